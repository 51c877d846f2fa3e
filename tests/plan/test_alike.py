"""What a plan computes once for tensors of one shape and layout is what each alone would get."""

import random

import pytest

from engine.format.layout import Absent, Flat, Grid, LogicalTensor, Mesh, Part
from engine.plan.assign import assign_writers, place_frozen
from engine.plan.order import _geometry, reading_order
from engine.planning import make_plan
from engine.state.boxes import written_boxes
from engine.transfer.replicas import shares

SHAPES = [(4, 6), (6, 4), (8,), (512, 64), ()]


def _layouts(shape: tuple[int, ...]) -> list[tuple[Part, ...]]:
    whole = [Grid(Mesh((2,)), (-1,)), Grid(Mesh((2,)), (-1,), writer=1), Grid(Mesh((4,)), (-1,)), Grid(Mesh((2, 2)), (-1, -1))]
    if shape:
        whole += [Grid(Mesh((2,)), (0,)), Grid(Mesh((2, 2)), (-1, 0)), Flat(Mesh((2,)), 0, 1 << 20), Flat(Mesh((2,)), 7, 1 << 20)]
    found = [(Part(layout),) for layout in whole]
    if len(shape) == 2:
        half = (shape[0] // 2, shape[1])
        found += [(Part(a, (0, 0), half), Part(b, (half[0], 0), half)) for a, b in [(whole[0], whole[4]), (whole[2], Absent())]]
    return found


@pytest.fixture
def tensors() -> list[LogicalTensor]:
    """Each kind a few times, in no order."""
    kinds = [(dtype, shape, parts) for dtype in ("F32", "I64") for shape in SHAPES for parts in _layouts(shape)] * 3
    random.Random(0).shuffle(kinds)
    return [LogicalTensor(f"model.{i}", *kind) for i, kind in enumerate(kinds)]


def _parts(found: tuple[LogicalTensor, ...]) -> list[tuple[Part, ...]]:
    return [tensor.parts for tensor in found]


def test_writers(tensors):
    small = [tensor for tensor in tensors if tensor.shape != (512, 64)]
    assert _parts(assign_writers(small)) == [assign_writers([tensor])[0].parts for tensor in small]
    mixed = dict(zip([t.name for t in tensors], _parts(assign_writers(tensors)), strict=True))
    large = [tensor for tensor in tensors if tensor.shape == (512, 64)]
    assert [mixed[tensor.name] for tensor in large] == _parts(assign_writers(large)), "small ones add to no load"
    assert len({mixed[t.name] for t in large if t.parts == (Part(Grid(Mesh((2,)), (-1,))),)}) == 2, "large ones take turns"


@pytest.mark.parametrize("has_frozen", [False, True])
def test_order_and_classes(tensors, has_frozen):
    names = frozenset((tensor.name, ()) for tensor in tensors[::5]) if has_frozen else frozenset()
    placed = place_frozen(assign_writers(tensors), names, 4)
    keys = [("", t.name) if any(p.layout.mesh.first >= 4 for p in t.parts if not isinstance(p.layout, Absent)) else _geometry(t) for t in placed]
    assert any(key[0] == "" for key in keys) == has_frozen
    order, classes = reading_order(placed, 4)
    assert order == sorted(range(len(placed)), key=lambda i: (*keys[i], i))
    of_class: dict[int, tuple[object, ...]] = {}
    assert all(of_class.setdefault(number, keys[i][:-1]) == keys[i][:-1] for i, number in zip(order, classes, strict=True))
    assert len(set(of_class.values())) == len(of_class)


def test_shared_ones(tensors):
    assert shares(tensors) == [i for i, tensor in enumerate(tensors) if shares([tensor])]


@pytest.mark.parametrize("rank", range(4))
def test_boxes_that_a_rank_writes(tensors, rank):
    plan = make_plan(tuple(tensors), rank, frozenset((tensor.name, ()) for tensor in tensors[::5]), 4)
    assert plan.has_frozen
    for tensor, boxes in zip(plan.assigned, plan.planner._boxes, strict=True):
        own, kept = ([box for part in tensor.parts for box in written_boxes(tensor, part, writer)] for writer in (rank, 4 + rank))
        assert list(boxes) == own + kept
        assert all((tensor.name, box.offsets) in plan.planner.frozen for box in kept)
    assert len(plan.planner.frozen) <= len(tensors[::5])
