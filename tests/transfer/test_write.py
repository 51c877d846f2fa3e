"""Files of several windows, each written while the next is prepared."""

import time

import pytest
import torch
from torch import nn

from engine import Checkpointer, Progress
from engine.errors import StorageError
from engine.format.checksum import BLOCK_BYTES
from engine.storage import LocalStorage, local
from engine.transfer import stage, write
from engine.transfer.verify import verify


def module(seed: int) -> nn.Module:
    """Small tensors that share windows, and one that fills several and has to be gathered."""
    torch.manual_seed(seed)
    made = nn.Module()
    made.small = nn.ParameterList(nn.Parameter(torch.randn(700, 100)) for _ in range(12))
    made.turned = nn.Parameter(torch.randn(700, 1000).t())
    return made


@pytest.fixture
def small_windows(monkeypatch):
    for place in (write, stage):
        monkeypatch.setattr(place, "WINDOW_BYTES", BLOCK_BYTES)


@pytest.mark.parametrize("max_in_flight", [0, 1])
def test_a_window_is_not_used_again_while_it_is_written(tmp_path, monkeypatch, small_windows, max_in_flight):
    real = local._LocalWriter.write

    def slow(self, data):
        time.sleep(0.02)  # in the writer process the real speed serves: there nothing is used again
        real(self, data)

    monkeypatch.setattr(local._LocalWriter, "write", slow)
    saved, other = module(0), module(1)
    assert sum(p.numel() * 4 for p in saved.parameters()) > 5 * BLOCK_BYTES
    checkpointer = Checkpointer(tmp_path, saved, max_in_flight=max_in_flight)
    checkpointer.save(Progress(step=1))
    checkpointer.close()
    assert verify(LocalStorage(tmp_path), "step_00000001") == []
    Checkpointer(tmp_path, other, max_in_flight=0).resume()
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("at", [2, 4])
def test_a_window_that_cannot_be_written_fails_the_save(tmp_path, monkeypatch, small_windows, at):
    real, count = local._LocalWriter.write, iter(range(1, 1000))

    def failing(self, data):
        if next(count) == at:
            raise StorageError("the disk is on fire")
        real(self, data)

    monkeypatch.setattr(local._LocalWriter, "write", failing)
    with pytest.raises(StorageError, match="the disk is on fire"):
        Checkpointer(tmp_path, module(0), max_in_flight=0).save(Progress(step=1))
    assert [path.name for path in tmp_path.iterdir() if "step" in path.name] == []
