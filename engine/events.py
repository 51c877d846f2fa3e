"""What a save took, for logs and trackers."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from engine.errors import UsageError

logger = logging.getLogger("engine")


_counts: Counter[str] = Counter()


def warn_counted(key: str, text: str, *args: object) -> None:
    """Warn of something that may come at every save: the first time, and then with how often, at the 10th, the 100th and so on."""
    _counts[key] += 1
    count = _counts[key]
    if count == 1:
        logger.warning(text, *args)
    elif str(count).strip("0") == "1":
        logger.warning(text + " (%d times so far)", *args, count)


class Ticker:
    """A line in the log now and then while bytes go by for long: that a save or a load is alive, and how fast."""

    EVERY_SECONDS = 10.0

    def __init__(self, what: str) -> None:
        self._what, self._began = what, time.monotonic()
        self._told, self._bytes = self._began, 0

    def add(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        now = time.monotonic()
        if now - self._told >= self.EVERY_SECONDS:
            self._told = now
            logger.info("%s: %.2f GB in %.0f s so far", self._what, self._bytes / 1e9, now - self._began)


class SaveEvent(Struct, frozen=True):
    """One save, seen from one rank. ``blocked_seconds``: how long ``save()`` kept the training loop; then, each counted from the call:
    until the state was staged, until this rank's files were durable, until the step was visible. ``size_bytes`` were this rank's, of
    which ``reused_bytes`` were linked and not written. Steps of optimizers that ended meanwhile: how many, and the times between them.
    """

    step: int
    blocked_seconds: float
    staged_seconds: float
    written_seconds: float
    committed_seconds: float
    size_bytes: int
    reused_bytes: int = 0
    steps: int = 0
    step_p50_seconds: float = 0.0
    step_p99_seconds: float = 0.0
    step_max_seconds: float = 0.0

    @property
    def gb_per_second(self) -> float:
        """Written, over the time from staged to durable."""
        return (self.size_bytes - self.reused_bytes) / 1e9 / max(self.written_seconds - self.staged_seconds, 1e-9)

    def scalars(self) -> dict[str, float]:
        """By the names that trackers get: ``checkpoint/blocked_seconds`` and so on."""
        found = {name: float(value) for name, value in asdict(self).items() if name != "step"}
        return {f"checkpoint/{name}": value for name, value in {**found, "gb_per_second": self.gb_per_second}.items()}


Sink = Callable[[SaveEvent], object]


def sink_of(target: Any) -> Sink:
    """Return what gives an event to ``target``: a function that is given the event, a TensorBoard ``SummaryWriter`` (``add_scalar``),
    or a W&B run (``log``), whose own step does not move: the next ``log`` of training carries the values.

    Raises :class:`UsageError` for anything else, such as a ``logging.Logger``: what it would get is in the log already.
    """
    if hasattr(target, "add_scalar"):

        def board(event: SaveEvent) -> None:
            for name, value in event.scalars().items():
                target.add_scalar(name, value, event.step)

        return board
    if hasattr(target, "log") and not isinstance(target, logging.Logger | logging.LoggerAdapter):
        return lambda event: target.log({"checkpoint/step": event.step, **event.scalars()}, commit=False)
    if not callable(target):
        raise UsageError(f"events takes functions, TensorBoard writers and W&B runs; {type(target).__name__} is none of them")
    return target


def sinks_of(targets: Any) -> list[Sink]:
    """Return a sink for each target of a list, see :func:`sink_of`. Raises :class:`UsageError` for what is not a list of them."""
    if not isinstance(targets, list | tuple):
        raise UsageError(f"events is a {type(targets).__name__}; give a list of functions, TensorBoard writers and W&B runs")
    return [sink_of(target) for target in targets]


def emit(event: SaveEvent, sinks: Sequence[Sink]) -> None:
    """To the log, and to every sink; one that fails is told, and costs no checkpoint."""
    reused = f", {event.reused_bytes / 1e6:.1f} MB of them reused" if event.reused_bytes else ""
    slowest = f"; {event.steps} step{'s' * (event.steps != 1)} meanwhile, the slowest {event.step_max_seconds:.3f} s" if event.steps else ""
    logger.info(
        "saved step %d: %.1f MB by this rank%s; training waited %.3f s, durable after %.2f s, visible after %.2f s%s",
        event.step, event.size_bytes / 1e6, reused, event.blocked_seconds, event.written_seconds, event.committed_seconds, slowest,
    )  # fmt: skip
    for sink in sinks:
        try:
            sink(event)
        except Exception as e:  # noqa: BLE001 - a tracker's failure must not become the checkpoint's
            warn_counted(f"sink {id(sink)} {e!r}", "an event of the save of step %d was not taken: %r", event.step, e)
