"""A rank's writer process, seen from the trainer: what it is told, what it answers, and what becomes of it when it does not.

The process is spawned, never forked, holds no torch and no CUDA context, and ends when the trainer's end of the socket closes, however
that comes about. ``engine.writer`` is its other side.
"""

import contextlib
import importlib.util
import logging
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from engine.errors import EngineError, StorageError, error_class
from engine.events import Ticker
from engine.format.layout import LogicalTensor
from engine.format.manifest import IndexEntry, Summary
from engine.plan.image import ShardLayout

logger = logging.getLogger("engine")

# The modules that the trainer has imported, from where it has imported them, and nothing from the working directory, whose files
# would run as code: -P keeps it off the path, and the package itself is loaded by its place.
_BOOT = """
import importlib.util, sys
package, *places = {places!r}
sys.path.extend(place for place in places if place not in sys.path)
spec = importlib.util.spec_from_file_location("engine", package + "/__init__.py", submodule_search_locations=[package])
sys.modules["engine"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from engine.writer import main
main(int(sys.argv[1]))
"""


def _places() -> list[str]:
    """The folder of this package, and those that hold what the writer imports beside the standard library."""
    origins = [spec.origin for name in ("msgspec", "xxhash") if (spec := importlib.util.find_spec(name)) and spec.origin]
    return [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), *(os.path.dirname(os.path.dirname(origin)) for origin in origins)]


COMMAND = (sys.executable, *subprocess._args_from_interpreter_flags(), "-P", "-c", _BOOT.format(places=_places()))  # type: ignore[attr-defined]
_LENGTH = struct.Struct("<Q")
_PATIENCE_SECONDS = 10.0  # for a process that has nothing left to do but to end
_END_SECONDS = 1.0  # for one that was killed


class Settings(Struct, tag=True):
    """The first message: the run's folder, this rank, the run's retention, and its config, as :func:`~engine.transfer.runfile.in_json`."""

    root: str
    rank: int
    retention: tuple[int | None, int | None, int | None, bool]
    config: dict[str, Any]


class Plan(Struct, tag=True):
    """What all saves of one plan have in common."""

    layout: ShardLayout
    tensors: tuple[LogicalTensor, ...]
    aliases: dict[str, str]


class UseImage(Struct, tag=True):
    """The image ``slot``: a file descriptor follows this message."""

    slot: int
    size_bytes: int


class Take(Struct, tag=True):
    """Take the run for this job; rank 0's writer only. Answered by the lease's name."""


class Write(Struct, tag=True):
    """Write the image in ``slot`` into ``attempt``; ``previous`` is the step whose files may be linked. Answered by
    :class:`~engine.transfer.write.Written`."""

    slot: int
    attempt: str
    record: bytes
    previous: str


class Commit(Struct, tag=True):
    """Make ``attempt`` visible; rank 0's writer only."""

    attempt: str
    summary: Summary
    indexes: tuple[IndexEntry, ...]
    record: bytes
    wandb_run_id: str


class Tidy(Struct, tag=True):
    """After a commit: ``best``, and what retention does not keep; rank 0's writer only."""

    summary: Summary


class Settle(Struct, tag=True):
    """Make sure that ``attempt`` is a step, or never will be; rank 0's writer only. Answered by whether it is."""

    attempt: str


Order = Settings | Plan | UseImage | Take | Write | Commit | Tidy | Settle


class Done(Struct, tag=True):
    value: Any = None


class Failed(Struct, tag=True):
    kind: str
    message: str
    trace: str


class Alive(Struct, tag=True):
    """Sent while at work, so that a long write is not taken for a hang: so many bytes are written."""

    size_bytes: int = 0


class Log(Struct, tag=True):
    level: int
    text: str


Answer = Done | Failed | Alive | Log


class Channel:
    """Messages over one socket, each with its length before it. Any thread may send."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._sending = threading.Lock()

    def send(self, message: Struct, fd: int | None = None) -> None:
        data = msgspec.msgpack.encode(message)
        with self._sending:
            self.socket.sendall(_LENGTH.pack(len(data)) + data)
            if fd is not None:
                socket.send_fds(self.socket, [b"\0"], [fd])

    def receive(self, kind: Any) -> Any:
        """Raises EOFError where the other side has closed."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return msgspec.msgpack.decode(self._read(length), type=kind)

    def receive_fd(self) -> int:
        _, fds, *_ = socket.recv_fds(self.socket, 1, 1)
        if not fds:
            raise EOFError
        return fds[0]

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            got = self.socket.recv_into(view)
            if got == 0:
                raise EOFError
            view = view[got:]
        return data


