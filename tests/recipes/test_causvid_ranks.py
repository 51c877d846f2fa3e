"""The recipe on two real ranks: rank 0 decides where to begin, one rank's failure is all ranks', and their gradients agree."""

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.pool import Pools
from engine import Checkpointer, catalog
from engine.cli.diff import diff
from engine.errors import EngineError
from engine.storage import LocalStorage
from recipes import causvid
from recipes.lib.parallel import TorchTrainable
from recipes.lib.world import World
from tests.recipes.conftest import SMALL

pytestmark = pytest.mark.timeout(300)  # DeepSpeed may have to build its C++ op first
TWO = ["--max_captions=10", "--batch_size=2", "--teacher_steps=2", "--log_iters=1", "--save_interval=2"]


def run_recipe(argv: list[str], folders: list[str] | None = None, past_the_wrapper: str = "") -> dict[str, Any]:
    """On every rank: the exit code and error, the losses told, and what was resumed. ``folders``: where each rank works;
    ``past_the_wrapper``: the network that is called without its DDP wrapper."""
    lines, resumed, here = [], [], os.getcwd()
    line, resume, call = causvid.Journal.line, Checkpointer.resume, TorchTrainable.__call__

    def noted(self: Checkpointer, what: str, **options: Any) -> Any:
        progress = resume(self, what, **options)
        resumed.append((what, progress.epoch, progress.step))
        return progress

    causvid.Journal.line, Checkpointer.resume = lambda self, text: lines.append(text), noted  # type: ignore[method-assign]

    def call_past(self: TorchTrainable, *args: Any, **options: Any) -> torch.Tensor:
        inside: Any = self.module.module
        return inside(*args, **options) if inside.causal == (past_the_wrapper == "generator") else call(self, *args, **options)

    if past_the_wrapper:
        TorchTrainable.__call__ = call_past  # type: ignore[method-assign]
    code, error = 0, ""
    try:
        os.chdir(folders[dist.get_rank()] if folders else here)
        with contextlib.redirect_stdout(io.StringIO()):
            causvid.run(argv, World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
    except EngineError as e:
        code, error = e.exit_code, f"{type(e).__name__}: {e}"
    finally:
        os.chdir(here)
        causvid.Journal.line, Checkpointer.resume, TorchTrainable.__call__ = line, resume, call  # type: ignore[method-assign]
    return {"code": code, "error": error, "losses": [text for text in lines if text.startswith("epoch")], "resumed": resumed}


def codes(ranks: list[dict[str, Any]]) -> list[int]:
    return [rank["code"] for rank in ranks]


@pytest.fixture
def two_views(finished, tmp_path) -> list[str]:
    """Where two ranks work: in the second folder the run has other checkpoints, as when storage is not shared, or changes meanwhile."""
    for name in "ab":
        shutil.copytree(finished[0], tmp_path / name / "runs/causvid")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"b/runs/causvid/step_{step:08}")
    (tmp_path / "b/runs/causvid/latest").write_text("step_00000003\n")
    return [str(tmp_path / name) for name in "ab"]


def test_all_ranks_begin_where_rank_0_says(pools: Pools, two_views):
    ranks = pools[2].run(run_recipe, ["--resume=latest", "--num_epochs=3", "--batch_size=2"], two_views)
    assert codes(ranks) == [0, 0], ranks
    assert [rank["resumed"] for rank in ranks] == [[(f"{two_views[0]}/runs/causvid/step_00000006", 2, 6)]] * 2
    assert [text.split(" generator")[0] for text in ranks[0]["losses"]] == ["epoch 3 step 7", "epoch 3 step 8", "epoch 3 step 9"]
    assert ranks[1]["losses"] == ranks[0]["losses"], "the mean of the ranks"
    assert not os.path.exists(f"{two_views[1]}/runs/causvid/step_00000009")


def test_what_rank_0_does_not_find_is_missing_for_all(pools: Pools, two_views):
    ranks = pools[2].run(run_recipe, ["--resume=epoch:2"], two_views[::-1])
    assert codes(ranks) == [4, 4]
    assert all("no checkpoint was saved after 2 completed epochs" in rank["error"] for rank in ranks)
    assert [rank["resumed"] for rank in ranks] == [[], []]


