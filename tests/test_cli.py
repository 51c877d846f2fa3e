"""The ``engine`` command."""

import subprocess
import sys

import torch

from engine import Checkpointer, Progress
from engine.cli import main


def test_ls_shows_the_steps_and_marks_the_latest(tmp_path, capsys):
    checkpointer = Checkpointer(tmp_path, torch.nn.Linear(2, 2))
    checkpointer.save(Progress(step=7, epoch=1), metrics={"val_loss": 0.25})
    checkpointer.save(Progress(step=12, epoch=2))
    assert main(["ls", str(tmp_path)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["step", "epoch", "ranks", "engine"]
    assert first.split()[:4] == ["step_00000007", "1", "1", "single"]
    assert first.endswith("val_loss=0.25")
    assert second.endswith("← latest")


def test_ls_goes_on_after_a_step_that_cannot_be_read(tmp_path, capsys):
    checkpointer = Checkpointer(tmp_path, torch.nn.Linear(2, 2))
    checkpointer.save(Progress(step=1))
    checkpointer.save(Progress(step=2))
    (tmp_path / "step_00000001/manifest").write_bytes(b"x")
    assert main(["ls", str(tmp_path)]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert "truncated" in first
    assert second.startswith("step_00000002")


def test_ls_of_nothing_exits_with_the_errors_code(tmp_path, capsys):
    assert main(["ls", str(tmp_path)]) == 4
    assert "no committed step" in capsys.readouterr().err


def test_the_command_does_not_import_torch(tmp_path):
    Checkpointer(tmp_path, torch.nn.Linear(2, 2)).save(Progress(step=1))
    code = f"import sys; from engine.cli import main; main(['ls', {str(tmp_path)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60).returncode == 0
