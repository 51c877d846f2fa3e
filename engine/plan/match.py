"""Does a checkpoint fit the live state? Names, shapes and dtypes, both sides, with what may be allowed."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from engine.errors import IncompatibleCheckpoint, UsageError
from engine.format.layout import Absent, LogicalTensor, Part
from engine.options import words
from engine.state.boxes import intersect, part_box

INITIALISATIONS = ("keep", "zeros", "mean")
"""``keep``: as the model here has made them. ``zeros``. ``mean``: each the mean of the stored rows."""

_SHOWN = 8


@dataclass(frozen=True)
class Allow:
    """Patterns (fnmatch, over full names such as ``generator.model.head.weight``) of differences to accept.

    ``missing``: live tensors that the checkpoint lacks keep their values. ``unexpected``: stored tensors without a live
    counterpart are left out. ``cast``: a dtype that differs is converted (rounding to nearest even). ``extend_rows``: by pattern (over
    full names or FQNs), what a parameter's rows beyond the stored ones become, one of :data:`INITIALISATIONS`; its optimizer state is
    zero there. ``resize``: buffers that take the stored shape. ``changed``: values, by the path that an error names, that may be others
    after the resume than in the checkpoint.
    """

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    cast: Sequence[str] = ()
    extend_rows: Mapping[str, str] = field(default_factory=dict)
    resize: Sequence[str] = ()
    changed: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("missing", "unexpected", "cast", "resize", "changed"):
            words(f"allow_{name}", getattr(self, name))
        if not isinstance(self.extend_rows, Mapping):
            raise UsageError(f"extend_rows={self.extend_rows!r}: give a mapping from patterns to one of {', '.join(INITIALISATIONS)}")
        for pattern, how in self.extend_rows.items():
            if how not in INITIALISATIONS:
                raise UsageError(f"extend_rows {pattern!r}: {how!r} is no initialisation; there are {', '.join(INITIALISATIONS)}")


@dataclass
class Match:
    """``pairs``: live name → stored tensor, with rows that it lacks declared absent. ``extended``: live name of a parameter with more
    rows → what they become. The rest was allowed and is for the log."""

    pairs: dict[str, LogicalTensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    cast: list[str] = field(default_factory=list)
    extended: dict[str, str] = field(default_factory=dict)


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
            (found.missing if allowed(tensor.name, allow.missing) else missing).append(tensor.name)
            continue
        used.add(name)
        how = _extension(tensor, other, allow.extend_rows) if other.shape != tensor.shape else ""
        if how:
            other = _extended(other, tensor.shape)
            found.extended[tensor.name] = how
        elif other.shape != tensor.shape:
            fewer = "; rows are never dropped" if other.shape[1:] == tensor.shape[1:] and other.shape > tensor.shape else ""
            shapes.append(f"{tensor.name}: {list(tensor.shape)} here, {list(other.shape)} in the checkpoint{fewer}")
            continue
        rounded = tensor.dtype if other.dtype != tensor.dtype else _rounded(tensor, other)
        if rounded:
            if allowed(tensor.name, allow.cast):
                found.cast.append(f"{tensor.name}: {other.dtype} to {rounded}")
            else:
                dtypes.append(f"{tensor.name}: {rounded} here, {other.dtype} in the checkpoint")
        found.pairs[tensor.name] = other
    unexpected = []
    for name in stored:
        if name not in used:
            (found.unexpected if allowed(name, allow.unexpected) else unexpected).append(name)
    _refuse(missing, unexpected, shapes, dtypes)
    return found


def _extension(live: LogicalTensor, stored: LogicalTensor, patterns: Mapping[str, str]) -> str:
    """What becomes of rows that only the live tensor has; empty where there are none, or they are not allowed."""
    if not live.shape or len(live.shape) != len(stored.shape) or live.shape[1:] != stored.shape[1:] or live.shape[0] <= stored.shape[0]:
        return ""
    for pattern, how in patterns.items():
        if allowed(live.name, (pattern, f"model.{pattern}", f"*.model.{pattern}")):
            return how
        if allowed(live.name, (f"optim.state.{pattern}.*", f"*.optim.state.{pattern}.*")):
            return "zeros"
    return ""


def _extended(stored: LogicalTensor, shape: tuple[int, ...]) -> LogicalTensor:
    rows, inner = stored.shape[0], (0,) * (len(shape) - 1)
    parts = tuple(part if part.sizes else replace(part, offsets=(0, *inner), sizes=stored.shape) for part in stored.parts)
    return replace(stored, shape=shape, parts=(*parts, Part(Absent(), (rows, *inner), (shape[0] - rows, *shape[1:]))))


def _rounded(live: LogicalTensor, stored: LogicalTensor) -> str:
    """The smaller dtype in which a part of the live tensor is kept, where the stored values were not; else empty."""
    for part in live.parts:
        if part.narrow:
            overlapping = [other for other in stored.parts if intersect(part_box(stored, other), part_box(live, part))]
            if any(other.narrow != part.narrow and not isinstance(other.layout, Absent) for other in overlapping):
                return part.narrow
    return ""


def match_names(live: Iterable[str], stored: Iterable[str], allow: Allow, what: str = "members") -> None:
    """Match ``what`` has no tensors to compare by name. Raises :class:`IncompatibleCheckpoint`."""
    live, stored = set(live), set(stored)
    missing = sorted(n for n in live - stored if not allowed(n, allow.missing))
    unexpected = sorted(n for n in stored - live if not allowed(n, allow.unexpected))
    if missing or unexpected:
        raise IncompatibleCheckpoint(
            f"{what} differ: {missing or 'none'} only in this run (allow_missing), {unexpected or 'none'} only in the checkpoint (allow_unexpected)"
        )


def allowed(name: str, patterns: Sequence[str]) -> bool:
    """Return whether any of the patterns fits the whole name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _refuse(missing: list[str], unexpected: list[str], shapes: list[str], dtypes: list[str]) -> None:
    told = [
        _told(missing, "in the model here but not in the checkpoint", "allow_missing=[patterns] keeps their present values"),
        _told(unexpected, "in the checkpoint but not in the model here", "allow_unexpected=[patterns] leaves them out"),
        _told(
            shapes,
            "of another shape",
            "build the model that was saved, or give extend_rows where this one only has more rows, or allow_resize=[patterns] for buffers",
        ),
        _told(dtypes, "of another dtype", "allow_cast=[patterns] converts them"),
    ]
    if any(told):
        raise IncompatibleCheckpoint("the checkpoint does not fit this run:\n" + "\n".join(t for t in told if t))


def _told(names: list[str], what: str, remedy: str) -> str:
    if not names:
        return ""
    more = f"\n    … and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {len(names)} tensors {what} ({remedy}):\n    " + "\n    ".join(names[:_SHOWN]) + more
