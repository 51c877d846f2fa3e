"""A run of the recipe and its resumes: what goes on, what changed flags do, what stays on disk."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch.distributed as dist

from engine import catalog
from engine.catalog.settings import stored_config
from engine.cli.diff import diff
from engine.format.record import decode_record
from engine.storage import LocalStorage
from recipes import causvid
from tests.recipes.conftest import SMALL

pytestmark = pytest.mark.timeout(120)


def steps(run_dir: Path) -> list[int]:
    return [step.number for step in catalog.steps(LocalStorage(run_dir))]


def into(tmp_path: Path) -> Path:
    """Where the last resume wrote."""
    return max(tmp_path.glob("resumed_*"))


def record(step: Path) -> dict:
    return decode_record(catalog.read_manifest(LocalStorage(step.parent), step.name).record)


def test_a_run_saves_at_its_interval_and_at_each_epochs_end(finished):
    run_dir, lines = finished
    assert [line.split(" generator")[0] for line in lines if line.startswith("epoch")] == [
        f"epoch {epoch} step {step}" for epoch, step in ((1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6))
    ]
    assert steps(run_dir) == [2, 3, 4, 6]
    assert list((run_dir / "logs").iterdir())
    assert "RANK" not in os.environ
    assert not dist.is_initialized()


def test_a_checkpoint_holds_both_networks_their_optimizers_the_position_and_the_settings(finished):
    run_dir, _ = finished
    manifest = catalog.read_manifest(LocalStorage(run_dir), "step_00000004")
    names = {tensor.name for tensor in manifest.tensors}
    adapted = "blocks.0.self_attn.q"
    assert {f"generator.model.{adapted}.weight", f"generator.optim.state.{adapted}.weight.exp_avg", f"teacher.model.{adapted}.lora_A"} < names
    assert {f"critic.model.{adapted}.{key}" for key in ("weight", "lora_A", "lora_B")} < names
    assert {f"critic.optim.state.{adapted}.lora_A.{key}" for key in ("exp_avg", "exp_avg_sq")} < names
    assert (manifest.summary.epoch, manifest.summary.step, manifest.summary.samples) == (1, 4, 14)
    config = stored_config(LocalStorage(run_dir), "step_00000004")
    assert (config["batch_size"], config["lr"], config["dfake_gen_update_ratio"], config["preset"]) == (4, 1e-4, 5, "tiny")
    assert json.loads((run_dir / "run.json").read_text())["config"] == config


def losses(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("epoch")]


def generator_moved(lines: list[str]) -> list[bool]:
    """Whether the generator was updated, at each step but the first, as its loss tells."""
    values = [line.split()[5] for line in losses(lines)]
    return [a != b for a, b in pairwise(values)]


def test_the_generator_moves_at_every_fifth_step(finished):
    assert generator_moved(finished[1]) == [False, False, False, False, True]
    assert len({line.split()[7] for line in losses(finished[1])}) == 6


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_is_the_run_that_was_never_interrupted(finished, resume, tmp_path, step, capsys):
    """In mid-epoch, at an epoch's end, and between: to the last digit of the losses and the last bit of what it saves."""
    run_dir, lines = finished
    ended = resume("--resume", run_dir / f"step_{step:08}")
    assert ended.code == 0
    assert ended.losses == losses(lines)[step:]
    assert "largest difference of any restored tensor: 0.0" in ended.lines
    assert not [line for line in ended.lines if line.startswith(("config:", "teacher"))]
    assert steps(into(tmp_path)) == [n for n in (3, 4, 6) if n > step]
    capsys.readouterr()
    assert diff(f"{run_dir}@6", f"{into(tmp_path)}@6", True) == 0, capsys.readouterr().out


def test_the_phase_of_the_update_ratio_goes_on_under_another_ratio_too(finished, resume):
    """Steps 3, 4 and 5 are left, counted from 0: with a ratio of 2 the generator moves at 4, with 3 at 3."""
    run_dir, lines = finished
    before = losses(lines)[2]
    by_two = resume("--resume", run_dir / "step_00000003", "--dfake_gen_update_ratio", 2)
    assert "config: dfake_gen_update_ratio is 2, was 5" in by_two.lines
    assert generator_moved([before, *by_two.lines]) == [False, True, False]
    by_three = resume("--resume", run_dir / "step_00000003", "--dfake_gen_update_ratio", 3)
    assert generator_moved([before, *by_three.lines]) == [True, False, False]


