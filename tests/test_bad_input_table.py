"""The table of bad input in the README: every row's message is produced here, and every case here has its row."""

import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.pool import Pools
from engine import ElasticSampler, Progress
from engine_kernels import convert
from tests import tiny
from tests.dist import jobs, rows
from tests.dist.test_replicas import resume_own, save_own, train_past_the_wrapper
from tests.now import Checkpointer

README = Path(__file__).resolve().parents[1] / "README.md"
SHARD = "rank_00000.0.safetensors"


def table() -> dict[str, str]:
    """Case → message, as the README has them."""
    text = README.read_text(encoding="utf-8")
    section = text[text.index("## When something is wrong") : text.index("## Read on")]
    return dict(re.findall(r"^\| ([^|]+?) \| `(.+)` \|$", section, re.MULTILINE))


@pytest.fixture
def run(tmp_path) -> Path:
    return tiny.save(tmp_path / "run").parent


def change(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def resumed(run: Path, model=None, what: str = "latest", names="tolerate", **options) -> str:
    return jobs.told(lambda: Checkpointer(run, model or tiny.make(1), names=names).resume(what, **options))


def step_folder(run: Path) -> Path:
    return run / "step_00000001"


def _invalid_name(run):
    (run / "step_7").mkdir()
    return resumed(run, names="refuse")


def _flipped(run):
    change(step_folder(run) / SHARD)
    return resumed(run)


def _truncated(run):
    path = step_folder(run) / SHARD
    path.write_bytes(path.read_bytes()[:-1])
    return resumed(run)


def _missing(run):
    (step_folder(run) / "rank_00000.index").unlink()
    return resumed(run)


def _manifest(run):
    change(step_folder(run) / "manifest")
    return resumed(run)


def _passed_over(run, caplog):
    checkpointer = Checkpointer(run, tiny.make(0))
    checkpointer.resume()
    checkpointer.save(Progress(step=2))
    change(run / "step_00000002" / SHARD)
    with caplog.at_level(logging.WARNING, "engine"):
        assert resumed(run) == ""
    return next(record.getMessage() for record in caplog.records if "DAMAGED" in record.getMessage())


def _other_data(run):
    Checkpointer(run, nn.Linear(2, 2), data=ElasticSampler(range(16), 4)).save(Progress(step=2))
    return jobs.told(lambda: Checkpointer(run, nn.Linear(2, 2), data=ElasticSampler(range(17), 4)).resume())


def _half_loaded(run):
    change(step_folder(run) / SHARD)
    checkpointer = Checkpointer(run, tiny.make(1))
    assert jobs.told(checkpointer.resume)
    return jobs.told(lambda: checkpointer.save(Progress(step=2)))


def _full(run, monkeypatch):
    def write(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    return jobs.told(lambda: Checkpointer(run, tiny.make(0)).save(Progress(step=2)))


def _replaced(run):
    module, optimizer = tiny.make(1)
    checkpointer = Checkpointer(run, (module, optimizer))
    module[0].weight = nn.Parameter(torch.zeros_like(module[0].weight))
    return jobs.told(lambda: checkpointer.save(Progress(step=2)))


class Projected(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        self.state[self.param_groups[0]["params"][0]]["projector"] = object()


def _odd_state(run):
    module = tiny.make(1)[0]
    return jobs.told(lambda: Checkpointer(run, tiny.train_with(module, Projected(module.parameters(), lr=0.1))))


class Average:
    """Forgets its decay when it is loaded."""

    def __init__(self, decay):
        self.decay = decay

    def state_dict(self):
        return {"decay": self.decay}

    def load_state_dict(self, state):
        pass


def _not_back(run):
    Checkpointer(run, tiny.make(0), ema=Average(0.9)).save(Progress(step=2))
    return jobs.told(lambda: Checkpointer(run, tiny.make(1), ema=Average(0.5)).resume())


def _scaler(run):
    def scaler(enabled):
        return torch.amp.GradScaler("cpu", enabled=enabled)

    Checkpointer(run, tiny.make(0), scaler=scaler(False)).save(Progress(step=2))
    return jobs.told(lambda: Checkpointer(run, tiny.make(1), scaler=scaler(True)).resume())


def _meta(run):
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 3))
    return jobs.told(lambda: Checkpointer(run, module))


def _no_monitor(run):
    return jobs.told(lambda: Checkpointer(run, tiny.make(0), monitor="val_loss").save(Progress(step=2), metrics={"loss": 1.0}))


def _stale(run):
    model = rows.Whole(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, {"embed": 11})
    return jobs.told(optimizer.step)


def _unmonitored(run):
    return resumed(run, what="best")


ALONE = {
    "the run folder is not there": lambda run: resumed(run.parent / "rnu"),
    "the run has no checkpoint": lambda run: resumed(Path(shutil.copytree(run, run.parent / "empty", ignore=lambda *_: ["step_00000001"]))),
    "that step or epoch is not there": lambda run: resumed(run, what="epoch:50"),
    "`best`, but nothing was monitored": _unmonitored,
    "a folder with an invalid name, where names are refused": _invalid_name,
    "a byte of a shard has changed": _flipped,
    "a shard is truncated": _truncated,
    "a file is missing": _missing,
    "the manifest has changed": _manifest,
    "other shapes or names": lambda run: resumed(run, tiny.make(1, width=5)),
    "another optimizer": lambda run: resumed(run, tiny.make(1, optimizer=torch.optim.RMSprop)),
    "another dtype": lambda run: resumed(run, tiny.make(1, dtype=torch.float64)),
    "another data set or seed": _other_data,
    "a save after a load that failed": _half_loaded,
    "parameters replaced after the start": _replaced,
    "state that no checkpoint holds": _odd_state,
    "state that did not come back": _not_back,
    "a grad scaler that was disabled": _scaler,
    "a model on the meta device": _meta,
    "the monitored metric is not given": _no_monitor,
    "more frozen rows than there are": lambda run: jobs.told(lambda: convert(rows.Whole(0), {"embed": 24})),
    "an optimizer older than the conversion": _stale,
    "an object of no known kind": lambda run: jobs.told(lambda: Checkpointer(run, model=object())),
}


def covers(message: str, found: str) -> bool:
    """``…`` in the README's message stands for anything."""
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
    return re.search(pattern, found, re.DOTALL) is not None


@pytest.mark.parametrize("case", ALONE)
def test_a_case_on_one_process(run, case):
    found = ALONE[case](run)
    assert covers(table()[case], found), f"the README says {table()[case]!r}, found {found!r}"


def test_the_newest_step_is_damaged(run, caplog):
    assert covers(table()["the newest step is damaged"], _passed_over(run, caplog))


def test_a_full_disk(run, monkeypatch):
    assert covers(table()["the disk is full"], _full(run, monkeypatch))


def test_cases_on_several_ranks(pools: Pools, tmp_path):
    run = str(tmp_path / "a")
    pools[1].run(rows.save, run, "ddp", False)
    fewer = pools[1].run(rows.load, run, "ddp", False, rows=rows.ROWS - 5, extend_rows={"*": "keep"})[0]["error"]
    assert covers(table()["fewer rows than the checkpoint"], fewer)

    drift = pools[2].run(train_past_the_wrapper, str(tmp_path / "b"), "all", False)
    assert all(covers(table()["replicas have drifted apart"], found) for found in drift)

    steps = pools[2].run(jobs.disagree, str(tmp_path / "c"))
    assert all(covers(table()["ranks at different steps"], found["steps"]) for found in steps)
    assert all(covers(table()["ranks with different models"], found["shapes"]) for found in steps)

    pools[2].run(save_own, str(tmp_path / "d"))
    assert all(covers(table()["a per-rank state on another number of ranks"], found) for found, _ in pools[3].run(resume_own, str(tmp_path / "d")))

    found = pools[1].run(jobs.resume_inside_accumulation, "zero1", str(tmp_path / "e"))[0]
    assert covers(table()["a resume inside gradient accumulation"], found)

    found = pools[2].run(jobs.save_with_a_failing_rank, str(tmp_path / "f"), 1, "create")
    assert all(covers(table()["one rank fails"], rank["error"]) for rank in found)


def test_every_row_of_the_table_is_produced():
    several = {
        "fewer rows than the checkpoint",
        "replicas have drifted apart",
        "ranks at different steps",
        "ranks with different models",
        "a per-rank state on another number of ranks",
        "a resume inside gradient accumulation",
        "one rank fails",
    }
    assert table().keys() == ALONE.keys() | several | {"the newest step is damaged", "the disk is full"}
