"""Shared by all tests: real ranks in worker pools that live for the session, and Hypothesis' profiles."""

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TRITON_INTERPRET"] = "1"  # no GPU is needed for kernels; Triton reads it when it is imported, which DeepSpeed does too

from benchmarks.pool import Pools, use_own_tools

use_own_tools()

_CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("same", max_examples=100, derandomize=True, deadline=None, suppress_health_check=_CHECKS)
settings.register_profile("search", max_examples=5000, deadline=None, suppress_health_check=_CHECKS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))  # by default the same examples on every run


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """``pools[n].run(job, ...)`` runs a job on n real gloo ranks."""
    found = Pools()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _empty_working_directory(monkeypatch, tmp_path_factory):
    """What a person has trained in the clone, and what a test writes by a relative path, is no other test's business."""
    monkeypatch.chdir(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def _engine_logs_as_by_default() -> None:
    """Whatever a test, or the recipe that it runs, does to the logger."""
    logger = logging.getLogger("engine")
    logger.setLevel(logging.NOTSET)
    logger.disabled, logger.propagate = False, True
