"""The elastic sampler under loaders that read ahead in worker processes, torch's own and torchdata's stateful one."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from engine import Progress
from engine.data import ElasticSampler
from engine.errors import IncompatibleCheckpoint, UsageError
from engine.format.record import decode_record, encode_record
from tests.now import Checkpointer

LENGTH = 40

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital'")  # torchdata 0.11 calls it, torch has deprecated it


def _ranks(kind, world, batch, *, workers=2):
    """A sampler and its loader for each rank."""
    data = TensorDataset(torch.arange(LENGTH))
    samplers = [ElasticSampler(data, batch, seed=3, rank=rank, world_size=world) for rank in range(world)]
    return samplers, [kind(data, batch_sampler=sampler, num_workers=workers, generator=torch.Generator()) for sampler in samplers]


def _join(parts):
    return [index for (part,) in parts for index in part.tolist()]


def _order(epoch):
    whole = ElasticSampler(range(LENGTH), LENGTH, seed=3, rank=0, world_size=1)
    whole.seek(epoch * LENGTH)
    (order,) = whole
    return order


def test_a_loader_with_workers_goes_on_in_mid_epoch_with_another_batch_size():
    """24 samples by batches of 12 on two ranks; then 16 are left, of which batches of 7 take 14, and then whole epochs of 35."""
    samplers, loaders = _ranks(DataLoader, 2, 12)
    batches = zip(*loaders)
    seen = _join(next(batches)) + _join(next(batches))
    state = [decode_record(encode_record(sampler.state_dict())) for sampler in samplers]
    del batches  # the workers had read to the end of the epoch
    assert state[0] == state[1]

    (sampler,), (loader,) = _ranks(DataLoader, 1, 7)
    sampler.load_state_dict(state[0])
    sampler.seek(24)
    assert len(loader) == 2
    seen += _join(loader)
    assert seen == _order(0)[:38]
    assert sampler.locate(38) == (1, 0)
    assert _join(loader) == _order(1)[:35]


@pytest.fixture
def stateful():
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader_first", [False, True])
def test_a_stateful_loader_restored_beside_its_sampler_goes_on_from_the_next_sample(stateful, workers, loader_first):
    """It skips nothing by itself: the sampler has state, and alone knows the position. It loads that state again as it begins to
    iterate, after the seek."""
    (sampler,), (loader,) = _ranks(stateful, 1, 6, workers=workers)
    batches = iter(loader)
    seen = _join([next(batches), next(batches)])
    saved = decode_record(encode_record({"sampler": sampler.state_dict(), "loader": loader.state_dict()}))
    del batches

    (sampler,), (loader,) = _ranks(stateful, 1, 10, workers=workers)
    if loader_first:
        loader.load_state_dict(saved["loader"])
    sampler.load_state_dict(saved["sampler"])
    sampler.seek(12)
    if not loader_first:
        loader.load_state_dict(saved["loader"])
    state = sampler.state_dict()
    seen += _join([next(iter(loader))])
    sampler.seek(22)
    assert sampler.state_dict() == state, "the loader has set the sampler back to what positions meant before"
    seen += _join(loader)
    assert seen == _order(0)[:32]
    assert _join(loader) == _order(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_restored_without_its_sampler_does_not_start_over_silently(stateful, workers):
    _, (loader,) = _ranks(stateful, 1, 6, workers=workers)
    next(iter(loader))
    saved = loader.state_dict()
    _, (loader,) = _ranks(stateful, 1, 6, workers=workers)
    loader.load_state_dict(saved)
    with pytest.raises(UsageError, match="call seek"):
        next(iter(loader))


def _saved(run, stateful, workers, batches):
    """A loader of torchdata's as a member, which keeps the position itself; what is left of its epoch after ``batches``."""
    loader = stateful(TensorDataset(torch.arange(LENGTH)), batch_size=4, num_workers=workers, generator=torch.Generator())
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    Checkpointer(run, nn.Linear(1, 1), loader=loader).save(Progress(step=batches))
    return _join(iterator), _join(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_is_a_member_that_keeps_its_own_position(tmp_path, stateful, workers):
    rest, epoch = _saved(tmp_path, stateful, workers, batches=3)
    loader = stateful(TensorDataset(torch.arange(LENGTH)), batch_size=4, num_workers=workers, generator=torch.Generator())
    Checkpointer(tmp_path, nn.Linear(1, 1), loader=loader).resume()
    assert _join(loader) == rest == list(range(12, LENGTH))
    assert _join(loader) == epoch


def test_a_stateful_loader_with_other_workers_is_refused_before_anything_changes(tmp_path, stateful):
    _saved(tmp_path, stateful, 2, batches=3)
    loader = stateful(TensorDataset(torch.arange(LENGTH)), batch_size=4, num_workers=1)
    with pytest.raises(IncompatibleCheckpoint, match="member 'loader' has num_workers=1 here, 2 in the checkpoint"):
        Checkpointer(tmp_path, nn.Linear(1, 1), loader=loader).resume()
    assert _join(loader) == list(range(LENGTH))


def test_a_stateful_loader_beside_its_sampler_loses_no_epoch(tmp_path, stateful):
    """Where an epoch is shorter than what the workers fetch ahead, torchdata draws the next one and discards it as it restores a
    finished epoch."""
    (sampler,), (loader,) = _ranks(stateful, 1, LENGTH // 2)
    progress = Progress(samples=len(_join(loader)))
    sampler.seek(progress.samples)
    Checkpointer(tmp_path, nn.Linear(1, 1), data=sampler, loader=loader).save(progress)
    (sampler,), (loader,) = _ranks(stateful, 1, LENGTH // 2)
    Checkpointer(tmp_path, nn.Linear(1, 1), data=sampler, loader=loader).resume()
    assert _join(loader) == _order(1)
