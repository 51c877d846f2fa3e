"""``resume_training_example.sh``: once with the real launcher, the rest with one that only says how it was called.

What it ends with where the recipe refuses, on two ranks: tests/recipes/test_launchers.py.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes/resume_training_example.sh"
RECIPE = SCRIPT.with_name("causvid.py")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def bare(tmp_path) -> Path:
    """A folder of programs: what the script needs, and launchers if a test puts some there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "cat"):
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    return folder


def put(folder: Path, name: str, exits: int = 0) -> None:
    (folder / name).write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} ran" "$@"\nexit {exits}\n')
    (folder / name).chmod(0o755)


def script(path: str, cwd: Path, *argv: object, at: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RANKS", "MASTER_PORT")}
    command = ["bash", str(at), *map(str, argv)]
    return subprocess.run(command, check=False, cwd=cwd, env={**kept, "PATH": path, **environment}, capture_output=True, text=True, timeout=110)


@pytest.mark.parametrize("argv", [[], [""], ["--num_epochs", "200"]])
def test_the_folder_is_required(bare, tmp_path, argv):
    put(bare, "deepspeed")
    ended = script(str(bare), tmp_path, *argv)
    assert ended.returncode == 2
    assert "usage: bash resume_training_example.sh DIR [flags" in ended.stderr
    assert "deepspeed ran" not in ended.stdout


def test_a_folder_that_is_not_there_is_told(bare, tmp_path):
    put(bare, "deepspeed")
    ended = script(str(bare), tmp_path, "nowhere", "--num_epochs", 2)
    assert ended.returncode == 4
    assert "nowhere is no folder" in ended.stderr
    assert "deepspeed ran" not in ended.stdout


def test_it_counts_the_checkpoints_passes_the_flags_on_and_ends_as_the_recipe_does(bare, finished, tmp_path):
    put(bare, "deepspeed", exits=7)
    put(bare, "torchrun")
    shutil.copytree(finished[0], tmp_path / "a run")
    (tmp_path / "a run/step_00000009").mkdir()  # none: it has no manifest
    ended = script(str(bare), tmp_path, "a run", "--resume_epoch", 10, "--data_path", "my captions.txt")
    assert ended.returncode == 7
    flags = ["--resume_from", "a run", "--resume_epoch", "10", "--data_path", "my captions.txt"]
    assert ended.stdout.splitlines() == ["a run: 4 checkpoints", "deepspeed ran", str(RECIPE), *flags]


def test_none_is_counted_where_there_is_none(bare, tmp_path):
    put(bare, "deepspeed")
    ended = script(str(bare), tmp_path, tmp_path)
    assert ended.returncode == 0
    assert ended.stdout.startswith(f"{tmp_path}: 0 checkpoints\n")


@pytest.mark.parametrize(
    ("launchers", "environment", "called"),
    [
        (["deepspeed", "torchrun"], {"RANKS": "2", "MASTER_PORT": "29"}, ["deepspeed ran", "--num_gpus", "2", "--master_port", "29"]),
        (["torchrun", "python3"], {}, ["torchrun ran", "--nproc_per_node", "1"]),
        (["torchrun"], {"RANKS": "2", "MASTER_PORT": "29"}, ["torchrun ran", "--nproc_per_node", "2", "--master_port", "29"]),
        (["python3"], {}, ["python3 ran"]),
    ],
)
def test_it_takes_the_launcher_that_is_there(bare, tmp_path, launchers, environment, called):
    """A copy of the script, beside which there is no virtual environment."""
    for name in launchers:
        put(bare, name)
    recipes = tmp_path / "clone/recipes"
    recipes.mkdir(parents=True)
    shutil.copy(SCRIPT, recipes)
    ended = script(str(bare), tmp_path, tmp_path, at=recipes / SCRIPT.name, **environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[1:] == [*called, f"{recipes}/causvid.py", "--resume_from", str(tmp_path)]


def test_a_run_goes_on_under_deepspeed_from_another_folder(finished, tmp_path):
    """With its own settings: its engine, its batch size, its captions."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    ended = script(os.environ["PATH"], tmp_path / "elsewhere", "../run", "--num_epochs", 3, RANKS="1", MASTER_PORT="29574", DS_ACCELERATOR="cpu")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "../run: 4 checkpoints" in ended.stdout
    assert "epoch 3 step 9 " in ended.stdout
    assert (tmp_path / "run/step_00000009").is_dir()
