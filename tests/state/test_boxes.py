"""Geometry against slow references: numpy counters, torch.chunk, a search over all ranks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import LayoutError
from engine.format.layout import ANY, REPLICATED, Absent, Flat, Grid, LogicalTensor, Mesh, Part
from engine.plan.assign import assign_writers
from engine.state.boxes import (
    Box,
    check_tiling,
    flat_span,
    flat_to_boxes,
    grid_box,
    held_boxes,
    intersect,
    part_box,
    unravel,
    writers,
    written_boxes,
)
from tests.layouts import all_held, boxes_in, counts, inside, ranks_of, region, replicas, shapes, tensors


@given(shapes(max_dims=5, max_side=5, min_side=1), st.data())
def test_flat_boxes_are_the_interval_in_order_each_contiguous_and_few(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    positions = np.arange(numel).reshape(shape)
    boxes = flat_to_boxes(shape, start, stop)
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    found = [positions[region(box)].ravel() for box in boxes]
    assert all(len(f) and (np.diff(f) == 1).all() for f in found), "a box is not contiguous in the flat order"
    assert np.concatenate([np.empty(0, int), *found]).tolist() == list(range(start, stop))


def test_flat_boxes_reach_their_bound():
    assert len(flat_to_boxes((4, 4, 4), 21 - 16, 64 - 5)) == 5


@given(shapes(min_side=1), st.data())
def test_flat_span_is_the_first_and_last_position(shape, data):
    box = data.draw(boxes_in(shape).filter(lambda b: b.numel))
    positions = np.arange(math.prod(shape)).reshape(shape)[region(box)]
    assert flat_span(shape, box) == (positions.min(), positions.max() + 1)


@given(shapes(), st.data())
def test_intersection_is_the_common_elements(shape, data):
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    common = (counts(shape, [a]) + counts(shape, [b])) == 2
    found = intersect(a, b)
    assert (counts(shape, [found] if found else []).astype(bool) == common).all()
    assert (found is None) == (not common.any())


@given(tensors())
def test_held_boxes_tile_each_part_once_for_each_replica(tensor):
    check_tiling(tensor)
    for part in tensor.parts:
        held = [box for rank in ranks_of(part) for box in held_boxes(tensor, part, rank)]
        times = 0 if isinstance(part.layout, Absent) else replicas(part) if isinstance(part.layout, Grid) else 1
        assert (counts(tensor.shape, held) == times * inside(tensor, part)).all()


@given(tensors())
def test_written_boxes_tile_what_is_not_absent_exactly_once(tensor):
    written = [box for part in tensor.parts for rank in ranks_of(part) for box in written_boxes(tensor, part, rank)]
    expected = sum((inside(tensor, p) for p in tensor.parts if not isinstance(p.layout, Absent)), np.zeros(tensor.shape, int))
    assert (counts(tensor.shape, written) == expected).all()
    assert all(box.numel for box in written) or math.prod(tensor.shape) == 0, "an empty box of a tensor that is not empty"


@given(st.lists(tensors(), max_size=6))
def test_every_element_has_one_writer_after_assignment(many):
    for before, tensor in zip(many, assign_writers(many), strict=True):
        check_tiling(tensor)
        assert all(not isinstance(part.layout, Grid) or part.layout.writer != ANY for part in tensor.parts)
        written = [box for part in tensor.parts for rank in ranks_of(part) for box in written_boxes(tensor, part, rank)]
        expected = sum((inside(tensor, p) for p in tensor.parts if not isinstance(p.layout, Absent)), np.zeros(tensor.shape, int))
        assert (counts(tensor.shape, written) == expected).all()
        for old, new in zip(before.parts, tensor.parts, strict=True):
            for rank in ranks_of(old):
                room = counts(tensor.shape, held_boxes(before, old, rank))
                assert (counts(tensor.shape, written_boxes(tensor, new, rank)) <= room).all(), f"rank {rank} writes what it does not hold"


@given(tensors(), st.data())
def test_writers_are_those_that_a_search_finds(tensor, data):
    target = data.draw(boxes_in(tensor.shape))
    for part in tensor.parts:
        searched = [
            (rank, box, overlap)
            for rank in ranks_of(part)
            for box in written_boxes(tensor, part, rank)
            if (overlap := intersect(box, target)) is not None
        ]
        assert sorted(map(repr, writers(tensor, part, target))) == sorted(map(repr, searched))


@pytest.mark.parametrize("mesh", [(2, 3), (3, 2), (4, 4), (2, 2, 3)])
def test_writers_where_mesh_dimensions_cut_one_dimension_again(mesh):
    """Every row, at every number of rows: the inner cut depends on the outer piece."""
    for rows in range(1, 20):
        tensor = LogicalTensor("t", "F32", (rows,), (Part(Grid(Mesh(mesh), (0,) * len(mesh), 0)),))
        (part,) = tensor.parts
        for row in range(rows):
            target = Box((row,), (1,))
            (expected,) = [rank for rank in ranks_of(part) for box in written_boxes(tensor, part, rank) if intersect(box, target)]
            assert [rank for rank, _, _ in writers(tensor, part, target)] == [expected]


@given(tensors())
def test_ranks_outside_a_mesh_hold_nothing(tensor):
    for part in tensor.parts:
        assert held_boxes(tensor, part, 1000) == written_boxes(tensor, part, 1000) == []


@given(st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), st.data())
def test_grid_pieces_are_those_of_torch_chunk(sizes, mesh, data):
    """DTensor cuts by ``torch.chunk``, mesh dimension after mesh dimension; pieces that chunk does not give are empty."""
    dims = tuple(data.draw(st.sampled_from([REPLICATED, *range(len(sizes))])) for _ in mesh)
    positions = torch.arange(math.prod(sizes)).reshape(sizes)
    for position in range(math.prod(mesh)):
        piece = positions
        for dim, index, count in zip(dims, unravel(position, mesh), mesh, strict=True):
            if dim != REPLICATED:
                pieces = torch.chunk(piece, count, dim)
                piece = pieces[index] if index < len(pieces) else piece.narrow(dim, 0, 0)
        box = grid_box(Grid(Mesh(mesh), dims), sizes, position)
        assert box.sizes == tuple(piece.shape)
        assert torch.equal(positions[region(box)], piece)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple), st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple), st.data())
def test_grid_pieces_are_those_of_dtensor(sizes, mesh, data):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    dims = tuple(data.draw(st.sampled_from([REPLICATED, *range(len(sizes))])) for _ in mesh)
    placements = [Replicate() if dim == REPLICATED else Shard(dim) for dim in dims]
    for position in range(math.prod(mesh)):
        index = unravel(position, mesh)
        shape, offset = _compute_local_shape_and_global_offset(torch.Size(sizes), mesh, lambda d, index=index: index[d], placements)
        box = grid_box(Grid(Mesh(mesh), dims), sizes, position)
        assert box.sizes == tuple(shape)
        if box.numel:
            assert box.offsets == tuple(offset)


def test_more_ranks_than_rows_leaves_the_last_ranks_empty():
    tensor = LogicalTensor("t", "F32", (3, 2), (Part(Grid(Mesh((8,)), (0,))),))
    assert [held_boxes(tensor, tensor.parts[0], rank) for rank in range(8)] == [[Box((row, 0), (1, 2))] for row in range(3)] + [[]] * 5


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)])
def test_an_empty_tensor_is_written_once_as_one_empty_box(shape):
    for mesh, dims in [((4,), (0,)), ((4,), (REPLICATED,)), ((2, 2), (REPLICATED, 0)), ((2, 2), (0, 0))]:
        (tensor,) = assign_writers([LogicalTensor("t", "F32", shape, (Part(Grid(Mesh(mesh), dims)),))])
        written = [box for rank in range(4) for box in written_boxes(tensor, tensor.parts[0], rank)]
        assert [(box.offsets, box.numel) for box in written] == [((0,) * len(shape), 0)]


def test_a_scalar_is_one_box_on_every_holder():
    tensor = LogicalTensor("t", "F32", (), (Part(Grid(Mesh((3,)), (REPLICATED,), 0)),))
    assert all_held(tensor) == [Box((), ())] * 3
    assert list(writers(tensor, tensor.parts[0], Box((), ()))) == [(0, Box((), ()), Box((), ()))]


def _whole(layout, shape=(4, 2)) -> LogicalTensor:
    return LogicalTensor("layer.weight", "F32", shape, (Part(layout),))


_ONE = Grid(Mesh((1,)), (REPLICATED,), 0)


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (LogicalTensor("layer.weight", "F32", (4, 2), ()), "cover 0 of 8"),
        (LogicalTensor("layer.weight", "F32", (4, 2), (Part(_ONE, (0, 0), (3, 2)),)), "cover 6 of 8"),
        (LogicalTensor("layer.weight", "F32", (4, 2), (Part(_ONE, (0, 0), (3, 2)), Part(_ONE, (2, 0), (2, 2)))), "overlap"),
        (LogicalTensor("layer.weight", "F32", (4, 2), (Part(_ONE, (1, 0), (4, 2)),)), "outside"),
        (LogicalTensor("layer.weight", "F32", (4, 2), (Part(_ONE, (-1, 0), (4, 2)),)), "outside"),
        (LogicalTensor("layer.weight", "F32", (4, 2), (Part(_ONE, (0,), (8,)),)), "outside"),
        (LogicalTensor("layer.weight", "F32", (4, 2), (Part(_ONE, (0,), (4, 2)),)), "offsets"),
        (LogicalTensor("layer.weight", "F32", (4, 2), (Part(_ONE, (1, 0)),)), "offsets"),
        (_whole(Flat(Mesh((2,)), 0, 3)), "do not fit"),
        (_whole(Flat(Mesh((2,)), 3, 5)), "do not fit"),
        (_whole(Flat(Mesh((2,)), -1, 5)), "do not fit"),
        (_whole(Flat(Mesh((2,)), 0, 0), (0,)), "do not fit"),
        (_whole(Grid(Mesh((2,)), (2,))), "cannot cut"),
        (_whole(Grid(Mesh((2,)), (-2,))), "cannot cut"),
        (_whole(Grid(Mesh((2,)), (0, 0))), "cannot cut"),
        (_whole(Grid(Mesh((2,)), (0,)), ()), "cannot cut"),
        (_whole(Grid(Mesh((2,), ranks=(0,)), (0,))), "not one a position"),
        (_whole(Grid(Mesh((2,), ranks=(1, 1)), (0,))), "not one a position"),
        (_whole(Grid(Mesh((2, 2), 0, (1, 1)), (0, REPLICATED))), "not one a position"),
        (_whole(Grid(Mesh((2,), -1), (0,))), "not one a position"),
        (_whole(Grid(Mesh((0,)), (0,))), "mesh of shape"),
        (_whole(Grid(Mesh((-1, -2)), (0, 0))), "mesh of shape"),
        (_whole(Grid(Mesh((2,)), (REPLICATED,), 2)), "writer 2"),
        (_whole(Grid(Mesh((2,)), (0,), 1)), "writer 1"),
        (_whole(Grid(Mesh((2,)), (REPLICATED,), -2)), "writer -2"),
    ],
)
def test_a_rule_that_does_not_tile_is_refused_by_name(tensor, told):
    with pytest.raises(LayoutError, match=told) as error:
        check_tiling(tensor)
    assert "layer.weight" in str(error.value)


@given(tensors())
def test_a_part_is_a_box_of_its_tensor(tensor):
    assert (counts(tensor.shape, [part_box(tensor, part) for part in tensor.parts]) == 1).all()
