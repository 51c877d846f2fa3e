"""Ranks as a launcher starts them: the store that they meet in lives in rank 0's process."""

import multiprocessing as mp
import os
import socket

import pytest
import torch
from torch import nn

from benchmarks.pool import Pools
from engine import sync
from engine.errors import CheckpointNotFound, EngineError, PeerError
from recipes.lib.world import World, launched

pytestmark = pytest.mark.timeout(120)


def end_at_once(rank: int, port: int, fails: bool) -> None:
    """Rank 0 is gone the moment it leaves; rank 1 looks for decisions but once a second."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if rank == 1:
        sync._POLL_SECONDS = (1.0, 1.0)

    def look() -> None:
        if fails:
            raise CheckpointNotFound("nothing there")

    try:
        with launched() as world:
            world.ranks.first("look", look)
    except EngineError as e:
        os._exit(e.exit_code)
    os._exit(0)


def compare_networks(odd: int) -> str:
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    networks = {"student": nn.Linear(2, 2), "critic": nn.Linear(2, 2)}
    if rank == odd:
        networks["critic"].bias.data[0] += 1
    try:
        World(rank, torch.distributed.get_world_size(), torch.device("cpu")).assert_equal("before training", networks)
    except PeerError as e:
        return str(e)
    return ""


@pytest.mark.parametrize(("fails", "code"), [(True, 4), (False, 0)])
def test_rank_0_does_not_leave_while_others_read_how_it_ended(pools: Pools, fails, code):
    pools[2].run(compare_networks, 2)  # starts the server that processes fork from, with torch loaded
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    context = mp.get_context("forkserver")
    ranks = [context.Process(target=end_at_once, args=(rank, port, fails), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [code, code]


def test_networks_that_differ_between_ranks_are_named(pools: Pools):
    assert pools[2].run(compare_networks, 2) == ["", ""]
    for error in pools[2].run(compare_networks, 1):
        assert "before training: ranks [1] have another critic than rank 0" in error
        assert "student" not in error
