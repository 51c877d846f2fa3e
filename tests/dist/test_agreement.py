"""What ranks must agree on is compared when a checkpointer is made, and at each later call: a difference is every rank's error."""

import os

import pytest

from benchmarks.pool import Pools
from tests.dist import agreement


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("folder", "ranks [1] have a different run folder than rank 0 ({run}/run_1 and {run}/run_0)"),
        ("disk", "UsageError: attach: rank 1 failed: rank 1 does not see the folder that rank 0 does"),
        ("options", "ranks [1] have other options than rank 0 (keep=(3, None, None, True) and keep=(2, None, None, True))"),
        ("members", "ranks [1] have other members than rank 0 (ema: Count and average: Count)"),
    ],
)
def test_a_difference_is_named_on_all_ranks_before_anything_is_saved(pools: Pools, tmp_path, what, message):
    answers = pools[2].run(agreement.attach, str(tmp_path), what)
    for answer, left in answers:
        assert message.format(run=tmp_path).removeprefix("UsageError: attach: rank 1 failed: ") in answer
        assert left == [], "nothing is left, the file that ranks looked for neither"


def test_members_may_be_named_in_any_order(pools: Pools, tmp_path):
    for message, left in pools[2].run(agreement.attach, str(tmp_path), "order"):
        assert not message
        assert left == ["run"]
    assert not [name for name in os.listdir(tmp_path / "run") if "lockstep" in name]


def test_a_save_on_one_rank_alone_says_that_every_rank_must_call_it(pools: Pools, tmp_path):
    message, _ = pools[2].run(agreement.save_on_rank_0_alone, str(tmp_path))
    assert "ranks [1] are at 'leave' while rank 0 is at 'save step_00000001: take the run'; every rank must make the same calls in the same order" in message
    message, _ = pools[2].run(agreement.save_at_different_steps, str(tmp_path))
    assert "ranks [1] are at another [epoch, step, samples] than rank 0 ([0, 2, 0] and [0, 1, 0])" in message


def test_what_was_made_before_the_process_group_is_refused_when_it_is_used(pools: Pools, tmp_path):
    for message in pools[2].run(agreement.made_before_the_group, str(tmp_path)):
        assert ["made for 1 rank, and the process group has 2" in line for line in message[:3]] == [True] * 3
        assert "this sampler was made for 1 ranks, and the process group has 2" in message[3]


def test_a_sampler_may_serve_other_ranks_than_the_groups(pools: Pools, tmp_path):
    first, second = pools[2].run(agreement.rank_of_data, str(tmp_path))
    assert first == second


def test_a_save_that_is_given_up_does_not_end_saving(pools: Pools, tmp_path):
    assert pools[2].run(agreement.a_save_is_given_up, str(tmp_path)) == [["step_00000001", "step_00000003"]] * 2
