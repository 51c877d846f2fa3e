"""State that is not laid out by parameter, on several ranks: back, or refused by name."""

import pytest

from benchmarks.pool import Pools
from tests.dist import accounting

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@pytest.mark.parametrize("engine", ENGINES)
def test_extra_state_per_rank_and_all_that_an_optimizer_counts_go_on(pools: Pools, tmp_path, engine):
    expected = pools[2].run(accounting.save, engine, str(tmp_path), {})
    found = pools[2].run(accounting.resume, engine, str(tmp_path), {})
    assert [one["losses"] for one in found] == expected
    assert expected[0] != expected[1], "ranks have batches of their own"


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_averages_of_dtensors_and_buffers_of_each_rank_come_back(pools: Pools, tmp_path, engine):
    expected = pools[2].run(accounting.save, engine, str(tmp_path), {}, objects=True)
    found = pools[2].run(accounting.resume, engine, str(tmp_path), {}, objects=True)
    placements = ["(Shard(dim=0),)"] if engine == "fsdp2" else ["plain"]
    assert found == [{"losses": losses, "replay": True, "placements": placements} for losses in expected]


def test_averages_of_dtensors_come_back_as_such_on_a_different_number_of_ranks(pools: Pools, tmp_path):
    pools[2].run(accounting.save, "fsdp2", str(tmp_path), {}, objects=True)
    found = pools[3].run(accounting.resume, "fsdp2", str(tmp_path), {}, objects=True, allow_missing=["replay"])
    assert [one["placements"] for one in found] == [["(Shard(dim=0),)"]] * 3
    assert not any(one["replay"] for one in found)


@pytest.mark.parametrize(("source", "target"), [("ddp", "zero2"), ("zero2", "ddp")])
def test_a_parameter_without_elements_goes_between_engines(pools: Pools, tmp_path, source, target):
    options = {"empty": True, "optimizer": "AdamW"}
    pools[2].run(accounting.save, source, str(tmp_path), options)
    assert len(pools[2].run(accounting.resume, target, str(tmp_path), options)) == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_the_loss_scale_of_torch_autocast_goes_on(pools: Pools, tmp_path, stage):
    for before, after in pools[2].run(accounting.scale_goes_on, str(tmp_path), stage):
        assert after == before
        assert after["_growth_tracker"] == 4


def test_micro_steps_come_back_where_they_are_a_boundary(pools: Pools, tmp_path):
    """Of a different accumulation they may be none: then those of as many steps are taken."""
    assert pools[2].run(accounting.micro_steps, str(tmp_path)) == [{2: 10, 4: 8}] * 2


def test_what_cannot_be_saved_is_refused_on_all_ranks_with_its_name_and_a_remedy(pools: Pools, tmp_path):
    parts = {
        "meta": ("UsageError", "first.weight is on the meta device", "to_empty"),
        "zero redundancy": ("UsageError", "ZeroRedundancyOptimizer", "fully_shard"),
        "assigned": ("UsageError", "first.weight", "load_state_dict(assign=True)"),
        "muon": ("UsageError", "Muon", "not aligned", "stage 3"),
        "nested": ("UsageError", "Odd keeps slow of first.weight as a list", "flat buffers"),
    }
    for found in pools[2].run(accounting.refusals, str(tmp_path)):
        assert {name: [part for part in expected if part not in found[name]] for name, expected in parts.items()} == {name: [] for name in parts}
