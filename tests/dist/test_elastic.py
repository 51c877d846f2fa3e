"""A job that its launcher starts anew: real ``torchrun --max-restarts``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.storage import LocalStorage
from engine.transfer.verify import verify
from tests.now import Checkpointer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("call", "at"), [("create", 9), ("rename", 2)], ids=["before its manifest", "before its rename"])
def test_an_orphan_of_the_first_incarnation_cannot_commit(tmp_path, call, at):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    # Without this torchrun starts a job anew on the store of the last one, and gloo may connect to ranks that are dead: pytorch#135712.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "LOCKSTEP_CALLS": str(tmp_path / "calls")}
    run, notes = tmp_path / "run", tmp_path / "notes"
    done = subprocess.run(
        [*command, "-m", "tests.dist.elastic", str(run), call, str(at)], capture_output=True, text=True, timeout=100, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().split() == [call] * at, "the orphan was stopped where it should be, and did nothing more of the kind"
    assert (notes / "orphan").read_text() == "T", "it was there while the second incarnation saved"
    assert {path.name: path.read_text() for path in notes.glob("resumed_*")} == {
        "resumed_0_0": "0",
        "resumed_0_1": "0",
        "resumed_1_0": "1",
        "resumed_1_1": "1",
    }
    assert sorted(path.name for path in run.iterdir() if "step" in path.name) == [f"step_{step:08d}" for step in (1, 2, 3, 4)]
    for step in (1, 2, 3, 4):
        assert verify(LocalStorage(run), f"step_{step:08d}") == []
        model = torch.nn.Linear(3, 3)
        Checkpointer(tmp_path / "other", model).resume(str(run / f"step_{step:08d}"))
        assert all(torch.equal(p, torch.full_like(p, step)) for p in model.parameters())
