"""Write: images to files, checksummed in the same pass, durable when it returns."""

from collections.abc import Sequence

import torch
from msgspec import Struct

from engine.format.checksum import block_digests, digest
from engine.format.manifest import FileEntry, shard_name
from engine.plan.image import Image
from engine.storage import Storage
from engine.transfer.stage import Stager


class Written(Struct, frozen=True, gc=False):
    """Where one item went. ``offset`` counts from the start of the file."""

    file: int
    offset: int
    nbytes: int
    digests: bytes


def write_images(
    storage: Storage, folder: str, rank: int, images: Sequence[Image], views: Sequence[torch.Tensor], stager: Stager
) -> tuple[list[FileEntry], dict[int, Written]]:
    """``views[item]`` is the live tensor of each item of the images. Returns the files, and each item's place."""
    files, places = [], {}
    for number, image in enumerate(images):
        name = shard_name(rank, number)
        digests = _write_file(storage, f"{folder}/{name}", image, [views[item] for item in image.items], stager)
        files.append(FileEntry(name, len(image.header) + image.data_bytes, len(image.header), digest(image.header)))
        for item, entry, blocks in zip(image.items, image.entries, digests, strict=True):
            places[item] = Written(number, len(image.header) + entry.offset, entry.nbytes, blocks)
    return files, places


def _write_file(storage: Storage, path: str, image: Image, views: Sequence[torch.Tensor], stager: Stager) -> list[bytes]:
    digests = [b""] * len(image.entries)
    writer = storage.create(path)
    try:
        writer.write(memoryview(image.header))
        for segment in stager.segments(image, views):
            if segment.partial:
                digests[segment.first] += block_digests(segment.data)
            else:
                begin = image.entries[segment.first].offset
                for i in range(segment.first, segment.stop):
                    entry = image.entries[i]
                    digests[i] = block_digests(segment.data[entry.offset - begin : entry.offset - begin + entry.nbytes])
            writer.write(segment.data)
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    return digests


def write_whole(storage: Storage, path: str, data: bytes) -> None:
    """A small file, durable when this returns."""
    writer = storage.create(path)
    try:
        writer.write(memoryview(data))
    except BaseException:
        writer.abandon()
        raise
    writer.close()
