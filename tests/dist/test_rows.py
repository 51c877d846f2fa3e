"""Partly frozen weights: two parameters, one logical tensor; saved split and loaded whole, and the other way; and grown rows."""

import pytest
import torch

from benchmarks.pool import Pools
from tests.dist import rows
from tests.dist.rows import BASE, ROWS

ENGINES = [("ddp", 2, "fp32"), ("zero1", 2, "bf16"), ("zero2", 3, "fp32"), ("zero3", 2, "fp32"), ("zero3", 2, "bf16"), ("fsdp2", 2, "fp32")]
MOMENT = "optim.state.embed.weight.exp_avg"


@pytest.mark.parametrize(("engine", "world", "dtype"), ENGINES)
def test_split_weights_are_one_tensor_for_every_engine(pools: Pools, tmp_path, engine, world, dtype):
    losses = pools[world].run(rows.save, str(tmp_path), engine, True, dtype)[0]
    again = pools[world].run(rows.load, str(tmp_path), engine, True, dtype)[0]
    assert again["difference"] == 0.0
    assert again["losses"] == losses
    other = "zero2" if dtype == "bf16" else "fsdp2"
    across = pools[2].run(rows.load, str(tmp_path), other, True, dtype)[0]
    assert across["difference"] == 0.0
    assert torch.equal(across["model.embed.weight"], again["model.embed.weight"])

    whole = pools[2].run(rows.load, str(tmp_path), "zero3" if dtype == "bf16" else "zero1", False, dtype)[0]
    assert whole["difference"] == 0.0
    assert torch.equal(whole["model.embed.weight"], again["model.embed.weight"])
    assert torch.equal(whole[MOMENT][:BASE], torch.zeros(BASE, rows.WIDTH, dtype=torch.float64)), "absent moments are zero"
    assert again[MOMENT][:BASE].isnan().all(), "no rank holds moments of frozen rows"
    assert torch.equal(whole[MOMENT][BASE:], again[MOMENT][BASE:])
    if world == 2:
        assert whole["losses"][0] == losses[0]


@pytest.mark.parametrize(("engine", "target"), [("zero2", "zero3"), ("fsdp2", "zero1"), ("ddp", "fsdp2")])
def test_whole_weights_load_into_split_ones_which_drop_the_moments_of_frozen_rows(pools: Pools, tmp_path, engine, target):
    losses = pools[2].run(rows.save, str(tmp_path), engine, False)[0]
    split = pools[2].run(rows.load, str(tmp_path), target, True)[0]
    whole = pools[2].run(rows.load, str(tmp_path), target, False)[0]
    assert split["difference"] == 0.0
    assert split["losses"][0] == losses[0]
    assert torch.equal(split["model.embed.weight"], whole["model.embed.weight"])
    assert split[MOMENT][:BASE].isnan().all()
    assert torch.equal(split[MOMENT][BASE:], whole[MOMENT][BASE:])


def test_fp32_rows_are_not_rounded_to_the_frozen_rows_dtype_unasked(pools: Pools, tmp_path):
    pools[2].run(rows.save, str(tmp_path), "fsdp2", True)
    refused = pools[2].run(rows.load, str(tmp_path), "zero1", True, "bf16")[0]
    assert "IncompatibleCheckpoint" in refused["error"]
    assert "embed.weight: BF16 here, F32 in the checkpoint" in refused["error"]
    allowed = pools[2].run(rows.load, str(tmp_path), "zero1", True, "bf16", allow_cast=["*"])[0]
    assert torch.equal(allowed["model.embed.weight"][:BASE].bfloat16().double(), allowed["model.embed.weight"][:BASE])


@pytest.mark.parametrize(("engine", "split"), [("zero1", False), ("zero3", True), ("fsdp2", False), ("ddp", True)])
def test_a_checkpoint_with_fewer_rows_grows_into_the_model(pools: Pools, tmp_path, engine, split):
    small = ROWS - 5
    pools[1].run(rows.save, str(tmp_path), "ddp", False, rows=small)
    saved = pools[1].run(rows.load, str(tmp_path), "ddp", False, rows=small)[0]
    refused = pools[2].run(rows.load, str(tmp_path), engine, split)[0]["error"]
    assert f"embed.weight: [{ROWS}, {rows.WIDTH}] here, [{small}, {rows.WIDTH}] in the checkpoint" in refused
    assert "extend_rows" in refused

    for how in ("keep", "zeros", "mean"):
        grown = pools[2].run(rows.load, str(tmp_path), engine, split, extend_rows={"embed.weight": how, "head.*": "zeros"})[0]
        weight, expected = grown["model.embed.weight"], saved["model.embed.weight"]
        assert torch.equal(weight[:small], expected), how
        new = {"keep": grown["before"][small:], "zeros": torch.zeros_like(weight[small:]), "mean": expected.mean(0).float().double().expand(5, -1)}
        assert torch.equal(weight[small:], new[how]), how
        first = BASE if split else 0
        assert torch.equal(grown[MOMENT][first:small], saved[MOMENT][first:]), how
        assert not grown[MOMENT][small:].any(), "new rows begin without momentum"


def test_rows_are_never_dropped(pools: Pools, tmp_path):
    pools[1].run(rows.save, str(tmp_path), "ddp", False)
    refused = pools[1].run(rows.load, str(tmp_path), "ddp", False, rows=ROWS - 5, extend_rows={"*": "keep"})[0]["error"]
    assert "IncompatibleCheckpoint" in refused
    assert "rows are never dropped" in refused
    unknown = pools[1].run(rows.load, str(tmp_path), "ddp", False, extend_rows={"*": "ones"})[0]["error"]
    assert "'ones' is no initialisation" in unknown
