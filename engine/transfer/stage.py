"""Stage: live tensors become the bytes of a file image, a window at a time."""

from collections.abc import Iterator, Sequence

import torch
from msgspec import Struct

from engine.format.checksum import BLOCK_BYTES
from engine.plan.image import Image
from engine.state.boxes import flat_to_boxes
from engine.state.shard import bytes_of, torch_dtype

WINDOW_BYTES = 16 * 1024 * 1024
"""What a save copies at once: the host memory it needs beyond training. A multiple of the checksum block."""


class Segment(Struct, frozen=True):
    """``data`` goes next into the file. It holds entries [first, stop) whole, or (``partial``) a run of blocks of entry ``first``.
    Valid until the next one is asked for."""

    first: int
    stop: int
    partial: bool
    data: memoryview


class Stager:
    """Owns one window, kept from save to save."""

    def __init__(self) -> None:
        self._window: torch.Tensor | None = None

    def segments(self, image: Image, views: Sequence[torch.Tensor]) -> Iterator[Segment]:
        """The image's data in file order. ``views[i]`` is the live tensor of ``image.entries[i]``. CPU tensors of more than a
        window are handed on where they lie, without a copy."""
        first = 0
        while first < len(image.entries):
            begin = image.entries[first].offset
            stop = first
            while stop < len(image.entries) and image.entries[stop].offset + image.entries[stop].nbytes - begin <= WINDOW_BYTES:
                stop += 1
            if stop == first:
                for data in self._pieces(views[first], torch_dtype(image.entries[first].dtype)):
                    yield Segment(first, first + 1, True, data)
                first += 1
            else:
                yield Segment(first, stop, False, self._gather(image, views, first, stop))
                first = stop

    def _gather(self, image: Image, views: Sequence[torch.Tensor], first: int, stop: int) -> memoryview:
        window = self._own_window()
        base = image.entries[first].offset
        while first < stop:  # one batched copy for each run of one dtype
            dtype, begin, last = image.entries[first].dtype, image.entries[first].offset - base, first
            while last < stop and image.entries[last].dtype == dtype:
                last += 1
            end = image.entries[last - 1].offset + image.entries[last - 1].nbytes - base
            if end > begin:
                sources = [view.reshape(-1) for view in views[first:last]]
                targets = window[begin:end].view(torch_dtype(dtype)).split([source.numel() for source in sources])
                torch._foreach_copy_(list(targets), sources)
            first = last
        end = image.entries[stop - 1].offset + image.entries[stop - 1].nbytes - base
        return bytes_of(window)[:end]

    def _pieces(self, view: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
        if view.device.type == "cpu" and view.is_contiguous() and view.dtype == dtype:
            data = bytes_of(view.reshape(-1).view(torch.uint8))
            yield from (data[i : i + WINDOW_BYTES] for i in range(0, len(data), WINDOW_BYTES))
            return
        window = self._own_window()
        for piece in _flat_pieces(view, WINDOW_BYTES // dtype.itemsize):
            size_bytes = piece.numel() * dtype.itemsize
            window[:size_bytes].view(dtype).copy_(piece)
            yield bytes_of(window)[:size_bytes]

    def _own_window(self) -> torch.Tensor:
        if self._window is None:
            self._window = torch.empty(WINDOW_BYTES, dtype=torch.uint8)
        return self._window


def _flat_pieces(view: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """A large tensor, in flat order, in pieces of at most ``count`` elements, without a whole flat copy."""
    if view.is_contiguous():
        yield from view.view(-1).split(count)
        return
    for start in range(0, view.numel(), count):
        boxes = flat_to_boxes(tuple(view.shape), start, min(start + count, view.numel()))
        parts = []
        for box in boxes:
            part = view
            for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
                part = part.narrow(dim, offset, size)
            parts.append(part.reshape(-1))
        yield torch.cat(parts)


assert WINDOW_BYTES % BLOCK_BYTES == 0
