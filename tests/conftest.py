"""Shared by all tests: real ranks in worker pools that live for the session."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
os.environ["DS_ACCELERATOR"] = "cpu"

from benchmarks.pool import Pools


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """``pools[n].run(job, ...)`` runs a job on n real gloo ranks."""
    found = Pools()
    yield found
    found.close()
