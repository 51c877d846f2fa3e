"""Ranks that should hold the same are seen to hold the same; and what each rank has for itself comes back to it."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.pool import Pools
from engine import PerRank, Progress
from tests.now import Checkpointer
from engine.data import ElasticSampler
from tests.dist.jobs import told


def train_past_the_wrapper(run: str, replicas: str, correct: bool) -> str:
    """The fault of the original CausVid trainer: the loss is computed with the module inside the DDP wrapper, so that gradients are
    never reduced and each rank trains a model of its own."""
    torch.manual_seed(0)
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    forward = wrapped if correct else wrapped.module
    forward(torch.full((2, 4), 1.0 + dist.get_rank())).square().sum().backward()
    optimizer.step()
    checkpointer = Checkpointer(run, student=(wrapped, optimizer), replicas=replicas, timeout_seconds=20)  # type: ignore[arg-type]
    return told(lambda: checkpointer.save(Progress(step=1)))


def test_gradients_that_were_never_reduced_are_named(pools: Pools, tmp_path):
    for error in pools[3].run(train_past_the_wrapper, str(tmp_path), "sample", False):
        assert "PeerError" in error
        assert "student.model.0.weight (as rank 0 has it): another value on ranks [1, 2]" in error
        assert "student.optim.state.0.weight.exp_avg" in error
        assert "gradients are not reduced" in error
    assert not os.path.exists(tmp_path / "latest"), "nothing was saved"
    assert pools[3].run(train_past_the_wrapper, str(tmp_path / "a"), "all", True) == [""] * 3
    assert pools[3].run(train_past_the_wrapper, str(tmp_path / "b"), "off", False) == [""] * 3


def drift_in_turn(run: str) -> list[str]:
    """Two tensors of which only one is in a save's sample, the second of which drifts."""
    from engine.transfer import replicas

    torch.manual_seed(0)
    model = nn.ParameterDict({"a": torch.zeros(64), "b": torch.full((64,), float(dist.get_rank()))})
    real, replicas.SAMPLE_BYTES = replicas.SAMPLE_BYTES, 256
    try:
        checkpointer = Checkpointer(run, model, timeout_seconds=20)
        return [told(lambda: checkpointer.save(Progress(step=step))) for step in (1, 2)]
    finally:
        replicas.SAMPLE_BYTES = real


def test_a_sample_goes_round(pools: Pools, tmp_path):
    first, second = pools[2].run(drift_in_turn, str(tmp_path))[1]
    assert first == ""
    assert "model.b" in second
    assert "model.a" not in second


def shard_with_replicas(run: str, drift: bool) -> str:
    """HSDP: rows over two ranks, each piece held by two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    if drift and dist.get_rank() == 3:
        model.weight._local_tensor.data[0, 0] += 1  # type: ignore[union-attr]
    return told(lambda: Checkpointer(run, model, timeout_seconds=20).save(Progress(step=1)))


def test_holders_of_one_piece_are_compared(pools: Pools, tmp_path):
    assert pools[4].run(shard_with_replicas, str(tmp_path / "a"), False) == [""] * 4
    for error in pools[4].run(shard_with_replicas, str(tmp_path / "b"), True):
        assert "model.weight (as rank 1 has it): another value on ranks [3]" in error
        assert "model.bias" not in error


class Position:
    """A member with a state of each rank's own, of many kinds."""

    def __init__(self) -> None:
        self.state = {"at": dist.get_rank() * 10, "noise": torch.arange(3) + dist.get_rank(), "by": ({"x": b"\x00" * dist.get_rank()},)}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def save_own(run: str) -> None:
    Checkpointer(run, nn.Linear(2, 2).requires_grad_(False).apply(_zero), position=PerRank(Position())).save(Progress(step=1))


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def resume_own(run: str, **resume) -> tuple[str, dict]:
    member = Position()
    saved, member.state = member.state, {"at": -1, "noise": torch.zeros(3), "by": ()}
    error = told(lambda: Checkpointer(run, nn.Linear(2, 2), position=PerRank(member)).resume("latest", **resume))
    if not error and not resume:
        assert repr(member.state) == repr(saved)
    return error, member.state


def test_each_rank_gets_its_own_state_back(pools: Pools, tmp_path):
    pools[2].run(save_own, str(tmp_path))
    assert [error for error, _ in pools[2].run(resume_own, str(tmp_path))] == ["", ""]
    for error, state in pools[3].run(resume_own, str(tmp_path)):
        assert "IncompatibleCheckpoint" in error
        assert "saved on 2 ranks; here are 3" in error
        assert state["at"] == -1
    for error, state in pools[3].run(resume_own, str(tmp_path), allow_missing=["position"]):
        assert error == ""
        assert state["at"] == -1, "it starts anew"


def shadow(run: str, load: bool) -> list[float]:
    """An EMA that is no module: tensors in a plain state dict, sharded like FSDP2's parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1 if load else 0)
    model = nn.Linear(6, 5)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    class Ema:
        def __init__(self) -> None:
            self.values, self.decay = [p.detach() * 2 for p in model.parameters()], 0.5

        def state_dict(self):
            return {"values": self.values, "decay": self.decay}

        def load_state_dict(self, state):
            self.values, self.decay = state["values"], state["decay"]

    ema = Ema()
    checkpointer = Checkpointer(run, model, ema=ema, data=ElasticSampler(range(8), 4 * dist.get_world_size(), drop_last=False))
    if load:
        ema.decay = 0.0
        checkpointer.resume("latest")
        assert ema.decay == 0.5
        assert all(type(value).__name__ == "DTensor" for value in ema.values)
    else:
        checkpointer.save(Progress(step=1))
    return [x for value in ema.values for x in value.full_tensor().flatten().tolist()]  # type: ignore[union-attr]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_tensors_of_an_object_are_sharded_and_resharded_like_a_models(pools: Pools, tmp_path, world):
    saved = pools[2].run(shadow, str(tmp_path), False)[0]
    assert pools[world].run(shadow, str(tmp_path), True)[0] == saved
