import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engine.format.checksum import BLOCK_BYTES, DIGEST_BYTES, block_count, block_digests, digest
from engine.format.dtypes import ITEM_BYTES


@given(st.integers(0, 3).flatmap(lambda n: st.integers(max(0, n * BLOCK_BYTES - 2), n * BLOCK_BYTES + 2)))
def test_blocks_are_digested_one_by_one(size_bytes):
    data = bytes(range(256)) * (size_bytes // 256 + 1)
    data = data[:size_bytes]
    digests = block_digests(memoryview(data))
    assert len(digests) == DIGEST_BYTES * block_count(size_bytes)
    for block in range(block_count(size_bytes)):
        part = data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        assert digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES] == digest(part) == xxhash.xxh3_128(part).digest()


def test_pieces_of_whole_blocks_digest_as_the_whole_does():
    data = memoryview(bytes(5 * BLOCK_BYTES + 7))
    assert block_digests(data[: 2 * BLOCK_BYTES]) + block_digests(data[2 * BLOCK_BYTES :]) == block_digests(data)


def test_no_element_lies_across_two_blocks():
    assert all(BLOCK_BYTES % width == 0 for width in ITEM_BYTES.values())
