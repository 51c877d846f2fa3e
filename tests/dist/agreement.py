"""What ranks must agree on, for test_agreement.py."""

import os

import torch.distributed as dist
from torch import nn

from engine import Checkpointer, ElasticSampler, PerRank, Progress
from engine.errors import EngineError


def _message(call):
    try:
        call()
    except EngineError as e:
        return f"{type(e).__name__}: {e}"
    return ""


class Count:
    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def attach(run, what):
    """Attach with a difference on rank 1. Returns what was said, and what lies below the run's parent."""
    rank, model = dist.get_rank(), nn.Linear(2, 2)
    options, path = {}, os.path.join(run, "run")
    if what == "folder":
        path += f"_{rank}"
    if what == "disk" and rank:  # the folder of a node's own, mounted at the same place
        from engine.storage import mark

        mark.os.path.lexists, real = (lambda path: False), mark.os.path.lexists
        mark._PATIENCE_SECONDS = 0.2
    if what == "options":
        options = {"keep_last": 2 + rank}
    if what == "members":
        options = {"ema": Count()} if rank else {"average": Count()}
    if what == "order":
        options = {"a": Count(), "b": Count()} if rank else {"b": Count(), "a": Count()}
    try:
        message = _message(lambda: Checkpointer(path, model, max_in_flight=0, timeout_seconds=30, **options).save(Progress(step=1)))
    finally:
        if what == "disk" and rank:
            mark.os.path.lexists, mark._PATIENCE_SECONDS = real, 5.0
    dist.barrier()
    return message, sorted(os.listdir(run))


def save_on_rank_0_alone(run):
    model = nn.Linear(2, 2)
    checkpointer = Checkpointer(run, model, timeout_seconds=30)
    if dist.get_rank() == 0:
        checkpointer.save(Progress(step=1))
    return _message(checkpointer.close)


def save_at_different_steps(run):
    checkpointer = Checkpointer(run, nn.Linear(2, 2), timeout_seconds=30)
    checkpointer.save(Progress(step=1 + dist.get_rank()))
    return _message(checkpointer.close)


def made_before_the_group(run):
    """As in a script that makes its objects before ``init_process_group``."""
    real, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        sampler = ElasticSampler(range(8), 4)
        checkpointer = Checkpointer(os.path.join(run, str(dist.get_rank())), nn.Linear(2, 2), max_in_flight=0)
    finally:
        dist.is_initialized = real
    calls = [lambda: checkpointer.save(Progress(step=1)), checkpointer.resume, checkpointer.wait, lambda: iter(sampler)]
    return [_message(call) for call in calls]


def rank_of_data(run):
    """A sampler may be given other ranks than the group's: two that share their data."""
    sampler = ElasticSampler(range(8), 4, rank=0, world_size=1)
    checkpointer = Checkpointer(run, nn.Linear(2, 2), data=sampler, noise=PerRank(Count()), max_in_flight=0)
    checkpointer.resume(missing="fresh")
    return next(iter(sampler))


def a_save_is_given_up(run):
    """Rank 1 comes to the second save once rank 0 has given it up. Returns the steps that are there."""
    checkpointer = Checkpointer(run, nn.Linear(2, 2), timeout_seconds=2, on_failure="warn")
    checkpointer.save(Progress(step=1))
    checkpointer.wait()
    if dist.get_rank() == 1:
        dist.barrier()
    checkpointer.save(Progress(step=2))
    checkpointer.wait()
    if dist.get_rank() == 0:
        dist.barrier()
    checkpointer.save(Progress(step=3))
    checkpointer.close()
    return sorted(name for name in os.listdir(run) if name.startswith("step_"))
