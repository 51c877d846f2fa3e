"""Each operation as it runs on the CPU, and its Triton kernels in the interpreter, for which tests/conftest.py has set the environment."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def as_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations take their Triton kernels, interpreted."""
    for name, module in list(sys.modules.items()):
        if name.startswith("engine_kernels.") and hasattr(module, "uses_triton"):
            monkeypatch.setattr(module, "uses_triton", lambda tensor: True)


@pytest.fixture(params=["torch", "triton"])
def on(request: pytest.FixtureRequest) -> str:
    """Each test that asks for it runs twice: as operations do on the CPU, and as they do on a GPU, interpreted."""
    if request.param == "triton":
        request.getfixturevalue("as_triton")
    return request.param


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated without a value holds NaN."""

    def poisoned(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = real(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return make

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
