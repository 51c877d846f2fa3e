"""Many ranks in one process: who reads which block, and that what a home sends is what the other side waits for."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.format.checksum import BLOCK_BYTES, block_count
from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import Flat, Grid, LogicalTensor, Mesh, Part
from engine.plan.exchange import CELL_BYTES, PARCEL_BYTES, SEGMENT_BYTES, Homes, Round, cells, homes_of, overlaps, quota
from engine.plan.reads import Need, block_span, slices, wants
from engine.state.boxes import Box, held_boxes, shift, written_boxes
from tests.layouts import boxes_in, region

HEADER = 4096


@given(st.integers(1, 40), st.integers(1, 40))
def test_every_file_has_homes_and_all_ranks_are_some(saved_on, world_size):
    homes = Homes(saved_on, world_size)
    found = Counter(rank for writer in range(saved_on) for rank in homes.of_writer(writer))
    assert all(len(homes.of_writer(writer)) >= 1 for writer in range(saved_on))
    assert set(found) <= set(range(world_size))
    if world_size <= saved_on:
        assert set(found) == set(range(world_size))
        assert max(found.values()) - min(found.values()) <= 1, "evenly"
    if saved_on == world_size:
        assert all(list(homes.of_writer(writer)) == [writer] for writer in range(saved_on))


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_every_block_has_one_home_alike_for_all(saved_on, world_size, data):
    homes = Homes(saved_on, world_size)
    writer = data.draw(st.integers(0, saved_on - 1))
    nbytes, position = data.draw(st.integers(1, 40 * BLOCK_BYTES)), data.draw(st.integers(0, 3 * SEGMENT_BYTES))
    shares = homes.shares(writer, position, nbytes)
    assert shares[-1][1] == block_count(nbytes)
    assert {home for home, _ in shares} <= set(homes.of_writer(writer))
    cuts = {home: cells(shares, home) for home in range(world_size)}
    for block in range(block_count(nbytes)):
        assert sum(cut(block)[1] for cut in cuts.values()) == 1
        ends = {cut(block)[0] for cut in cuts.values()}
        assert len(ends) == 1, "all cut alike"
        end = ends.pop()
        assert block < end <= (block // (CELL_BYTES // BLOCK_BYTES) + 1) * (CELL_BYTES // BLOCK_BYTES)
        assert len({next(home for home, cut in cuts.items() if cut(b)[1]) for b in range(block, min(end, block_count(nbytes)))}) == 1


class Asked(Need, frozen=True, gc=False):
    requester: int


@st.composite
def jobs(draw):
    """Chunks of one file, and what each of some ranks needs of them."""
    world_size, begin, item, found = draw(st.integers(1, 6)), HEADER, 0, []
    for chunk in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(["F32", "BF16", "I8"]))
        block = BLOCK_BYTES // ITEM_BYTES[dtype]
        sizes = (draw(st.sampled_from([1, 3, 5, 30])), draw(st.sampled_from([1, 7, block // 4, block // 2, block, block + 1])))
        nbytes = math.prod(sizes) * ITEM_BYTES[dtype]
        for _ in range(draw(st.integers(0, 6))):
            inner = draw(st.one_of(boxes_in(sizes).filter(lambda b: b.numel), st.just(Box((0, 0), sizes))))
            found.append(Asked(item, chunk, sizes, inner, dtype, begin, nbytes, draw(st.integers(0, world_size - 1))))
            item += 1
        begin += nbytes
    return world_size, draw(st.integers(1, 3)), draw(st.permutations(found))


def _elements(piece, need):
    """The positions in the chunk of what is sent of a need in a piece, in order."""
    starts = [np.ravel_multi_index(overlap.offsets, need.sizes) for *_, overlap in overlaps(piece, need)]
    found = [
        start + (np.arange(overlap.sizes[0])[:, None] * need.sizes[1] + np.arange(overlap.sizes[1])).ravel()
        for start, (*_, overlap) in zip(starts, overlaps(piece, need), strict=True)
    ]
    return np.concatenate(found) if found else np.empty(0, int)


def _stream(pieces, requester):
    """What goes to a rank, in order: (item, elements)."""
    found = [(need.item, _elements(piece, need)) for piece in pieces for need in piece.needs if need.requester == requester]
    return [(item, elements) for item, elements in found if elements.size]


@given(jobs())
def test_what_homes_send_is_what_the_others_wait_for(job):
    world_size, saved_on, needs = job
    homes, writer = Homes(saved_on, world_size), saved_on - 1
    shares = lambda need: homes.shares(writer, need.begin - HEADER, need.nbytes)  # noqa: E731
    ordered = sorted(needs, key=lambda need: (need.begin, block_span(need)[0]))
    read, got = Counter(), {need.item: np.zeros(need.sizes, np.int8) for need in needs}
    for home in range(world_size):
        cut = lambda need, home=home: cells(shares(need), home)  # noqa: E731
        asked = [need for rank in range(world_size) for need in ordered if need.requester == rank and home in homes_of(need, shares(need))]
        mine = list(slices(asked, cut))
        read.update((piece.chunk, block) for piece in mine for block in range(piece.first_block, piece.stop_block))
        for rank in range(world_size):
            sent, expected = _stream(mine, rank), _stream(slices([need for need in asked if need.requester == rank], cut), rank)
            assert [item for item, _ in sent] == [item for item, _ in expected]
            assert all((a == b).all() for (_, a), (_, b) in zip(sent, expected, strict=True))
            for item, elements in sent:
                assert (np.diff(elements) > 0).all(), "in the order of the chunk"
                got[item].ravel()[elements] += 1
    for need in needs:
        whole = np.zeros(need.sizes, np.int8)
        whole[region(need.inner)] = 1
        assert (got[need.item] == whole).all(), "each element once, and nothing else"
    assert set(read) == {(need.chunk, block) for need in needs for block in range(*block_span(need))}
    assert set(read.values()) <= {1}, "a block is read twice"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, CELL_BYTES)), max_size=80), st.lists(st.integers(1, 8), min_size=4, max_size=4))
def test_a_round_is_bounded_and_never_empty(items, homes):
    quotas = [quota(range(n)) for n in homes]
    now = Round(quotas)
    for rank, size_bytes in items:
        if not now.fits(rank, size_bytes):
            assert now.total, "an item that no round takes"
            now = Round(quotas)
            assert now.fits(rank, size_bytes)
        now.add(rank, size_bytes)
        assert now.total <= PARCEL_BYTES
        assert all(used <= limit for used, limit in zip(now.used, quotas, strict=True))
        assert now.total == sum(now.used)


def test_a_rank_of_many_homes_is_sent_little_by_each():
    now = Round([quota(range(8)), quota(range(1))])
    while now.fits(0, CELL_BYTES):
        now.add(0, CELL_BYTES)
    assert now.used == [PARCEL_BYTES // 8, 0]
    assert now.fits(1, CELL_BYTES), "others have room left"


def _crossing(stored: LogicalTensor, live: LogicalTensor, saved_on: int, world_size: int) -> tuple[int, int]:
    """Elements that are sent from rank to rank, and all that are needed."""
    homes, sent, needed = Homes(saved_on, world_size), 0, 0
    for rank in range(world_size):
        for box in held_boxes(live, live.parts[0], rank):
            for writer, chunk, overlap in wants(stored, box):
                nbytes = chunk.numel * 4
                need = Need(0, 0, chunk.sizes, shift(overlap, chunk.offsets, -1), "F32", HEADER, nbytes)
                for home in homes_of(need, homes.shares(writer, 0, nbytes)):
                    cut = cells(homes.shares(writer, 0, nbytes), home)
                    numel = sum(o.numel for piece in slices([need], lambda _, cut=cut: cut) for *_, o in overlaps(piece, need))
                    needed += numel
                    sent += numel if home != rank else 0
    return sent, needed


def _rows(world: int, dim: int = 0) -> Grid:
    return Grid(Mesh((world,)), (dim,), 0)


def _flat(world: int) -> Flat:
    return Flat(Mesh((world,)), 0, -(-4096 * 2048 // world))


@pytest.mark.parametrize("layout", [_rows, _flat])
@pytest.mark.parametrize(("saved_on", "world_size"), [(2, 2), (7, 7), (2, 4), (2, 8), (8, 2), (4, 2), (1, 8)])
def test_a_sharding_that_only_became_finer_or_coarser_sends_next_to_nothing(layout, saved_on, world_size):
    tensors = [LogicalTensor("t", "F32", (4096, 2048), (Part(layout(world)),)) for world in (saved_on, world_size)]
    sent, needed = _crossing(*tensors, saved_on, world_size)
    assert needed == 4096 * 2048
    assert sent <= 0.01 * needed
    assert sent == 0 or saved_on != world_size


def test_rows_to_columns_sends_what_it_must():
    stored, live = (LogicalTensor("t", "F32", (4096, 2048), (Part(_rows(8, dim)),)) for dim in (0, 1))
    sent, needed = _crossing(stored, live, 8, 8)
    assert needed == 4096 * 2048
    assert sent == needed * 7 // 8


def test_small_tensors_of_a_neighbourhood_have_one_home():
    """So that they are read in long runs, by all homes in turn."""
    homes = Homes(1, 4)
    found = [homes.shares(0, position, 1000)[0][0] for position in range(0, 32 * 2**20, 1000)]
    assert sum(a != b for a, b in itertools.pairwise(found)) == 7
    assert set(found) == {0, 1, 2, 3}


def test_the_writers_of_a_save_are_its_homes():
    tensor = LogicalTensor("t", "F32", (4096, 2048), (Part(_rows(4)),))
    for rank in range(4):
        (box,) = written_boxes(tensor, tensor.parts[0], rank)
        need = Need(0, 0, box.sizes, replace(box, offsets=(0, 0)), "F32", HEADER, box.numel * 4)
        assert homes_of(need, Homes(4, 4).shares(rank, 0, need.nbytes)) == [rank]
