"""Processes that are killed at any instant: at the seam where the storage asks the system for a change."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from engine.storage import local


class Killed(BaseException):
    """No ``except Exception`` catches it, and after it nothing works: what clean-up there is does nothing, as in a killed process."""


class Death:
    """Counts the changes asked of the system; the ``at``-th and every one after it is not made."""

    def __init__(self, at: int | None) -> None:
        self._at = at
        self.calls: list[str] = []

    @property
    def happened(self) -> bool:
        return self._at is not None and len(self.calls) >= self._at

    def strike(self, call: str) -> None:
        self.calls.append(call)
        if self.happened:
            raise Killed(call)


@contextmanager
def dying(at: int | None, exchange: bool = True) -> Iterator[Death]:
    """The block dies at its ``at``-th change (None: never). ``exchange``: whether the file system can exchange two names.

    Nothing is synced: a kill loses no memory of the system's, and these tests make thousands of files.
    """
    death = Death(at)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, _counted(death, name, getattr(os, name)))
        patch.setattr(os, "fsync", lambda fd: death.strike("fsync"))
        patch.setattr(os, "write", _torn(death, os.write))
        patch.setattr(os, "open", _created(death, os.open))
        patch.setattr(local, "_exchange", _counted(death, "exchange", local._exchange) if exchange else lambda *_: False)
        with suppress(Killed):
            yield death


def _counted(death: Death, name: str, real):
    def call(*args, **kwargs):
        path = next(arg for arg in args if not isinstance(arg, int))
        death.strike(f"{name} {os.path.basename(os.fspath(path))}")
        return real(*args, **kwargs)

    return call


def _created(death: Death, real):
    def call(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            death.strike(f"create {os.path.basename(path)}")
        return real(path, flags, *args, **kwargs)

    return call


def _torn(death: Death, real):
    def call(fd, data):
        already = death.happened
        try:
            death.strike("write")
        except Killed:
            if not already:
                real(fd, data[: len(data) // 2])
            raise
        return real(fd, data)

    return call


def refuse(patch: pytest.MonkeyPatch, name: str, code: int = errno.EACCES) -> None:
    """Every call of ``os.<name>`` fails."""

    def call(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    patch.setattr(os, name, call)
