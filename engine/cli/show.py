"""``engine show``: what a step holds. Reads the manifest and the heads of indexes, no chunk and no tensor."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import msgspec
from msgspec.structs import replace

from engine.cli.target import locate
from engine.cli.text import dump, megabytes, moment, numbers, say, table
from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import REPLICATED, Absent, Grid, Layout, LogicalTensor, Part, shifted
from engine.format.record import Array, Reference, decode_record
from engine.state.boxes import holders, part_box
from engine.transfer.stored import StoredCheckpoint

_SHOWN_RANKS, _SHOWN_PARTS = 32, 4
_AS_THEY_ARE = frozenset({bool, int, str, type(None)})


def show(target: str, pattern: str, as_json: bool) -> None:
    """Print it."""
    told = describe(StoredCheckpoint(*locate(target)), pattern)
    if as_json:
        dump(told)
    else:
        say(*_lines(told))


def describe(stored: StoredCheckpoint, pattern: str = "*") -> dict[str, Any]:
    """Everything as JSON has it. ``tensors`` are those whose name matches."""
    manifest = stored.manifest
    record = decode_record(manifest.record)
    ranks = []
    for writer in range(len(manifest.indexes)):
        index = stored.index(writer)
        files = [{"name": file.name, "size_bytes": file.size_bytes} for file in index.files]
        ranks.append(
            {
                "rank": index.head.rank,
                "frozen": writer >= manifest.summary.world_size,
                "chunks": sum(page.chunks for page in index.head.pages),
                "files": files,
            }
        )
    return {
        "path": stored.where.encode(errors="backslashreplace").decode(),
        **_plain(msgspec.to_builtins(manifest.summary)),
        "record": _plain(record) if isinstance(record, dict) else {},
        "aliases": manifest.aliases,
        "tensors": [_tensor(tensor, manifest.summary.world_size) for tensor in manifest.tensors if fnmatchcase(tensor.name, pattern)],
        "tensors_in_all": len(manifest.tensors),
        "ranks": ranks,
    }


def _plain(value: Any) -> Any:
    """What JSON can carry: no NaN, no bytes."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        if _AS_THEY_ARE.issuperset(map(type, value)):
            return list(value)
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, Reference):
        return f"tensor {value.name}"
    if isinstance(value, Array):
        return f"{value.kind} array, {value.dtype} {list(value.shape)}"
    return str(value) if isinstance(value, complex) else value


def _tensor(tensor: LogicalTensor, world_size: int) -> dict[str, Any]:
    stored = [part for part in tensor.parts if not isinstance(part.layout, Absent)]
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "layout": _layouts(tensor, stored, world_size),
        "absent": [_slices(tensor, part) for part in tensor.parts if isinstance(part.layout, Absent)],
        "stored_bytes": sum(part_box(tensor, part).numel for part in stored) * ITEM_BYTES[tensor.dtype],
    }


def _layouts(tensor: LogicalTensor, stored: list[Part], world_size: int) -> str:
    told = []
    for part in stored[:_SHOWN_PARTS]:
        place = f"{_slices(tensor, part)} " if part.sizes else ""
        told.append(f"{place}{_layout(part.layout, world_size)}{f', kept as {part.narrow}' if part.narrow else ''}")
    return "; ".join(told) + (f"; and {len(stored) - _SHOWN_PARTS} more parts" if len(stored) > _SHOWN_PARTS else "")


def _layout(layout: Layout, world_size: int) -> str:
    assert not isinstance(layout, Absent)
    ranks, first = layout.mesh.size, layout.mesh.rank_at(0)
    if first >= world_size:  # further writers
        return f"frozen, {_layout(replace(layout, mesh=shifted(layout.mesh, -world_size)), world_size)}"
    if not isinstance(layout, Grid):
        return f"flat over {ranks} ranks, {layout.chunk} elements each, from {layout.start}"
    cuts = [f"dim {dim} in {count}" for dim, count in zip(layout.dims, layout.mesh.shape, strict=True) if dim != REPLICATED and count > 1]
    copies = holders(layout)
    if not cuts:
        return f"whole, on {ranks} ranks" if ranks > 1 else f"whole, on rank {first}"
    return ", ".join(cuts) + (f", on {copies} ranks each" if copies > 1 else "")


