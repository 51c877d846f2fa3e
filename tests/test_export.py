"""``engine export``: a model of a step as an ordinary file, equal to the live model bit for bit, whatever saved it; or an error, and no file."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from engine import Progress
from engine.cli import main
from engine.errors import CheckpointCorrupt, CheckpointNotFound, StorageError, UsageError
from engine.export import export_model
from engine.format.layout import REPLICATED, Absent, Flat, Grid, Mesh, Part
from engine.format.safetensors import decode_header
from engine_kernels import convert
from tests.dist import rows
from tests.kernels.test_modules import BASE, Model, train
from tests.now import Checkpointer
from tests.synthetic import with_fills, write_step
from tests.tiny import make

SUFFIXES = (".safetensors", ".pt")


def read(path) -> dict[str, torch.Tensor]:
    return load_file(path) if str(path).endswith(".safetensors") else torch.load(path, weights_only=True)


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, with the same dtypes and shapes."""
    assert found.keys() == expected.keys()
    raw = [(x.dtype, x.shape, x.reshape(-1).view(torch.uint8).tolist()) for state in (found, expected) for _, x in sorted(state.items())]
    return raw[: len(found)] == raw[len(found) :]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, nn.Module, nn.Module]:
    """A run of two models: a tied, partly frozen one that has been trained, and one with buffers."""
    model = convert(Model(tied=True), {"embed": BASE})
    train(model, 2)
    critic = make()
    run = tmp_path_factory.mktemp("saved") / "run"
    Checkpointer(run, generator=model, critic=critic).save(Progress(step=2, epoch=1))
    return run, model, critic[0]


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """The run, to be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".bin"])
def test_a_model_loads_its_export_by_the_stock_call(saved, tmp_path, suffix):
    run, _, critic = saved
    export_model(run, "latest", tmp_path / f"critic{suffix}", member="critic")
    found = read(tmp_path / f"critic{suffix}")
    assert equal(found, critic.state_dict()), "with its buffers"
    make(seed=1)[0].load_state_dict(found)


def test_tied_partly_frozen_weights_are_whole_and_once(saved, tmp_path):
    run, model, _ = saved
    for suffix in SUFFIXES:
        assert export_model(run, "epoch:1", tmp_path / f"model{suffix}", member="generator").tensors == 4
    state, whole = read(tmp_path / "model.pt"), Model(tied=True)
    assert equal(state, model.state_dict())
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
    whole.load_state_dict(state)
    assert equal(whole.state_dict(), model.state_dict())

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
        assert "head.weight" not in file.keys()  # noqa: SIM118 - safe_open is no mapping
    other = Model(tied=True)
    with torch.no_grad():
        other.embed.weight.zero_()
    assert load_model(other, tmp_path / "model.safetensors") == (set(), [])
    assert equal(other.state_dict(), model.state_dict())


def save_and_gather(run: str, engine: str, dtype: str) -> dict[str, torch.Tensor]:
    """A job: what the ranks hold of a model whose weights are split, gathered by their live views."""
    with rows._built(engine, True, 0, dtype, rows.ROWS) as (member, step):
        step(0)
        checkpointer = Checkpointer(run, member)
        checkpointer.save(Progress(step=1))
        names = [shard.name for shard in checkpointer._members.model_shards() if shard.name.startswith("model.")]
        found = {name.removeprefix("model."): rows._whole(checkpointer, name) for name in names}
        dist.barrier()
        return found


@pytest.mark.parametrize(("engine", "dtype"), [("fsdp2", "fp32"), ("zero2", "bf16"), ("zero3", "fp32")])
def test_what_ranks_have_saved_in_pieces_is_whole(pools, tmp_path, engine, dtype):
    live = pools[2].run(save_and_gather, str(tmp_path / "run"), engine, dtype)[0]
    for suffix in SUFFIXES:
        export_model(tmp_path / "run", "latest", tmp_path / f"model{suffix}")
        found = read(tmp_path / f"model{suffix}")
        assert {x.dtype for x in found.values()} == {torch.float32}, "masters, and frozen rows of bf16 widened"
        assert equal({name: x.double() for name, x in found.items()}, live)
    rows.Whole(1).load_state_dict(found)


PARTS = {
    "model.flat": (Part(Absent(), (0, 0), (2, 5)), Part(Flat(Mesh((2,)), 3, 14), (2, 0), (5, 5), "BF16")),
    "model.grid": (Part(Grid(Mesh((2, 2)), (REPLICATED, 1))),),
    "model.fill": (Part(Absent(1.5), (0,), (3,)), Part(Grid(Mesh((2,)), (REPLICATED,)), (3,), (6,))),
}
VALUES = {
    "model.flat": torch.randn(7, 5),
    "model.grid": torch.randn(3, 7, 2, dtype=torch.float64),
    "model.fill": torch.arange(9.0).bfloat16(),
    "model.empty": torch.ones(3, 0, dtype=torch.float16),
    "model.flags": torch.tensor([True, False, True]),
    "model.eight": torch.arange(9.0).to(torch.float8_e4m3fn),
    "model.wave": torch.randn(4, dtype=torch.complex64),
    "buffers.count": torch.tensor(7),
    "optim.state.flat.exp_avg": torch.ones(7, 5),
}


@pytest.mark.parametrize("window", [1 << 20, 4])
def test_layouts_absent_ranges_and_dtypes(tmp_path, monkeypatch, window):
    monkeypatch.setattr("engine.export.WINDOW_ELEMENTS", window)
    write_step(tmp_path / "run", VALUES, PARTS)
    expected = {name.split(".", 1)[1]: with_fills(x, PARTS.get(name, ())) for name, x in VALUES.items() if not name.startswith("optim")}
    for suffix in SUFFIXES:
        export_model(tmp_path / "run", "latest", tmp_path / f"model{suffix}")
        assert equal(read(tmp_path / f"model{suffix}"), expected)


def test_a_type_that_safetensors_has_not_goes_to_a_pt_file(tmp_path):
    values = {"model.wide": torch.randn(5, 2, dtype=torch.complex128), "model.scale": torch.arange(1.0, 4.0).to(torch.float8_e8m0fnu)}
    write_step(tmp_path / "run", values)
    with pytest.raises(UsageError, match=r"wide is of C128, for which safetensors has no type .*export to a \.pt file"):
        export_model(tmp_path / "run", "latest", tmp_path / "model.safetensors")
    export_model(tmp_path / "run", "latest", tmp_path / "model.pt")
    assert equal(read(tmp_path / "model.pt"), {name.removeprefix("model."): x for name, x in values.items()})
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "run"]


def test_the_file_is_the_same_whatever_laid_the_tensors_out(tmp_path):
    del (values := dict(VALUES))["model.flat"], values["model.fill"]
    write_step(tmp_path / "a", values, {"model.grid": PARTS["model.grid"]})
    write_step(tmp_path / "b", dict(reversed(values.items())), step=5)
    for suffix in SUFFIXES:
        for run in ("a", "b"):
            export_model(tmp_path / run, "latest", tmp_path / f"{run}{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


# ---------------------------------------------------------------- or nothing


def flip(step: Path, tensor: str) -> None:
    """A byte of a tensor, in whichever shard has it."""
    for path in step.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        size = 8 + int.from_bytes(data[:8], "little")
        for entry in decode_header(bytes(data[:size]), ""):
            if entry.name == tensor:
                data[size + entry.offset + 1] ^= 1
                path.write_bytes(data)
                return
    raise AssertionError(f"{tensor} is in no shard")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_changed_byte_is_an_error_and_leaves_no_file(copy, tmp_path, suffix):
    flip(copy / "step_00000002", "generator.model.inner.weight")
    target = tmp_path / f"model{suffix}"
    for old in (None, b"an older export"):
        if old is not None:
            target.write_bytes(old)
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(CheckpointCorrupt, match=r"written by rank 0: bytes .* of generator\.model\.inner\.weight, have changed"):
            export_model(copy, "latest", target, member="generator", overwrite=True)
        assert sorted(os.listdir(tmp_path)) == before
    assert target.read_bytes() == b"an older export"
    export_model(copy, "latest", target, member="critic", overwrite=True)  # which is sound


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_no_file(tmp_path, suffix):
    """Met in the middle of a tensor."""
    write_step(tmp_path / "run", {"model.a": torch.randn(100_000), "model.b": torch.randn(100_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
        with pytest.raises(StorageError, match=r"cannot write .*: File too large; nothing of it is left"):
            export_model(tmp_path / "run", "latest", tmp_path / f"model{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("model.onnx", {}, r"Its name should end in \.safetensors, or in \.pt, \.pth, \.bin for torch\.load"),
        ("none/model.pt", {}, r"none is not a folder; make it"),
        ("copy/step_00000002/model.pt", {}, r"step_00000002 is a checkpoint, which holds nothing but its own files"),
        ("taken.pt", {}, r"taken\.pt is there already; .*overwrite"),
        ("folder.pt", {"overwrite": True}, r"folder\.pt is there already; give another name$"),
        ("model.pt", {"member": None}, r"has these models: '\w+', '\w+'; which one is not said\. Name one by --member"),
        ("model.pt", {"member": "optim"}, r"has these models: .*; none is called 'optim'"),
    ],
)
def test_what_cannot_be_exported(copy, tmp_path, file, options, message):
    (tmp_path / "taken.pt").write_bytes(b"mine")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(UsageError, match=message):
        export_model(copy, "latest", tmp_path / file, **{"member": "critic", **options})
    assert sorted(os.listdir(tmp_path)) == ["copy", "folder.pt", "taken.pt"]
    assert (tmp_path / "taken.pt").read_bytes() == b"mine"


def test_a_step_that_is_not_there(saved, tmp_path):
    with pytest.raises(CheckpointNotFound, match="there is no step 7"):
        export_model(saved[0], "step:7", tmp_path / "model.pt")


# ---------------------------------------------------------------- the command


def test_the_command_tells_what_it_wrote(saved, tmp_path, capsys):
    run, model, _ = saved
    file = tmp_path / "model.pt"
    arguments = ["export", f"{run}@2", str(file), "--member", "generator"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{file}: 4 tensors of {run}/step_00000002, ")
    assert equal(read(file), model.state_dict())
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_safetensors_are_streamed_and_need_no_torch(tmp_path):
    """A model of 96 MB, in two tensors that two ranks have in columns; the process takes a fraction of it."""
    columns = (Part(Grid(Mesh((2,)), (1,))),)
    values = {f"model.{name}": torch.randn(3000, 4000) for name in "ab"}
    write_step(tmp_path / "run", values, dict.fromkeys(values, columns))
    code = (
        "import re, sys, numpy; from engine.cli import main;"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]);"
        f"before = peak(); main(['export', {str(tmp_path / 'run')!r}, {str(tmp_path / 'model.safetensors')!r}]);"
        "print('torch' in sys.modules, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    has_torch, more_kib = done.stdout.split()[-2:]
    print(more_kib)
    assert has_torch == "False"
    assert int(more_kib) < 40_000
    assert torch.equal(load_file(tmp_path / "model.safetensors")["b"], values["model.b"])


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.a(x)))


def lora(**options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(Tower(), LoraConfig(target_modules=["a"], r=2, **options))  # type: ignore[arg-type]


def two_adapters():
    from peft import LoraConfig

    model = lora()
    model.add_adapter("second", LoraConfig(target_modules=["a"], r=3))
    return model


@pytest.mark.parametrize(
    "make_model",
    [lora, lambda: lora(modules_to_save=["head"]), two_adapters, lambda: nn.Sequential(lora(), nn.Linear(4, 4)), lambda: torch.compile(lora())],
    ids=["one", "with a saved module", "two", "below the top level", "compiled"],
)
def test_an_adapted_model_has_pefts_own_keys(tmp_path, make_model):
    """The checkpoint's names are the base model's, so that either loads the other's; a file is for PEFT to load."""
    model = make_model()
    Checkpointer(tmp_path / "run", model).save(Progress(step=1))
    export_model(tmp_path / "run", "latest", tmp_path / "model.safetensors")
    expected = {key.removeprefix("_orig_mod."): value for key, value in model.state_dict().items()}
    assert equal(load_file(tmp_path / "model.safetensors"), expected)


def test_keys_that_are_no_texts_are_damage(tmp_path):
    write_step(tmp_path, {"model.a": torch.zeros(2)}, step=1, record={"models": {"": {"keys": {"a": 3}}}})
    with pytest.raises(CheckpointCorrupt, match="not as this version writes it"):
        export_model(tmp_path, "latest", tmp_path / "model.safetensors")
