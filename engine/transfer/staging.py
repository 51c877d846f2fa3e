"""Staging: the copy of a rank's state that its writer process reads. All that training waits for is the copy into it."""

import contextlib
import ctypes
import logging
import mmap
import os
import weakref
from collections.abc import Container, Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from msgspec import Struct

from engine.plan.image import ShardLayout
from engine.state.shard import torch_dtype
from engine.transfer.write import places

logger = logging.getLogger("engine")

_SMALL_BYTES = 64 * 1024
_SHARE_OF_FREE_MEMORY = 0.6
"""What the images of all ranks on a machine may take of what is free when they are made; the rest is training's to grow into."""


class StagingImage:
    """Memory for the files of one save, allocated and mapped when this is made. ``fd`` is what another process maps it from: it has no
    name, so it cannot be left over. A fork of this process does not have it. Raises OSError where the memory is not to be had."""

    def __init__(self, size_bytes: int, pinned: bool = False) -> None:
        self.size_bytes = size_bytes
        self.fd = os.memfd_create("lockstep-image", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fd, 0, size_bytes)
            self._map = mmap.mmap(self.fd, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self._map.madvise(mmap.MADV_DONTFORK)
            self.memory = torch.frombuffer(self._map, dtype=torch.uint8)
        except OSError:
            os.close(self.fd)
            raise
        _images.add(self)
        self._pinned = pinned and int(_cuda().cudaHostRegister(self.memory.data_ptr(), size_bytes, 0)) == 0

    def close(self) -> None:
        if self.fd >= 0:
            if self._pinned:
                _cuda().cudaHostUnregister(self.memory.data_ptr())
            os.close(self.fd)
            self.fd = -1
            del self.memory, self._map

    def forget(self) -> None:
        """In a fork, which has no such memory: where it was, something else may be by now, and must not be unmapped in its place."""
        if self.fd >= 0:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._map))  # so it is never collected, which would close a descriptor, too
            own = os.fstat(self.fd)
            for name in os.listdir("/proc/self/fd"):  # the map has a duplicate of its own
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(int(name)), own):
                        os.close(int(name))
            self.fd = -1


_images: "weakref.WeakSet[StagingImage]" = weakref.WeakSet()


def _forget_all() -> None:
    for image in list(_images):
        image.forget()


os.register_at_fork(after_in_child=_forget_all)


def _cuda() -> Any:
    return torch.cuda.cudart()


def image_bytes(layout: ShardLayout) -> int:
    return max(places(layout)[-1], mmap.PAGESIZE)


def fits_memory(size_bytes: int) -> bool:
    """Whether an image of this size fits what is free on this machine, or left to its control group, shared with its other ranks."""
    return size_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= _SHARE_OF_FREE_MEMORY * _free_bytes()


