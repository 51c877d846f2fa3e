"""Shard handles speak DCP's protocol: torch's own planners, writer and reader carry them too."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from engine.dcp import ShardSavePlanner, ShardTensor
from engine.errors import UsageError
from engine.format.layout import Flat, Grid, LogicalTensor, Mesh, Part
from engine.state.boxes import held_boxes
from engine.state.shard import Shard

SHAPE = (5, 7, 3)


def handle(layout, local: torch.Tensor, rank: int) -> ShardTensor:
    tensor = LogicalTensor("w", "F32", SHAPE, (Part(layout),))
    return ShardTensor(Shard(tensor, (local,)), held_boxes(tensor, tensor.parts[0], rank), rank)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_dcp_saves_and_loads_a_flat_fragment_as_boxes(tmp_path):
    whole = torch.arange(105.0)
    layout = Flat(Mesh((2,)), start=12, chunk=64)  # rank 0 holds [0, 52), rank 1 [52, 105)
    fragment = handle(layout, whole[:52].clone(), 0)
    assert len(fragment.__create_chunk_list__()) == 3, "rows, then columns of a row, then a part of a column"
    dcp.save({"w": fragment}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    filled = torch.zeros(52)
    dcp.load({"w": handle(layout, filled, 0)}, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(filled, whole[:52])
    rows = torch.full((2, 7, 3), -1.0)  # another layout over the same tensor: the rows [0, 2)
    dcp.load({"w": handle(Grid(Mesh((3,)), (0,)), rows, 0)}, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(rows, whole.view(SHAPE)[:2])


def test_a_handle_is_not_for_computing():
    with pytest.raises(UsageError, match="use the live tensor"):
        handle(Grid(Mesh((1,)), (0,)), torch.zeros(SHAPE), 0) + 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_handles_of_a_plan_are_what_this_rank_writes(tmp_path):
    """Tensors that are alike but for their names share all that a plan computes."""
    halves, one = Grid(Mesh((2,)), (0,), writer=0), Grid(Mesh((2,)), (-1,), writer=1)
    layouts = {"a": halves, "b": one, "c": halves, "d": one}
    tensors = [LogicalTensor(name, "F32", (4, 3), (Part(layout),)) for name, layout in layouts.items()]
    whole = {name: torch.rand(4, 3) for name in layouts}
    for rank, names in ((0, ["a", "c"]), (1, ["a", "b", "c", "d"])):
        shards = [Shard(t, ((whole[t.name] if t.name in "bd" else whole[t.name][2 * rank : 2 * rank + 2]).clone(),)) for t in tensors]
        planner = ShardSavePlanner(tensors, rank)
        handles = planner.handles(shards)
        assert (list(handles), len(handles)) == (names, len(names))
        items = planner.create_local_plan().items
        assert [item.index.fqn for item in items] == names
        for item, view in zip(items, planner.views(), strict=True):
            assert torch.equal(planner.resolve_data(item), view)
            assert item.tensor_data.size == (4, 3)
        dcp.save(dict(handles), storage_writer=dcp.FileSystemWriter(tmp_path / str(rank)), no_dist=True)
        filled = {name: torch.zeros_like(shards["abcd".index(name)].locals[0]) for name in names}
        targets = {t.name: Shard(t, (filled[t.name],)) for t in tensors if t.name in filled}
        loaded = {name: ShardTensor(shard, held_boxes(shard.tensor, shard.tensor.parts[0], rank), rank) for name, shard in targets.items()}
        dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path / str(rank)), no_dist=True)
        assert all(torch.equal(filled[name], shards["abcd".index(name)].locals[0]) for name in names)


def test_views_serve_while_no_shard_is_replaced():
    tensors = [LogicalTensor(name, "F32", (2,), (Part(Grid(Mesh((1,)), (-1,), writer=0)),)) for name in "ab"]
    shards = [Shard(tensor, (torch.rand(2),)) for tensor in tensors]
    planner = ShardSavePlanner(tensors, 0)
    planner.handles(shards)
    views = planner.views()
    planner.handles(list(shards))
    assert planner.views() is views
    planner.handles([shards[0], Shard(tensors[1], (torch.rand(2),))])
    assert planner.views() is not views
    with pytest.raises(KeyError):
        planner.handles(shards)["c"]
