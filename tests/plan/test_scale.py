"""A job of 1,024 ranks, planned in one process: the save covers every element once, and so does every reshard of it."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import REPLICATED, Flat, Grid, LogicalTensor, Mesh, Part
from engine.plan.assign import assign_writers
from engine.plan.image import Source, lay_out
from engine.plan.reads import wants
from engine.state.boxes import Box, check_tiling, flat_to_boxes, held_boxes, written_boxes

WORLD = 1024
LAYERS = 40


def _shapes() -> dict[str, tuple[int, ...]]:
    """Of a transformer, small and uneven: more ranks than rows in most tensors."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (1021, 48), "patch": (48, 3, 2, 2, 2)}
    for i in range(LAYERS):
        shapes |= {f"{i}.qkv": (144, 48), f"{i}.out": (48, 48), f"{i}.up": (192, 48), f"{i}.norm": (48,), f"{i}.gate": (1, 6, 48)}
    return shapes


def _fsdp2(world: int) -> list[LogicalTensor]:
    return [LogicalTensor(name, "F32", shape, (Part(Grid(Mesh((world,)), (0,))),)) for name, shape in _shapes().items()]


def _hsdp(world: int) -> list[LogicalTensor]:
    return [LogicalTensor(name, "F32", shape, (Part(Grid(Mesh((8, world // 8)), (REPLICATED, 0))),)) for name, shape in _shapes().items()]


def _zero(world: int) -> list[LogicalTensor]:
    """Stages 1 and 2: all parameters one after the other in one flat buffer."""
    total = sum(map(math.prod, _shapes().values()))
    tensors, start, chunk = [], 0, -(-total // world)
    for name, shape in _shapes().items():
        tensors.append(LogicalTensor(name, "F32", shape, (Part(Flat(Mesh((world,)), start, chunk)),)))
        start += math.prod(shape)
    return tensors


def _zero3(world: int) -> list[LogicalTensor]:
    """Stage 3: each parameter cut by itself."""
    return [LogicalTensor(name, "F32", shape, (Part(Flat(Mesh((world,)), 0, -(-math.prod(shape) // world))),)) for name, shape in _shapes().items()]


def _ddp(world: int) -> list[LogicalTensor]:
    return [LogicalTensor(name, "F32", shape, (Part(Grid(Mesh((world,)), (REPLICATED,))),)) for name, shape in _shapes().items()]


@pytest.mark.parametrize("layout", [_fsdp2, _hsdp, _zero, _zero3, _ddp])
def test_a_save_covers_every_element_once(layout):
    tensors = assign_writers(layout(WORLD))
    load = Counter()
    for tensor in tensors:
        check_tiling(tensor)
        found = np.zeros(tensor.shape, np.uint8)
        for rank in range(WORLD):
            for box in written_boxes(tensor, tensor.parts[0], rank):
                found[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] += 1
                load[rank] += box.numel
        assert (found == 1).all(), tensor.name
    assert sum(load.values()) == sum(map(math.prod, _shapes().values()))


@pytest.mark.parametrize("layout", [_fsdp2, _zero])
def test_each_ranks_files_hold_its_boxes(layout):
    tensors = assign_writers(layout(WORLD))
    for rank in (0, 1, 47, 500, WORLD - 1):
        boxes = [(tensor, box) for tensor in tensors for box in written_boxes(tensor, tensor.parts[0], rank)]
        sources = [Source(i, t.name, t.dtype, b.offsets, b.sizes, b.numel * ITEM_BYTES[t.dtype]) for i, (t, b) in enumerate(boxes)]
        images = lay_out(sources)
        assert len(images) <= 9, "more files than boxes that a flat interval of five dimensions has"
        assert sum(image.data_bytes for image in images) == 4 * sum(box.numel for _, box in boxes)


@pytest.mark.parametrize(
    ("source", "target", "world", "count"),
    [(_zero, _fsdp2, 768, 202), (_fsdp2, _zero, 768, 202), (_ddp, _zero, 1024, 202), (_zero3, _hsdp, 512, 12), (_hsdp, _zero3, 2000, 12)],
)
def test_a_reshard_reads_every_element_of_every_target_once(source, target, world, count):
    stored = {tensor.name: tensor for tensor in assign_writers(source(WORLD))}
    written: dict[tuple[str, int], list[Box]] = defaultdict(list)
    for live in target(world)[:count]:
        read = np.zeros(live.shape, np.int32)
        held = np.zeros(live.shape, np.int32)
        for rank in range(world):
            for box in held_boxes(live, live.parts[0], rank):
                held[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))] += 1
                for writer, chunk, overlap in wants(stored[live.name], box):
                    read[tuple(slice(o, o + n) for o, n in zip(overlap.offsets, overlap.sizes, strict=True))] += 1
                    key = (live.name, writer)
                    if key not in written:
                        written[key] = written_boxes(stored[live.name], stored[live.name].parts[0], writer)
                    assert chunk in written[key], f"rank {writer} did not write {chunk}"
        assert held.min() >= 1
        assert (read == held).all(), live.name


def test_finding_the_writers_does_not_search_all_ranks():
    """A reader of one row asks few ranks' indexes, at any world size."""
    tensor = LogicalTensor("embed", "F32", (10**9, 4096), (Part(Flat(Mesh((10**6,)), 0, 4096 * 10**3)),))
    found = list(wants(tensor, Box((123_456_789, 0), (1, 4096))))
    assert [rank for rank, _, _ in found] == [123_456]
    tensor = LogicalTensor("embed", "F32", (10**9, 4096), (Part(Grid(Mesh((10**6,)), (0,), 0)),))
    assert [rank for rank, _, _ in wants(tensor, Box((123_456_789, 0), (1, 4096)))] == [123_456]


def test_a_flat_interval_is_few_boxes_however_large_the_tensor():
    assert len(flat_to_boxes((1000, 1000, 1000, 1000), 1_234_567_891, 987_654_321_123)) <= 7
