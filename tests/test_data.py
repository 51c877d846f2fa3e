"""The sampler's promise: nothing repeated, nothing skipped, one order, whatever changes between interruptions."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from engine import Progress
from engine.data import ElasticSampler
from engine.errors import IncompatibleCheckpoint, UsageError
from engine.format.record import decode_record, encode_record
from tests.now import Checkpointer


def _samplers(length, batch, world, **options):
    return [ElasticSampler(range(length), batch, rank=rank, world_size=world, empty="yield", **options) for rank in range(world)]


def _global_batches(samplers):
    """What all ranks see of each global batch until the epoch ends, in rank order."""
    for parts in itertools.zip_longest(*samplers):
        assert None not in parts, "the ranks see different numbers of batches"
        yield [index for part in parts for index in part]


def _resume(samplers, state, samples):
    for sampler in samplers:
        sampler.load_state_dict(decode_record(encode_record(state)))
        sampler.seek(samples)


def _state(samplers):
    """The state of the job, which all its ranks must agree on."""
    states = [sampler.state_dict() for sampler in samplers]
    assert all(state == states[0] for state in states)
    return states[0]


def _consume(samplers, count, ahead=0):
    """The next ``count`` global batches, over ends of epochs; a loader had drawn up to ``ahead`` more when the job died."""
    batches = []
    while len(batches) < count:
        batches += itertools.islice(_global_batches(samplers), count - len(batches) + ahead)
    return batches[:count]


class Reference:
    """The samples still to come, one epoch's at a time: takes batches off the front, and remembers what each epoch gave."""

    def __init__(self, length, seed, shuffle):
        self.orders = ElasticSampler(range(length), length, rank=0, world_size=1, seed=seed, shuffle=shuffle, drop_last=False)
        self.epochs, self.rest = [], []

    def settle(self, batch, drop_last):
        """The next epoch begins where this one cannot give another batch."""
        if len(self.rest) < (batch if drop_last else 1):
            assert not self.rest or drop_last
            (order,) = self.orders
            self.rest = list(order)
            self.epochs.append((order, []))

    def take(self, batch, drop_last):
        taken, self.rest = self.rest[:batch], self.rest[batch:]
        self.epochs[-1][1].extend(taken)
        self.settle(batch, drop_last)
        return taken

    def position(self):
        return len(self.epochs) - 1, len(self.epochs[-1][1])


@st.composite
def histories(draw):
    """A data set, and runs between interruptions: (world size, global batch size, drop_last, batches consumed, batches read ahead)."""
    length, runs = draw(st.integers(1, 50)), []
    for _ in range(draw(st.integers(1, 7))):
        world, micro, accumulation = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
        batch = micro * accumulation * world
        runs.append((world, batch, draw(st.booleans()) and batch <= length, draw(st.integers(0, 9)), draw(st.integers(0, 4))))
    return length, draw(st.booleans()), draw(st.integers(0, 5)), runs