def _free_bytes(root: str = "/") -> int:
    found = [os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE]
    for line in _read(f"{root}proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found = [int(line.split()[1]) * 1024]
    for folder, limit, used in _control_groups(root):
        most, now = _read(f"{folder}/{limit}").strip(), _read(f"{folder}/{used}").strip()
        if most.isdigit() and now.isdigit():
            found.append(int(most) - int(now) + _reclaimable(f"{folder}/memory.stat"))
    return max(0, min(found))


def _control_groups(root: str) -> Iterator[tuple[str, str, str]]:
    """This process's groups, each up to the root, since every one may have a limit: folder, and the files of limit and use. Inside a
    container the path may be the host's, of which only the root is to be seen."""
    for line in _read(f"{root}proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        base, limit, used = ("", "memory.max", "memory.current") if not controllers else ("/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        if not controllers or "memory" in controllers.split(","):
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for count in range(len(parts), -1, -1):
                yield "/".join([f"{root}sys/fs/cgroup{base}", *parts[:count]]), limit, used


def _reclaimable(path: str) -> int:
    """Page cache counts as used there, and goes when it is needed."""
    return sum(int(line.split()[1]) for line in _read(path).splitlines() if line.startswith("inactive_file "))


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


class Pending(Protocol):
    """Copies that may still be under way."""

    def before_change(self) -> None:
        """Called in the trainer's thread before an optimizer changes what is copied: no change may overtake the copy."""
        ...

    def wait(self) -> None:
        """Until the image is whole. Called from another thread."""
        ...


class _Finished:
    def before_change(self) -> None: ...

    def wait(self) -> None: ...


class _OnStream:
    """Copies on a CUDA stream of their own: the trainer's stream waits for them, the processor does not."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def before_change(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()


class _Batch(Struct):
    """``whole``: the targets as one, where many small sources fill it one after another: concatenating them takes half the time."""

    sources: list[torch.Tensor]
    targets: list[torch.Tensor]
    whole: torch.Tensor | None = None

    def copy(self, non_blocking: bool = False) -> None:
        if self.whole is not None:
            torch.cat(self.sources, out=self.whole)
        else:
            torch._foreach_copy_(self.targets, self.sources, non_blocking=non_blocking)


class Copies:
    """The copies of one plan's live tensors into one image, laid out once: ``views[item]`` is the tensor of each item. ``late``: the
    names of those that only an optimizer's step changes, so that copies from a CUDA device may overlap with what comes before it."""

    def __init__(self, layout: ShardLayout, views: Sequence[torch.Tensor], late: Container[str], image: StagingImage) -> None:
        self._now: list[_Batch] = []
        self._late: list[_Batch] = []
        self._stream: torch.cuda.Stream | None = None
        for place, one in zip(places(layout), layout.images, strict=False):
            start = place + len(one.header)
            image.memory[place:start] = torch.frombuffer(bytearray(one.header), dtype=torch.uint8)
            at = 0
            for dtype, group in groupby(zip(one.entries, one.items, strict=True), key=lambda pair: pair[0].dtype):
                pairs = [(entry, views[item], entry.name in late) for entry, item in group]
                end = at + sum(entry.nbytes for entry, *_ in pairs)
                kind = torch_dtype(dtype)
                target = image.memory[start + at : start + end].view(kind) if end > at else torch.empty(0, dtype=kind, device="cpu")
                self._take(target, [(view, is_late) for _, view, is_late in pairs])
                at = end

    def _take(self, target: torch.Tensor, views: list[tuple[torch.Tensor, bool]]) -> None:
        """``target`` is filled by ``views``, one after another."""
        joined = _joined(views)
        if all(_is_flat(view, target.dtype) for view, _, _ in joined) and target.nbytes < _SMALL_BYTES * len(joined):
            self._now.append(_Batch([view for view, _, _ in joined], [], target))
            return
        batches = {kind: _Batch([], []) for kind in (False, True)}
        at = 0
        for view, is_late, count in joined:
            batch = batches[is_late and view.device.type == "cuda"]
            goal = target.narrow(0, at, count)
            batch.sources.append(view)
            batch.targets.append(goal if view.ndim == 1 else goal.view(view.shape))
            at += count
        for kind, into in ((False, self._now), (True, self._late)):
            if batches[kind].sources:
                into.append(batches[kind])

    def start(self) -> Pending:
        with torch.no_grad():
            for batch in self._now:
                batch.copy()
            if not self._late:
                return _Finished()
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for batch in self._late:
                    batch.copy(non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            return _OnStream(event)


def _is_flat(view: torch.Tensor, dtype: torch.dtype) -> bool:
    return view.ndim == 1 and view.is_cpu and view.dtype == dtype and view.is_contiguous()


def _joined(views: list[tuple[torch.Tensor, bool]]) -> list[tuple[torch.Tensor, bool, int]]:
    """The views with their element counts; those that lie one after another in one storage, as in ZeRO's flat buffers, as one."""
    found: list[tuple[torch.Tensor, bool, int]] = []
    end = -1  # of the last one in memory, if it is contiguous
    for view, is_late in views:
        count = view.numel()
        if count == 0:
            continue
        if not view.is_contiguous():
            found.append((view, is_late, count))
            end = -1
            continue
        begin = view.data_ptr()
        if begin == end:
            first, is_first_late, before = found[-1]
            if is_first_late == is_late and first.dtype == view.dtype and _storage(first) == _storage(view):
                found[-1] = (first, is_late, before + count)
                end = begin + count * view.element_size()
                continue
        found.append((view, is_late, count))
        end = begin + count * view.element_size()
    return [(_flattened(view, count), is_late, count) for view, is_late, count in found]


def _storage(view: torch.Tensor) -> int:
    return view.untyped_storage().data_ptr()


def _flattened(view: torch.Tensor, count: int) -> torch.Tensor:
    """From its first element on, ``count`` that lie one after another; what is not contiguous stays as it is.

    Always a new view: made together, they lie together in memory, where each save goes through them.
    """
    view = view.detach()
    if view.numel() != count:
        return view.as_strided((count,), (1,), view.storage_offset())
    return view.view(-1) if view.ndim != 1 and view.is_contiguous() else view
