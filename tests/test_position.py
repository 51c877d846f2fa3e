"""The position in the data is what training has consumed: whatever a loop does that is allowed, every sample of every epoch comes once,
in the order of the uninterrupted run; what is not allowed is refused."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from engine import ElasticSampler, Progress
from engine.errors import UsageError
from engine.format.record import decode_record, encode_record
from tests.now import Checkpointer
from tests.test_data import Reference


class Loops(RuleBasedStateMachine):
    """One run: ranks of one process, their loaders, and progress; a job may end at any moment and go on from what was saved last.

    ``expected`` gives the batches that an uninterrupted run trains on.
    """

    workers = 0

    @initialize(length=st.integers(1, 40), seed=st.integers(0, 3), shuffle=st.booleans(), data=st.data())
    def start(self, length, seed, shuffle, data):
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.expected = Reference(length, seed, shuffle)
        self.saved = None
        self._begin_job(data)

    def _begin_job(self, data):
        self.world = data.draw(st.integers(1, 3), "world")
        self.batch = self.world * data.draw(st.integers(1, 6), "batch per rank")
        self.drop_last = self.batch <= self.length and data.draw(st.booleans(), "drop_last")
        empty = data.draw(st.sampled_from(["yield", "repeat"]), "empty")
        self.samplers = [
            ElasticSampler(
                range(self.length),
                self.batch,
                seed=self.seed,
                shuffle=self.shuffle,
                drop_last=self.drop_last,
                empty=empty,
                rank=rank,
                world_size=self.world,
            )
            for rank in range(self.world)
        ]
        workers = data.draw(st.integers(0, self.workers), "workers")
        dataset = TensorDataset(torch.arange(self.length))
        self.loaders = [
            DataLoader(
                dataset,
                batch_sampler=sampler,
                collate_fn=list,
                num_workers=workers,
                prefetch_factor=data.draw(st.integers(1, 3), "prefetch") if workers else None,
                persistent_workers=bool(workers) and data.draw(st.booleans(), "persistent"),
            )
            for sampler in self.samplers
        ]
        self.progress = [Progress() for _ in self.samplers]
        if self.saved is not None:
            state, counts, self.expected = copy.deepcopy(self.saved)
            self.progress = [Progress(*counts) for _ in self.samplers]
            for sampler in self.samplers:
                sampler.load_state_dict(decode_record(encode_record(state)))
                sampler.seek(counts[2])
        for sampler, progress in zip(self.samplers, self.progress):
            sampler.follow(progress)
        self.expected.settle(self.batch, self.drop_last)
        self.iterators = None
        self.is_new = True

    @rule()
    def iterate(self):
        """Make new iterators: the loop begins, or was left in mid-epoch and is entered again. One that was left at an epoch's end has
        counted that epoch; one that is new after a resume there has not, and finds no batch first."""
        if not self.is_new and self._uncounted():
            self._end_epoch()
        self.is_new = False
        self.iterators = [iter(loader) for loader in self.loaders]

    @rule()
    def step(self):
        if self.iterators is None:
            self.iterate()
        parts = [next(iterator, None) for iterator in self.iterators]
        if parts[0] is None:
            assert parts == [None] * self.world
            self._end_epoch()
            return
        weights = [sampler.weight for sampler in self.samplers]
        seen = [index.item() for part, weight in zip(parts, weights) if weight for (index,) in part]
        assert seen == self.expected.take(self.batch, self.drop_last)
        assert sum(weights) == pytest.approx(self.world)
        for progress in self.progress:
            progress.advance()

    def _end_epoch(self):
        self.iterators = None
        for progress in self.progress:
            progress.epoch += 1
        assert self.progress[0].epoch == self.samplers[0].locate(self.progress[0].samples)[0], "the loop's count of epochs is the sampler's"

    @rule()
    def loop_bounded_by_len(self):
        """To the epoch's end, as trainers do it that never ask for the batch that is not there."""
        if not self.is_new and self._uncounted():
            self._end_epoch()
        self.iterators = None
        count = len(self.loaders[0])
        self.iterate()
        for _ in range(count):
            assert len(self.loaders[0]) == count, "within a loop the number of its batches stays"
            self.step()
        self._end_epoch()

    def _uncounted(self):
        return self.progress[0].epoch < self.samplers[0].locate(self.progress[0].samples)[0]

    @precondition(lambda self: not (self.is_new and self._uncounted()))
    @rule()
    def peek(self):
        for loader in self.loaders:
            next(iter(loader), None)
        if self.iterators is not None and self.loaders[0].persistent_workers:
            self.iterators = None  # the loader has only one

    @rule()
    def save(self):
        states = [sampler.state_dict() for sampler in self.samplers]
        assert states == [states[0]] * self.world
        for sampler, progress in zip(self.samplers, self.progress):
            sampler.note_saved(progress)
        counts = (self.progress[0].epoch, self.progress[0].step, self.progress[0].samples)
        self.saved = (states[0], counts, copy.deepcopy(self.expected))

    @precondition(lambda self: self.saved is not None)
    @rule(data=st.data())
    def go_on_from_the_last_save(self, data):
        self._begin_job(data)

    @rule(wrong=st.integers(1, 50))
    def count_wrong(self, wrong):
        """A count that is not the batch's: refused, and nothing changes."""
        progress, sampler = self.progress[0], self.samplers[0]
        right = min(len(self.expected.rest), self.batch)
        before = copy.copy(progress)
        if wrong % self.batch and wrong < right:
            with pytest.raises(UsageError, match="not a position in the data: batches end after"):
                progress.advance(wrong)
        assert progress == before
        assert sampler.samples == before.samples

    @invariant()
    def ranks_count_alike(self):
        assert all(progress == self.progress[0] for progress in self.progress)

    def teardown(self):
        self.iterators = self.loaders = None


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("workers", "examples", "steps"), [(0, 150, 40), (2, 12, 15)])
def test_every_sample_comes_once_in_order_whatever_the_loop_does(workers, examples, steps):
    kind = type("Loops", (Loops,), {"workers": workers})
    limits = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(kind, settings=limits)


