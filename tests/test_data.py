"""The sampler's promise: nothing repeated, nothing skipped, one order, whatever changes between interruptions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from engine.data import ElasticSampler
from engine.errors import IncompatibleCheckpoint, UsageError


def _samplers(length, batch, world, **options):
    return [ElasticSampler(range(length), batch, rank=rank, world_size=world, **options) for rank in range(world)]


def _global_batches(samplers):
    """What all ranks see of each global batch until the epoch ends, in rank order."""
    for parts in itertools.zip_longest(*samplers):
        assert None not in parts, "the ranks see different numbers of batches"
        yield [index for part in parts for index in part]


@st.composite
def histories(draw):
    """A data set, and runs between interruptions: (world size, global batch size, global batches consumed)."""
    length, drop_last = draw(st.integers(1, 60)), draw(st.booleans())
    batches = [b for b in range(1, 25) if not drop_last or b <= length]
    first = draw(st.sampled_from(batches))
    if drop_last:  # other batch sizes mean the same position only where they leave out the same samples
        batches = [b for b in batches if length % b == length % first]
    runs = []
    for _ in range(draw(st.integers(1, 6))):
        batch = draw(st.sampled_from(batches))
        world = draw(st.sampled_from([w for w in range(1, 9) if batch % w == 0]))
        runs.append((world, batch, draw(st.integers(0, 8))))
    return length, drop_last, draw(st.booleans()), draw(st.integers(0, 5)), runs


@given(histories())
def test_interruptions_change_neither_the_samples_nor_their_order(history):
    length, drop_last, shuffle, seed, runs = history
    seen, state = [], None
    for world, batch, count in runs:
        samplers = _samplers(length, batch, world, seed=seed, shuffle=shuffle, drop_last=drop_last)
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(state)
            sampler.seek(len(seen))
        state = samplers[0].state_dict()
        while count:
            left = len(samplers[0])
            taken = list(itertools.islice(_global_batches(samplers), count))
            assert len(taken) == min(count, left)
            assert all(len(one) <= batch for one in taken)
            seen += [index for one in taken for index in one]
            count -= len(taken)
            for sampler in samplers:
                sampler.seek(len(seen))

    whole = ElasticSampler(range(length), runs[0][1], rank=0, world_size=1, seed=seed, shuffle=shuffle, drop_last=drop_last)
    expected = []
    while len(expected) < len(seen):
        epoch = [index for one in whole for index in one]
        assert len(epoch) == len(set(epoch)) == whole.samples_per_epoch
        expected += epoch
    assert seen == expected[: len(seen)]


@given(st.integers(1, 60), st.sampled_from([(w, w * m) for w in range(1, 6) for m in range(1, 5)]), st.booleans(), st.data())
def test_an_uninterrupted_epoch_gives_every_rank_its_contiguous_share(length, sizes, drop_last, data):
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
        (ElasticSampler(range(100), 7, rank=0, world_size=1), "samples_per_epoch is 98 here, 96"),
        (ElasticSampler(range(100), 8, drop_last=False, rank=0, world_size=1), "samples_per_epoch is 100 here, 96"),
    ):
        with pytest.raises(IncompatibleCheckpoint, match=told):
            other.load_state_dict(saved)
    ElasticSampler(range(100), 4, rank=1, world_size=2, drop_last=False).load_state_dict(
        ElasticSampler(range(100), 32, rank=0, world_size=8, drop_last=False).state_dict()
    )


def test_sizes_that_cannot_work_are_refused_at_once():
    with pytest.raises(UsageError, match="10 is not a positive multiple of the 4 ranks"):
        ElasticSampler(range(100), 10, rank=0, world_size=4)
    with pytest.raises(UsageError, match="3 samples do not fill one global batch of 4"):
        ElasticSampler(range(3), 4, rank=0, world_size=1)
    assert list(ElasticSampler(range(3), 4, rank=0, world_size=1, drop_last=False, shuffle=False)) == [[0, 1, 2]]
    for length, batch in ((0, 4), (4, 0), (4, -4)):
        with pytest.raises(UsageError):
            ElasticSampler(range(length), batch, rank=0, world_size=1, drop_last=False)
