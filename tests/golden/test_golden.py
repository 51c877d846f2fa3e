"""A checkpoint of each format stays readable: by verify, by a resume on one rank, and by a reader written from the specification."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.format.manifest import RankIndex, encode_index, encode_manifest, open_index, read_manifest, read_page
from engine.plan.order import reading_order
from engine.storage import LocalStorage
from engine.transfer.verify import verify
from tests.golden import make, reader
from tests.layouts import Bytes, tensors
from tests.now import Checkpointer
from tests.synthetic import unsynced, with_fills, write_step

RUNS = sorted(make.HERE.glob("format_*"))
STEP = "step_00000002"
EACH = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)


def test_there_is_one_of_this_format():
    assert make.RUN in RUNS, "python -m tests.golden.make"


@EACH
def test_it_is_small_and_sound(run):
    assert sum(path.stat().st_size for path in (run / STEP).iterdir()) < 60_000
    assert verify(LocalStorage(run), STEP) == []


@EACH
def test_a_reader_written_from_the_specification_finds_every_tensor(run):
    expected = json.loads((run / make.EXPECTED).read_text())
    summary, record, found = reader.read(run / STEP)
    assert (summary["step"], summary["epoch"], summary["world_size"], summary["best_step"]) == (2, 1, 2, 2)
    assert record["progress"].items() >= expected["progress"].items()
    assert record["config"] == expected["config"]
    assert found.keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert list(found[name].shape) == tensor["shape"], name
        assert found[name].tobytes().hex() == tensor["hex"], name


def test_that_reader_has_nothing_of_ours():
    tree = ast.parse(Path(reader.__file__).read_text())
    names = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)}
    assert not any(name.startswith(("engine", "torch", "tests")) for name in names)


@given(st.data())
@settings(max_examples=50)
def test_that_reader_understands_every_layout(tmp_path_factory, data):
    """So does the specification."""
    drawn = {f"t{i}": data.draw(tensors()) for i in range(2)}
    values = {n: torch.arange(1.0, t.size_bytes // 4 + 1).reshape(t.shape) for n, t in drawn.items()}
    with unsynced():
        step = write_step(tmp_path_factory.mktemp("run"), values, {name: tensor.parts for name, tensor in drawn.items()})
    _, _, found = reader.read(step)
    for name, tensor in drawn.items():
        assert np.array_equal(found[name], with_fills(values[name], tensor.parts).numpy())


@EACH
def test_it_resumes_on_one_rank_under_no_engine(run):
    expected = json.loads((run / make.EXPECTED).read_text())
    torch.manual_seed(9)
    generator, critic, average, data = make.Generator(torch.nn.Embedding(make.ROWS, make.WIDTH)), make.Critic(), make.Average(), make.sampler()
    members = {"generator": generator, "critic": critic}
    optimizers = {name: torch.optim.AdamW(module.parameters(), lr=1.0) for name, module in members.items()}
    pairs = {name: (members[name], optimizers[name]) for name in members}
    progress = Checkpointer(run, read_only=True, average=average, data=data, **pairs).resume()
    assert (progress.epoch, progress.step, progress.samples, progress.metrics) == (1, 2, 8, {"val_loss": 0.25})
    found = {"average.shadow": average.state["shadow"], "generator.buffers.scale": generator.scale}
    for name, module in members.items():
        assert optimizers[name].param_groups[0]["lr"] == make.LR[name]
        for fqn, parameter in module.named_parameters():
            found[f"{name}.model.{fqn}"] = parameter.detach()
            found |= {f"{name}.optim.state.{fqn}.{key}": value for key, value in optimizers[name].state[parameter].items()}
    assert found.keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        value = found[name].contiguous()
        assert list(value.shape) == tensor["shape"], name
        assert value.reshape(-1).view(torch.uint8).numpy().tobytes().hex() == tensor["hex"], name
    assert average.state["updates"] == 2


def test_todays_encoder_gives_the_same_bytes():
    """If this fails the format has changed: give it the next number, and keep these files."""
    step = make.RUN / STEP
    data = (step / "manifest").read_bytes()
    manifest, _ = read_manifest(Bytes(data), "manifest")
    assert encode_manifest(manifest) == data
    order, classes = reading_order(manifest.tensors, manifest.summary.world_size)
    assert order == list(range(len(order)))
    for rank, entry in enumerate(manifest.indexes):
        data = (step / manifest.index_name(rank)).read_bytes()
        head, sealed = open_index(Bytes(data), "index")
        chunks = tuple(chunk for page in head.pages for chunk in read_page(sealed, page, "index"))
        made, found = encode_index(RankIndex(head.rank, head.files, chunks, sealed.page(head.record)), classes)
        assert (made, found.size_bytes, found.digest) == (data, entry.size_bytes, entry.digest)
    assert any(entry.name for entry in manifest.indexes), "with something that does not change"
