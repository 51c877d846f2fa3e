"""Lines of training: who descends from whom, decided from two heads alone; and what is best of them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.catalog.lineage import descends_from, line_to, next_lineage, ranked, saved_last
from engine.format.manifest import Line
from engine.format.names import step_name
from tests.catalog.made import LINE, NAN, branch, monitored, summary


def test_a_fresh_start_begins_a_line():
    assert next_lineage(None, [summary(10)], "new") == (Line("new", 0),)


def test_the_last_step_of_a_line_is_followed_on_it():
    assert next_lineage(summary(20), [summary(10), summary(20)], "new") == LINE


def test_a_step_that_was_passed_begins_a_line_of_its_own():
    assert next_lineage(summary(10), [summary(10), summary(20)], "new") == (*LINE, Line("new", 10))


def test_a_step_is_also_passed_by_a_line_that_left_after_it():
    left = summary(25, branch(20))
    assert next_lineage(summary(10), [summary(10), left], "new") == (*LINE, Line("new", 10))
    assert next_lineage(summary(20), [summary(20), left], "new") == (*LINE, Line("new", 20))


def test_a_line_is_followed_where_only_others_went_further():
    assert next_lineage(summary(15, branch(10)), [summary(10), summary(30), summary(15, branch(10))], "new") == branch(10)


@pytest.mark.parametrize(
    ("step", "ancestor", "expected"),
    [
        ((20, LINE), (10, LINE), True),
        ((20, LINE), (20, LINE), True),
        ((10, LINE), (20, LINE), False),
        ((25, branch(10)), (10, LINE), True),
        ((25, branch(10)), (20, LINE), False),
        ((25, branch(10)), (20, branch(10)), True),
        ((10, branch(10)), (10, LINE), True),  # saved again, after 10 had been passed
        ((10, LINE), (10, branch(10)), False),
        ((60, branch(10, 40)), (30, branch(10)), True),
        ((60, branch(10, 40)), (50, branch(10)), False),
        ((60, branch(10, 40)), (11, LINE), False),
        ((5, (Line("fresh", 0),)), (0, LINE), False),
        ((5, branch(0)), (0, LINE), True),
    ],
)
def test_who_descends_from_whom(step, ancestor, expected):
    assert descends_from(summary(*step), summary(*ancestor)) is expected


@given(st.data())
def test_the_heads_alone_tell_what_the_history_was(data):
    """Against a plain tree of parents, over any history of resuming, saving on (also on a number that exists), and deleting."""
    parents, numbers, made, alive = {}, {}, {}, []
    for uid in range(data.draw(st.integers(1, 16))):
        by_number = {numbers[u]: u for u in alive}
        parent = data.draw(st.sampled_from([None, *alive]))
        number = data.draw(st.integers(0 if parent is None else numbers[parent], 12))
        lineage = next_lineage(made.get(parent), [made[u] for u in alive], f"line{uid}")
        parents[uid], numbers[uid], made[uid] = parent, number, summary(number, lineage)
        alive = sorted({*alive, uid} - {by_number.get(number)})
        if data.draw(st.booleans()):
            alive.remove(data.draw(st.sampled_from(alive)))

    def ancestors(uid):
        return set() if uid is None else {uid} | ancestors(parents[uid])

    for uid in alive:
        assert {other for other in alive if descends_from(made[uid], made[other])} == ancestors(uid) & set(alive)
        assert len(made[uid].lineage) <= 1 + len(ancestors(uid))


def test_a_job_that_is_preempted_over_and_over_stays_on_its_line():
    existing = [summary(0)]
    for step in range(1, 100):
        existing.append(summary(step, next_lineage(existing[-1], existing, f"line{step}")))
    assert existing[-1].lineage == LINE


def named(*found):
    return [(step_name(s.step), s) for s in found]


def test_the_way_to_a_step_is_in_order_and_ends_with_it():
    found = named(summary(30), summary(25, branch(10)), summary(5), summary(10), summary(20))
    assert [s.step for _, s in line_to(summary(25, branch(10)), found)] == [5, 10, 25]
    assert [s.step for _, s in line_to(summary(30), found)] == [5, 10, 20, 30]
    assert line_to(summary(99, branch(1, 2)), []) == []


def test_saved_last_goes_by_the_clock_and_then_by_the_number():
    assert saved_last([]) is None
    found = named(summary(10, created=9.0), summary(30, created=1.0), summary(20, created=9.0))
    last = saved_last(found)
    assert last is not None
    assert last[1].step == 20


@pytest.mark.parametrize(("mode", "order"), [("min", [5, 3, 4, 2, 6]), ("max", [6, 2, 3, 4, 5])])
def test_the_best_comes_first_the_earlier_of_equals_and_never_nan(mode, order):
    values = {1: NAN, 2: 7.0, 3: 0.5, 4: 0.5, 5: -math.inf, 6: math.inf}
    found = named(summary(7), *(summary(step, **monitored(value, mode)) for step, value in reversed(values.items())))
    assert [s.step for _, s in ranked(found, "val_loss", mode)] == order
    assert ranked(found, "accuracy", mode) == ranked(found, "", mode) == []
