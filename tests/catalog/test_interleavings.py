"""Two jobs that want one run, in every order of their storage calls: some scenarios; all are for ``benchmarks.interleavings``."""

import pytest

from benchmarks import interleavings
from engine.catalog import lease


def test_whatever_the_order_nothing_is_lost_or_torn_and_one_job_commits():
    rows = interleavings.explore(interleavings.QUICK)
    assert len(rows) == 2 * len(interleavings.QUICK)
    assert all(row["states"] > 1000 for row in rows)
    assert [row for row in rows if row["lost"] or row["torn"] or row["double_commit"]] == []


def test_without_the_fence_the_explorer_finds_it(monkeypatch):
    monkeypatch.setattr(lease, "fenced_name", lambda: (_ for _ in ()).throw(FileNotFoundError))
    rows = interleavings.explore(("save 30, taken by save 30",))
    assert all(row["double_commit"] for row in rows)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_there_is_a_scenario_for_each_pair_of_acts(can_exchange):
    names = [name for name, *_ in interleavings.scenarios(can_exchange)]
    assert len(names) == len(set(names)) == len(interleavings.ACTS) * (len(interleavings.ACTS) + 1)
