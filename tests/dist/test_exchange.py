"""Loads in which ranks need what others read: bit-equal, each block read once, and a failure of one is everyone's within seconds."""

import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks import reshard
from benchmarks.pool import Pool, Pools
from engine import Progress
from engine.format.checksum import BLOCK_BYTES
from engine.format.manifest import shard_name
from engine.storage import local
from engine.transfer import exchange, read
from tests.dist.jobs import told
from tests.now import Checkpointer

SHAPES = {"large": (1300, 777), "ragged": (7, 5), "rows": (3, 4000), "one": (1,), "cube": (17, 9, 11), "long": (70_001,), "narrow": (1000, 33)}


def build(seed: int, dim: int | None) -> nn.Module:
    """Uneven shapes, one of them in another dtype, cut along ``dim`` (the last one, at most), or alike on all ranks."""
    torch.manual_seed(seed)
    values = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    values["narrow"] = values["narrow"].bfloat16()
    if dim is not None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        values = {name: distribute_tensor(value, mesh, [Shard(min(dim, value.dim() - 1))]) for name, value in values.items()}
    return nn.ParameterDict({name: nn.Parameter(value) for name, value in values.items()})


def local_values(model: nn.Module) -> list[torch.Tensor]:
    return [(p.to_local() if hasattr(p, "to_local") else p).detach().clone() for p in model.parameters()]


def save(run: str, dim: int | None) -> None:
    Checkpointer(run, build(0, dim)).save(Progress(step=1))


def load(run: str, dim: int | None) -> bool:
    expected, model = local_values(build(0, dim)), build(1, dim)
    checkpointer = Checkpointer(run, model, timeout_seconds=30)
    checkpointer.resume("latest")
    assert checkpointer.max_difference() == 0.0
    return all(torch.equal(a, b) for a, b in zip(local_values(model), expected, strict=True))


@pytest.mark.parametrize(
    ("source", "target"),
    [((1, 0), (3, 0)), ((2, 0), (3, 0)), ((3, 0), (2, 1)), ((3, 1), (3, 0)), ((4, 0), (1, 0)), ((2, 1), (4, 0)), ((4, 0), (4, 2)), ((4, 1), (3, 1))],
)
def test_ragged_shapes_arrive_bit_equal(pools: Pools, tmp_path, source, target):
    (saved_on, saved_dim), (loaded_on, loaded_dim) = source, target
    pools[saved_on].run(save, str(tmp_path), saved_dim)
    assert all(pools[loaded_on].run(load, str(tmp_path), loaded_dim))


@contextmanager
def small_rounds():
    """Many of them, of little, as a large state on many ranks has."""
    from engine.plan import exchange as plan

    real = plan.PARCEL_BYTES, plan.CELL_BYTES
    plan.PARCEL_BYTES, plan.CELL_BYTES = BLOCK_BYTES, BLOCK_BYTES
    try:
        yield
    finally:
        plan.PARCEL_BYTES, plan.CELL_BYTES = real


def load_in_small_rounds(run: str, dim: int) -> tuple[bool, int]:
    sent = []
    real = exchange._Channel.send

    def send(self, parcels, sizes):
        sent.append(sum(sizes))
        return real(self, parcels, sizes)

    exchange._Channel.send = send
    try:
        with small_rounds():
            return load(run, dim), len(sent)
    finally:
        exchange._Channel.send = real


def test_many_small_rounds(pools: Pools, tmp_path):
    pools[3].run(save, str(tmp_path), 0)
    for equal, rounds in pools[3].run(load_in_small_rounds, str(tmp_path), 1):
        assert equal
        assert rounds > 6


def load_watched(run: str, dim: int | None) -> dict:
    """Which bytes of shard files this rank reads, and whether ranks were connected for it."""
    found: list[tuple[str, int, int]] = []
    real, connect, connected = local._LocalReader.read_into, dist.new_group, []

    def read_into(self, offset, target):
        found.append((Path(self._path).name, offset, offset + len(target)))
        real(self, offset, target)

    def new_group(*args, **kwargs):
        connected.append(kwargs["backend"])
        return connect(*args, **kwargs)

    model = build(1, dim)
    expected = local_values(build(0, dim))
    checkpointer = Checkpointer(run, model, timeout_seconds=30)
    local._LocalReader.read_into, dist.new_group = read_into, new_group
    try:
        checkpointer.resume("latest")
    finally:
        local._LocalReader.read_into, dist.new_group = real, connect
    assert all(torch.equal(a, b) for a, b in zip(local_values(model), expected, strict=True))
    return {"read": [one for one in found if one[0].endswith(".safetensors")], "connected": connected}


