"""What the caller has switched on for its own computing, off while a checkpointer works."""

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def in_neutral_surroundings(method: Callable[P, R]) -> Callable[P, R]:
    """Decorate a method so that inference mode, gradients and autocast of its caller change nothing in it.

    The default dtype and device are left alone, since the state of members may depend on them; this
    package names both wherever it makes a tensor.
    """

    @wraps(method)
    def neutral(*args: P.args, **kwargs: P.kwargs) -> R:
        with _neutral():
            return method(*args, **kwargs)

    return neutral


@contextlib.contextmanager
def _neutral() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
