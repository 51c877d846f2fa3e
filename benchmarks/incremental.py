"""What later saves of a partly frozen run write: adapters beside a frozen base, and a model of which one half is frozen. Two ranks.

Under FSDP2, ten saves with a real step before each. A later save's new bytes are those of the files whose inode no earlier step
has, over the bytes that change: trainable parameters and their optimizer state. Beside it what a full save takes, and DeepSpeed's
``save_checkpoint(exclude_frozen_parameters=True)`` of the same model under ZeRO-2, which leaves the frozen weights out altogether.
The last step is then loaded into another model and must be equal.
"""

import os
import shutil
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.harness import Result, Row, main, median
from benchmarks.pool import Pool
from benchmarks.training import quiet, under_zero
from engine import Checkpointer, Progress

_WIDTH = 1024


class Adapted(nn.Module):
    """A frozen matrix, and beside it a trained one of low rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(_WIDTH, _WIDTH, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(_WIDTH, rank, bias=False), nn.Linear(rank, _WIDTH, bias=False)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return x_BD + self.base(x_BD) + self.up(self.down(x_BD))


def _build(kind: str, layers: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "adapters":
        return nn.Sequential(*(Adapted(64) for _ in range(layers)))
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(layers)))
    model[: layers // 2].requires_grad_(False)
    return model


def _under_fsdp2(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.children(), model):
        fully_shard(module, mesh=mesh)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def measure_rank(folder: str, kind: str, layers: int, saves: int) -> dict[str, Any]:
    """All ranks find the same: they look at the whole run's files."""
    quiet()
    model, optimizer = _under_fsdp2(_build(kind, layers, seed=0))
    trainable_bytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    seen: set[tuple[int, int]] = set()
    found: dict[str, Any] = {"trainable_bytes": trainable_bytes, "new_bytes": [], "full_bytes": []}
    checkpointer = Checkpointer(f"{folder}/ours", (model, optimizer))
    for step in range(1, saves + 1):
        model(torch.randn(4, _WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpointer.save(Progress(step=step))
        checkpointer.wait()
        files = [os.stat(entry) for entry in os.scandir(f"{folder}/ours/step_{step:08d}")]
        found["new_bytes"].append(sum(file.st_size for file in files if (file.st_dev, file.st_ino) not in seen))
        found["full_bytes"].append(sum(file.st_size for file in files))
        seen |= {(file.st_dev, file.st_ino) for file in files}
        dist.barrier()
    checkpointer.close()
    found["difference"] = _resumed_difference(f"{folder}/ours", kind, layers)
    found["deepspeed_bytes"] = _deepspeed_bytes(f"{folder}/deepspeed", kind, layers)
    return found


def _resumed_difference(run: str, kind: str, layers: int) -> float:
    checkpointer = Checkpointer(run, _under_fsdp2(_build(kind, layers, seed=1)))
    checkpointer.resume("latest")
    difference = checkpointer.max_difference()
    checkpointer.close()
    return difference


def _deepspeed_bytes(folder: str, kind: str, layers: int) -> int:
    """Of each save: all are alike."""
    engine = under_zero(_build(kind, layers, seed=0), torch.randn(4, _WIDTH), stage=2)
    engine.save_checkpoint(folder, tag="1", exclude_frozen_parameters=True)
    dist.barrier()
    taken = sum(entry.stat().st_size for entry in os.scandir(f"{folder}/1"))
    engine.destroy()
    return taken


def measure(quick: bool) -> Result:
    rows: list[Row] = []
    pool, folder = Pool(2), tempfile.mkdtemp(prefix="lockstep_incremental_")
    try:
        for kind in ("adapters", "half"):
            found = pool.run(measure_rank, f"{folder}/{kind}", kind, 6 if quick else 26, 3 if quick else 10)[0]
            rows.append({"kind": kind, "difference": found["difference"], **_row(found)})
    finally:
        pool.close()
        shutil.rmtree(folder, ignore_errors=True)
    return rows, {
        "later_bytes_over_trainable": max(row["worst_later_mb"] / row["trainable_mb"] for row in rows),
        "full_bytes_over_trainable": max(row["full_mb"] / row["trainable_mb"] for row in rows),
        "deepspeed_bytes_over_trainable": max(row["deepspeed_mb"] / row["trainable_mb"] for row in rows),
        "max_difference": max(row["difference"] for row in rows),
    }


def _row(found: dict[str, Any]) -> Row:
    first, *later = found["new_bytes"]
    taken = {
        "trainable": found["trainable_bytes"],
        "first": first,
        "later": median(later),
        "worst_later": max(later),
        "all": first + sum(later),
        "full": found["full_bytes"][-1],
        "deepspeed": found["deepspeed_bytes"],
    }
    return {f"{name}_mb": taken_bytes / 1e6 for name, taken_bytes in taken.items()}


if __name__ == "__main__":
    main(measure, __doc__)
