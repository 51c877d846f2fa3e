"""The writer process of one rank: it writes, checksums, commits and tidies, off the training path. No torch.

Started by :class:`engine.transfer.process.WriterProcess`, which calls :func:`main`; ends when that socket closes.
"""

import logging
import mmap
import os
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from msgspec.structs import replace

from engine import catalog
from engine.catalog import Retention
from engine.errors import CheckpointCorrupt, EngineError
from engine.format.manifest import Manifest, Summary
from engine.plan.image import ShardLayout
from engine.storage import LocalStorage, Storage, Writer
from engine.transfer.commit import commit_attempt
from engine.transfer.process import Alive, Channel, Commit, Done, Failed, Log, Order, Plan, Settings, Settle, Take, Tidy, UseImage, Write
from engine.transfer.runfile import write_run_file
from engine.transfer.write import Images, MemoryImages, Written, places, write_shards

logger = logging.getLogger("engine")

REWRITE_AFTER = 20
CHECK_AFTER = 10
NICENESS = 10
"""Training goes first; but a save ends, too, where training leaves no processor idle: it gets a tenth of one."""


class _Watched:
    """A file being written: the trainer hears that the writer lives, and a writer whose trainer has gone ends at once."""

    def __init__(self, writer: Writer, channel: Channel) -> None:
        self._writer, self._channel = writer, channel

    def write(self, data: memoryview) -> None:
        try:
            if not self._channel.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                os._exit(0)
        except BlockingIOError:
            pass
        self._writer.write(data)
        self._channel.send(Alive(len(data)))

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        self._writer.abandon()


class _Storage(LocalStorage):
    def __init__(self, root: str, channel: Channel) -> None:
        super().__init__(root)
        self._channel = channel

    def create(self, path: str, size_bytes: int = 0) -> Any:
        return _Watched(super().create(path, size_bytes), self._channel)

    def remove(self, path: str) -> None:
        super().remove(path)
        self._channel.send(Alive())


class _Told(logging.Handler):
    """What is logged here is the trainer's to tell."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(Log(record.levelno, record.getMessage()))


class _File(NamedTuple):
    """A file of content that does not change, as this process has written or linked it: how often in a row the latter."""

    stamp: tuple[int, ...] | None
    links: int = 0


class _Links:
    """Content of the step before, by its name, which says what it is. A file that has been linked :data:`REWRITE_AFTER` times is written
    anew: where it has gone bad, an older step that shares it is no remedy. Nor is damage passed on: one that is not as it was when it
    was written is not linked, and one that this process has not written, or linked :data:`CHECK_AFTER` times, is read before."""

    def __init__(self, storage: Storage, previous: str, files: dict[str, _File]) -> None:
        self._storage, self._previous, self._files = storage, previous, files

    def take(self, path: str, is_sound: Callable[[str], bool]) -> bool:
        name = path.rpartition("/")[2]
        source, known = f"{self._previous}/{name}", self._files.get(name)
        stamp = self._storage.stamp(source) if self._previous else None
        if stamp is None or (known is not None and known.links >= REWRITE_AFTER):
            if known is not None and self._previous and stamp is None and self._storage.exists(source):
                self._report(source)
            return False
        if known is not None and known.stamp != stamp:
            self._report(source)
            return False
        links = known.links + 1 if known is not None else 1
        if known is None or links % CHECK_AFTER == 0:
            try:
                if not is_sound(source):
                    raise CheckpointCorrupt(f"{source} is damaged")
            except (EngineError, FileNotFoundError):
                self._report(source)
                return False
        if not self._storage.link(source, path):
            return False
        self._files[name] = _File(stamp, links)
        if self._storage.stamp(path) != stamp:  # replaced since it was looked at
            self._storage.remove(path)
            return False
        return True

    def wrote(self, path: str) -> None:
        self._files[path.rpartition("/")[2]] = _File(self._storage.stamp(path))

    def _report(self, source: str) -> None:
        logger.warning(
            "%s/%s HAS CHANGED since it was written: it is written again for this step, but steps before that share it cannot be loaded. "
            "`engine verify` says which; look at the disk, and at who else writes there", self._storage.root, source,
        )  # fmt: skip


class Scribe:
    """What becomes of one rank's saves on storage, in this order: files, commit on rank 0, tidying. Used by the writer process, and by the
    trainer itself where a save is synchronous. What a lost lease makes impossible is a :class:`StorageError` that says so."""

    def __init__(self, storage: Storage, settings: Settings) -> None:
        self._storage, self._config = storage, settings.config
        self._tidying = catalog.Tidying(storage, Retention(*settings.retention))
        self._files = dict[str, _File]()
        self._layout: ShardLayout | None = None
        self._digests: dict[int, bytes] = {}

    def take(self) -> str:
        """On rank 0: take the run for this job; returns the lease's name."""
        return catalog.lease.take(self._storage)

    def write(self, attempt: str, layout: ShardLayout, images: Images, record: bytes, previous: str = "") -> Written:
        """This rank's files, durable. ``previous``: the step whose files may be linked, if any."""
        with self._held(attempt):
            self._storage.claim_folder(attempt)
            written = write_shards(self._storage, attempt, layout, images, record, _Links(self._storage, previous, self._files))
        changed = [t for t, found in written.digests.items() if self._digests.get(t) != found] if self._layout is layout else []
        self._layout, self._digests = layout, written.digests
        return replace(written, digests={}, changed=tuple(changed))

    def commit(self, attempt: str, manifest: Manifest, wandb_run_id: str) -> None:
        """On rank 0, when all ranks have written."""
        with self._held(attempt):
            write_run_file(self._storage, self._config, attempt.partition("/")[0], wandb_run_id)
            commit_attempt(self._storage, attempt, manifest)

    def settle(self, attempt: str) -> bool:
        """On rank 0, after a failure: make sure that an attempt is a step, with ``latest`` at it, or can never be one."""
        return catalog.settle(self._storage, attempt)

    def tidy(self, summary: Summary) -> None:
        """On rank 0, after a commit."""
        with self._held(summary.attempt):
            self._tidying.after(summary)

    def _held(self, attempt: str) -> AbstractContextManager[None]:
        return catalog.lease.held(self._storage, attempt.partition("/")[0])