def test_resume_from_takes_the_latest_or_the_epoch(finished, resume):
    run_dir, lines = finished
    ended = resume("--resume_from", run_dir, "--resume_epoch", 1)
    assert ended.code == 0
    assert f"resuming {run_dir}/step_00000004" in ended.lines  # the last step at which one epoch was complete
    assert ended.losses == losses(lines)[4:]
    ended = resume("--resume_from", run_dir)
    assert ended.code == 0
    assert ended.losses == []
    assert [line for line in ended.lines if "nothing is left to do" in line]


def test_the_next_epoch_follows_until_there_are_num_epochs_in_total(causvid_main, tmp_path):
    small = [*SMALL, "--experiment_dir", tmp_path]
    assert causvid_main(*small, "--num_epochs", 1).code == 0
    ended = causvid_main("--resume_from", tmp_path, "--num_epochs", 3)
    assert [line.split(" generator")[0] for line in ended.losses] == [
        f"epoch {epoch} step {step}" for epoch, step in ((2, 4), (2, 5), (2, 6), (3, 7), (3, 8), (3, 9))
    ]
    assert f"1 of 3 epochs done, 3 steps; saving to {tmp_path}" in ended.lines
    assert steps(tmp_path) == [3, 6, 9]
    assert not causvid_main("--resume_from", tmp_path, "--num_epochs", 2).losses, "more than that are done"


@pytest.mark.parametrize(("spec", "step"), [("latest", 6), ("auto", 6), ("epoch:1", 4), ("step:3", 3)])
def test_resume_finds_in_the_runs_own_folder(finished, causvid_main, tmp_path, spec, step):
    shutil.copytree(finished[0], tmp_path / "run")
    ended = causvid_main("--experiment_dir", tmp_path / "run", "--resume", spec)
    assert ended.code == 0
    assert f"resuming {tmp_path}/run/step_{step:08}" in ended.lines
    assert ended.losses == losses(finished[1])[step:]


def test_a_path_may_be_a_run_and_best_is_looked_for_in_resume_from(finished, resume):
    run_dir, _ = finished
    assert f"resuming {run_dir}/step_00000006" in resume("--resume", run_dir).lines
    values = {summary.metrics[causvid.MONITOR]: name for name, summary in catalog.summaries(LocalStorage(run_dir))}
    assert len(values) == 4
    assert f"resuming {run_dir}/{values[min(values)]}" in resume("--resume_from", run_dir, "--resume", "best").lines


def test_what_is_monitored_is_the_mean_since_the_checkpoint_before(finished):
    """A checkpoint is not the best for one lucky batch."""
    run_dir, lines = finished
    critic = [float(line.split()[7]) for line in losses(lines)]
    means = {name: summary.metrics[causvid.MONITOR] for name, summary in catalog.summaries(LocalStorage(run_dir))}
    assert means == {
        "step_00000002": pytest.approx((critic[0] + critic[1]) / 2),
        "step_00000003": pytest.approx(critic[2]),
        "step_00000004": pytest.approx(critic[3]),
        "step_00000006": pytest.approx((critic[4] + critic[5]) / 2),
    }


def test_auto_starts_afresh_where_there_is_nothing_and_then_goes_on(causvid_main, tmp_path):
    flags = [*SMALL, "--experiment_dir", tmp_path / "run", "--resume", "auto"]
    first = causvid_main(*flags, "--num_epochs", 1)
    assert first.code == 0
    assert [line for line in first.lines if line.startswith("starting fresh: there is no checkpoint: the run folder")]
    assert len(first.losses) == 3
    second = causvid_main(*flags, "--num_epochs", 2)
    assert second.losses[0].startswith("epoch 2 step 4 ")


def test_old_checkpoints_go_but_for_the_newest_and_the_best(causvid_main, tmp_path):
    """With a checkpoint a step, the monitored mean is that step's loss."""
    flags = [*SMALL, "--save_interval", 1, "--experiment_dir"]
    assert causvid_main(*flags, tmp_path / "two", "--keep_last", 2).code == 0
    history = record(tmp_path / "two/step_00000006")["progress"]["history"]
    by_loss = [int(entry["step"]) for entry in sorted(history, key=lambda entry: entry["critic_loss"])]
    assert len(by_loss) == 6
    assert steps(tmp_path / "two") == sorted({5, 6, by_loss[0]})
    ended = causvid_main("--resume_from", tmp_path / "two", "--resume", "best", "--no_save")
    assert f"resuming {tmp_path}/two/step_{by_loss[0]:08}" in ended.lines
    assert causvid_main(*flags, tmp_path / "more", "--keep_last", 1, "--keep_best", 2).code == 0
    assert steps(tmp_path / "more") == sorted({6, *by_loss[:2]})