@pytest.mark.parametrize(("source", "target"), [((2, 0), (4, 0)), ((3, 0), (3, 1)), ((3, None), (3, None)), ((4, 0), (3, 0))])
def test_no_byte_of_a_shard_file_is_read_twice(pools: Pools, tmp_path, source, target):
    pools[source[0]].run(save, str(tmp_path), source[1])
    found = pools[target[0]].run(load_watched, str(tmp_path), target[1])
    ranges = sorted(one for rank in found for one in rank["read"])
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(ranges)), "read twice"
    files = {path.name: path.stat().st_size for path in tmp_path.glob("step_00000001/*.safetensors")}
    assert sum(stop - start for _, start, stop in ranges) == sum(files.values()), "all of it, headers too"
    assert all(rank["connected"] == ["gloo"] for rank in found)


@pytest.mark.parametrize("dim", [0, 1])
def test_an_unchanged_sharding_connects_nobody(pools: Pools, tmp_path, dim):
    pools[3].run(save, str(tmp_path), dim)
    for rank, found in enumerate(pools[3].run(load_watched, str(tmp_path), dim)):
        assert found["connected"] == []
        assert {name for name, *_ in found["read"]} == {shard_name(rank, 0)}


@pytest.mark.parametrize("case", [case for case in reshard.CASES if max(case.ranks) < 8], ids=lambda case: case.name)
def test_all_ranks_together_read_hardly_more_than_is_needed(pools: Pools, tmp_path, case):
    """With indexes, headers and manifest; by our count and by the kernel's."""
    (saved_on, loaded_on), (saved_dim, loaded_dim) = case.ranks, case.dims or (None, None)
    pools[saved_on].run(reshard.save, saved_dim, 3, str(tmp_path))
    found = pools[loaded_on].run(reshard.load, loaded_dim, 3, str(tmp_path), False)
    payload = 3 * 1025 * 1024 * 4 * (1 if case.dims else 3)
    assert payload <= sum(one["bytes"] for one in found) <= 1.05 * payload
    assert payload <= sum(one["rchar"] for one in found) <= 1.05 * payload


def resume_told(run: str, dim: int, timeout_seconds: float = 30.0) -> tuple[str, float]:
    checkpointer = Checkpointer(run, build(1, dim), timeout_seconds=timeout_seconds)
    began = time.perf_counter()
    return told(lambda: checkpointer.resume("latest", corrupt="error")), time.perf_counter() - began


@pytest.mark.parametrize("writer", [0, 2])
@pytest.mark.parametrize("damage", ["flip", "header", "truncate", "remove"])
def test_damage_that_one_home_finds_is_told_to_all_alike(pools: Pools, tmp_path, writer, damage):
    pools[3].run(save, str(tmp_path), 0)
    path = tmp_path / "step_00000001" / shard_name(writer, 0)
    data = bytearray(path.read_bytes())
    if damage in ("flip", "header"):
        data[len(data) // 2 if damage == "flip" else 100] ^= 1
    path.unlink()
    if damage != "remove":
        path.write_bytes(data[:-1] if damage == "truncate" else data)
    found = pools[3].run(resume_told, str(tmp_path), 1)
    words = {"flip": "the checksum of bytes", "header": "its header has changed", "truncate": "bytes, ", "remove": "is missing"}
    for rank, (error, seconds) in enumerate(found):
        assert error.startswith("CheckpointCorrupt")
        assert f"{path.name}, written by rank {writer}" in error
        assert words[damage] in error
        assert "partly overwritten" in error
        assert rank == writer or f"rank {writer} failed" in error
        assert seconds < 10


def test_the_step_before_is_taken_by_all_when_one_home_finds_damage(pools: Pools, tmp_path):
    pools[3].run(save, str(tmp_path), 0)
    pools[3].run(save_again, str(tmp_path))
    path = tmp_path / "step_00000002" / shard_name(1, 0)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert pools[3].run(resume_step, str(tmp_path)) == [(1, True)] * 3


def save_again(run: str) -> None:
    checkpointer = Checkpointer(run, build(5, 0))
    checkpointer.resume("latest")
    checkpointer.save(Progress(step=2))


def resume_step(run: str) -> tuple[int, bool]:
    expected, model = local_values(build(0, 1)), build(1, 1)
    progress = Checkpointer(run, model, timeout_seconds=30).resume("latest")
    return progress.step, all(torch.equal(a, b) for a, b in zip(local_values(model), expected, strict=True))


def resume_with_a_stuck_rank(run: str) -> tuple[str, float]:
    real = read.FileReader.read

    def stuck(self, run):
        if dist.get_rank() == 1:
            time.sleep(6)
        real(self, run)

    read.FileReader.read = stuck  # type: ignore[method-assign]
    return resume_told(run, 1, 2.0)


def test_a_stuck_rank_is_an_error_after_the_timeout(pools: Pools, tmp_path):
    pools[2].run(save, str(tmp_path), 0)
    pool = Pool(2)
    try:
        found = pool.run(resume_with_a_stuck_rank, str(tmp_path), timeout_seconds=60)
        assert all(error.startswith("PeerError") for error, _ in found), found
        assert "ranks [1] did not report" in found[0][0]
        assert found[0][1] < 10
    finally:
        pool.close()
