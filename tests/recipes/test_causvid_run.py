"""The recipe itself, started twice: as a person would, but in this process and under DDP, which starts in no time."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from recipes import causvid

pytestmark = pytest.mark.timeout(120)
SMALL = ["--engine=ddp", "--max_captions=10", "--batch_size=4", "--teacher_steps=2", "--log_iters=1"]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of two epochs of three steps, a checkpoint after every second step; and its lines."""
    run_dir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(causvid.Journal, "line", lambda self, text: lines.append(text))
        assert causvid.main([*SMALL, "--experiment_dir", str(run_dir), "--save_interval", "2"]) == 0
    return run_dir, lines


@pytest.fixture
def resume(finished, tmp_path, monkeypatch):
    """Resumes the finished run into a folder of its own; returns the exit code and the lines."""

    def start(*argv: str) -> tuple[int, list[str]]:
        lines: list[str] = []
        monkeypatch.setattr(causvid.Journal, "line", lambda self, text: lines.append(text))
        return causvid.main(["--experiment_dir", str(tmp_path), "--check_resume", *argv]), lines

    return start


def losses(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("epoch")]


def test_a_run_saves_at_its_interval_and_at_each_epochs_end(finished):
    run_dir, lines = finished
    assert [line.split(" generator")[0] for line in losses(lines)] == [
        f"epoch {epoch} step {step}" for epoch, step in ((1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6))
    ]
    assert sorted(p.name for p in run_dir.glob("step_*")) == [f"step_{n:08}" for n in (2, 3, 4, 6)]
    assert list((run_dir / "logs").iterdir())
    assert "RANK" not in os.environ
    assert not dist.is_initialized()


def test_the_generator_moves_at_every_fifth_step(finished):
    generator, critic = ([line.split()[i] for line in losses(finished[1])] for i in (5, 7))
    assert len(set(generator[:5])) == 1
    assert generator[5] != generator[4]
    assert len(set(critic)) == 6


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_repeats_the_losses_to_the_last_digit(finished, resume, step):
    run_dir, lines = finished
    code, again = resume("--resume", str(run_dir / f"step_{step:08}"))
    assert code == 0
    assert losses(again) == losses(lines)[step:]
    assert "largest difference of any restored tensor: 0.0" in again
    assert not [line for line in again if line.startswith(("--", "teacher"))]


def test_resume_from_takes_the_latest_or_the_epoch(finished, resume):
    run_dir, lines = finished
    code, again = resume("--resume_from", str(run_dir), "--resume_epoch", "1")
    assert code == 0
    assert f"resuming {run_dir}/step_00000004" in again  # the last step at which one epoch was complete
    assert losses(again) == losses(lines)[4:]
    code, again = resume("--resume_from", str(run_dir))
    assert code == 0
    assert losses(again) == []
    assert [line for line in again if "nothing is left to do" in line]


def test_changed_flags_take_effect_and_are_reported(finished, resume):
    run_dir, lines = finished
    code, again = resume("--resume_from", str(run_dir), "--resume_epoch", "1", "--lr", "0.5", "--num_epochs", "3")
    assert code == 0
    assert {line for line in again if line.startswith("--")} == {
        "--lr is now 0.5 (was 0.0001)",
        "--num_epochs is now 3 (was 2)",
    }
    assert losses(again)[0] == losses(lines)[4]  # computed before the first update
    assert losses(again)[1] != losses(lines)[5]
    assert len(losses(again)) == 5


def test_the_batch_size_may_change_and_no_sample_is_lost(finished, resume):
    run_dir, _ = finished
    code, again = resume("--resume", str(run_dir / "step_00000003"), "--batch_size", "3")
    assert code == 0
    assert "--batch_size is now 3 (was 4)" in again
    assert len(losses(again)) == 4


def test_another_architecture_is_refused(finished, resume, capsys):
    run_dir, _ = finished
    code, _ = resume("--resume_from", str(run_dir), "--fake_lora_rank", "8")
    assert code == 6
    assert "lora_A" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--resume", "latest"], ["--resume_from", "/nowhere"], ["--resume_epoch", "7"]])
def test_nothing_to_resume_is_an_error(resume, flags, capsys):
    code, _ = resume(*flags)
    assert code == 4
    assert "causvid:" in capsys.readouterr().err
    assert not dist.is_initialized()


def test_no_save_writes_no_checkpoint(tmp_path):
    assert causvid.main([*SMALL, "--num_epochs", "1", "--experiment_dir", str(tmp_path), "--no_save"]) == 0
    assert not list(tmp_path.glob("step_*"))