@given(histories())
def test_interruptions_change_neither_the_samples_nor_their_order(history):
    length, shuffle, seed, runs = history
    reference, state, samples = Reference(length, seed, shuffle), None, 0
    for world, batch, drop_last, count, ahead in runs:
        samplers = _samplers(length, batch, world, seed=seed, shuffle=shuffle, drop_last=drop_last)
        if state is not None:
            _resume(samplers, state, samples)
        state = _state(samplers)
        reference.settle(batch, drop_last)
        assert samplers[-1].locate(samples) == reference.position()
        assert len(samplers[-1]) == (len(reference.rest) // batch if drop_last else -(-len(reference.rest) // batch))

        expected = [reference.take(batch, drop_last) for _ in range(count)]
        assert _consume(samplers, count, ahead) == expected
        samples += sum(map(len, expected))
        assert samplers[-1].locate(samples) == reference.position()
        assert _state(samplers) == state, "the state depends on how far a loader has read"

    for order, given_out in reference.epochs:
        assert given_out == order[: len(given_out)]
    if not any(drop_last for _, _, drop_last, _, _ in runs):
        assert all(given_out == order for order, given_out in reference.epochs[:-1])


@given(histories())
def test_with_one_batch_size_an_interrupted_run_is_the_uninterrupted_one(history):
    length, shuffle, seed, runs = history
    world, batch, drop_last, _, _ = runs[0]
    options = {"seed": seed, "shuffle": shuffle, "drop_last": drop_last}
    seen, state = [], None
    for ranks, (_, _, _, count, ahead) in zip(itertools.cycle([world, batch, 1]), runs):
        samplers = _samplers(length, batch, ranks, **options)
        if state is not None:
            _resume(samplers, state, sum(map(len, seen)))
        seen += _consume(samplers, count, ahead)
        state = _state(samplers)
    whole = ElasticSampler(range(length), batch, rank=0, world_size=1, **options)
    assert state == whole.state_dict()
    assert seen == _consume([whole], len(seen))


@pytest.mark.parametrize(
    ("length", "runs", "last"),
    [
        (10, [(4, True, 1), (3, True, 3)], [[4, 5, 6], [7, 8, 9], [0, 1, 2]]),
        (10, [(4, True, 1), (5, True, 2)], [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]),  # one is left out of the first epoch, none of the next
        (10, [(4, True, 1), (8, True, 1)], [[0, 1, 2, 3, 4, 5, 6, 7]]),  # six were left
        (10, [(4, True, 2), (1, True, 1)], [[0]]),  # the epoch was over: what it left out stays left out
        (10, [(4, False, 2), (1, True, 3)], [[8], [9], [0]]),
        (10, [(4, False, 2), (4, True, 1)], [[0, 1, 2, 3]]),
        (10, [(4, True, 1), (4, False, 3)], [[4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]),
        (8, [(4, True, 2), (2, True, 1)], [[0, 1]]),  # at an epoch's exact end
        (5, [(8, False, 2), (2, True, 2)], [[0, 1], [2, 3]]),  # a batch larger than the data
        (5, [(2, True, 1), (8, False, 2)], [[2, 3, 4], [0, 1, 2, 3, 4]]),
        (10, [(4, True, 1), (6, True, 0), (2, True, 1)], [[4, 5]]),  # a resume right after a resume
        (10, [(4, True, 1), (8, True, 0), (2, True, 1)], [[0, 1]]),  # the one between had begun the next epoch
        (1, [(1, True, 3), (3, False, 2)], [[0], [0]]),
    ],
)
def test_a_new_batch_size_goes_on_from_the_next_sample(length, runs, last):
    state, samples, batches = None, 0, []
    for batch, drop_last, count in runs:
        samplers = _samplers(length, batch, 1, shuffle=False, drop_last=drop_last)
        if state is not None:
            _resume(samplers, state, samples)
        batches, state = _consume(samplers, count), _state(samplers)
        samples += sum(map(len, batches))
    assert batches == last


@given(st.integers(1, 60), st.sampled_from([(w, w * m) for w in range(1, 6) for m in range(1, 5)]), st.booleans())
def test_an_uninterrupted_epoch_gives_every_rank_its_contiguous_share(length, sizes, drop_last):
    world, batch = sizes
    if drop_last and batch > length:
        return
    samplers = _samplers(length, batch, world, drop_last=drop_last)
    epochs = [list(sampler) for sampler in samplers]
    assert len({len(epoch) for epoch in epochs}) == 1
    full = length // batch
    assert all(len(part) == batch // world for epoch in epochs for part in epoch[:full])
    assert len(epochs[0]) == (full if drop_last else -(-length // batch))
    assert sum(len(part) for epoch in epochs for part in epoch) == samplers[0].samples_per_epoch


@pytest.mark.parametrize("shuffle", [True, False])
def test_epochs_follow_each_other_each_with_its_own_order(shuffle):
    sampler = ElasticSampler(range(20), 4, rank=0, world_size=1, shuffle=shuffle)
    epochs = [[index for batch in sampler for index in batch] for _ in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert (epochs[0] != epochs[1] != epochs[2]) == shuffle


def test_the_order_depends_on_the_seed():
    orders = [list(ElasticSampler(range(50), 5, rank=0, world_size=1, seed=seed)) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_reads_ahead_does_not_move_the_position(workers):
    data = TensorDataset(torch.arange(23))
    sampler = ElasticSampler(data, 4, rank=0, world_size=1, drop_last=False)
    expected = [batch for _ in range(2) for batch in ElasticSampler(data, 4, rank=0, world_size=1, drop_last=False)][:6]
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, prefetch_factor=4 if workers else None)
    assert len(loader) == 6
    seen = []
    for (batch,) in loader:
        seen += batch.tolist()
        if len(seen) == 8:
            break  # the job dies here; workers had fetched further
    assert len(loader) == 6, "fetching ahead has moved the position"
    sampler.seek(len(seen))
    assert len(loader) == 4
    for (batch,) in loader:
        seen += batch.tolist()
    assert seen == [index for batch in expected for index in batch]
    assert len(loader) == 6, "the next epoch begins"


def test_a_position_that_would_mean_other_samples_is_refused():
    saved = ElasticSampler(range(100), 8, rank=0, world_size=1).state_dict()
    for other, told in (
        (ElasticSampler(range(101), 8, rank=0, world_size=1), "length is 101 here, 100"),
        (ElasticSampler(range(100), 8, seed=1, rank=0, world_size=1), "seed is 1 here, 0"),
        (ElasticSampler(range(100), 8, shuffle=False, rank=0, world_size=1), "shuffle is False here, True"),
    ):
        before = other.state_dict()
        with pytest.raises(IncompatibleCheckpoint, match=told):
            other.check_state_dict(saved)
        with pytest.raises(IncompatibleCheckpoint, match=told):
            other.load_state_dict(saved)
        other.seek(0)
        assert other.state_dict() == before


@pytest.mark.parametrize(
    "change",
    [
        *(
            {name: value}
            for name in ("length", "global_batch_size")
            for value in (0, -1, 1.0, True, None, "8", 101 if name != "length" else -(2**70))
        ),
        *({name: value} for name in ("samples", "epoch", "offset") for value in (-1, 1.5, False, None, [1], -(2**70))),
        *({name: 1} for name in ("shuffle", "drop_last", "unknown")),
        {"seed": None},
        {"offset": 101},
    ],
    ids=str,
)
def test_a_malformed_state_is_refused(change):
    sampler = ElasticSampler(range(100), 8, rank=0, world_size=1)
    state = sampler.state_dict()
    with pytest.raises(IncompatibleCheckpoint):
        sampler.check_state_dict({**state, **change})


@pytest.mark.parametrize("name", ["length", "seed", "shuffle", "global_batch_size", "drop_last", "samples", "epoch", "offset"])
def test_a_state_without_one_of_its_values_is_refused(name):
    sampler = ElasticSampler(range(100), 8, rank=0, world_size=1)
    state = sampler.state_dict()
    del state[name]
    with pytest.raises(IncompatibleCheckpoint, match=f"missing required field `{name}`"):
        sampler.check_state_dict(state)


@pytest.mark.parametrize("state", [None, 3, "x", [], {}, {1: 2}, {"length": 100, "seed": 0, "shuffle": True, "samples_per_epoch": 96}], ids=str)
def test_what_is_no_state_at_all_is_refused(state):
    with pytest.raises(IncompatibleCheckpoint, match="not as this version writes it"):
        ElasticSampler(range(100), 8, rank=0, world_size=1).check_state_dict(state)


def test_a_state_is_good_however_its_sizes_were_given():
    """A flag that came as 0 or 1, or a size from numpy, makes no state that a later resume refuses."""
    sampler = ElasticSampler(range(9), np.int64(2), seed=np.int32(3), shuffle=1, drop_last=0, rank=0, world_size=1)  # type: ignore[arg-type]
    sampler.check_state_dict(sampler.state_dict())
    assert {type(value) for value in sampler.state_dict().values()} == {int, bool}


def test_checkpoints_carry_a_run_over_two_changes_of_batch_size(tmp_path):
    """10 samples: a batch of 2 and one of 5, which leave out 3; the next epoch is cut by single samples."""
    model, progress, seen = torch.nn.Linear(1, 1), Progress(), []
    for batch, count in ((2, 1), (5, 1), (1, 4)):
        sampler = ElasticSampler(range(10), batch, rank=0, world_size=1, shuffle=False)
        checkpointer = Checkpointer(tmp_path, model, data=sampler)
        progress = checkpointer.resume(missing="fresh")
        for indices in _consume([sampler], count):
            seen += indices
            progress.advance(batch)
            progress.epoch, _ = sampler.locate(progress.samples)
        checkpointer.save(progress)
    assert seen == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    assert (progress.epoch, progress.step, progress.samples) == (1, 6, 11)


def test_a_position_before_the_last_change_of_batch_size_needs_its_own_state():
    first, second = (ElasticSampler(range(10), batch, rank=0, world_size=1, shuffle=False) for batch in (2, 5))
    _resume([second], first.state_dict(), 4)
    with pytest.raises(UsageError, match="2 samples lie before 4"):
        second.seek(2)
    assert next(iter(second)) == [4, 5, 6, 7, 8], "a refused seek changes nothing"
    _resume([second], first.state_dict(), 2)  # an earlier checkpoint of the first run
    assert next(iter(second)) == [2, 3, 4, 5, 6]
    with pytest.raises(UsageError, match="-1 samples lie before 0"):
        first.seek(-1)


def test_a_loaded_state_without_a_position_does_not_start_over_silently():
    sampler = ElasticSampler(range(10), 2, rank=0, world_size=1)
    sampler.load_state_dict(sampler.state_dict())
    with pytest.raises(UsageError, match="call seek"):
        next(iter(sampler))
    sampler.seek(4)
    assert len(list(sampler)) == 3


def test_a_state_that_is_loaded_again_after_the_seek_changes_nothing():
    """As torchdata's StatefulDataLoader does when it begins to iterate."""
    first, second = (ElasticSampler(range(10), batch, rank=0, world_size=1, shuffle=False) for batch in (2, 5))
    _resume([second], first.state_dict(), 4)
    state = second.state_dict()
    second.load_state_dict(first.state_dict())
    assert list(second) == [[4, 5, 6, 7, 8]]
    assert second.locate(9) == (1, 0)
    second.seek(14)
    assert second.state_dict() == state
    assert list(second) == [[5, 6, 7, 8, 9]]


def test_sizes_that_cannot_work_are_refused_at_once():
    with pytest.raises(UsageError, match="10 is not a positive multiple of the 4 ranks"):
        ElasticSampler(range(100), 10, rank=0, world_size=4)
    with pytest.raises(UsageError, match="3 samples do not fill one global batch of 4"):
        ElasticSampler(range(3), 4, rank=0, world_size=1)
    assert list(ElasticSampler(range(3), 4, rank=0, world_size=1, drop_last=False, shuffle=False)) == [[0, 1, 2]]
    for length, batch in ((0, 4), (4, 0), (4, -4)):
        with pytest.raises(UsageError):
            ElasticSampler(range(length), batch, rank=0, world_size=1, drop_last=False)