def test_changed_flags_take_effect_and_are_reported(finished, resume, tmp_path):
    run_dir, lines = finished
    ended = resume("--resume_from", run_dir, "--resume_epoch", 1, "--lr", 0.5, "--num_epochs", 3)
    assert ended.code == 0
    assert {line for line in ended.lines if line.startswith("config:")} == {
        "config: lr is 0.5, was 0.0001",
        "config: num_epochs is 3, was 2",
    }
    for name in ("generator", "critic"):
        assert f"{name}: AdamW, param group 0: lr is 0.5 here and 0.0001 in the checkpoint; this run's is used" in ended.lines
    assert "largest difference of any restored tensor: 0.0" in ended.lines, "moments too"
    assert ended.losses[0] == losses(lines)[4]  # computed before the first update
    assert ended.losses[1] != losses(lines)[5]
    assert len(ended.losses) == 5
    groups = [group for member in record(into(tmp_path) / "step_00000009")["models"].values() for group in member.get("groups", [])]
    assert [group["values"]["lr"] for group in groups] == [0.5, 0.5]


def test_without_lr_the_checkpoints_own_holds(finished, resume, tmp_path):
    run_dir, _ = finished
    resume("--resume", run_dir / "step_00000004", "--lr", 5e-7, "--num_epochs", 3)
    ended = resume("--resume_from", into(tmp_path), "--num_epochs", 4)
    assert {line for line in ended.lines if "lr" in line.split()} == set()
    assert stored_config(LocalStorage(into(tmp_path)), "step_00000012")["lr"] == 5e-7


def test_the_batch_size_may_change_and_no_sample_is_lost(finished, resume, tmp_path):
    run_dir, _ = finished
    ended = resume("--resume", run_dir / "step_00000004", "--batch_size", 3)
    assert ended.code == 0
    assert "config: batch_size is 3, was 4" in ended.lines
    assert "largest difference of any restored tensor: 0.0" in ended.lines
    assert len(ended.losses) == 2, "of the second epoch's 10 captions 6 are left"
    assert record(into(tmp_path) / "step_00000006")["progress"]["samples"] == 20


def test_relative_paths_hold_from_another_folder(causvid_main, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    Path("captions.txt").write_text("\n".join(f"a {animal}" for animal in ("cat", "dog", "cow", "hen", "bat")))
    assert causvid_main(*SMALL, "--num_epochs", 1, "--data_path", "captions.txt", "--experiment_dir", "run").code == 0
    monkeypatch.chdir(tmp_path)
    assert causvid_main("--resume_from", "there/run", "--num_epochs", 2).code == 0
    assert steps(tmp_path / "there/run") == [2, 4]


def test_the_users_config_is_kept_beside_the_checkpoints(causvid_main, tmp_path):
    config, run_dir = tmp_path / "wan_causal_dmd.yaml", tmp_path / "run"
    config.write_text("# mine\nnum_epochs: 1\nmodel_name: wan\n")
    assert causvid_main(*SMALL, "--config_path", config, "--experiment_dir", run_dir).code == 0
    config.write_text("num_epochs: 2\n")
    for _ in range(2):
        assert causvid_main("--resume_from", run_dir, "--config_path", config).code == 0
    assert steps(run_dir) == [3, 6]
    assert (run_dir / "config.yaml").read_text() == "# mine\nnum_epochs: 1\nmodel_name: wan\n"
    assert (run_dir / "config_step_00000003.yaml").read_text() == "num_epochs: 2\n"


def test_no_save_writes_no_checkpoint(causvid_main, tmp_path):
    assert causvid_main(*SMALL, "--num_epochs", 1, "--experiment_dir", tmp_path, "--no_save").code == 0
    assert not steps(tmp_path)


def test_the_named_folder_is_where_a_named_experiment_goes_on(finished, causvid_main, tmp_path, monkeypatch):
    """The document's last example: another experiment's name, and the folder to resume from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    ended = causvid_main("--experiment_name", "continued", "--resume_from", finished[0], "--resume_epoch", 1, "--lr", 1e-5)
    assert ended.code == 0
    assert steps(tmp_path / "runs/continued_realLora32-fakeLora32_lr1e-5_ep2_bs4_ratio5_glyphs_slurm7") == [6]
    assert steps(finished[0]) == [2, 3, 4, 6]
