"""Saves behind training, on real ranks."""

import pytest

from benchmarks.pool import Pools
from engine.storage import LocalStorage
from engine.transfer.verify import verify
from tests.dist import saving


@pytest.mark.parametrize(
    ("engine", "options"),
    [("fsdp2", {}), ("zero1", {}), ("zero2", {}), ("zero3", {"zero": {"sub_group_size": 16}}), ("zero1", {"dtype": "bf16"})],
    ids=["fsdp2", "zero1", "zero2", "zero3", "zero1-bf16"],
)
def test_no_optimizer_changes_what_is_still_being_copied(pools: Pools, tmp_path, engine, options):
    for after, resumed in pools[2].run(saving.save_late, engine, str(tmp_path), options):
        assert after == resumed


def test_a_save_after_the_first_asks_no_process_group_for_anything(pools: Pools, tmp_path):
    assert pools[2].run(saving.count_collectives, str(tmp_path)) == [[], []]


def test_saves_and_the_trainers_collectives_do_not_meet(pools: Pools, tmp_path):
    assert pools[3].run(saving.save_under_load, str(tmp_path), 60) == [0.0] * 3
    assert verify(LocalStorage(tmp_path), "step_00000060") == []


def test_a_killed_writer_is_every_ranks_error_and_is_replaced(pools: Pools, tmp_path):
    for error, steps in pools[2].run(saving.lose_a_writer, str(tmp_path)):
        assert error.startswith("StorageError")
        assert "was killed by signal 9" in error
        assert steps == ["step_00000001", "step_00000003"]


def test_ranks_stay_in_step_where_they_hear_of_a_failure_at_other_times(pools: Pools, tmp_path):
    found = pools[2].run(saving.hear_at_other_times, str(tmp_path))
    (at_save, at_wait), (late, later) = [errors for errors, _ in found]
    assert "rank 1 failed: write step 2: the writer process" in at_save
    assert "write step 2: the writer process" in later
    assert (at_wait, late) == ("", "")
    assert [steps for _, steps in found] == [["step_00000001", "step_00000003", "step_00000004"]] * 2


@pytest.mark.parametrize("why", ["captured", "staged"])
def test_a_rank_that_cannot_save_its_state_fails_the_save_of_all_at_once(pools: Pools, tmp_path, why):
    found = pools[2].run(saving.one_rank_cannot_save, str(tmp_path), why)
    assert all("progress takes whole numbers" in error for error, *_ in found)
    assert "rank 1 failed" in found[0][0]
    assert max(seconds for _, seconds, _ in found) < 10
    assert [steps for *_, steps in found] == [["step_00000001", "step_00000003"]] * 2