def _slices(tensor: LogicalTensor, part: Part) -> str:
    """As one would index it: [0:2] are rows."""
    box = part_box(tensor, part)
    ranges = [f"{o}:{o + n}" for o, n in zip(box.offsets, box.sizes, strict=True)]
    while ranges and box.offsets[len(ranges) - 1] == 0 and box.sizes[len(ranges) - 1] == tensor.shape[len(ranges) - 1]:
        ranges.pop()
    return f"[{', '.join(ranges) or ':'}]"


def _lines(told: Mapping[str, Any]) -> list[str]:
    record = told["record"]
    line = " → ".join(f"{line['name']} (from step {line['parent_step']})" if i else line["name"] for i, line in enumerate(_named(told["lineage"])))
    best = f"step {told['best_step']} by {told['monitor']} ({told['mode']})" if told["best_step"] >= 0 else "nothing is monitored"
    facts = {
        "step": f"{told['step']}, {told['epoch']} epochs completed, {told['samples']} samples",
        "saved": f"{moment(told['created'])} UTC by {told['engine']} on {told['world_size']} ranks (attempt {told['attempt']})",
        "line": line,
        "metrics": numbers({name: float(value) for name, value in told["metrics"].items()}) or "none",
        "best": best,
        "size": f"{megabytes(told['size_bytes'])} MB, {told['tensors_in_all']} tensors",
    }
    lines = [told["path"], *(f"  {name:8} {value}" for name, value in facts.items())]
    for title, value in record.items():
        if title == "models" and isinstance(value, dict):
            lines += ["", "models", *(f"  {text}" for name, model in value.items() for text in _model(name, model))]
        elif value not in ({}, [], None):
            lines += ["", title, *_nested(value)]
    return [*lines, *_tensor_lines(told), *_rank_lines(told["ranks"])]


def _named(lineage: list[Any]) -> list[dict[str, Any]]:
    return [{"name": name, "parent_step": parent} for name, parent in lineage]


def _model(name: str, model: Any) -> list[str]:
    if not isinstance(model, dict):
        return [f"{name or 'model'}: {model}"]
    lines, groups = [f"{name or 'model'}: {model.get('engine', '?')}, {model.get('optimizer', 'no optimizer')}"], model.get("groups")
    for number, group in enumerate(groups if isinstance(groups, list) else []):
        if isinstance(group, dict) and isinstance(group.get("values"), dict) and isinstance(group.get("params"), list):
            values = " ".join(f"{key}={value}" for key, value in group["values"].items())
            lines.append(f"  group {number}, {len(group['params'])} parameters: {values}")
    rest = {key: value for key, value in model.items() if key not in ("engine", "optimizer", "groups") and value not in ({}, [], None)}
    return lines + [f"  {key}: {_short(value)}" for key, value in rest.items()]


def _nested(value: Any) -> list[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [("", value)]
    return [f"  {key}: {_short(inner)}" for key, inner in items]


def _short(value: Any, most: int = 200) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def _tensor_lines(told: Mapping[str, Any]) -> list[str]:
    rows = [
        [t["name"], t["dtype"], str(t["shape"]), t["layout"] or "-", " ".join(t["absent"]), megabytes(t["stored_bytes"])] for t in told["tensors"]
    ]
    count = f"{len(rows)} of {told['tensors_in_all']}"
    return ["", f"tensors ({count})", *table(["name", "dtype", "shape", "layout", "absent", ">MB"], rows, "  ")]


def _rank_lines(ranks: list[dict[str, Any]]) -> list[str]:
    """Of very many ranks, the first ones and the extremes."""
    sizes = [sum(file["size_bytes"] for file in rank["files"]) for rank in ranks]
    rows = [
        [str(rank["rank"]), str(rank["chunks"]), megabytes(size), " ".join(file["name"] for file in rank["files"])]
        for rank, size in zip(ranks[:_SHOWN_RANKS], sizes, strict=False)
    ]
    lines = ["", "ranks", *table([">rank", ">shards", ">MB", "files"], rows, "  ")]
    if len(ranks) > _SHOWN_RANKS:
        lines.append(f"  … {len(ranks)} ranks, {megabytes(min(sizes))} to {megabytes(max(sizes))} MB each")
    return lines
