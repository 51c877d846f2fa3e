"""The recipe as users start it: the real deepspeed launcher, torchrun, plain python; and exit codes when there is nothing to load."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SHORT = ["--max_captions", "16", "--batch_size", "4", "--teacher_steps", "2", "--log_iters", "1"]


def start(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PATH": f"{BIN}:{environment['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=110)


def steps(output: str) -> list[int]:
    return [int(found) for found in re.findall(r"epoch \d+ step (\d+) ", output)]


@pytest.mark.timeout(300)
def test_a_run_moves_from_deepspeed_to_plain_python_to_torchrun(tmp_path):
    recipe = str(ROOT / "recipes/causvid.py")
    first = start("deepspeed", "--num_gpus", "2", "--master_port", "29571", recipe, *SHORT, "--num_epochs", "1", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert steps(first.stdout) == [1, 2]

    second = start(
        sys.executable, recipe, "--resume", "latest", "--check_resume", "--engine", "zero3", "--num_epochs", "2", "--batch_size", "8", cwd=tmp_path
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert steps(second.stdout) == [3, 4]
    assert "largest difference of any restored tensor: 0.0" in second.stdout

    torchrun = ("torchrun", "--nproc_per_node", "2", "--master_port", "29572")
    third = start(
        *torchrun, recipe, "--resume", "latest", "--check_resume", "--engine", "fsdp2", "--num_epochs", "3", "--batch_size", "4", cwd=tmp_path
    )
    assert third.returncode == 0, third.stdout + third.stderr
    assert steps(third.stdout) == [5, 6]
    assert "largest difference of any restored tensor: 0.0" in third.stdout
    assert sorted(path.name for path in (tmp_path / "runs/causvid").iterdir() if path.name.startswith("step")) == [
        f"step_{number:08d}" for number in (2, 4, 6)
    ]
    assert list((tmp_path / "runs/causvid/logs").glob("events*"))

    missing = start(*torchrun, recipe, "--resume", "epoch:9", cwd=tmp_path)
    assert missing.returncode != 0
    assert missing.stderr.count("no checkpoint was saved after 9 completed epochs") >= 2, "both ranks say what is wrong"


def test_a_resume_without_a_run_exits_with_the_errors_code(tmp_path):
    found = start(sys.executable, str(ROOT / "recipes/causvid.py"), "--resume", "latest", cwd=tmp_path)
    assert found.returncode == 4
    assert "does not exist" in found.stderr
