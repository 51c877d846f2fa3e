"""What nobody trains lies in files of its own, linked from step to step only while its content stays the same."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import Progress
from engine.errors import CheckpointCorrupt
from engine.storage import LocalStorage
from engine.transfer.verify import verify
from tests.now import Checkpointer


class Adapted(nn.Module):
    """A frozen base, and what is trained on top of it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(64, 64).requires_grad_(False)
        self.more = nn.Linear(64, 64).requires_grad_(False)
        self.adapter = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapter(self.more(self.base(x)))


class Run:
    def __init__(self, folder: Path, seed: int = 0, **members: nn.Module) -> None:
        self.model = Adapted(seed)
        self.optimizer = torch.optim.AdamW(self.model.adapter.parameters(), lr=0.1)
        self.checkpointer = Checkpointer(folder, (self.model, self.optimizer), **members)
        self.folder, self.number = folder, 0

    def save(self) -> Path:
        self.model(torch.randn(4, 64)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1
        return Path(self.checkpointer.save(Progress(step=self.number)))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr("engine.plan.assign.FROZEN_BYTES", 1)


def frozen(step: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in step.glob("frozen.*")}


def sound(step: Path) -> bool:
    return verify(LocalStorage(step.parent), step.name) == []


def loads(step: Path, model: nn.Module) -> bool:
    other = Adapted(9)
    Checkpointer(step.parent, (other, torch.optim.AdamW(other.adapter.parameters()))).resume(str(step))
    return all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_frozen_weights_are_written_once_and_every_step_is_complete_in_itself(tmp_path):
    run = Run(tmp_path / "run")
    steps = [run.save() for _ in range(4)]
    assert len({tuple(frozen(step).items()) for step in steps}) == 1
    assert len(frozen(steps[0])) == 2, "a file and its index"
    names = {path.name for path in steps[3].glob("rank_*")}
    assert sum((steps[3] / name).stat().st_size for name in names) < sum(path.stat().st_size for path in steps[3].glob("frozen.*"))
    shutil.copytree(steps[3], tmp_path / "elsewhere/step_00000004")
    for step in steps[:3]:
        shutil.rmtree(step)
    assert sound(steps[3])
    assert loads(steps[3], run.model)
    shutil.rmtree(steps[3])
    assert loads(tmp_path / "elsewhere/step_00000004", run.model)


def test_a_copy_that_is_changed_behind_autograds_back_is_saved_as_it_is(tmp_path):
    """An EMA: no gradient, and `.data` bumps no version. It is found out by its content, and kept apart from then on."""
    average = nn.Linear(32, 32).requires_grad_(False)
    run, seen = Run(tmp_path, ema=average), []
    for _ in range(5):
        average.weight.data = average.weight.data * 0.5
        step = run.save()
        seen.append(frozen(step))
        other = nn.Linear(32, 32).requires_grad_(False)
        Run(tmp_path, 1, ema=other).checkpointer.resume(str(step))
        assert torch.equal(other.weight, average.weight)
        assert sound(step)
    assert seen[0].keys() != seen[1].keys(), "written anew, as it had changed"
    assert seen[3] == seen[4], "what did not change is linked again"


def test_a_tensor_that_is_trained_from_now_on_or_no_longer(tmp_path):
    run = Run(tmp_path)
    before = frozen(run.save())
    run.optimizer.add_param_group({"params": list(run.model.more.requires_grad_(True).parameters())})
    middle = run.save()
    after = run.save()
    assert before.keys() != frozen(middle).keys()
    assert frozen(middle) == frozen(after)
    assert sound(after)
    other = Adapted(9)
    other.more.requires_grad_(True)
    optimizer = torch.optim.AdamW([*other.adapter.parameters(), *other.more.parameters()])
    Checkpointer(tmp_path, (other, optimizer)).resume()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), run.model.parameters(), strict=True))


def test_a_resumed_run_goes_on_linking(tmp_path):
    first = frozen(Run(tmp_path).save())
    again = Run(tmp_path, seed=3)
    again.number = again.checkpointer.resume().step
    assert frozen(again.save()) == first


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EMLINK, errno.EPERM])
def test_storage_without_links_gets_copies(tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    run = Run(tmp_path)
    first, second = run.save(), run.save()
    assert frozen(first).keys() == frozen(second).keys()
    assert not set(frozen(first).values()) & set(frozen(second).values())
    assert loads(second, run.model)


def test_a_bad_shared_file_is_told_for_every_step_that_has_it_and_written_anew_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.writer.REWRITE_AFTER", 2)
    run = Run(tmp_path)
    steps = [run.save() for _ in range(3)]
    (shared,) = steps[0].glob("frozen.*.safetensors")
    data = bytearray(shared.read_bytes())
    data[-1] ^= 1
    with open(shared, "r+b") as file:
        file.write(data)
    (problem,) = verify(LocalStorage(tmp_path), steps[2].name)
    assert problem.shared_with == (steps[0].name, steps[1].name)
    with pytest.raises(CheckpointCorrupt, match="has changed"):
        run.checkpointer.resume()
    healed = run_on(tmp_path, steps[2])
    assert sound(healed), "after so many links it is written anew"


def run_on(folder: Path, after: Path) -> Path:
    """A run whose memory is sound saves on."""
    run = Run(folder)
    run.number = 3
    run.checkpointer._saves.committed = after.name
    run.checkpointer._saves._scribe._links.update({path.name: 2 for path in after.glob("frozen.*")})
    return run.save()


def test_a_linked_file_is_never_opened_for_writing(tmp_path):
    run = Run(tmp_path)
    first = run.save()
    for path in first.glob("frozen.*"):
        path.chmod(0o400)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in first.glob("frozen.*")}
    run.save()
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in first.glob("frozen.*")} == before
