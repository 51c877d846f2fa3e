"""What came before a step, and on which line goes on what is saved after it."""

import os
import shutil

import pytest

from engine.catalog import lineage_after, previous, summaries
from engine.format.manifest import Line
from engine.storage import LocalStorage
from tests.catalog.made import LINE, branch, commit, spoil


@pytest.fixture
def run(tmp_path):
    """Line a: 10, 20, 30; left at 20 for line b: 25, 35, saved later."""
    for step in (10, 20, 30):
        commit(tmp_path, step)
    for step in (25, 35):
        commit(tmp_path, step, branch(20), created=100.0 + step)
    return tmp_path


@pytest.mark.parametrize(("step", "before"), [(35, 25), (25, 20), (30, 20), (20, 10)])
def test_before_a_step_comes_its_nearest_ancestor_not_the_next_lower_number(run, step, before):
    assert previous(LocalStorage(run), f"step_{step:08d}") == f"step_{before:08d}"


def test_before_the_first_step_there_is_none(run):
    assert previous(LocalStorage(run), "step_00000010") is None
    assert previous(LocalStorage(run / "none"), "step_00000010") is None


def test_an_ancestor_that_cannot_be_read_is_no_candidate(run):
    spoil(run, 25)
    assert previous(LocalStorage(run), "step_00000035") == "step_00000020"


def test_before_a_step_that_cannot_be_read_comes_the_one_saved_last(run):
    spoil(run, 35)
    assert previous(LocalStorage(run), "step_00000035") == "step_00000025"
    spoil(run, 25)
    assert previous(LocalStorage(run), "step_00000035") == "step_00000030"
    for step in (10, 20, 30):
        spoil(run, step)
    assert previous(LocalStorage(run), "step_00000035") is None


def test_falling_back_ends_whatever_is_damaged(run):
    spoil(run, 35)
    seen, name = [], "step_00000035"
    while name := previous(LocalStorage(run), name):
        seen.append(int(name[5:]))
    assert seen == [25, 20, 10]


def test_what_follows_the_last_step_of_a_line_is_on_it(run):
    assert lineage_after(LocalStorage(run), "step_00000035", "new") == branch(20)
    assert lineage_after(LocalStorage(run), "step_00000030", "new") == LINE


def test_what_follows_a_step_that_was_passed_is_on_a_new_line(run):
    assert lineage_after(LocalStorage(run), "step_00000020", "new") == (*LINE, Line("new", 20))
    assert lineage_after(LocalStorage(run), "step_00000025", "new") == (*branch(20), Line("new", 25))


@pytest.mark.parametrize("parent", [None, ""])
def test_without_a_parent_a_line_begins(run, parent):
    assert lineage_after(LocalStorage(run), parent, "new") == (Line("new", 0),)


def test_a_parent_that_is_gone_counts_as_none_with_a_warning(run, caplog):
    shutil.rmtree(run / "step_00000035")
    assert lineage_after(LocalStorage(run), "step_00000035", "new") == (Line("new", 0),)
    assert "its parent cannot be read" in caplog.text


def test_a_later_step_that_cannot_be_read_may_be_of_this_line(run):
    spoil(run, 30)
    shutil.rmtree(run / "step_00000035")
    shutil.rmtree(run / "step_00000025")
    assert lineage_after(LocalStorage(run), "step_00000020", "new") == (*LINE, Line("new", 20))


def test_so_may_one_that_is_aside_for_a_replacement_that_never_came(run):
    (run / ".lease_00000001").mkdir()
    os.rename(run / "step_00000030", run / ".lease_00000001/step_00000030.0001.replaced")
    shutil.rmtree(run / "step_00000035")
    shutil.rmtree(run / "step_00000025")
    assert lineage_after(LocalStorage(run), "step_00000020", "new") == (*LINE, Line("new", 20))


def test_summaries_are_in_order_and_without_what_cannot_be_read(run, caplog):
    spoil(run, 20)
    assert [s.step for _, s in summaries(LocalStorage(run))] == [10, 25, 30, 35]
    assert "step_00000020 is passed over" in caplog.text
    caplog.clear()
    assert [name for name, _ in summaries(LocalStorage(run), ["step_00000030", "step_00000077", "step_00000010"])] == [
        "step_00000010",
        "step_00000030",
    ]
    assert not caplog.records, "what is gone is no news"


def test_a_step_under_another_number_is_passed_over(run, caplog):
    shutil.copytree(run / "step_00000010", run / "step_00000090")
    assert [s.step for _, s in summaries(LocalStorage(run))] == [10, 20, 25, 30, 35]
    assert "step_00000090 is passed over" in caplog.text
    assert "holds step 10: it has been renamed or is a copy" in caplog.text
