"""One rank's failure is every rank's error, and nothing torn becomes visible."""

import os

import pytest

from benchmarks.pool import Pool, Pools, RankFailed
from engine.catalog import steps
from engine.storage import LocalStorage
from tests.dist import jobs


@pytest.mark.parametrize(("failing", "call"), [(0, "create"), (1, "create"), (2, "sync_folder"), (0, "publish"), (0, "claim_folder")])
def test_a_failing_rank_fails_all_and_leaves_nothing_torn(pools: Pools, tmp_path, failing, call):
    found = pools[3].run(jobs.save_with_a_failing_rank, str(tmp_path), failing, call)
    for rank, result in enumerate(found):
        assert result["error"], f"rank {rank} did not learn of the failure"
        assert result["after"] == [".lease_00000001", "latest", "run.json", "step_00000001"]
        if rank != failing:
            assert f"rank {failing} failed" in result["error"]
    assert [step.number for step in steps(LocalStorage(tmp_path))] == [1, 3]
    assert (tmp_path / "latest").read_text() == "step_00000003\n"


def test_a_killed_rank_is_named_within_the_timeout_and_the_old_step_stays(tmp_path):
    pool = Pool(2)
    try:
        with pytest.raises(RankFailed, match="exit code -9"):
            pool.run(jobs.save_and_die, str(tmp_path), 1)
    finally:
        pool.close()
    assert [step.number for step in steps(LocalStorage(tmp_path))] == [1]
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    again = Pool(2)
    try:
        assert [r["progress"][0] for r in again.run(jobs.resume_then_continue, "fsdp2", str(tmp_path), 1, {})] == [1, 1]
    finally:
        again.close()


def test_the_survivor_of_a_killed_rank_gets_an_error_that_names_it(tmp_path):
    """Rank 0 dies: rank 1, which waits for its decision, ends the wait itself."""
    pool = Pool(2)
    try:
        with pytest.raises(RankFailed) as failure:
            pool.run(jobs.save_and_die, str(tmp_path), 0, timeout_seconds=60)
        assert "rank 0: the process ended with exit code -9" in str(failure.value)
        assert "rank 1" not in str(failure.value), "rank 1 must answer (with its error) instead of hanging"
    finally:
        pool.close()


def test_ranks_that_disagree_are_named(pools: Pools, tmp_path):
    for found in pools[2].run(jobs.disagree, str(tmp_path)):
        assert "ranks [1] are at another [epoch, step, samples] than rank 0 ([0, 1, 0] and [0, 0, 0])" in found["steps"]
        assert "ranks [1] have other tensors, shapes or layouts than rank 0" in found["shapes"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith("step_")] if tmp_path.exists() else True


def test_a_rank_that_cannot_read_fails_the_resume_of_all(pools: Pools, tmp_path):
    pools[2].run(jobs.save_then_continue, "fsdp2", str(tmp_path), 1, {})
    found = pools[2].run(jobs.resume_with_one_blind_rank, str(tmp_path))
    assert all("the disk is on fire" in error or "rank 1 failed" in error for error in found), found
    assert all(found)
