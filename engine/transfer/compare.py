"""Compare live state with the files of a step, read by the safetensors package: a second opinion on our own reader."""

import json
from collections.abc import Iterable

import torch
from safetensors import safe_open

from engine.format.dtypes import STORED_AS_BYTES
from engine.state.boxes import Box, intersect
from engine.state.shard import Shard, torch_dtype
from engine.transfer.stored import StoredCheckpoint


def differences(stored: StoredCheckpoint, pairs: Iterable[tuple[Shard, str]], rank: int) -> dict[str, float]:
    """By live name, the largest |live − stored| over what ``rank`` holds; inf where only one is NaN. ``pairs``: live shards with
    their stored names. Elements that are declared absent, in no file, are not compared, nor are types stored as bytes."""
    wanted: dict[str, list[Shard]] = {}
    for shard, name in pairs:
        if stored.tensors[name].dtype not in STORED_AS_BYTES:
            wanted.setdefault(name, []).append(shard)
    largest = {shard.name: 0.0 for shards in wanted.values() for shard in shards}
    for path in _files(stored):
        with safe_open(path, framework="pt") as file:
            sharding = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118 - not a dict
                for shard in wanted.get(name, ()):
                    gap = _difference(shard, file.get_slice(name), tuple(sharding[name]["saved_offsets"]), rank)
                    largest[shard.name] = max(largest[shard.name], gap)
    return largest


def _files(stored: StoredCheckpoint) -> list[str]:
    names = {file.name for writer in range(len(stored.manifest.indexes)) for file in stored.index(writer).files}
    return [f"{stored.where}/{name}" for name in sorted(names)]


def _difference(shard: Shard, saved, offsets: tuple[int, ...], rank: int) -> float:  # noqa: ANN001 - safetensors' slice type is not exported
    box, largest = Box(offsets, tuple(saved.get_shape())), 0.0
    for held, view in shard.held(rank):
        overlap = intersect(held, box)
        if overlap is None:
            continue
        theirs = saved[tuple(slice(o - b, o - b + n) for o, b, n in zip(overlap.offsets, box.offsets, overlap.sizes, strict=True))]
        mine = view[tuple(slice(o - b, o - b + n) for o, b, n in zip(overlap.offsets, held.offsets, overlap.sizes, strict=True))]
        largest = max(largest, _gap(mine.cpu().to(torch_dtype(shard.tensor.dtype)), theirs.to(torch_dtype(shard.tensor.dtype))))
    return largest


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return float((a.to(torch.float64) - b.to(torch.float64)).abs().max().clamp(min=1.0))
    wide = torch.complex128 if a.is_complex() else torch.float64
    gap = (a.to(wide) - b.to(wide)).abs()
    gap = gap.masked_fill((a.isnan() & b.isnan()) | (a == b), 0.0)
    return float(gap.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