class WriterProcess:
    """Started when made; whoever makes one calls :meth:`stop`. Its methods may be called from one thread at a time."""

    def __init__(self, settings: Settings, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        ours, theirs = socket.socketpair()
        ours.settimeout(timeout_seconds)
        self._process = subprocess.Popen([*COMMAND, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._channel = Channel(ours)
        self._owner, self._is_killed = os.getpid(), False
        _processes.add(self)
        self._send("start", settings)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def tell(self, order: Order, fd: int | None = None) -> None:
        """An order without an answer."""
        self._send(type(order).__name__, order, fd)

    def check(self) -> None:
        """Raises :class:`StorageError` where the process was killed and does not end: the storage holds it in the kernel."""
        if self._is_killed and self.is_alive:
            raise StorageError(
                f"the writer process {self.pid} was killed and does not end: the storage hangs in the system (see its log; a hard NFS mount waits "
                "for its server). Saves fail until it goes on. Checkpoints committed before are untouched"
            )

    def ask(self, what: str, order: Order, on_alive: Callable[[], None] = lambda: None, patience_seconds: float | None = None) -> Any:
        """The answer's value. Raises what the process raised, with its traceback, or :class:`StorageError` if it died, or gave no sign
        of life for ``patience_seconds``, the timeout by default."""
        self._send(what, order)
        ticker = Ticker(what)
        while True:
            answer = self._receive(what, self._timeout_seconds if patience_seconds is None else patience_seconds)
            if isinstance(answer, Alive):
                ticker.add(answer.size_bytes)
                on_alive()
            if isinstance(answer, Done):
                return answer.value
            if isinstance(answer, Failed):
                kind = error_class(answer.kind)
                ours = issubclass(kind, EngineError) and kind.__name__ == answer.kind
                raise (kind if ours else StorageError)(answer.message if ours else f"{what}: the writer process failed:\n{answer.trace}")
            if isinstance(answer, Log):
                logger.log(answer.level, "%s", answer.text)

    def stop(self) -> None:
        """Close, and wait until it has ended. One that was killed and does not end is left: nothing can be done about it."""
        self.let_go()
        if os.getpid() != self._owner or self._is_killed:
            return
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def let_go(self) -> None:
        """Close this process's end of the socket; the writer ends when no process has it."""
        with contextlib.suppress(OSError):
            self._channel.socket.close()

    def kill(self) -> None:
        self.let_go()
        self._is_killed = True
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)

    def _send(self, what: str, order: Struct, fd: int | None = None) -> None:
        try:
            self._channel.send(order, fd)
        except TimeoutError:
            raise self._hang(what) from None
        except OSError:
            raise self._death(what) from None

    def _receive(self, what: str, patience_seconds: float) -> Any:
        deadline = time.monotonic() + patience_seconds
        try:
            while not select.select([self._channel.socket], [], [], max(0.0, min(1.0, deadline - time.monotonic())))[0]:
                if time.monotonic() >= deadline:
                    raise TimeoutError
            return self._channel.receive(Answer)
        except TimeoutError:
            raise self._hang(what) from None
        except (EOFError, OSError):
            raise self._death(what) from None

    def _hang(self, what: str) -> StorageError:
        self.kill()
        return StorageError(
            f"{what}: the writer process {self.pid} gave no sign of life for {self._timeout_seconds:.0f} s and was killed. The storage "
            "may hang (see the system log). Checkpoints committed before are untouched"
        )

    def _death(self, what: str) -> StorageError:
        try:
            code = self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return StorageError(
            f"{what}: the writer process {self.pid} {how}. Look at this rank's stderr and the system log (out of memory?). Checkpoints committed "
            "before are untouched; the next save starts a new one"
        )


_processes: "weakref.WeakSet[WriterProcess]" = weakref.WeakSet()


def _let_go_of_all() -> None:
    """In a fork, such as a DataLoader's worker: a writer must end with its trainer, and not with the last of its children."""
    for process in list(_processes):
        process.let_go()


os.register_at_fork(after_in_child=_let_go_of_all)
