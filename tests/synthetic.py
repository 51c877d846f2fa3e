"""Steps of any number of ranks and any layouts, written by this one process: the files that such a job would write."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from engine.format.layout import REPLICATED, Absent, Grid, LogicalTensor, Mesh, Part
from engine.format.manifest import IndexEntry, Line, Manifest, Summary
from engine.format.names import step_name
from engine.format.record import encode_record
from engine.plan.assign import assign_writers
from engine.plan.image import Source, shard_layout
from engine.plan.order import reading_order
from engine.state.boxes import Box, part_box, written_boxes
from engine.state.shard import dtype_name
from engine.storage import LocalStorage
from engine.transfer.commit import commit_attempt
from engine.transfer.stage import LiveImages
from engine.transfer.write import write_shards

WHOLE = (Part(Grid(Mesh((1,)), (REPLICATED,))),)

RECORD = {
    "progress": {"epoch": 1, "step": 1, "samples": 8, "metrics": {"val_loss": 0.5}, "history": [], "best": None, "stale": 0, "wandb_run_id": ""},
    "models": {
        "": {
            "engine": "synthetic",
            "counters": {},
            "optimizer": "AdamW",
            "optimizer_class": "AdamW",
            "int_steps": False,
            "groups": [{"params": ["w"], "values": {"lr": 0.1, "betas": (0.9, 0.999)}}],
            "scalars": {},
            "stateless": [],
        }
    },
    "objects": {"sampler": {"seed": 3, "samples": 8}},
    "per_rank": [],
    "config": {"width": 3},
}


@contextlib.contextmanager
def unsynced():
    """Property tests write thousands of files; that they are durable is not what is tested."""
    with mock.patch.object(os, "fsync"):
        yield


def write_step(
    run: str | os.PathLike[str], values: Mapping[str, torch.Tensor], parts: Mapping[str, tuple[Part, ...]] | None = None, **changes: Any
) -> Path:
    """``parts`` by name; what is not named is whole on rank 0. ``changes``: record, aliases, world_size, and fields of the summary."""
    described = assign_writers(
        LogicalTensor(name, dtype_name(value.dtype), tuple(value.shape), (parts or {}).get(name, WHOLE)) for name, value in values.items()
    )
    order, classes = reading_order(described)
    listed = tuple(described[place] for place in order)
    meshes = [part.layout.mesh for tensor in listed for part in tensor.parts if not isinstance(part.layout, Absent)]
    world_size = changes.pop("world_size", max((mesh.largest + 1 for mesh in meshes), default=1))
    step, storage, attempt = changes.get("step", 1), LocalStorage(run), ".writing"
    storage.make_folder(attempt)
    entries, total = [], 0
    for rank in range(world_size):
        entry, size_bytes = _write_rank(storage, attempt, rank, listed, classes, values)
        entries.append(entry)
        total += size_bytes
    known = {
        "engine": "synthetic", "world_size": world_size, "epoch": 1, "step": step, "samples": 8 * step, "created": 1.7e9 + step, "attempt": attempt,
        "lineage": (Line("a", 0),), "metrics": {"val_loss": 0.5}, "monitor": "", "mode": "", "best_step": -1, "tensors": len(listed),
        "size_bytes": total,
    }  # fmt: skip
    record, aliases = encode_record(changes.pop("record", RECORD)), changes.pop("aliases", {})
    commit_attempt(storage, attempt, Manifest(Summary(**{**known, **changes}), listed, aliases, tuple(entries), record))
    return Path(storage.root, step_name(step))


def _write_rank(storage, folder, rank, listed, classes, values) -> tuple[IndexEntry, int]:
    sources, views = [], []
    for tensor in listed:
        for part in tensor.parts:
            for box in written_boxes(tensor, part, rank):
                view = values[tensor.name][region(box)].contiguous()
                sources.append(Source(len(views), tensor.name, tensor.dtype, box.offsets, box.sizes, view.numel() * view.element_size()))
                views.append(view)
    layout = shard_layout(rank, sources, {tensor.name: number for number, tensor in enumerate(listed)}, classes)
    record = encode_record({"rng": {"seed": rank}, "objects": {}})
    written = write_shards(storage, folder, layout, LiveImages(layout, views), record)
    return written.index, written.size_bytes


def region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))


def with_fills(value: torch.Tensor, tensor_parts: tuple[Part, ...]) -> torch.Tensor:
    """As a reader would see it: what is declared absent has the fill value."""
    value = value.clone()
    tensor = LogicalTensor("", dtype_name(value.dtype), tuple(value.shape), tensor_parts)
    for part in tensor_parts:
        if isinstance(part.layout, Absent):
            value[region(part_box(tensor, part))] = part.layout.fill
    return value
