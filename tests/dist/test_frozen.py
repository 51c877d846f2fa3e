"""Frozen rows stay frozen, to the bit, under every engine, and the others train as if nothing were."""

import pytest
import torch

from benchmarks.pool import Pools
from tests.dist import frozen
from tests.dist.frozen import BASE, FROZEN

WORLD = {"single": 1, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "fsdp2": 2}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("engine", WORLD)
def test_a_thousand_steps_of_adamw_with_decay_accumulation_and_clipping(pools: Pools, engine, dtype):
    found = pools[WORLD[engine]].run(frozen.train, engine, dtype, "modules", 1000, timeout_seconds=110)[0]
    assert found["same"], found["drift"]
    assert found["moved"] > 0.05
    assert all(value.isfinite().all() for value in found["ended"].values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("engine", WORLD)
def test_rows_of_a_model_that_cannot_be_changed_freeze_in_mid_training(pools: Pools, engine, dtype):
    found = pools[WORLD[engine]].run(frozen.train, engine, dtype, "rows", 60, before=5)[0]
    assert found["same"], found["drift"]
    assert found["moved"] > 0.01


@pytest.mark.parametrize("engine", WORLD)
def test_both_ways_train_alike_and_the_norm_is_that_of_what_is_trained(pools: Pools, engine):
    ways = [pools[WORLD[engine]].run(frozen.train, engine, "fp32", how, 20, clip=0.2)[0] for how in ("modules", "rows")]
    assert max(ways[0]["norms"]) > 0.2, "something was clipped"
    torch.testing.assert_close(ways[0]["norms"], ways[1]["norms"], rtol=1e-4, atol=0)
    for name, value in ways[0]["ended"].items():
        torch.testing.assert_close(value, ways[1]["ended"][name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("engine", WORLD)
def test_new_rows_take_the_step_that_they_would_take_if_nothing_were_frozen(pools: Pools, engine):
    split, free = [pools[WORLD[engine]].run(frozen.train, engine, "fp32", how, 1, clip=0.0)[0]["ended"] for how in ("modules", "free")]
    for name in split:
        first = BASE if name in FROZEN else 0
        torch.testing.assert_close(split[name][first:], free[name][first:], rtol=0, atol=1e-6)


def test_the_usual_hook_does_not_freeze(pools: Pools):
    """Why all this exists, and that these tests would see a drift."""
    assert pools[2].run(frozen.train, "ddp", "fp32", "hook", 20)[0]["drift"] > 1e-3
    assert pools[2].run(frozen.train, "fsdp2", "fp32", "hook", 20)[0]["drift"] > 1e-3
