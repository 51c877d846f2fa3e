"""The storage in memory on which interleavings are explored keeps the contract too: what is found there says something."""

import pytest

from benchmarks.memory_storage import Disk, MemoryStorage
from tests.storage.contract import StorageTests


@pytest.fixture(params=[True, False], ids=["exchange", "no exchange"])
def storage(request):
    return MemoryStorage(Disk().apply, request.param)


class TestMemoryStorage(StorageTests):
    pass
