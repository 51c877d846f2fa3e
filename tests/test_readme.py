"""The loop in the README runs as printed, and resumes."""

import contextlib
import itertools
import json
import re
import shutil
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def block(number: int) -> str:
    return re.findall(r"runs this block -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[number]


def loop() -> str:
    return block(0)


def run(seed: int, stop_after: int | None = None) -> dict:
    """Execute the block; ``stop_after`` so many batches it ends as if killed."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    names = {"dataset": torch.arange(320.0).view(80, 4) / 320, "model": model, "optimizer": optimizer, "scheduler": scheduler}
    if stop_after is not None:
        batches = itertools.count()

        def stop(*args) -> None:
            if next(batches) == stop_after:
                raise KeyboardInterrupt

        model.register_forward_pre_hook(stop)
    with contextlib.suppress(KeyboardInterrupt):
        exec(loop(), names)
    names["ckpt"].close()  # as the end of the process would
    return names


def test_the_readmes_loop_runs_and_resumes_bit_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = run(seed=0)
    shutil.rmtree("runs")
    stopped = run(seed=0, stop_after=3)  # two batches an epoch: in the middle of the second
    assert stopped["progress"].step == 3
    resumed = run(seed=1)
    assert resumed["progress"].step == whole["progress"].step == 6
    assert torch.equal(resumed["model"].weight, whole["model"].weight)


def test_the_loop_is_short():
    assert len([line for line in loop().splitlines() if line.strip()]) <= 16


def test_the_readmes_vocabulary_is_frozen():
    model = torch.nn.ModuleDict({"text_embedding": torch.nn.Embedding(24000, 4), "text_head": torch.nn.Linear(4, 24000)})
    names = {"torch": torch, "model": model, "ids": torch.randint(24000, (2, 5))}
    exec(block(1), names)
    names["loss"].backward()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.grad is not None}
    assert shapes == {"text_embedding.trainable": (12000, 4), "text_head.trainable": (12000, 4), "text_head.trainable_bias": (12000,)}


def figures(name: str) -> dict[str, float]:
    return json.loads((README.parent / f"benchmarks/results/{name}.json").read_text())["figures"]


def test_the_figures_are_those_of_the_committed_results():
    matrix, tiny, memory, scale = figures("matrix"), figures("tiny_tensors"), figures("memory"), figures("scale")
    stall, incremental, reshard = figures("stall"), figures("incremental"), figures("reshard")
    tiny_steps, interference = figures("stall_tiny"), figures("interference")
    zoo, fuzz, sampler, attach = figures("state_zoo"), figures("state_fuzz"), figures("sampler"), figures("attach")
    throughput, crash, frozen = figures("throughput"), figures("crash"), figures("frozen_vocab")
    phrases = [
        f"{matrix['cells_state_bitwise']} of {matrix['cells']} cells bit-equal, {matrix['cells_refused']} refused as they must be, "
        f"{matrix['cells_unexpected']} unexpected",
        f"saved {tiny['save_ratio_dcp']:.1f}× and loaded {tiny['load_ratio_dcp']:.1f}× as fast as with DCP's FileSystemWriter and Reader; "
        f"{tiny['disk_over_payload_tiny']:.2f} bytes on disk a byte of payload",
        f"of a save {memory['peak_save_over_shard']:.2f} × the rank's shard, of a load {memory['peak_load_over_run']:.2f} × the longest run it reads",
        f"wait {stall['blocked_over_memcpy']:.2f} × one copy of the state, "
        f"{stall['blocked_over_dcp_thread']:.2f} × what DCP's asynchronous save takes",
        f"is {tiny_steps['tiny_worst_step_ms']:.0f} ms longer than without saves (DCP's asynchronous save: "
        f"{tiny_steps['tiny_worst_step_ms_dcp']:.0f} ms); saving every 50 steps of 0.1 s leaves {interference['steps_ratio']:.2f} of the speed",
        f"saved {throughput['save_over_raw']:.2f} × and loaded {throughput['load_over_raw']:.2f} × as fast as plain system calls do the same bytes, "
        f"checksums included; loaded {throughput['load_over_dcp']:.1f} × as fast as with DCP",
        f"{crash['kills']:,} ranks and writers killed at random instants: {crash['torn_visible']} torn checkpoints to be seen, "
        f"{crash['committed_lost']} committed ones lost",
        f"takes {sampler['bytes_per_sample']:.1f} bytes a sample; the first batch after a resume in mid-epoch comes in "
        f"{sampler['seek_seconds']:.1f} s (DistributedSampler, skipped through: {sampler['bytes_per_sample_distributed']:.1f} bytes and "
        f"{sampler['seek_seconds_distributed']:.1f} s; torchdata's StatefulDataLoader: {sampler['bytes_per_sample_stateful']:.1f} bytes and "
        f"{sampler['seek_seconds_stateful']:.1f} s)",
        f"of 10,000 small parameters take {attach['single_10000_over_reference']:.3f} × what `dcp.save` of the same state takes",
        f"Of {zoo['tried']} optimizers, schedulers, scalers, samplers, averages, metrics, observers and modules {zoo['exact']} are exact, "
        f"{zoo['refused_at_attach']} refused at attach, {zoo['reported']} reported, {zoo['wrong']} wrong; of {fuzz['seeds']} random programs "
        f"{fuzz['different']} differ after a resume",
        f"a later save of an adapter run writes {incremental['later_bytes_over_trainable']:.3f} × what is trained",
        f"takes {frozen['flops_over_hook']:.3f} of the head's operations that it takes with a gradient hook, "
        f"{frozen['optimizer_bytes_over_hook']:.2f} of the optimizer's state, and {frozen['peak_1024_over_hook']:.2f} of the peak memory at "
        f"1,024 tokens, {frozen['peak_4096_over_hook']:.2f} at 4,096; the hook's frozen rows drift, these do not",
        f"at most {reshard['worst_read_amplification']:.3f} × the bytes needed",
        f"a first plan takes a rank {scale['plan_seconds_4096']:.1f} s, the root manifest has {scale['root_mb_4096']:.1f} MB, a commit takes rank 0 "
        f"{scale['rank0_seconds_4096']:.1f} s, and a load on half as many ranks reads {scale['index_bytes_over_needed']:.2f} × the index bytes "
        "it needs",
    ]
    for phrase in phrases:
        assert phrase in README.read_text(encoding="utf-8"), f"the README should say: {phrase}"


def test_the_page_on_extended_vocabularies_has_the_committed_figures():
    frozen, page = figures("frozen_vocab"), (README.parent / "docs/extended-vocabulary.md").read_text(encoding="utf-8")
    rows = [("`convert`", "", "frozen_drift"), ("PEFT's trainable tokens", "peft_", "peft_drift")]
    rows.append(("the hook under `torch.compile`", "compiled_", "compiled_drift"))
    assert f"| gradient hook | 1 | 1 | 1 | 1 | {frozen['hook_drift']:.1e} |" in page
    for row, prefix, drift in rows:
        ratios = [frozen[f"{prefix}{what}_{tokens}_over_hook"] for what in ("peak", "seconds") for tokens in (1024, 4096)]
        assert f"| {row} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + f" | {frozen[drift]:.1e} |" in page
