"""Shard handles speak DCP's protocol: torch's own planners, writer and reader carry them too."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from engine.dcp import ShardTensor
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
