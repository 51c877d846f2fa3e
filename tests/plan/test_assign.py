"""Writers: spread evenly, the same on every rank."""

from collections import Counter

from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import ANY, REPLICATED, Grid, LogicalTensor, Mesh, Part
from engine.plan.assign import CUT_BYTES, SMALL_BYTES, assign_writers
from engine.state.boxes import written_boxes


def _replicated(name, shape, world=4, dtype="F32", writer=ANY):
    return LogicalTensor(name, dtype, shape, (Part(Grid(Mesh((world,)), (REPLICATED,), writer)),))


def _bytes_by_rank(tensors, world):
    load = Counter()
    for tensor in assign_writers(tensors):
        for rank in range(world):
            load[rank] += sum(box.numel for part in tensor.parts for box in written_boxes(tensor, part, rank)) * ITEM_BYTES[tensor.dtype]
    return [load[rank] for rank in range(world)]


def test_small_tensors_lie_together_on_the_first_holder():
    tensors = [_replicated(f"t{i}", (SMALL_BYTES // 4 - 1,)) for i in range(10)]
    assert [tensor.parts[0].layout.writer for tensor in assign_writers(tensors)] == [0] * 10


def test_middling_tensors_are_spread_evenly():
    load = _bytes_by_rank([_replicated(f"t{i}", (SMALL_BYTES // 4 + 100 * i,)) for i in range(40)], 4)
    assert max(load) < 1.1 * min(load)


def test_one_large_tensor_is_cut_over_its_holders():
    rows = 1024
    load = _bytes_by_rank([_replicated("big", (rows, CUT_BYTES // 4 // rows))], 4)
    assert load == [CUT_BYTES // 4] * 4


def test_a_large_tensor_with_fewer_rows_than_holders_stays_whole():
    load = _bytes_by_rank([_replicated("flat", (3, CUT_BYTES))], 4)
    assert sorted(load) == [0, 0, 0, 3 * 4 * CUT_BYTES]


def test_replicas_of_a_sharded_tensor_share_the_work():
    """HSDP: two replicas of each shard; half the tensors go to either."""
    grid = Grid(Mesh((2, 2)), (REPLICATED, 0))
    tensors = [LogicalTensor(f"t{i}", "F32", (64, 1024), (Part(grid),)) for i in range(8)]
    assert len(set(_bytes_by_rank(tensors, 4))) == 1


def test_an_assigned_writer_stays():
    (tensor,) = assign_writers([_replicated("buffer", (CUT_BYTES, 4), writer=3)])
    assert tensor == _replicated("buffer", (CUT_BYTES, 4), writer=3)


def test_the_answer_depends_on_the_tensors_alone():
    tensors = [_replicated(f"t{i}", (SMALL_BYTES + i,)) for i in range(9)]
    assert assign_writers(tensors) == assign_writers(list(tensors))
