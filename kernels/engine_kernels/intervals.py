"""Which elements of tensors are trained, and the tables by which kernels find them.

Tensors are looked at flat. ``intervals`` has for each tensor of a list its trained ``(begin, end)``: sorted, disjoint, inside the tensor.
Rows ``[base, V)`` of a ``[V, D]`` tensor are ``[(base * D, V * D)]``. Operators take only lists of ints: three for each interval, the
number of its tensor, begin and end, which are called *spans* here.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from engine_kernels.device import upload

Intervals = Sequence[tuple[int, int]]


def spans_of(intervals: Sequence[Intervals], sizes: Sequence[int]) -> list[int]:
    """The spans of tensors with ``sizes`` elements, without those of length 0. Raises ValueError where intervals are not as they must be."""
    if len(intervals) != len(sizes):
        raise ValueError(f"there are intervals for {len(intervals)} tensors, but {len(sizes)} tensors; a frozen one has []")
    spans = []
    for i, (own, size) in enumerate(zip(intervals, sizes)):
        last = 0
        for begin, end in own:
            if not 0 <= begin <= end <= size:
                raise ValueError(f"tensor {i} has interval ({begin}, {end}); it must be (begin, end) with 0 <= begin <= end <= {size}")
            if begin < last:
                raise ValueError(f"tensor {i} has interval ({begin}, {end}) after one that ends at {last}; they must be sorted and disjoint")
            last = end
            if begin < end:
                spans += [i, begin, end]
    return spans


def triples(spans: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(number of the tensor, begin, end) of each span."""
    return zip(spans[::3], spans[1::3], spans[2::3])


def shard_intervals(intervals: Sequence[Intervals], sizes: Sequence[int], rank: int, shard_size: int) -> list[tuple[int, int]]:
    """What is trained of one rank's shard, elements ``[rank * shard_size, (rank + 1) * shard_size)`` of a flat buffer.

    In the buffer lie parameters with ``sizes`` elements, one after another; what lies between or after them, as padding, is given as one
    without intervals, or is left out at the end. Returns intervals counted from the shard's first element; those that touch are joined.
    Raises ValueError as :func:`spans_of`.
    """
    starts, first = list(accumulate(sizes, initial=0)), rank * shard_size
    found: list[tuple[int, int]] = []
    for i, begin, end in triples(spans_of(intervals, sizes)):
        low, high = max(starts[i] + begin - first, 0), min(starts[i] + end - first, shard_size)
        if low < high and found and found[-1][1] == low:
            found[-1] = (found[-1][0], high)
        elif low < high:
            found.append((low, high))
    return found


def gaps_of(spans: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The spans of what is not trained."""
    gaps, last = [], [0] * len(sizes)
    for i, begin, end in [*triples(spans), *((i, size, size) for i, size in enumerate(sizes))]:
        if last[i] < begin:
            gaps += [i, last[i], begin]
        last[i] = end
    return gaps


def check_tensors(lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Raises ValueError unless all lists are as long as the first, with tensors of its shapes that are contiguous, on one device, and of
    fp32, bf16 or fp16, or fp64 on the CPU."""
    name, models = next(iter(lists.items()))
    for other, tensors in lists.items():
        if len(tensors) != len(models):
            raise ValueError(f"there are {len(models)} {name}, but {len(tensors)} {other}")
        for i, (t, model) in enumerate(zip(tensors, models)):
            device = models[0].device
            if t.shape != model.shape or t.device != device:
                raise ValueError(f"{other}[{i}] is {tuple(t.shape)} on {t.device}; it must be {tuple(model.shape)} on {device}")
            if not t.is_contiguous():
                raise ValueError(f"{other}[{i}] is {tuple(t.shape)} with strides {t.stride()}; it must be contiguous")
            if t.dtype not in (torch.float32, torch.bfloat16, torch.float16) and (t.dtype != torch.float64 or device.type != "cpu"):
                raise ValueError(f"{other}[{i}] is {t.dtype} on {device}; it must be float32, bfloat16 or float16, or float64 on the CPU")


def check_scalar(name: str, scalar: Tensor | None, device: torch.device) -> None:
    """Raises ValueError unless it is a 0-d tensor on ``device``, or None."""
    if scalar is not None and (scalar.ndim or scalar.device != device):
        raise ValueError(f"{name} is {tuple(scalar.shape)} on {scalar.device}; it must be a 0-d tensor on {device}")


def by_dtype(spans: Sequence[int], *lists: Sequence[Tensor]) -> dict[tuple[torch.dtype, ...], list[int]]:
    """The spans of tensors whose dtypes, one a list, are alike: what one launch works on."""
    found: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, begin, end in triples(spans):
        found.setdefault(tuple(tensors[i].dtype for tensors in lists), []).extend((i, begin, end))
    return found


def tiles(spans: Sequence[int], size: int, device: torch.device) -> Tensor:
    """int64 [tiles, 3] on ``device``: spans cut at multiples of ``size``. One program works on each. Kept from call to call."""
    return _tiles(tuple(spans), size, device, _stream(device))


def addresses(lists: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """int64 [n, lists + 1] on ``device``: of each of the n tensors of a list its address, and last whether those of all lists are multiples
    of 16 bytes. Kept from call to call while addresses stay."""
    rows = tuple(tuple(t.data_ptr() for t in tensors) for tensors in zip(*lists, strict=True))
    return _addresses(rows, device, _stream(device))


@lru_cache(maxsize=64)
def _tiles(spans: tuple[int, ...], size: int, device: torch.device, stream: int) -> Tensor:
    tensor, begin, end = torch.tensor(spans, dtype=torch.int64, device="cpu").view(-1, 3).unbind(1)
    first = begin // size
    counts = (end + size - 1) // size - first
    span = torch.repeat_interleave(counts)
    start = (first[span] + torch.arange(len(span), device="cpu") - (counts.cumsum(0) - counts)[span]) * size
    return upload(torch.stack([tensor[span], torch.maximum(start, begin[span]), torch.minimum(start + size, end[span])], 1), device)


@lru_cache(maxsize=64)
def _addresses(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    table = [[*row, all(address % 16 == 0 for address in row)] for row in rows]
    return upload(torch.tensor(table, dtype=torch.int64, device="cpu"), device)


def _stream(device: torch.device) -> int:
    """A table is copied in the order of one stream, and kept for that one only."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
