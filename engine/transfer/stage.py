"""Stage: live tensors become the bytes of file images: at once, into an image kept in memory, or a window at a time."""

from collections.abc import Callable, Iterator, Sequence

import torch

from engine.plan.image import Image, ShardLayout
from engine.state.boxes import flat_to_boxes
from engine.state.shard import bytes_of, torch_dtype
from engine.transfer.write import WINDOW_BYTES, Segment, windows


class LiveImages:
    """Images of live tensors, a window of :data:`~engine.transfer.write.WINDOW_BYTES` at a time. Two of them, used in turn, are all the
    memory that a save takes beyond training. ``views[item]`` is the tensor of each item. CPU tensors of more than a window are handed
    on where they lie."""

    def __init__(self, layout: ShardLayout, views: Sequence[torch.Tensor]) -> None:
        self._layout, self._views = layout, views
        self._windows: list[torch.Tensor] = []

    def stream(self, number: int, take: Callable[[Segment], None]) -> Iterator[memoryview]:
        image = self._layout.images[number]
        yield memoryview(image.header)
        for segment in self._segments(image, [self._views[item] for item in image.items]):
            take(segment)
            yield segment.data

    def _segments(self, image: Image, views: Sequence[torch.Tensor]) -> Iterator[Segment]:
        done = -1
        for first, stop, partial, *_ in windows(image):
            if not partial:
                yield Segment(first, stop, False, self._gather(image, views, first, stop))
            elif first != done:  # all its windows at once
                done = first
                for data in self._pieces(views[first], torch_dtype(image.entries[first].dtype)):
                    yield Segment(first, first + 1, True, data)

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
        for piece in _flat_pieces(view, WINDOW_BYTES // dtype.itemsize):
            window = self._own_window()
            size_bytes = piece.numel() * dtype.itemsize
            window[:size_bytes].view(dtype).copy_(piece)
            yield bytes_of(window)[:size_bytes]

    def _own_window(self) -> torch.Tensor:
        """The one that was used before the last: that one may still be in writing."""
        self._windows.append(self._windows.pop(0) if len(self._windows) == 2 else torch.empty(WINDOW_BYTES, dtype=torch.uint8, device="cpu"))
        return self._windows[-1]


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
