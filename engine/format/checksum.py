"""xxh3_128 digests: whole, and a block at a time, so that a part can be verified without the rest."""

import xxhash

DIGEST_BYTES = 16
BLOCK_BYTES = 128 * 1024
"""Divides by every item size, so that no element lies across two blocks."""


def digest(data: bytes | bytearray | memoryview) -> bytes:
    return xxhash.xxh3_128_digest(data)


def block_digests(data: memoryview) -> bytes:
    """The digests of ``data``'s blocks, one after the other; the last block may be short."""
    if len(data) <= BLOCK_BYTES:
        return xxhash.xxh3_128_digest(data)
    return b"".join(xxhash.xxh3_128_digest(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES))


def block_count(size_bytes: int) -> int:
    return max(1, -(-size_bytes // BLOCK_BYTES))
