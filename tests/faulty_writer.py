"""A writer process with a fault, given ``ACTION CALLS AT FD``, in place of ``engine.writer``.

CALLS are changes asked of the system, comma-separated, or ``all``; the fault is at the AT-th of them, for ``sleep`` at each one.
What is asked is listed in the file that LOCKSTEP_CALLS names, where it is set. No torch.
"""

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from engine import writer
from engine.storage import local
from engine.transfer import process

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALL = ("mkdir", "rename", "replace", "unlink", "rmdir", "link", "fsync", "write", "create", "exchange")
SLEEP_SECONDS = 0.15
LIMIT_BYTES = 2000


def command(action: str, calls: str = "all", at: int = 1) -> Sequence[str]:
    """What :data:`engine.transfer.process.COMMAND` is set to."""
    boot = f"import runpy, sys; sys.path.insert(0, {ROOT!r}); runpy.run_module('tests.faulty_writer', run_name='__main__', alter_sys=True)"
    return (sys.executable, "-c", boot, action, calls, str(at))


def use(patch: Any, action: str, calls: str = "all", at: int = 1) -> None:
    """For the writer processes that are started from now on."""
    patch.setattr(process, "COMMAND", command(action, calls, at))


def strike(action: str) -> None:
    if action == "raise":
        raise RuntimeError("the disk is on fire")
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if action == "fail":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    if action in ("orphan", "both"):
        os.kill(os.getppid(), signal.SIGKILL)
    if action in ("die", "both"):
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if action == "hang":
        time.sleep(1000)
    if action == "sleep":
        time.sleep(SLEEP_SECONDS)


def install(action: str, calls: Sequence[str], at: int) -> None:
    count, log = 0, os.environ.get("LOCKSTEP_CALLS")
    real_write, real_open = os.write, os.open
    out = real_open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if log else -1

    def note(name: str) -> bool:
        """Whether this is the one."""
        nonlocal count
        if name not in calls:
            return False
        count += 1
        if out >= 0:
            real_write(out, f"{name}\n".encode())
        return count == at or action == "sleep"

    def wrapped(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if note(name):
                strike(action)
            return real(*args, **kwargs)

        return call

    def write(fd: int, data: Any) -> int:
        if note("write"):
            if action not in ("sleep", "orphan"):  # those write all of it then
                real_write(fd, data[: len(data) // 2])
            strike(action)
        return real_write(fd, data)

    def create(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and note("create"):
            strike(action)
        return real_open(path, flags, *args, **kwargs)

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "link", "fsync"):
        setattr(os, name, wrapped(name, getattr(os, name)))
    os.write, os.open = write, create  # type: ignore[assignment]
    local._exchange = wrapped("exchange", local._exchange)


if __name__ == "__main__":
    action, calls, at, fd = sys.argv[1:]
    if action == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
    install(action, ALL if calls == "all" else calls.split(","), int(at))
    writer.main(int(fd))
