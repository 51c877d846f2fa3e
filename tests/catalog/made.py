"""Steps made by hand: a manifest, and a file to go with it. No training, no torch."""

import math
import os
from pathlib import Path

from engine.format.manifest import Line, Manifest, Summary, encode_manifest
from engine.format.names import step_name
from engine.format.record import encode_record

LINE = (Line("a", 0),)


def summary(step: int, lineage=LINE, **changes) -> Summary:
    fields = {
        "engine": "single", "world_size": 1, "epoch": step // 100, "step": step, "samples": 8 * step, "created": float(step), "attempt": "",
        "lineage": lineage, "metrics": {}, "monitor": "", "mode": "", "best_step": -1, "tensors": 0, "size_bytes": 0,
    }  # fmt: skip
    return Summary(**(fields | changes))


def branch(*parents: int) -> tuple[Line, ...]:
    """``branch(20, 50)``: line a, left at 20 for line b, left at 50 for line c."""
    return tuple(Line("abcdefgh"[i], parent) for i, parent in enumerate((0, *parents)))


def manifest(of: Summary, record=None) -> Manifest:
    return Manifest(of, (), {}, (), encode_record(record or {}))


def commit(run: Path, step: int, lineage=LINE, record=None, latest=False, **changes) -> str:
    """A committed step, straight on disk."""
    name = step_name(step)
    (run / name).mkdir(parents=True)
    (run / name / "manifest").write_bytes(encode_manifest(manifest(summary(step, lineage, **changes), record)))
    if latest:
        (run / "latest").write_text(f"{name}\n")
    return name


def monitored(value: float, mode: str = "min") -> dict:
    return {"metrics": {"val_loss": value}, "monitor": "val_loss", "mode": mode}


def spoil(run: Path, step: int) -> None:
    (run / step_name(step) / "manifest").write_bytes(b"damaged")


def everything(run: Path) -> dict[str, bytes | None]:
    """All that lies below, hidden or not."""
    found = {}
    for folder, folders, files in os.walk(run):
        found |= {os.path.relpath(os.path.join(folder, name), run): None for name in folders}
        found |= {os.path.relpath(os.path.join(folder, name), run): Path(folder, name).read_bytes() for name in files}
    return found


NAN = math.nan
