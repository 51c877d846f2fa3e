"""Does a checkpoint fit the live state? Names, shapes and dtypes, both sides, with what may be allowed."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.errors import IncompatibleCheckpoint
from engine.format.layout import LogicalTensor

_SHOWN = 8


@dataclass(frozen=True)
class Allow:
    """Patterns (fnmatch, over full names such as ``generator.model.head.weight``) of differences to accept.

    ``missing``: live tensors that the checkpoint lacks keep their values. ``unexpected``: stored tensors without a live
    counterpart are left out. ``cast``: a dtype that differs is converted (rounding to nearest even).
    """

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    cast: Sequence[str] = ()


@dataclass
class Match:
    """``pairs``: live name → stored tensor. The rest was allowed and is for the log."""

    pairs: dict[str, LogicalTensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    cast: list[str] = field(default_factory=list)


def match(
    live: Iterable[LogicalTensor], stored: Mapping[str, LogicalTensor], stored_names: Mapping[str, str], allow: Allow, also_used: Iterable[str] = ()
) -> Match:
    """Pair live tensors with stored ones. Raises :class:`IncompatibleCheckpoint` listing every difference of both sides."""
    found = Match()
    used = set(also_used)
    missing, shapes, dtypes = [], [], []
    for tensor in live:
        name = stored_names.get(tensor.name, tensor.name)
        other = stored.get(name)
        if other is None:
            (found.missing if _allowed(tensor.name, allow.missing) else missing).append(tensor.name)
            continue
        used.add(name)
        if other.shape != tensor.shape:
            shapes.append(f"{tensor.name}: {list(tensor.shape)} here, {list(other.shape)} in the checkpoint")
            continue
        if other.dtype != tensor.dtype:
            if _allowed(tensor.name, allow.cast):
                found.cast.append(f"{tensor.name}: {other.dtype} to {tensor.dtype}")
            else:
                dtypes.append(f"{tensor.name}: {tensor.dtype} here, {other.dtype} in the checkpoint")
        found.pairs[tensor.name] = other
    unexpected = []
    for name in stored:
        if name not in used:
            (found.unexpected if _allowed(name, allow.unexpected) else unexpected).append(name)
    _refuse(missing, unexpected, shapes, dtypes)
    return found


def match_names(live: Iterable[str], stored: Iterable[str], allow: Allow) -> None:
    """The same for members that hold plain values. Raises :class:`IncompatibleCheckpoint`."""
    live, stored = set(live), set(stored)
    missing = sorted(n for n in live - stored if not _allowed(n, allow.missing))
    unexpected = sorted(n for n in stored - live if not _allowed(n, allow.unexpected))
    if missing or unexpected:
        raise IncompatibleCheckpoint(
            f"members differ: {missing or 'none'} only in this run (allow_missing), {unexpected or 'none'} only in the checkpoint (allow_unexpected)"
        )


def _allowed(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _refuse(missing: list[str], unexpected: list[str], shapes: list[str], dtypes: list[str]) -> None:
    told = [
        _told(missing, "in the model here but not in the checkpoint", "allow_missing=[patterns] keeps their present values"),
        _told(unexpected, "in the checkpoint but not in the model here", "allow_unexpected=[patterns] leaves them out"),
        _told(shapes, "of another shape", "the architecture differs; build the model that was saved"),
        _told(dtypes, "of another dtype", "allow_cast=[patterns] converts them"),
    ]
    if any(told):
        raise IncompatibleCheckpoint("the checkpoint does not fit this run:\n" + "\n".join(t for t in told if t))


def _told(names: list[str], what: str, remedy: str) -> str:
    if not names:
        return ""
    more = f"\n    … and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {len(names)} tensors {what} ({remedy}):\n    " + "\n    ".join(names[:_SHOWN]) + more
