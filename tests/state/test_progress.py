"""Progress, what a save takes of its history, and random state that comes back or is derived anew."""

import copy
import pickle
import random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.format.record import decode_record, encode_packed, encode_record, pack_record
from engine.state.progress import Entry, History, Monitor, Progress, capture_rng, derive_rng, restore_rng


def _draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist(), torch.randn(3).tolist()


def test_every_generator_continues_where_it_was_captured():
    derive_rng(7, 0, 0)
    np.random.randn(1)  # leaves a cached second Gaussian
    random.gauss(0, 1)  # likewise
    state = decode_record(encode_record(capture_rng()))
    expected = [_draw() for _ in range(3)]
    derive_rng(8, 0, 0)
    restore_rng(state)
    assert [_draw() for _ in range(3)] == expected


def test_derived_state_is_reproducible_and_differs_by_seed_step_and_rank():
    drawn = {}
    for key in [(1, 5, 0), (1, 5, 1), (1, 6, 0), (2, 5, 0), (-1, 5, 0), (2**63, 5, 0)]:
        derive_rng(*key)
        drawn[key] = _draw()
        derive_rng(*key)
        assert _draw() == drawn[key]
    for i in range(len(_draw())):
        assert len({str(values[i]) for values in drawn.values()}) == len(drawn)


def test_advance_counts_a_step_and_its_samples():
    progress = Progress(epoch=2, step=10, samples=320)
    progress.advance(32)
    assert (progress.epoch, progress.step, progress.samples) == (2, 11, 352)


def test_two_progresses_share_nothing():
    a, b = Progress(), Progress()
    a.metrics["loss"] = 1.0
    a.history.append({"loss": 1.0})
    assert (b.metrics, b.history) == ({}, [])


class _Counting(History):
    """Counts the entries that are checked, encoded and judged."""

    taken = 0

    def _append(self, entry):
        self.taken += 1
        super()._append(entry)


def _save(history, progress, metrics):
    """As a checkpointer does; returns how many entries were taken in, and the record."""
    before = history.taken
    saved = history.take_in(progress, metrics)
    record = encode_record(history.record(saved))
    progress.take(saved)
    return history.taken - before, record


def test_a_save_takes_in_only_the_entries_that_are_new():
    history = _Counting(Monitor("val"))
    progress = Progress(step=1000, history=[{"step": float(i), "val": 1.0} for i in range(1000)])
    taken = []
    for _ in range(4):
        progress.step += 1
        taken.append(_save(history, progress, {"val": 2.0})[0])
    assert taken == [1001, 1, 1, 1]
    assert (len(progress.history), progress.best.step, progress.stale) == (1004, 0, 1003)  # type: ignore[union-attr]
    assert _save(history, progress, {"val": 0.5})[0] == 1, "a step that is saved again replaces its entry"
    assert (len(progress.history), progress.best.step, progress.stale) == (1004, 1004, 0)  # type: ignore[union-attr]
    progress.history = [*progress.history[:-10], {**progress.history[-10], "val": 0.25}, *progress.history[-9:]]
    progress.step += 1
    assert _save(history, progress, {})[0] == 10, "from the entry that was replaced on"
    assert _save(history, progress, {})[0] == 0
    other = _Counting()
    resumed = msgspec.convert(decode_record(encode_record(msgspec.to_builtins(progress))), Progress)
    other.adopt(resumed)
    resumed.step += 1
    assert _save(other, resumed, {"val": 3.0})[0] == 1


_values = st.sampled_from([0.0, -0.0, 1.0, 2.0, float("nan"), float("inf")])
_entries = st.dictionaries(st.sampled_from(["step", "epoch", "val", "ü"]), _values | st.integers(0, 9), max_size=3)
_entries = _entries.map(lambda entry: entry | {name: 1.0 for name in ("step", "epoch") if not np.isfinite(entry.get(name, 0.0))})


@given(st.data(), st.sampled_from([None, Monitor("val"), Monitor("val", "max")]))
def test_what_is_saved_is_that_of_the_whole_history_whatever_was_saved_before(data, monitor):
    history, progress = _Counting(monitor), Progress()
    for _ in range(data.draw(st.integers(1, 6))):
        length = len(progress.history)
        first, last = sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length))))
        match data.draw(st.sampled_from(["kept", "kept", "spliced", "equal", "in place"])):
            case "spliced":
                progress.history = [*progress.history[:first], *data.draw(st.lists(_entries, max_size=3)), *progress.history[last:]]
            case "equal":
                progress.history = [dict(reversed(entry.items())) for entry in progress.history]
            case "in place":
                progress.history[first:last] = data.draw(st.lists(_entries, max_size=3))
        progress.step = data.draw(st.integers(0, 9))
        metrics = data.draw(st.fixed_dictionaries({"val": _values}) | st.just({}))
        whole = History(monitor).take_in(progress, metrics)
        _, record = _save(history, progress, metrics)
        assert repr(progress) == repr(whole)
        assert record == encode_record(msgspec.to_builtins(whole))


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65535, 65536])
def test_a_history_of_any_length_is_encoded_as_a_list(count):
    history = _Counting()
    progress = Progress(step=count, history=[{"step": float(i)} for i in range(count)])
    _, record = _save(history, progress, {})
    assert record == encode_record(msgspec.to_builtins(progress))


def test_the_record_of_a_save_in_flight_is_as_it_was_at_the_save():
    history, progress, names = _Counting(), Progress(), ["a", "b"]
    records = []
    for step, value in [(1, 0.5), (2, 0.25), (2, 0.125), (3, 1.0), (1, 7.0)]:
        progress.step = step
        saved = history.take_in(progress, {"val": value})
        record = {"progress": history.record(saved), "names": names}
        records.append((pack_record(record), encode_record(record)))
        progress.take(saved)
        names.append("c")
    assert [encode_packed(packed) for packed, _ in records] == [record for _, record in records]


def test_a_saved_entry_refuses_to_change():
    progress = Progress(step=1)
    _save(_Counting(), progress, {"val": 0.5})
    (entry,) = progress.history
    assert type(entry) is Entry
    for change in (
        lambda: entry.__setitem__("val", 0.0), lambda: entry.__delitem__("val"), lambda: entry.__ior__({"val": 0.0}), entry.clear, entry.popitem,
        lambda: entry.update(val=0.0), lambda: entry.pop("val"), lambda: entry.setdefault("more", 0.0),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="replace it"):
            change()
    assert entry == {"epoch": 0.0, "step": 1.0, "val": 0.5}
    for twin in (copy.copy(entry), copy.deepcopy(entry), pickle.loads(pickle.dumps(entry))):
        assert twin == entry
        assert type(twin) is Entry
    assert type(entry | {"val": 0.0}) is dict
