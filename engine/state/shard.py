"""A rank's piece of a logical tensor: the agreed description, and views of the live storage behind it."""

from collections.abc import Iterator

import torch
from msgspec import Struct

from engine.errors import CheckpointCorrupt, LayoutError, UsageError
from engine.format.layout import Absent, Flat, LogicalTensor, Part
from engine.state.boxes import Box, flat_start, held_boxes, held_interval, held_numel, part_box, shift

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.complex128: "C128",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    if dtype not in _NAMES:
        raise UsageError(f"tensors of {dtype} cannot be saved; convert to one of {sorted(_DTYPES)}")
    return _NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    return _DTYPES[name]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of bytes."""
    return memoryview(tensor.numpy())  # pyright: ignore[reportArgumentType]  # NumPy's arrays are buffers from Python 3.12 on for pyright


class Shard(Struct, frozen=True, gc=False):
    """What this rank holds of ``tensor``: for each part either a 1-D view of its flat interval (:class:`Flat`) or its N-D box
    (:class:`Grid`); None for a part it has no share in. The views alias live training state: nothing is copied."""

    tensor: LogicalTensor
    locals: tuple[torch.Tensor | None, ...]

    @property
    def name(self) -> str:
        return self.tensor.name

    def held(self, rank: int) -> Iterator[tuple[Box, torch.Tensor]]:
        """The rank's boxes and their live views."""
        for part, local in zip(self.tensor.parts, self.locals, strict=True):
            for box in held_boxes(self.tensor, part, rank):
                if local is None:
                    raise LayoutError(f"rank {rank}: {self.name} at {box.offsets} should be held here, but there is no storage for it")
                yield box, _view(self.tensor, part, local, box, rank)

    def view(self, box: Box, rank: int) -> torch.Tensor:
        """The live view of a box inside what this rank holds."""
        for part, local in zip(self.tensor.parts, self.locals, strict=True):
            if local is not None and (not part.sizes or _inside(box, part_box(self.tensor, part))):
                return _view(self.tensor, part, local, box, rank)
        raise LayoutError(f"rank {rank}: {self.name} at {box.offsets} is not held here")


def _inside(inner: Box, outer: Box) -> bool:
    return all(p <= b and b + n <= p + m for p, m, b, n in zip(outer.offsets, outer.sizes, inner.offsets, inner.sizes, strict=True))


def _view(tensor: LogicalTensor, part: Part, local: torch.Tensor, box: Box, rank: int) -> torch.Tensor:
    if local.shape == box.sizes:  # a box this large can only be all that is held
        return local
    inner, layout = shift(box, part.offsets, -1), part.layout
    if isinstance(layout, Flat):
        begin = flat_start(part.sizes or tensor.shape, inner.offsets) - held_interval(tensor, part, layout, rank)[0]
        return local.narrow(0, begin, inner.numel).view(inner.sizes)
    origin = shift(held_boxes(tensor, part, rank)[0], part.offsets, -1)
    for dim, (offset, base, size) in enumerate(zip(inner.offsets, origin.offsets, inner.sizes, strict=True)):
        local = local.narrow(dim, offset - base, size)
    return local


def check_shard(shard: Shard, rank: int) -> None:
    """Raises :class:`LayoutError` unless the live views are as large as the layout rule says they must be."""
    for part, local in zip(shard.tensor.parts, shard.locals, strict=True):
        expected = held_numel(shard.tensor, part, rank)
        found = 0 if local is None else local.numel()
        if expected != found:
            raise LayoutError(
                f"rank {rank}: {shard.name} of shape {shard.tensor.shape} should have {expected} elements here by its layout, but {found} are live. "
                "The engine lays its state out in a way this version does not know"
            )
        if local is not None and not (found and local.is_contiguous()) and _is_expanded(local):
            raise LayoutError(
                f"rank {rank}: {shard.name} is an expanded view, whose elements share memory and cannot be filled; make it .contiguous()"
            )
        if local is not None and dtype_name(local.dtype) != (part.narrow or shard.tensor.dtype):
            raise LayoutError(f"rank {rank}: {shard.name} is {local.dtype} here, {shard.tensor.dtype} by its description")


def _is_expanded(local: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True))


def new_tensor(stored: LogicalTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of the shape of a stored one, which this run does not know.

    Raises :class:`CheckpointCorrupt` for elements that no file has, or more than memory has room for.
    """
    told = f"{stored.name} of shape {list(stored.shape)}"
    if any(isinstance(part.layout, Absent) for part in stored.parts):
        raise CheckpointCorrupt(f"{told} is declared absent in part, which only the states of a parameter are")
    try:
        return torch.zeros(stored.shape, dtype=dtype, device=device)
    except RuntimeError as e:
        raise CheckpointCorrupt(f"{told} has no room in memory: {e}") from e