class Server:
    """Carries out a trainer's orders, one after another."""

    def __init__(self, channel: Channel, settings: Settings) -> None:
        self._channel = channel
        self._scribe = Scribe(_Storage(settings.root, channel), settings)
        self._plan: Plan | None = None
        self._images: dict[int, memoryview] = {}

    def serve(self) -> None:
        while True:
            order = self._channel.receive(Order)
            if isinstance(order, Plan):
                self._plan = order
            elif isinstance(order, UseImage):
                self._use(order)
            else:
                self._answer(order)

    def _use(self, order: UseImage) -> None:
        fd = self._channel.receive_fd()
        try:
            self._images[order.slot] = memoryview(mmap.mmap(fd, order.size_bytes, prot=mmap.PROT_READ))
        finally:
            os.close(fd)

    def _answer(self, order: Take | Write | Commit | Tidy | Settle) -> None:
        try:
            answer = Done(self._carry_out(order))
        except Exception as e:  # noqa: BLE001 - whatever it is, the trainer must hear of it
            answer = Failed(type(e).__name__, str(e), traceback.format_exc())
        self._channel.send(answer)

    def _carry_out(self, order: Take | Write | Commit | Tidy | Settle) -> Written | str | bool | None:
        if isinstance(order, Take):
            return self._scribe.take()
        if isinstance(order, Settle):
            return self._scribe.settle(order.attempt)
        if isinstance(order, Tidy):
            return self._scribe.tidy(order.summary)
        plan = self._plan
        assert plan is not None
        if isinstance(order, Commit):
            manifest = Manifest(order.summary, plan.tensors, plan.aliases, order.indexes, order.record)
            return self._scribe.commit(order.attempt, manifest, order.wandb_run_id)
        memory = self._images[order.slot][: places(plan.layout)[-1]]
        return self._scribe.write(order.attempt, plan.layout, MemoryImages(memory, plan.layout), order.record, order.previous)


def main(fd: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the trainer, which decides what is still saved
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    channel = Channel(socket.socket(fileno=fd))
    root = logging.getLogger("engine")
    root.addHandler(_Told(channel))
    root.setLevel(logging.INFO)
    try:
        Server(channel, channel.receive(Settings)).serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