def _sampler(length=12, batch=4, **options):
    return ElasticSampler(range(length), batch, **{"rank": 0, "world_size": 1, "shuffle": False, **options})


def test_a_loop_that_nothing_counts_is_refused_rather_than_repeated():
    sampler = _sampler()
    assert list(sampler)[-1] == [8, 9, 10, 11]
    iterator = iter(sampler)
    assert next(iterator) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match=r"left after 4 samples, and nothing says how many.*progress.advance\(\)"):
        iter(sampler)
    sampler.seek(16)
    assert next(iter(sampler)) == [4, 5, 6, 7]


def test_a_loop_bounded_by_len_goes_through_the_epochs_by_itself():
    sampler, seen = _sampler(), []
    for _ in range(2):
        iterator = iter(sampler)
        seen += [next(iterator) for _ in range(len(sampler))]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] * 2


def test_steps_that_were_not_counted_are_refused():
    sampler, progress = _sampler(), Progress()
    sampler.follow(progress)
    next(iter(sampler))
    progress.step += 1
    with pytest.raises(UsageError, match=r"progress\.step went from 0 to 1 while progress\.samples stayed 0"):
        sampler.note_saved(progress)
    progress.step = 0
    progress.advance()
    with pytest.raises(UsageError, match="counts 8 samples, but the sampler has handed out 4: a step was counted twice"):
        progress.advance()
    assert (progress.step, progress.samples) == (1, 4)
    with pytest.raises(UsageError, match="6 samples are not a position in the data: batches end after 4 and 8 samples"):
        progress.advance(2)


def test_a_step_may_take_several_batches():
    sampler, progress = _sampler(length=11, drop_last=False), Progress()
    sampler.follow(progress)
    iterator = iter(sampler)
    for taken in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10]]):
        assert [next(iterator) for _ in taken] == taken
        progress.advance(batches=len(taken))
    assert (progress.step, progress.samples) == (2, 11)


def test_a_progress_without_a_sampler_needs_a_number():
    progress = Progress()
    with pytest.raises(UsageError, match=r"no sampler follows this progress. Give samples="):
        progress.advance()
    progress.advance(3)
    first, second = _sampler(), _sampler(batch=6)
    for sampler in (first, second):
        sampler.restart(3)
        sampler.follow(progress)
    with pytest.raises(UsageError, match="samplers have batches of different size"):
        progress.advance()
    assert (progress.step, progress.samples) == (1, 3)


