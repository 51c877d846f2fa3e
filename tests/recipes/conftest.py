"""A small run of the recipe, started as a person would but in this process and under DDP, which starts in no time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from recipes import causvid

SMALL = ["--engine=ddp", "--max_captions=10", "--batch_size=4", "--teacher_steps=2", "--log_iters=1"]
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")


class Ended(NamedTuple):
    code: int
    lines: list[str]  # what it told
    errors: str

    @property
    def losses(self) -> list[str]:
        return [line for line in self.lines if line.startswith("epoch")]


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the recipe itself does: small models lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def causvid_main(monkeypatch, capsys) -> Callable[..., Ended]:
    """The recipe's ``main``: its exit code, lines and errors."""

    def start(*argv: object) -> Ended:
        lines: list[str] = []
        monkeypatch.setattr(causvid.Journal, "line", lambda self, text: lines.append(text))
        capsys.readouterr()
        code = causvid.main([str(arg) for arg in argv])
        return Ended(code, lines, capsys.readouterr().err)

    return start


@pytest.fixture(scope="package")
def finished(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of two epochs of three steps, a checkpoint after every second step; and its lines. Nobody writes to it."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHED:
            patch.delenv(name, raising=False)
        lines: list[str] = []
        patch.setattr(causvid.Journal, "line", lambda self, text: lines.append(text))
        assert causvid.main([*SMALL, "--experiment_dir", str(run_dir), "--save_interval", "2"]) == 0
    return run_dir, lines


@pytest.fixture
def resume(causvid_main, tmp_path) -> Callable[..., Ended]:
    """Resumes into a folder of its own, a new one each time, ``into`` of the outcome."""

    def start(*argv: object) -> Ended:
        into = tmp_path / f"resumed_{len(list(tmp_path.glob('resumed_*')))}"
        into.mkdir()
        return causvid_main("--experiment_dir", into, "--check_resume", *argv)

    return start
