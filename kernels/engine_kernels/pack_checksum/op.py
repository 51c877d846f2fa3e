"""``lockstep::pack_checksum`` and ``lockstep::checksums``: plain torch on the CPU; on CUDA the library of pack_checksum.cu, else Triton."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from engine_kernels.pack_checksum import cuda, naive


@torch.library.custom_op("lockstep::pack_checksum", mutates_args=("image",))
def _pack(sources: Sequence[Tensor], offsets: Sequence[int], image: Tensor) -> Tensor:
    begin, end = image.data_ptr(), image.data_ptr() + image.numel()
    for i, source in enumerate(sources):
        if source.nbytes and begin < source.data_ptr() + source.nbytes and source.data_ptr() < end:
            raise ValueError(f"source {i} shares memory with the image; it must lie elsewhere")
    return _run(sources, offsets, image)


@_pack.register_fake
def _(sources: Sequence[Tensor], offsets: Sequence[int], image: Tensor) -> Tensor:
    return image.new_empty(len(sources), dtype=torch.int64)


@torch.library.custom_op("lockstep::checksums", mutates_args=())
def _checksums(sources: Sequence[Tensor]) -> Tensor:
    return _run(sources, (), None)


@_checksums.register_fake
def _(sources: Sequence[Tensor]) -> Tensor:
    return sources[0].new_empty(len(sources), dtype=torch.int64)


def _run(sources: Sequence[Tensor], offsets: Sequence[int], image: Tensor | None) -> Tensor:
    device = sources[0].device
    if device.type != "cuda":
        return naive.pack_checksum(sources, offsets, image)
    with torch.cuda.device(device):
        if (library := cuda.library(device)) is not None:
            return cuda.pack_checksum(library, sources, offsets, image)
        from engine_kernels.pack_checksum import triton

        return triton.pack_checksum(sources, offsets, image)


def pack_checksum(sources: Sequence[Tensor], offsets: Sequence[int], image: Tensor) -> Tensor:
    """Copies each source to ``image[offset : offset + its bytes]`` and returns its checksum, as README.md defines it, in the same pass.

    Args:
        sources: n contiguous tensors of any dtype, shape and alignment; they may be empty.
        offsets: where each goes, in bytes. Multiples of 16 are fastest.
        image: ``[bytes]`` uint8 on the device of the sources. What no source covers stays as it is.

    Returns int64 [n], on that device. Raises ValueError where destinations overlap or do not fit into the image, a source is not contiguous,
    is on another device or shares memory with the image, or where the image is not ``[bytes]`` uint8.
    """
    if image.dtype != torch.uint8 or image.ndim != 1 or not image.is_contiguous():
        raise ValueError(f"the image is {image.dtype} {tuple(image.shape)} with strides {image.stride()}; it must be contiguous uint8 [bytes]")
    if len(sources) != len(offsets):
        raise ValueError(f"there are {len(sources)} sources and {len(offsets)} offsets; each source needs one")
    _check_sources(sources, image.device)
    _check_destinations(sources, offsets, image)
    return _pack([source.detach() for source in sources], offsets, image) if sources else image.new_empty(0, dtype=torch.int64)


def checksums(sources: Sequence[Tensor]) -> Tensor:
    """int64 [n]: the checksums that :func:`pack_checksum` gives, and nothing is copied. Without sources it is on the CPU.

    Raises ValueError where a source is not contiguous or is on another device than the first.
    """
    if not sources:
        return torch.empty(0, dtype=torch.int64)
    _check_sources(sources, sources[0].device)
    return _checksums([source.detach() for source in sources])


def _check_sources(sources: Sequence[Tensor], device: torch.device) -> None:
    for i, source in enumerate(sources):
        if source.device != device:
            raise ValueError(f"source {i} is on {source.device}; it must be on {device}")
        if not source.is_contiguous():
            raise ValueError(f"source {i} is {tuple(source.shape)} with strides {source.stride()}; it must be contiguous")


def _check_destinations(sources: Sequence[Tensor], offsets: Sequence[int], image: Tensor) -> None:
    ranges = sorted((offset, offset + source.nbytes, i) for i, (source, offset) in enumerate(zip(sources, offsets)))
    for begin, end, i in ranges:
        if begin < 0 or end > image.numel():
            raise ValueError(f"source {i} goes to bytes {begin} to {end}; the image has {image.numel()}")
    for (_, end, i), (begin, _, j) in pairwise(r for r in ranges if r[0] < r[1]):
        if begin < end:
            raise ValueError(f"source {j} goes to byte {begin} on, but source {i} ends at byte {end}: destinations must not overlap")