def test_a_program_that_makes_its_own_progress_for_each_save_is_checked_too(tmp_path):
    sampler, seen = _sampler(), []
    checkpointer = Checkpointer(tmp_path, nn.Linear(1, 1), data=sampler)
    checkpointer.resume(missing="fresh")
    for step in range(1, 4):
        seen.append(next(iter(sampler)))
        with pytest.raises(UsageError, match=r"progress.step went from \d to \d while"):
            checkpointer.save(Progress(step=step, samples=4 * step - 4))
        checkpointer.save(Progress(step=step, samples=4 * step))
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert next(iter(sampler)) == [0, 1, 2, 3]


def test_set_epoch_goes_forward_and_stays_where_training_is(caplog):
    sampler, progress = _sampler(), Progress()
    sampler.follow(progress)
    sampler.set_epoch(0)
    next(iter(sampler))
    progress.advance()
    sampler.set_epoch(0)
    assert next(iter(sampler)) == [4, 5, 6, 7]
    sampler.set_epoch(2)
    assert "8 of 12 samples of epoch 0 are left out" in caplog.text
    assert sampler.locate(progress.samples) == (2, 0)
    assert [len(sampler), next(iter(sampler))] == [3, [0, 1, 2, 3]]
    with pytest.raises(UsageError, match=r"set_epoch\(1\), but training is in epoch 2, 0 samples into it"):
        sampler.set_epoch(1)
    other = _sampler()
    other.load_state_dict(sampler.state_dict())
    other.seek(progress.samples)
    assert other.locate(progress.samples) == (2, 0)


def test_an_epoch_that_is_read_whole_without_a_step_is_reported_once(caplog):
    """Statistics of BatchNorm, say, are made so; a loop that counts nothing looks the same."""
    sampler = _sampler()
    sampler.follow(Progress())
    for _ in range(3):
        assert len(list(sampler)) == 3
    assert caplog.text.count("an epoch's batches are handed out again: progress.samples is still 0") == 1


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_weights_make_the_mean_over_ranks_the_mean_over_the_batch(world, caplog):
    length, batch = 3 * 2 * world + 2, 2 * world
    samplers = [_sampler(length, batch, drop_last=False, rank=rank, world_size=world) for rank in range(world)]
    assert ("Multiply the loss by sampler.weight" in caplog.text) == (world > 2)
    for position, last in ((0, batch), (3 * batch, length)):
        for sampler in samplers:
            sampler.seek(position)
            with pytest.raises(UsageError, match="weight is that of the batch at the position: follow a progress first"):
                _ = sampler.weight
            sampler.follow(Progress(samples=position))
        parts = [next(iter(sampler)) for sampler in samplers]
        means = [sum(part) / len(part) * sampler.weight for part, sampler in zip(parts, samplers)]
        assert sum(means) / world == pytest.approx(sum(range(position, last)) / (last - position))


def test_parts_without_a_sample_are_refused_where_asked(caplog):
    message = r"the last batch of an epoch has fewer samples \(2\) than there are ranks \(3\)"
    with pytest.raises(UsageError, match=message):
        _sampler(14, 6, drop_last=False, world_size=3, empty="refuse")
    with pytest.raises(UsageError, match="empty='pad' is not known; use one of 'repeat', 'yield', 'refuse'"):
        _sampler(empty="pad")
    sampler = _sampler(15, 6, drop_last=False, world_size=3, empty="refuse")
    state = {**sampler.state_dict(), "global_batch_size": 1}
    sampler.load_state_dict(state)
    with pytest.raises(UsageError, match=message):
        sampler.seek(1)  # 14 of this epoch are left
    _sampler(14, 6, drop_last=False, world_size=3, empty="repeat")
    assert not caplog.text


def test_making_loaders_iterators_leaves_the_random_state_of_training_alone():
    """Also two at once, one that is not used, and where the caller seeds the generator in between."""
    samplers = [_sampler(seed=seed) for seed in (0, 1)]
    for sampler in samplers:
        sampler.follow(Progress())
    loaders = [DataLoader(range(12), batch_sampler=sampler) for sampler in samplers]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    seen = []
    iter(loaders[0])
    for _ in zip(*loaders):
        seen.append(torch.rand(()))
        break
    for _ in loaders[1]:
        seen.append(torch.rand(()))
    assert torch.equal(torch.stack(seen), expected)
    iterator = iter(loaders[0])
    torch.manual_seed(3)
    next(iterator)
    assert torch.equal(torch.rand(4), expected)
