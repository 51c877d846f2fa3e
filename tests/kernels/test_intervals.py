"""The algebra of intervals against boolean masks."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_kernels import intervals as module
from engine_kernels.intervals import addresses, gaps_of, shard_intervals, spans_of, tiles, triples


@st.composite
def trained(draw):
    """Sizes of tensors and their intervals; some are empty, some touch."""
    sizes = draw(st.lists(st.integers(0, 30), max_size=5))
    cuts = [sorted(draw(st.lists(st.integers(0, size), max_size=8))) for size in sizes]
    return sizes, [list(zip(cut[::2], cut[1::2])) for cut in cuts]


def masks(sizes, intervals):
    found = [torch.zeros(size, dtype=torch.bool) for size in sizes]
    for mask, own in zip(found, intervals, strict=True):
        for begin, end in own:
            mask[begin:end] = True
    return found


def covered(size, own):
    return masks([size], [own])[0]


@given(trained(), st.integers(1, 4), st.integers(0, 5))
def test_shards_hold_what_the_whole_buffer_holds(sizes_intervals, world, padding):
    sizes, intervals = sizes_intervals
    whole = torch.cat([*masks(sizes, intervals), torch.zeros(padding, dtype=torch.bool)])
    shard_size = -(-len(whole) // world)
    whole = torch.cat([whole, torch.zeros(shard_size * world - len(whole), dtype=torch.bool)])
    for rank in range(world):
        own = shard_intervals(intervals, sizes, rank, shard_size)
        assert torch.equal(covered(shard_size, own), whole[rank * shard_size : (rank + 1) * shard_size])
        assert all(0 <= begin < end <= shard_size for begin, end in own)
        assert all(a[1] < b[0] for a, b in pairwise(own)), "they are sorted, and those that touch are joined"


@given(trained(), st.sampled_from([1, 4, 16]))
def test_tiles_and_gaps_cover_each_element_once(sizes_intervals, size):
    sizes, intervals = sizes_intervals
    spans = spans_of(intervals, sizes)
    for found, wanted in ((spans, masks(sizes, intervals)), (gaps_of(spans, sizes), [~mask for mask in masks(sizes, intervals)])):
        for i, mask in enumerate(wanted):
            assert torch.equal(covered(sizes[i], [(begin, end) for tensor, begin, end in triples(found) if tensor == i]), mask)
        counts = [torch.zeros(n, dtype=torch.int64) for n in sizes]
        for i, begin, end in tiles(found, size, torch.device("cpu")).tolist():
            assert begin < end <= (begin // size + 1) * size
            counts[i][begin:end] += 1
        assert all(torch.equal(count, mask.long()) for count, mask in zip(counts, wanted, strict=True))


def test_tables_are_copied_when_something_has_changed(monkeypatch):
    moved = []
    monkeypatch.setattr(module, "upload", lambda table, device: moved.append(table) or table)
    first, second, device = torch.zeros(40), torch.zeros(40), torch.device("cpu")
    for pointed in (first, first, second, first):
        addresses([[pointed], [pointed[1:]]], device)
        tiles([0, 3, 37], 8191, device)
    assert len(moved) == 3
    assert moved[0].tolist() == [[first.data_ptr(), first.data_ptr() + 4, 0]]
    tiles([0, 3, 38], 8191, device)
    tiles([0, 3, 38], 8192, device)
    assert len(moved) == 5


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([[(0, 3)]], "there are intervals for 1 tensors, but 2 tensors"),
        ([[], [(2, 11)]], r"tensor 1 has interval \(2, 11\); it must be \(begin, end\) with 0 <= begin <= end <= 10"),
        ([[(-1, 2)], []], r"tensor 0 has interval \(-1, 2\)"),
        ([[(4, 3)], []], r"tensor 0 has interval \(4, 3\)"),
        ([[], [(0, 4), (3, 5)]], r"tensor 1 has interval \(3, 5\) after one that ends at 4; they must be sorted and disjoint"),
        ([[], [(6, 7), (0, 2)]], r"tensor 1 has interval \(0, 2\) after one that ends at 7"),
    ],
)
def test_intervals_that_cannot_be(intervals, message):
    with pytest.raises(ValueError, match=message):
        spans_of(intervals, [5, 10])
    with pytest.raises(ValueError, match=message):
        shard_intervals(intervals, [5, 10], 0, 15)
