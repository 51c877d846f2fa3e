"""Loads from another sharding, on real gloo ranks of this machine: the bytes that all ranks read together, and the seconds, against
DCP's FileSystemReader on the same DTensors.

Bytes are counted where the storage is called (every byte of shard files, indexes and manifest) and by the kernel (``rchar`` of
``/proc/self/io``), and divided by the bytes of the tensors. Each load is checked bit by bit. Seconds are medians of interleaved pairs,
of the slowest rank.
"""

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from benchmarks.harness import Result, interleaved, main, median
from benchmarks.pool import Pools
from engine import Checkpointer, Progress
from engine.storage import local

_WIDTH = 1024


@dataclass(frozen=True)
class Case:
    """``dims``: of which tensor dimension FSDP2 cuts, saved and loaded; None for ZeRO-3."""

    name: str
    ranks: tuple[int, int]
    dims: tuple[int, int] | None = (0, 0)


CASES = (
    Case("fsdp2 unchanged", (2, 2)),
    Case("fsdp2 2 → 4", (2, 4)),
    Case("fsdp2 2 → 8", (2, 8)),
    Case("fsdp2 rows → columns", (8, 8), (0, 1)),
    Case("zero3 2 → 4", (2, 4), None),
)


def build(dim: int | None, layers: int, seed: int) -> Any:
    """A member for the checkpointer, alike on all ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(layers)))
    if dim is not None:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), shard_placement_fn=lambda p: Shard(min(dim, p.dim() - 1)))
        return model
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True}
    config |= {"gradient_clipping": 0.0, "zero_force_ds_cpu_optimizer": False}
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config, dist_init_required=False)
    wrapped.backward(wrapped(torch.randn(2, _WIDTH)).square().mean())
    wrapped.step()
    return wrapped


def save(dim: int | None, layers: int, folder: str) -> None:
    member = build(dim, layers, seed=0)
    Checkpointer(f"{folder}/ours", member, max_in_flight=0).save(Progress(step=1))
    if dim is not None:
        dcp.save({"model": member.state_dict()}, storage_writer=dcp.FileSystemWriter(f"{folder}/dcp"))
    else:
        member.destroy()


def load(dim: int | None, layers: int, folder: str, theirs: bool) -> dict[str, Any]:
    """On every rank: the seconds and bytes of one load into other values, which then equal the saved ones."""
    warnings.simplefilter("ignore")
    expected = [p.to_local().clone() for p in build(dim, layers, seed=0).parameters()] if dim is not None else []
    member = build(dim, layers, seed=1)
    checkpointer = Checkpointer(f"{folder}/ours", member, max_in_flight=0)
    state = {"model": member.state_dict()} if theirs else {}

    def act() -> None:
        if theirs:
            dcp.load(state, storage_reader=dcp.FileSystemReader(f"{folder}/dcp"))
        else:
            checkpointer.resume("latest")

    found = _measured(act)
    if dim is None:
        assert checkpointer.max_difference() == 0.0
        member.destroy()
    else:
        assert all(torch.equal(p.to_local(), e) for p, e in zip(member.parameters(), expected, strict=True))
    return found


def _measured(act: Callable[[], None]) -> dict[str, Any]:
    with _counted() as sizes:
        dist.barrier()
        before, began = _rchar(), time.perf_counter()
        act()
        return {"seconds": time.perf_counter() - began, "rchar": _rchar() - before, "bytes": sum(sizes)}


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The size of every read of our storage."""
    sizes: list[int] = []
    real = local._LocalReader.read_into

    def read_into(self: Any, offset: int, target: memoryview) -> None:
        sizes.append(len(target))
        real(self, offset, target)

    local._LocalReader.read_into = read_into  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        local._LocalReader.read_into = real  # type: ignore[method-assign]


def _rchar() -> int:
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def run_case(case: Case, pools: Pools, layers: int, pairs: int) -> dict[str, Any]:
    folder = tempfile.mkdtemp(prefix="lockstep_reshard_")
    (saved_on, loaded_on), (saved_dim, loaded_dim) = case.ranks, case.dims or (None, None)
    layers = layers if case.dims else layers // 3  # ZeRO-3 has two moments beside each weight
    payload = layers * (_WIDTH + 1) * _WIDTH * 4 * (1 if case.dims else 3)
    row: dict[str, Any] = {"case": case.name, "ranks": f"{saved_on} → {loaded_on}", "payload_mb": payload / 1e6}

    def measured(theirs: bool) -> float:
        found = pools[loaded_on].run(load, loaded_dim, layers, folder, theirs)
        which = "_dcp" if theirs else ""
        row[f"read{which}"] = sum(one["rchar" if theirs else "bytes"] for one in found) / payload
        row[f"rchar{which}"] = sum(one["rchar"] for one in found) / payload
        return max(one["seconds"] for one in found)

    try:
        pools[saved_on].run(save, saved_dim, layers, folder)
        measured(False)  # the first load of a process imports and connects
        if case.dims:
            measured(True)
            ours, theirs = interleaved(pairs, lambda: measured(False), lambda: measured(True))
            return row | {"seconds": median(ours), "seconds_dcp": median(theirs)}
        return row | {"seconds": median(measured(False) for _ in range(pairs))}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(quick: bool) -> Result:
    pools, rows = Pools(), []
    try:
        rows = [run_case(case, pools, 9 if quick else 24, 3 if quick else 5) for case in CASES]
    finally:
        pools.close()
    against = [row for row in rows if "seconds_dcp" in row]
    return rows, {
        "worst_read_amplification": max(row["read"] for row in rows),
        "worst_read_amplification_rchar": max(row["rchar"] for row in rows),
        "worst_read_amplification_dcp": max(row["read_dcp"] for row in against),
        "unchanged_read_amplification": rows[0]["read"],
        "load_seconds": sum(row["seconds"] for row in against),
        "load_seconds_dcp": sum(row["seconds_dcp"] for row in against),
        "load_over_dcp": sum(row["seconds"] for row in against) / sum(row["seconds_dcp"] for row in against),
    }


if __name__ == "__main__":
    main(measure, __doc__, ("case", "ranks", "payload_mb", "read", "rchar", "read_dcp", "seconds", "seconds_dcp"))
