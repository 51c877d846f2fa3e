"""A loop that is resumed in mid-epoch goes on as if it had not been interrupted, random draws of its layers included."""

import pytest

from benchmarks.pool import Pools
from tests.dist import loops

STEPS = loops.EPOCHS * -(-loops.LENGTH // loops.BATCH)


@pytest.mark.parametrize(
    ("engine", "world", "bounded", "workers"),
    [
        *(("single", 1, bounded, workers) for bounded in (False, True) for workers in (0, 2)),
        *((engine, 2, bounded, workers) for engine in ("ddp", "fsdp2") for bounded, workers in ((False, 2), (True, 0))),
    ],
)
def test_losses_under_dropout_are_those_of_the_uninterrupted_loop(pools: Pools, tmp_path, engine, world, bounded, workers):
    how = {"bounded": bounded, "workers": workers}
    expected = pools[world].run(loops.train, str(tmp_path), engine, resumes=False, **how)
    assert [sorted(losses) for losses in expected] == [list(range(loops.SAVE_AT + 1, STEPS + 1))] * world
    assert pools[world].run(loops.train, str(tmp_path), engine, resumes=True, **how) == expected


def test_a_loop_that_is_resumed_at_the_end_of_an_epoch_counts_it(pools: Pools, tmp_path):
    """The save came in the loop, after its last batch: the epoch was not counted yet."""
    last = STEPS // loops.EPOCHS
    how = {"bounded": False, "workers": 0, "save_at": last}
    expected = pools[1].run(loops.train, str(tmp_path), "single", resumes=False, **how)
    assert [*expected[0]] == list(range(last + 1, STEPS + 1))
    assert pools[1].run(loops.train, str(tmp_path), "single", resumes=True, **how) == expected


def test_workers_are_seeded_by_the_position(pools: Pools, tmp_path):
    """What they draw differs from epoch to epoch, and is the same after a resume at an epoch's start."""
    last = STEPS // loops.EPOCHS
    how = {"bounded": False, "workers": 2, "save_at": last, "noisy": True}
    expected = pools[1].run(loops.train, str(tmp_path), "single", resumes=False, **how)
    assert pools[1].run(loops.train, str(tmp_path), "single", resumes=True, **how) == expected


def test_ranks_stay_in_step_whatever_forked_workers_collect(pools: Pools, tmp_path):
    """A store of files counts its clients: one that a worker inherits and collects must not end it for the job."""
    for found in pools[2].run(loops.workers_collect_what_they_inherit, str(tmp_path)):
        assert "step_00000001" in found
