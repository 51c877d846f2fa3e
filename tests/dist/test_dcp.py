"""Saves and loads go through torch.distributed.checkpoint, and stock PyTorch reads what they leave."""

import os
import subprocess
import sys

import pytest

from benchmarks.pool import Pools
from tests.dist import jobs


def test_saves_and_loads_go_through_dcp(pools: Pools, tmp_path):
    for found in pools[2].run(jobs.save_counting_dcp, "fsdp2", str(tmp_path)):
        saves = [call for call in found["calls"] if call.startswith("save")]
        assert saves == ["save:ShardWriter:ShardSavePlanner"]
        assert "load:ShardReader:ShardLoadPlanner" in found["calls"]
        assert found["without_dcp"], "a save that does not pass dcp.save must not succeed"
    assert found["files"] == ["manifest", "rank_00000.0.safetensors", "rank_00000.index", "rank_00001.0.safetensors", "rank_00001.index"]


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_stock_pytorch_loads_model_and_optimizer(pools: Pools, tmp_path, engine):
    pools[2].run(jobs.save_for_stock, engine, str(tmp_path))
    step, expected = f"{tmp_path}/step_00000002", f"{tmp_path}/expected.pt"
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "stock_reader.py"), step, expected]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(r), "WORLD_SIZE": "2", "RENDEZVOUS": f"{tmp_path}/rendezvous"} for r in range(2)]
    processes = [subprocess.Popen(command, env=clean | extra, stderr=subprocess.PIPE, text=True) for extra in [*ranks, {}]]
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
