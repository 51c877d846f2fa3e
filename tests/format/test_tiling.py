"""Numbers of boxes add up exactly where the boxes tile: against counting every element."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.format.tiling import Tiling, tiles
from tests.layouts import boxes_in, counts, shapes


@given(shapes(), st.data())
def test_boxes_tile_if_every_element_is_in_one(shape, data):
    boxes = data.draw(st.lists(boxes_in(shape), max_size=6))
    assert tiles(shape, [(box.offsets, box.sizes) for box in boxes]) == bool((counts(shape, boxes) == 1).all())


@st.composite
def cuts(draw, offsets: tuple[int, ...], sizes: tuple[int, ...], depth: int = 3) -> list:
    """A box, cut again and again."""
    dims = [dim for dim, n in enumerate(sizes) if n > 1]
    if not depth or not dims or draw(st.booleans()):
        return [(offsets, sizes)]
    dim = draw(st.sampled_from(dims))
    at = draw(st.integers(1, sizes[dim] - 1))
    low = (offsets, (*sizes[:dim], at, *sizes[dim + 1 :]))
    high = ((*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :]), (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :]))
    return draw(cuts(*low, depth - 1)) + draw(cuts(*high, depth - 1))


@given(shapes(min_side=1), st.data())
def test_cut_boxes_tile_and_no_longer_where_one_is_missing_doubled_or_moved(shape, data):
    boxes = data.draw(cuts((0,) * len(shape), shape))
    assert tiles(shape, boxes)
    assert tiles(shape, random.Random(0).sample(boxes, len(boxes)))
    place = data.draw(st.integers(0, len(boxes) - 1))
    offsets, sizes = boxes[place]
    assert not tiles(shape, boxes[:place] + boxes[place + 1 :])
    assert not tiles(shape, [*boxes, boxes[place]])
    if shape:
        moved = (offsets[0] + 1, *offsets[1:])
        assert not tiles(shape, [*boxes[:place], (moved, sizes), *boxes[place + 1 :]])


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (1, 2)), ((1, 0), (1, 2)), ((0, 2), (2, 1)), ((0, 2), (2, 1))],
        [((0, 0), (2, 2)), ((1, 1), (1, 2))],  # as many elements as there are, one twice and one never
        [((0, 0), (2, 1)), ((0, 1), (2, 1)), ((0, 1), (2, 1))],
    ],
)
def test_as_many_elements_are_not_enough(boxes):
    assert sum(a * b for _, (a, b) in boxes) >= 6
    assert not tiles((2, 3), boxes)


def test_many_dimensions_and_large_extents_cost_no_more():
    shape = (2,) * 64
    half = (1, *shape[1:])
    assert tiles(shape, [((0,) * 64, half), ((1, *(0,) * 63), half)])
    assert not tiles(shape, [((0,) * 64, half)] * 2)
    assert tiles((2**62,), [((0,), (2**61,)), ((2**61,), (2**61,))])


def test_the_training_runs_random_numbers_are_not_touched():
    random.seed(3)
    expected = random.getstate()
    tiles((4, 4), [((0, 0), (4, 4))])
    assert random.getstate() == expected


def test_numbers_are_of_one_tiling_only():
    a, b = Tiling(), Tiling()
    assert a.number((0,), (3,)) != b.number((0,), (3,))
    assert a.same(a.number((0,), (3,)) + a.number((3,), (2,)), a.number((0,), (5,)))
    assert np.unique([Tiling().number((0,), (1,)) % 1000 for _ in range(50)]).size > 10
