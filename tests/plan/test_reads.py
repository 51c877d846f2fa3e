"""What a load reads: exactly the blocks needed, in order, each once, never too much at a time."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.format.checksum import BLOCK_BYTES
from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import Absent
from engine.plan import reads
from engine.plan.reads import Need, absent, runs, slices, wants
from engine.state.boxes import Box
from tests.layouts import boxes_in, counts, inside, region, tensors


@given(tensors(), st.data())
def test_wants_and_absent_cover_a_target_exactly_once(tensor, data):
    target = data.draw(boxes_in(tensor.shape))
    wanted = [overlap for _, _, overlap in wants(tensor, target)]
    missing = [overlap for overlap, _ in absent(tensor, target)]
    assert (counts(tensor.shape, wanted + missing) == counts(tensor.shape, [target])).all()
    expected = sum((inside(tensor, part) for part in tensor.parts if isinstance(part.layout, Absent)), np.zeros(tensor.shape, int))
    assert (counts(tensor.shape, missing) == expected * counts(tensor.shape, [target])).all()
    for _, box, overlap in wants(tensor, target):
        assert (counts(tensor.shape, [overlap]) <= counts(tensor.shape, [box])).all(), "a stored box does not hold what is wanted of it"


@st.composite
def needs(draw):
    """Needs in the chunks of one file: chunks below, at and above a block, contiguous in the file."""
    found, begin, item = [], 4096, 0
    for chunk in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(["F32", "BF16", "I8"]))
        width = ITEM_BYTES[dtype]
        block = BLOCK_BYTES // width
        rows = draw(st.sampled_from([1, 3, 5, 64]))
        columns = draw(st.sampled_from([1, 7, block // 4, block // 2, block, block + 1]))
        sizes = (rows, columns)
        nbytes = math.prod(sizes) * width
        for _ in range(draw(st.integers(0, 3))):
            inner = draw(boxes_in(sizes).filter(lambda b: b.numel))
            found.append(Need(item, chunk, sizes, inner, dtype, begin, nbytes))
            item += 1
        begin += nbytes
    return draw(st.permutations(found))


def _blocks(need: Need) -> set[int]:
    """By brute force over the rows of the box: every block that holds one of its elements."""
    per_block = BLOCK_BYTES // ITEM_BYTES[need.dtype]
    (row, column), (rows, columns) = need.inner.offsets, need.inner.sizes
    found = set()
    for r in range(row, row + rows):
        first = r * need.sizes[1] + column
        found |= set(range(first // per_block, (first + columns - 1) // per_block + 1))
    return found


@given(needs(), st.sampled_from([BLOCK_BYTES, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES, 16 * 1024 * 1024]))
def test_slices_and_runs(wanted, run_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reads, "RUN_BYTES", run_bytes)
        pieces = list(slices(wanted))
        lists = list(runs(pieces))
    assert [piece for run in lists for piece in run] == pieces, "runs reorder or drop slices"

    end = 0
    for piece in pieces:
        assert piece.offset >= end, "not sorted, or read twice"
        assert 0 < piece.nbytes <= run_bytes
        end = piece.offset + piece.nbytes
    for run in lists:
        assert all(a.offset + a.nbytes == b.offset for a, b in itertools.pairwise(run)), "a run has a hole"
        assert run[-1].offset + run[-1].nbytes - run[0].offset <= run_bytes, "a run is too long"
    for left, right in itertools.pairwise(lists):
        touching = left[-1].offset + left[-1].nbytes == right[0].offset
        assert not touching or right[0].offset + right[0].nbytes - left[0].offset > run_bytes, "two runs could be one"

    by_number = {need.chunk: need for need in wanted}
    assert {piece.chunk for piece in pieces} == set(by_number)
    for number, chunk in by_number.items():
        of_chunk = [piece for piece in pieces if piece.chunk == number]
        blocks = [block for piece in of_chunk for block in range(piece.first_block, piece.stop_block)]
        span = set()
        for need in wanted:
            if need.chunk == number:
                touched = _blocks(need)
                assert {b for p in of_chunk if need in p.needs for b in range(p.first_block, p.stop_block)} >= touched, (
                    "an item misses a block it needs"
                )
                span |= set(range(min(touched), max(touched) + 1))
        assert blocks == sorted(span), "other blocks are read than those from the first to the last that a need touches"
        for piece in of_chunk:
            low = piece.first_block * BLOCK_BYTES
            assert piece.offset == chunk.begin + low
            assert piece.nbytes == min(piece.stop_block * BLOCK_BYTES, chunk.nbytes) - low
            assert piece.needs
            assert len(set(piece.needs)) == len(piece.needs)


def test_rows_of_a_large_chunk_read_only_their_blocks():
    sizes = (1024, 8192)  # 32 MiB of F32, a block holds four rows
    (piece,) = slices([Need(0, 0, sizes, Box((512, 0), (8, 8192)), "F32", 4096, 1024 * 8192 * 4)])
    assert (piece.offset, piece.nbytes) == (4096 + 512 * 8192 * 4, 2 * BLOCK_BYTES)


def test_a_whole_checkpoint_is_read_in_few_long_runs():
    wanted = [Need(i, i, (1000,), Box((0,), (1000,)), "F32", 4096 + 4000 * i, 4000) for i in range(10_000)]
    lengths = [sum(piece.nbytes for piece in run) for run in runs(slices(reversed(wanted)))]
    assert sum(lengths) == 40_000_000
    assert len(lengths) == math.ceil(40_000_000 / (reads.RUN_BYTES // 4000 * 4000))


def test_nothing_is_read_for_nothing():
    assert list(runs(slices([]))) == []


def test_regions_of_a_scalar():
    assert region(Box((), ())) == ()
    (piece,) = slices([Need(0, 0, (), Box((), ()), "F64", 4096, 8)])
    assert (piece.offset, piece.nbytes) == (4096, 8)
