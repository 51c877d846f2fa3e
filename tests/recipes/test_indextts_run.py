"""The recipe with an extended vocabulary: stopped anywhere, it goes on anywhere; what is frozen is the base's to the bit."""

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.pool import Pools
from engine import catalog
from engine.export import export_model
from engine.format.record import decode_record
from recipes import indextts_amharic, prepare_amharic
from recipes.lib.indextts import PRESETS, TEXT_TABLES, IndexTTS
from tests.recipes import indextts

BASE = 300
EPOCHS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("amharic")
    assert prepare_amharic.main(["--output-dir", str(folder), "--preset", "tiny", "--max-samples", "60"]) == 0
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model's file: 300 pieces and one row more."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("base") / "gpt.safetensors"
    save_file(IndexTTS(replace(PRESETS["tiny"], text_vocab=BASE)).state_dict(), path)
    return path


def arguments(data: Path, base: Path, run: Path, **more: Any) -> list[str]:
    given = {"data_dir": data, "base_checkpoint": base, "output_dir": run, "engine": "ddp", "epochs": EPOCHS, "batch_size": 4, "grad_accumulation": 2}
    given |= {"save_interval": 2, "log_interval": 1, "val_interval": 1000, "warmup_steps": 3, **more}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def whole(data, base, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """A run of two ranks that nothing stops."""
    run, pools = tmp_path_factory.mktemp("whole") / "run", Pools()
    try:
        found = pools[2].run(indextts.run, arguments(data, base, run))
    finally:
        pools.close()
    assert not found[0]["error"], found[0]["error"]
    return run, found


def exported(run: Path, file: Path) -> dict[str, torch.Tensor]:
    export_model(run, "latest", file)
    return load_file(file)


def objects(run: Path) -> dict[str, Any]:
    """What the latest step has of members that are no models."""
    return decode_record(catalog.read_manifest(*catalog.find(run, "latest")).record)["objects"]


def test_a_run_on_other_ranks_with_other_batches_repeats_and_skips_nothing(pools: Pools, data, base, whole, tmp_path):
    """Stopped at a random step of the second epoch on two ranks, two steps later on one, and then on three to the end."""
    assert whole[1][0]["steps"] == 8
    stop = random.Random(20).randrange(5, 8)
    first = pools[2].run(indextts.run, arguments(data, base, tmp_path / "run"), stop)
    kept = stop - stop % 2  # the last save; what was seen after it is seen again
    second = pools[1].run(indextts.run, arguments(data, base, tmp_path / "run", resume="auto", batch_size=5, grad_accumulation=1, save_interval=1), 2)
    assert second[0]["error"] == "stopped", second[0]["error"]
    third = pools[3].run(indextts.run, arguments(data, base, tmp_path / "run", resume="auto", batch_size=2, grad_accumulation=1))
    assert not third[0]["error"], third[0]["error"]
    used = [*((rank, kept) for rank in first), (second[0], 2), *((rank, 1000) for rank in third)]
    seen = [name for rank, limit in used for steps, name in rank["seen"] if steps < limit]
    everything = sorted(name for rank in whole[1] for _, name in rank["seen"])
    assert len(set(everything)) * EPOCHS == len(everything)
    assert sorted(seen) == everything
    assert any("Successfully resumed" in line for line in third[0]["lines"])
    assert "[Info]    Recent checkpoints: 3" in third[0]["lines"], "those of the runs before it"
    assert "[Info] --batch_size is 2, was 5: the command line's counts" in third[0]["lines"]
    assert len(list((tmp_path / "run/logs").glob("run_*/events*"))) == 3, "TensorBoard has each start"


@pytest.mark.parametrize(
    ("engine", "more"),
    [("ddp", {}), ("ddp", {"amp": True, "amp_dtype": "float16"}), ("zero1", {}), ("zero2", {"amp": True}), ("zero3", {}), ("fsdp2", {"amp": True})],
    ids=["ddp", "ddp float16", "zero1", "zero2 bfloat16", "zero3", "fsdp2 bfloat16"],
)
def test_a_resume_on_as_many_ranks_is_as_if_nothing_had_stopped_it(pools: Pools, data, base, tmp_path, engine, more):
    whole = pools[2].run(indextts.run, arguments(data, base, tmp_path / "whole", engine=engine, **more))[0]
    assert not whole["error"], whole["error"]
    first = pools[2].run(indextts.run, arguments(data, base, tmp_path / "run", engine=engine, **more), 5)[0]
    again = pools[2].run(indextts.run, arguments(data, base, tmp_path / "run", engine=engine, resume="auto", **more))[0]
    assert not again["error"], again["error"]
    saved = next(i for i, line in enumerate(whole["losses"]) if " step 5 " in line)  # the last save was at step 4
    assert first["losses"][:saved] + again["losses"] == whole["losses"]
    scalers = [objects(tmp_path / run).get("scaler") for run in ("whole", "run")]
    assert scalers[0] == scalers[1]
    assert (scalers[0] is not None) == (more.get("amp_dtype") == "float16")
    assert scalers[0] is None or scalers[0]["_growth_tracker"] > 4, "it has counted the steps before the resume too"
    banners = [[line for line in told["lines"] if "Extended Vocab Fix" in line] for told in (whole, again)]
    assert len(banners[0]) == len(banners[1]) == 6, "on every start"
    state, given = exported(tmp_path / "run", tmp_path / "model.safetensors"), load_file(base)
    for name in TEXT_TABLES:
        kept = given[name][:BASE].bfloat16().float() if engine == "zero2" else given[name][:BASE]  # DeepSpeed has frozen weights in bfloat16 then
        assert torch.equal(state[name][:BASE].float(), kept), name
        assert not torch.equal(state[name][BASE:], given[name][BASE - 1 :][:1].expand_as(state[name][BASE:])), name
    losses = [float(line.split("val_loss ")[1]) for line in whole["losses"] if "val_loss" in line]
    assert losses[-1] < losses[0], "text that it was not trained on is predicted better"


def test_another_learning_rate_counts_from_the_resume_on(pools: Pools, data, base, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    same, other = (pools[2].run(indextts.run, arguments(data, base, run, resume="step:6", learning_rate=lr))[0] for lr in (5e-4, 5e-2))
    assert same["losses"] == whole[1][0]["losses"][-len(same["losses"]) :]
    assert "[Info] --learning_rate is 0.05, was 0.0005: the command line's counts" in other["lines"]
    assert other["losses"][0] == same["losses"][0], "before the first step with it"
    assert other["losses"][1:] != same["losses"][1:]


def test_frozen_rows_are_on_the_disk_once(pools: Pools, data, base, tmp_path):
    found = pools[2].run(indextts.run, arguments(data, base, tmp_path / "run"), frozen_bytes=0)[
        0
    ]  # the tiny model has too few for files of their own
    assert not found["error"], found["error"]
    files = list((tmp_path / "run").glob("step_*/frozen.*.safetensors"))
    assert len(list((tmp_path / "run").glob("step_*"))) == 3
    assert len({path.stat().st_ino for path in files}) * 3 == len(files) > 0
    state, given = exported(tmp_path / "run", tmp_path / "model.safetensors"), load_file(base)
    assert all(torch.equal(state[name][:BASE], given[name][:BASE]) for name in TEXT_TABLES)


def test_the_newest_is_damaged_and_the_one_before_serves(pools: Pools, data, base, whole, tmp_path):
    for name, line in (("rank_00000.0.safetensors", "IS DAMAGED and is passed over; going back to step_00000006"), ("manifest", "IS DAMAGED")):
        run = Path(shutil.copytree(whole[0], tmp_path / name))
        path = run / "step_00000008" / name
        path.write_bytes(path.read_bytes()[:-9] + b"something")
        found = pools[2].run(indextts.run, arguments(data, base, run, resume="auto"))[0]
        assert not found["error"], found["error"]
        assert any(line in told for told in found["lines"])
        assert found["losses"] == whole[1][0]["losses"][-len(found["losses"]) :]


def test_a_step_without_its_optimizer_is_named(pools: Pools, data, base, tmp_path):
    pools[1].run(indextts.save_weights, str(tmp_path / "run"))
    found = pools[1].run(indextts.run, arguments(data, base, tmp_path / "run", resume="auto"))[0]
    assert "Checkpoint missing required keys: ['optimizer', 'scheduler']" in found["error"]


def told(capsys, *argv: object) -> tuple[int, str]:
    capsys.readouterr()
    code = indextts_amharic.main([str(arg) for arg in argv])
    return code, capsys.readouterr().err


def test_what_is_refused(data, base, whole, tmp_path, capsys):
    given = arguments(data, base, tmp_path / "run")
    code, error = told(capsys, *given, "--resume", tmp_path / "gone")
    assert code != 0
    assert "there is no folder" in error
    code, error = told(capsys, *given, "--base_vocab_size=601")
    assert code != 0
    assert "fewer than the 601 of the base" in error
    code, error = told(capsys, *given, f"--base_tokenizer={data / 'tokenizers/amharic_extended_bpe.model'}")
    assert code != 0
    assert "the tokenizer does not extend its base: it has 600 pieces, the base 600" in error
    save_file({"other.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    code, error = told(capsys, *given, f"--base_checkpoint={tmp_path / 'other.safetensors'}")
    assert "Checkpoint missing required keys: ['text_embedding.weight']" in error
    code, error = told(capsys, *arguments(data, base, whole[0]))
    assert "would overwrite" in error
    code, error = told(capsys, *arguments(data, base, whole[0], resume="latest"), "--base_vocab_size=200")
    assert "--base_vocab_size is 200, the checkpoint has 300" in error
    pairs = (data / "train_pairs.jsonl").read_text().splitlines()
    broken = data / "broken_pairs.jsonl"
    broken.write_text("\n".join([pairs[0], pairs[1].replace(".npy", ".gone", 1)]))
    code, error = told(capsys, *given, f"--train_manifest={broken}")
    assert code != 0
    assert f"{broken}, line 2: " in error
