"""The recipe as users start it: the real deepspeed launcher, torchrun, plain python; and exit codes when there is nothing to load."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import main

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SHORT = ["--max_captions", "16", "--batch_size", "4", "--teacher_steps", "2", "--log_iters", "1"]


def start(*command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PATH": f"{BIN}:{environment['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}
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

    script = str(ROOT / "recipes/resume_training_example.sh")
    missing = start("bash", script, "runs/causvid", "--resume_epoch", "9", cwd=tmp_path, RANKS="2", MASTER_PORT="29573")
    assert missing.returncode == 4
    assert "runs/causvid: 3 checkpoints" in missing.stdout
    assert missing.stderr.count("no checkpoint was saved after 9 completed epochs") == 2, "both ranks say what is wrong"
    assert re.findall(r"^step_\d+", missing.stdout, re.MULTILINE) == ["step_00000002", "step_00000004", "step_00000006"]


FAULTY = """
import sys, torch
sys.path.insert(0, {root!r})
from recipes import causvid

sound, seen = causvid.critic_loss, []

def faulty(*args):
    seen.append(None)
    if len(seen) == 6 and torch.distributed.get_rank() == 1:
        raise RuntimeError("the memory of rank 1 is bad")
    return sound(*args)

causvid.critic_loss = faulty
sys.exit(causvid.main(sys.argv[1:]))
"""


def test_a_rank_that_fails_in_the_loop_ends_all_and_what_was_saved_is_sound(tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(root=str(ROOT)))
    flags = ["--engine", "ddp", *SHORT, "--num_epochs", "9", "--experiment_dir", "run"]
    ended = start("torchrun", "--nproc_per_node", "2", "--master_port", "29575", str(script), *flags, cwd=tmp_path)
    assert ended.returncode != 0
    assert "the memory of rank 1 is bad" in ended.stderr
    assert steps(ended.stdout) == [1, 2, 3, 4, 5]
    assert main(["verify", str(tmp_path / "run"), "--all"]) == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("*step_*")) == ["step_00000002", "step_00000004"]


def test_a_resume_without_a_run_exits_with_the_errors_code(tmp_path):
    found = start(sys.executable, str(ROOT / "recipes/causvid.py"), "--resume", "latest", cwd=tmp_path)
    assert found.returncode == 4
    assert "does not exist" in found.stderr


@pytest.mark.timeout(200)
def test_an_extended_vocabulary_under_deepspeed_is_killed_and_goes_on_in_plain_python(tmp_path):
    prepared = start(sys.executable, str(ROOT / "recipes/prepare_amharic.py"), "--output-dir", "data/amharic", "--max-samples", "60", cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    recipe = str(ROOT / "recipes/indextts_amharic.py")
    flags = [recipe, "--batch-size", "2", "--log-interval", "1", "--save-interval", "2", "--resume", "auto"]
    command = ["deepspeed", "--num_gpus", "2", "--master_port", "29577", *flags, "--epochs", "50"]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    killed = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert killed.stdout is not None
    for line in killed.stdout:
        if " step 7 " in line:
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()

    ended = start(sys.executable, *flags, "--engine", "ddp", "--batch-size", "4", "--epochs", "1", cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "[Info] Auto-resume: found checkpoint at" in ended.stdout
    assert steps(ended.stdout)[0] in (3, 5, 7, 9), "after a save that was committed when all died"
    assert main(["verify", str(tmp_path / "runs/indextts_amharic"), "--all"]) == 0