@pytest.mark.parametrize(
    ("second", "code", "message"),
    [(None, 2, "captions.txt: cannot be read"), ("a cat\na cow\n", 8, r"ranks [1] have other captions than rank 0")],
)
def test_data_that_one_rank_lacks_or_has_otherwise_end_all(pools: Pools, tmp_path, second, code, message):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, content in zip(folders, ("a cat\na dog\n", second), strict=True):
        folder.mkdir()
        if content:
            (folder / "captions.txt").write_text(content)
    argv = [*SMALL, "--data_path=captions.txt", f"--experiment_dir={tmp_path}/run"]
    ranks = pools[2].run(run_recipe, argv, [str(folder) for folder in folders])
    assert codes(ranks) == [code] * 2
    assert all(message in rank["error"] for rank in ranks)


def test_damage_that_one_rank_meets_ends_all(pools: Pools, tmp_path):
    """Under FSDP2 each rank reads its own shards: rank 0 has read all of its when rank 1 fails."""
    run = f"{tmp_path}/run"
    assert codes(pools[2].run(run_recipe, [*TWO, "--engine=fsdp2", "--num_epochs=1", f"--experiment_dir={run}"])) == [0, 0]
    shard = Path(run, "step_00000003/rank_00001.0.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    ranks = pools[2].run(run_recipe, [f"--resume_from={run}", "--num_epochs=2"])
    assert codes(ranks) == [5, 5]
    assert all("rank_00001.0.safetensors" in rank["error"] and "checksum" in rank["error"] for rank in ranks)
    assert "rank 1 failed" in ranks[0]["error"]
    assert not ranks[0]["losses"]


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_a_run_resumed_on_as_many_ranks_is_the_run_that_was_never_interrupted(pools: Pools, tmp_path, engine, capsys):
    whole, again = f"{tmp_path}/whole", f"{tmp_path}/again"
    first = pools[2].run(run_recipe, [*TWO, f"--engine={engine}", f"--experiment_dir={whole}"])
    assert codes(first) == [0, 0], first
    second = pools[2].run(run_recipe, [f"--resume={whole}/step_00000002", f"--experiment_dir={again}"])
    assert codes(second) == [0, 0], second
    assert second[0]["losses"] == first[0]["losses"][2:]
    assert diff(f"{whole}@6", f"{again}@6", True) == 0, capsys.readouterr().out


def test_the_command_lines_rate_wins_under_deepspeed_too(pools: Pools, tmp_path, capsys):
    """At a rate of 0 the networks stand still, and the moments go on."""
    run = f"{tmp_path}/run"
    assert codes(pools[2].run(run_recipe, [*TWO, "--engine=zero2", "--num_epochs=1", f"--experiment_dir={run}"])) == [0, 0]
    second = pools[2].run(run_recipe, [f"--resume_from={run}", "--num_epochs=2", "--lr=0"])
    assert codes(second) == [0, 0], second
    assert len(second[0]["losses"]) == 3
    assert diff(f"{run}@3", f"{run}@6", True) == 1
    changed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " F32 " in line]
    assert {name.split(".state.")[0] for name in changed} == {"generator.optim", "critic.optim"}


@pytest.mark.parametrize(("network", "tensor"), [("generator", "patch_embedding.weight"), ("critic", "blocks.0.self_attn.q.lora_A")])
def test_a_loss_computed_past_the_wrapper_is_named_by_the_save(pools: Pools, tmp_path, network, tensor):
    """The original's fault: its gradients were never reduced, so that each rank trained networks of its own."""
    argv = [*TWO, "--engine=ddp", "--num_epochs=1"]
    for rank in pools[2].run(run_recipe, [*argv, f"--experiment_dir={tmp_path}/bad"], past_the_wrapper=network):
        assert rank["code"] == 8
        assert "replicas have drifted apart" in rank["error"]
        assert f"{network}.model.{tensor} (as rank 0 has it): another value on ranks [1]" in rank["error"]
        assert "gradients are not reduced (the loss is computed past the DDP wrapper)" in rank["error"]
    assert not catalog.steps(LocalStorage(f"{tmp_path}/bad"))
    assert codes(pools[2].run(run_recipe, [*argv, f"--experiment_dir={tmp_path}/good"])) == [0, 0]
    assert len(catalog.steps(LocalStorage(f"{tmp_path}/good"))) == 2
