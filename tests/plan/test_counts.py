"""What many ranks cost beside the bytes of the state: messages a round, index bytes a load touches. Counts, never seconds."""

import statistics
from collections import Counter

import pytest
import torch.distributed as dist

from benchmarks import scale
from benchmarks.imagined import reshard
from engine import sync
from engine.plan.order import reading_order
from engine.plan.reads import RUN_BYTES
from engine.storage import LocalStorage
from engine.sync import Ranks

WORLD = 16


@pytest.fixture
def counted():
    """Each rank's own way to one store, counted."""
    shared = dist.HashStore()
    return [scale.CountingStore(shared) for _ in range(WORLD)]


def play(counted, act, value=None):
    """Rounds of a job whose other ranks report ``value``; ``act`` is rank 0's part in them, one after the other."""
    others, ranks = [Ranks(rank, WORLD, counted[rank]) for rank in range(1, WORLD)], Ranks(0, WORLD, counted[0])
    for one in act:
        for rank in others:
            rank._number += 1
            rank._report("save", sync._Report("save", value))
        one(ranks)
        for rank in others:
            rank._await(rank.timeout_seconds, False)
            rank._tidy()


def test_a_round_costs_a_rank_four_messages(counted):
    play(counted, [lambda ranks: ranks.gather("save", lambda: 0)] * 3)
    for store in counted[1:]:
        assert store.calls == dict.fromkeys(("set", "check", "get", "delete_key"), 3)
    assert counted[0].calls["check"] == 3, "all reports were there: one look"
    assert counted[0].calls["compare_set"] == 3
    assert counted[0].calls["set"] == 0, "its own report does not travel"


def test_a_claim_costs_rank_0_one_message_and_the_others_none(counted):
    play(counted, [lambda ranks: ranks.round("save", lambda: 0, lambda values: values, changes="committed")] * 3)
    for store in counted[1:]:
        assert store.calls == dict.fromkeys(("set", "check", "get", "delete_key"), 3)
    assert counted[0].calls["compare_set"] == counted[0].calls["set"] == 3, "the claim, and how it ended"


def test_what_only_rank_0_needs_does_not_travel_to_all(counted):
    report = bytes(10_000)
    play(counted, [lambda ranks: ranks.collect("save", lambda: report)], report)
    assert all(10_000 < store.bytes < 10_400 for store in counted[1:]), "its own report, and no one else's"


@pytest.mark.parametrize("world", [2, 64, 4096, 100_000])
def test_waiting_ranks_together_look_a_bounded_number_of_times_a_second(world, monkeypatch):
    now, looks = [0.0], Counter()

    class Never:
        def check(self, keys):
            looks[int(now[0])] += 1
            return False

    monkeypatch.setattr(sync.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sync.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    assert not Ranks(world - 1, world, Never())._wait(["decision"], 60.0, {})
    later = statistics.mean(looks[second] for second in range(30, 60))
    assert later * (world - 1) <= max(1.05 * sync._LOOKS_A_SECOND, 11 * world if world <= 1000 else 0)
    assert sum(looks.values()) > 5, "still looks often enough to notice"


@pytest.mark.parametrize("target", ["fsdp2", "zero3"])
def test_a_load_touches_little_more_of_the_indexes_than_it_needs(target, tmp_path):
    for found in reshard(LocalStorage(tmp_path), ("fsdp2", 64), (target, 32), 300, (0, 1, 15, 31)):
        assert found.touched_bytes <= 1.2 * found.needed_bytes, found
        assert found.indexes <= 12, "of 64"


def test_a_load_reads_shard_files_in_few_runs(tmp_path):
    """Files list tensors as the manifest does. Here a rank needs every second tensor, by the model's order, of two ranks' files, and
    the others of two other ranks'."""
    (found,) = reshard(LocalStorage(tmp_path), ("fsdp2", 4096), ("fsdp2", 2048), 300, (1023,))
    assert found.reads <= 4 * found.files + found.data_bytes // RUN_BYTES, found


def test_tensors_of_other_inner_sizes_are_of_another_class():
    """A norm's rows and a matrix's are cut alike by FSDP2, but not by ZeRO-3, which then needs them of different ranks."""
    tensors = scale.describe("fsdp2", 64, 60)
    order, classes = reading_order(tensors)
    shapes = {}
    for place, number in zip(order, classes, strict=True):
        shapes.setdefault(number, set()).add(tensors[place].shape)
    assert all(len(found) == 1 for found in shapes.values())
