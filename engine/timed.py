"""A job's store of which every call ends in time. Torch's own calls wait for as long as the process that hosts the store is stopped."""

import threading
import time
import weakref
from queue import SimpleQueue
from typing import Any, Protocol

from engine.errors import PeerError


class Store(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: bytes, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: bytes, desired: bytes, /) -> bytes: ...
    def delete_key(self, key: str, /) -> bool: ...


class _Call:
    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args = name, args
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None


class TimedStore:
    """Calls of ``store``, one after another in a thread of their own. One that has not ended at ``until`` (``time.monotonic()``) raises
    TimeoutError, and is still carried out, before the next ones, when the host goes on: what it does comes late, not never.

    Raises :class:`PeerError` where no thread can be started.
    """

    def __init__(self, store: Store, until: float = float("inf")) -> None:
        self.until = until
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        thread = threading.Thread(target=_serve, args=(store, self._calls), name="lockstep-store", daemon=True)
        try:
            thread.start()
        except RuntimeError as e:
            raise PeerError(f"{e}: the limit of this user's or container's tasks is reached (ulimit -u, pids.max). Raise it") from None
        weakref.finalize(self, self._calls.put, None).atexit = False
        self._is_extended = getattr(store, "has_extended_api", bool)()

    def has_extended_api(self) -> bool:
        """Whether :meth:`multi_get` is one call."""
        return self._is_extended

    def set(self, key: str, value: bytes) -> None:
        self._call("set", key, value)

    def get(self, key: str) -> bytes:
        return self._call("get", key)

    def check(self, keys: list[str]) -> bool:
        return self._call("check", keys)

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        return self._call("compare_set", key, expected, desired)

    def delete_key(self, key: str) -> bool:
        return self._call("delete_key", key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._call("multi_get", keys)

    def _call(self, name: str, *args: Any) -> Any:
        call = _Call(name, args)
        self._calls.put(call)
        left = self.until - time.monotonic()
        if not call.done.wait(max(0.0, left) if left < threading.TIMEOUT_MAX else None):
            raise TimeoutError("the job's store does not answer")
        if call.error is not None:
            raise call.error
        return call.value


def _serve(store: Any, calls: "SimpleQueue[_Call | None]") -> None:
    while (call := calls.get()) is not None:
        try:
            call.value = getattr(store, call.name)(*call.args)
        except BaseException as e:  # noqa: BLE001 - the caller's
            call.error = e
        call.done.set()
        del call
