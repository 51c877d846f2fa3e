"""Which steps may go."""

import pytest

from engine.catalog import Retention, expired
from engine.errors import UsageError
from engine.format.names import step_name
from tests.catalog.made import NAN, branch, monitored, summary

LINE = [summary(step) for step in (10, 20, 30, 40, 50)]


def gone(found, latest, **retention):
    names = expired([(step_name(s.step), s) for s in found], step_name(latest), Retention(**retention))
    return [int(name.removeprefix("step_")) for name in names]


def test_by_default_all_are_kept():
    assert gone(LINE, 50) == gone(LINE, 50, every=1000, best=1) == []


@pytest.mark.parametrize(("last", "deleted"), [(1, [10, 20, 30, 40]), (2, [10, 20, 30]), (5, []), (99, [])])
def test_the_newest_are_kept(last, deleted):
    assert gone(LINE, 50, last=last) == deleted


def test_those_whose_number_divides_are_kept_too():
    assert gone(LINE, 50, last=1, every=20) == [10, 30]


@pytest.mark.parametrize(("mode", "deleted"), [("min", [10, 20, 40]), ("max", [30, 40])])
def test_the_best_are_kept_too_by_the_latest_steps_monitor(mode, deleted):
    values = {10: 3.0, 20: 3.0, 30: 1.0, 40: NAN, 50: 2.0}
    found = [summary(step, **monitored(value, mode)) for step, value in values.items()]
    assert gone(found, 50, last=1, best=2) == deleted
    assert gone(found, 50, last=1, best=1) == ([10, 20, 40] if mode == "min" else [20, 30, 40])


def test_without_a_monitor_none_is_best():
    found = [*LINE[:-1], summary(50, metrics={"": 1.0, "val_loss": 1.0})]
    assert gone(found, 50, last=1, best=3) == [10, 20, 30, 40]


def test_the_best_step_by_the_latest_is_kept_though_its_own_head_says_nothing():
    assert gone([*LINE[:-1], summary(50, best_step=20)], 50, last=1) == [10, 30, 40]


def test_other_lines_stay_whole_and_do_not_count():
    found = [summary(10), summary(20), summary(30), summary(25, branch(20)), summary(35, branch(20))]
    assert gone(found, 35, last=1) == [10, 20, 25]
    assert gone(found, 35, last=2) == [10, 20]
    assert gone(found, 30, last=1) == [10, 20]


def test_other_lines_go_where_that_is_asked_for():
    found = [summary(10), summary(20), summary(30), summary(25, branch(20)), summary(35, branch(20))]
    assert gone(found, 35, last=1, abandoned=False) == [10, 20, 25, 30]
    assert gone(found, 35, abandoned=False) == [], "without last, all stay"
    assert gone(found, 60, last=1, abandoned=False) == [], "which line is the current one is not known"


def test_where_the_latest_is_not_the_highest_later_numbers_stay():
    assert gone(LINE, 30, last=1) == [10, 20]


def test_without_the_latest_step_nothing_is_deleted():
    assert gone(LINE, 60, last=1) == []
    assert expired([], "step_00000001", Retention(last=1)) == []


@pytest.mark.parametrize("name", ["last", "every", "best"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_a_number_that_is_none_is_refused(name, value):
    with pytest.raises(UsageError, match=f"keep_{name}=.*give a whole number of at least 1"):
        Retention(**{name: value})
