"""Some seeds of the state fuzzer, and that its oracle sees a single change of each kind of state."""

import collections
import math

import numpy as np
import pytest
import torch

from benchmarks import state_fuzz
from benchmarks.fuzz import cases
from benchmarks.fuzz.oracle import copied, differences
from benchmarks.pool import Pools
from tests.dist import fuzz

SEEDS = range(12)


def test_seeds_come_back_to_the_bit_or_are_refused_by_name(pools: Pools):
    rows = [state_fuzz.run_seed(seed, pools) for seed in SEEDS]
    assert [row for row in rows if row["outcome"] not in ("equal", "refused")] == []
    assert sum(row["outcome"] == "equal" for row in rows) >= 8


@pytest.mark.parametrize(("engine", "world_size"), [("single", 1), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)])
def test_the_oracle_names_a_single_change(pools: Pools, engine, world_size):
    words = {
        "moment": "exp_avg", "step": "'step'", "group": "weight_decay", "scheduler": "_step_count", "buffer": "num_batches_tracked",
        "late buffer": "late.cache", "extra state": "extra state net.extra", "member": "member notes", "random state": "random state",
    }  # fmt: skip
    for found in pools[world_size].run(fuzz.seen, fuzz.case_on(engine, world_size)):
        assert found.pop("nothing") == []
        assert {name: len(lines) > 0 and all(words[name] in line for line in lines) for name, lines in found.items()} == dict.fromkeys(words, True)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (1, 1.0), (1, True), (0.0, -0.0), (1.0, np.float64(1.0)), ((1, 2), [1, 2]), ({1: 2}, {"1": 2}), ({}, None),
        ({"a": 1}, collections.OrderedDict(a=1)), (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(2), -torch.zeros(2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)), (torch.zeros(2), np.zeros(2, dtype=np.float32)),
        (torch.zeros(2), torch.nn.Parameter(torch.zeros(2))), ([1], [1, 2]), ({"a": {"b": [1, (2,)]}}, {"a": {"b": [1, (3,)]}}),
    ],
)  # fmt: skip
def test_types_and_bits_are_told_apart(was, now):
    assert len(differences(copied(was), copied(now))) > 0
    assert len(differences(copied(now), copied(was))) > 0
    assert differences(copied(was), copied(was)) == []


def test_nans_are_equal_to_themselves():
    assert differences(copied({"a": [math.nan, torch.tensor([math.nan])]}), copied({"a": [math.nan, torch.tensor([math.nan])]})) == []


def test_cases_are_what_their_engines_can_train():
    drawn = [cases.draw(seed) for seed in range(300)]
    assert drawn == [cases.draw(seed) for seed in range(300)]
    for case in drawn:
        kinds = {one.optimizer for one in case.trained} | {one.scheduler for one in case.trained}
        kinds |= {"two optimizers"} if len(case.trained) > 1 else set()
        kinds |= {node.args["norm"] for node in case.tree.walk() if node.kind == "affine"}
        assert not kinds & {feature for side in case.sides for feature in cases.CANNOT[side.engine]}
    assert {side.engine for case in drawn for side in case.sides} == set(cases.ENGINES)
    assert {side.world_size for case in drawn for side in case.sides} == set(cases.WORLD_SIZES)
    assert all("extra" not in case.described() for case in (cases.draw(seed, ["extra"]) for seed in range(50)))
