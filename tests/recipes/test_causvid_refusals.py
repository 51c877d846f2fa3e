"""What the recipe refuses: at once, with an exit code of its own, a log of what there is, and nothing touched."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from engine import Progress
from recipes import causvid
from recipes.lib.start import what_is_there
from recipes.lib.wan import PRESETS
from tests.now import Checkpointer
from tests.recipes.conftest import SMALL

pytestmark = pytest.mark.timeout(60)
NOT_FOUND, CORRUPT, INCOMPATIBLE, USAGE = 4, 5, 6, 2
LATEST = "step_00000006"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy, to be damaged."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def tree(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: data for path, data in found.items() if not path.endswith("/holder.json")}  # who resumes takes the run


def listed(lines: list[str]) -> list[str]:
    """The steps that the log names, in its order."""
    return [line.split()[0] for line in lines if line.startswith("step_")]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_missing_run_is_told_with_the_runs_beside_it(run, causvid_main):
    ended = causvid_main("--resume_from", run.parent / "rum")
    assert ended.code == NOT_FOUND
    assert f"the run folder {run.parent}/rum does not exist" in ended.errors
    assert f"runs with checkpoints in {run.parent}: run" in ended.lines
    assert not (run.parent / "rum").exists()
    assert not dist.is_initialized()


def test_a_folder_that_holds_runs_is_none_itself(run, causvid_main):
    (run.parent / "notes").write_text("a file")
    ended = causvid_main("--resume_from", run.parent)
    assert ended.code == NOT_FOUND
    assert "no step has been committed there" in ended.errors
    assert f"runs with checkpoints in {run.parent}: run" in ended.lines


@pytest.mark.parametrize("flags", [["--resume_epoch", "7"], ["--resume", "epoch:7"], ["--resume", "step:7"], ["--resume", "step_00000007"]])
def test_an_absent_epoch_or_step_is_told_with_those_there_are(run, causvid_main, monkeypatch, flags):
    monkeypatch.chdir(run)
    before = tree(run)
    ended = causvid_main("--experiment_dir", run, *flags)
    assert ended.code == NOT_FOUND
    assert "it has step_00000002, step_00000003, step_00000004, step_00000006" in ended.errors
    assert listed(ended.lines) == ["step_00000002", "step_00000003", "step_00000004", "step_00000006"]
    assert tree(run) == before


def test_auto_forgives_nothing_but_an_absent_run(run, causvid_main):
    (run / "step_7").mkdir()
    assert causvid_main("--experiment_dir", run, "--resume", "auto").code == CORRUPT


@pytest.mark.parametrize("name", ["step_7", "step_final", "step_00000006.bak"])
def test_an_invalid_folder_name_is_refused(run, causvid_main, name):
    shutil.copytree(run / LATEST, run / name)
    ended = causvid_main("--resume_from", run)
    assert ended.code == CORRUPT
    assert f"{run}/{name} is not how a step is named" in ended.errors
    assert listed(ended.lines) == ["step_00000002", "step_00000003", "step_00000004", "step_00000006"]
    assert [line for line in ended.lines if line.startswith("besides them: ") and name in line.split(": ")[1].split(", ")]


def _manifest_flipped(step: Path) -> str:
    flip(step / "manifest")
    return "manifest: its checksum does not match"


def _manifest_missing(step: Path) -> str:
    (step / "manifest").unlink()
    return "is no complete step: it has no file 'manifest'"


def _index_missing(step: Path) -> str:
    (step / "rank_00000.index").unlink()
    return "rank_00000.index, written by rank 0, is missing"


def _shard_missing(step: Path) -> str:
    (step / "rank_00000.0.safetensors").unlink()
    return "rank_00000.0.safetensors, written by rank 0, is missing"


def _shard_truncated(step: Path) -> str:
    path = step / "rank_00000.0.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    return "rank_00000.0.safetensors, written by rank 0, has "


def _shard_flipped(step: Path) -> str:
    flip(step / "rank_00000.0.safetensors")
    return "does not match"


DAMAGES = [_manifest_flipped, _manifest_missing, _index_missing, _shard_missing, _shard_truncated, _shard_flipped]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
@pytest.mark.parametrize("flags", [["--resume_from", "run"], ["--experiment_dir", "run", "--resume", "auto"]], ids=["resume_from", "auto"])
def test_a_missing_or_corrupt_file_ends_the_run_and_no_other_step_is_taken(run, causvid_main, monkeypatch, damage, flags):
    monkeypatch.chdir(run.parent)
    message = damage(run / LATEST)
    before = tree(run)
    ended = causvid_main(*flags)
    assert ended.code == CORRUPT
    assert message in ended.errors
    assert LATEST in ended.errors
    assert {"step_00000002", "step_00000003", "step_00000004"} <= set(listed(ended.lines))
    assert not ended.losses
    assert tree(run) == before
    assert not dist.is_initialized()


def test_a_lost_manifest_is_refused_even_of_a_step_that_is_not_asked_for(run, causvid_main):
    (run / "step_00000002/manifest").unlink()
    assert causvid_main("--resume_from", run).code == CORRUPT


def test_checkpoints_are_listed_in_numeric_order(tmp_path):
    """By name, a step of nine digits would come before one of eight."""
    checkpointer = Checkpointer(tmp_path, nn.Linear(1, 1))
    for step in (100_000_000, 99_999_999, 5):
        checkpointer.save(Progress(step=step))
    assert listed(what_is_there(tmp_path)) == ["step_00000005", "step_99999999", "step_100000000"]


@pytest.mark.parametrize("flag", ["--fake_lora_rank=8", "--real_lora_rank=0", "--preset=wan1.3b"])
def test_another_architecture_is_refused_before_anything_is_made(run, causvid_main, monkeypatch, flag):
    monkeypatch.setattr(causvid, "make_networks", None)
    before, (name, value) = tree(run), flag.split("=")
    ended = causvid_main("--resume_from", run, flag)
    assert ended.code == INCOMPATIBLE
    was = {"--fake_lora_rank": 32, "--real_lora_rank": 32, "--preset": "tiny"}[name]
    assert f"{name} is {value}, the checkpoint has {was}" in ended.errors
    assert "lr" not in ended.errors
    assert tree(run) == before


def test_networks_that_differ_though_the_settings_do_not_are_refused_too(run, causvid_main, monkeypatch):
    """As after a change of the code."""
    from dataclasses import replace

    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], ffn_dim=96))
    before = tree(run)
    ended = causvid_main("--resume_from", run)
    assert ended.code == INCOMPATIBLE
    assert "critic.model.blocks.0.ffn.0.weight: [96, 48] here, [128, 48] in the checkpoint" in ended.errors
    assert "partly overwritten" not in ended.errors
    assert tree(run) == before


@pytest.mark.parametrize("flag", ["--seed=1", "--max_captions=9", "--dataset_repeat=2"])
def test_another_order_of_the_data_is_refused(run, causvid_main, flag):
    ended = causvid_main("--resume_from", run, flag)
    assert ended.code == INCOMPATIBLE
    assert "the data order differs" in ended.errors


@pytest.mark.parametrize("flags", [[], ["--resume_from", "other"]])
def test_a_run_that_begins_does_not_overwrite_another(run, causvid_main, monkeypatch, flags):
    shutil.copytree(run, run.parent / "other")
    monkeypatch.chdir(run.parent)
    before = tree(run)
    ended = causvid_main(*([] if flags else SMALL), *flags, "--experiment_dir", run)
    assert ended.code == USAGE
    assert f"{run} has 4 checkpoints of an earlier run, the last of them {LATEST}" in ended.errors
    assert tree(run) == before


def test_a_wrong_command_line_is_told_before_any_rank_waits(causvid_main, monkeypatch):
    monkeypatch.setattr(causvid, "launched", None)
    ended = causvid_main("--batch_size", "none")
    assert ended.code == USAGE
    assert "--batch_size" in ended.errors


@pytest.mark.parametrize(("flag", "value"), [("--data_path", "nowhere.txt"), ("--config_path", "nowhere.yaml"), ("--ds_config", "nowhere.json")])
def test_an_unreadable_file_is_told(causvid_main, tmp_path, flag, value):
    ended = causvid_main("--engine=zero1", "--teacher_steps=1", "--experiment_dir", tmp_path / "run", flag, tmp_path / value)
    assert ended.code == USAGE
    assert value in ended.errors
    assert not (tmp_path / "run").exists()
