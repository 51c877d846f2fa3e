"""The writer process of one rank: it writes, checksums, commits and tidies, off the training path. No torch.

Started by :class:`engine.transfer.process.WriterProcess`, which calls :func:`main`; ends when that socket closes.
"""

import logging
import mmap
import os
import signal
import socket
import traceback
from collections import Counter
from typing import Any

from msgspec.structs import replace

from engine import catalog
from engine.catalog import Retention
from engine.format.manifest import Manifest, Summary
from engine.format.names import step_name
from engine.plan.image import ShardLayout
from engine.storage import LocalStorage, Storage, Writer
from engine.transfer.commit import abort_attempt, commit_attempt
from engine.transfer.process import Abort, Alive, Channel, Commit, Done, Failed, Log, Order, Plan, Settings, Tidy, UseImage, Write
from engine.transfer.write import Images, MemoryImages, Written, places, write_shards

REWRITE_AFTER = 20
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

    def remove_folder(self, path: str) -> None:
        super().remove_folder(path)
        self._channel.send(Alive())


class _Told(logging.Handler):
    """What is logged here is the trainer's to tell."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(Log(record.levelno, record.getMessage()))


class _Links:
    """Content of the step before, by its name, which says what it is. A file that has been linked :data:`REWRITE_AFTER` times is written
    anew: where it has gone bad, an older step that shares it is no remedy."""

    def __init__(self, storage: Storage, previous: str, links: Counter[str]) -> None:
        self._storage, self._previous, self._links = storage, previous, links

    def take(self, path: str) -> bool:
        name = path.rpartition("/")[2]
        if not self._previous or self._links[name] >= REWRITE_AFTER or not self._storage.link(f"{self._previous}/{name}", path):
            self._links[name] = 0
            return False
        self._links[name] += 1
        return True


class Scribe:
    """What becomes of one rank's saves on storage, in this order: files, commit on rank 0, tidying. Used by the writer process, and by the
    trainer itself where a save is synchronous."""

    def __init__(self, storage: Storage, rank: int, holder: str, retention: Retention) -> None:
        self._storage, self._rank, self._holder, self._retention = storage, rank, holder, retention
        self._has_lease = False
        self._links = Counter[str]()
        self._layout: ShardLayout | None = None
        self._digests: dict[int, bytes] = {}

    def write(self, attempt: str, layout: ShardLayout, images: Images, record: bytes, previous: str = "") -> Written:
        """This rank's files, durable. ``previous``: the step whose files may be linked, if any."""
        if self._rank == 0 and not self._has_lease:
            catalog.lease.take(self._storage, self._holder)
            self._has_lease = True
        self._storage.make_folder(attempt)
        written = write_shards(self._storage, attempt, layout, images, record, _Links(self._storage, previous, self._links))
        changed = [t for t, found in written.digests.items() if self._digests.get(t) != found] if self._layout is layout else []
        self._layout, self._digests = layout, written.digests
        return replace(written, digests={}, changed=tuple(changed))

    def commit(self, attempt: str, manifest: Manifest) -> None:
        """On rank 0, when all ranks have written."""
        catalog.lease.check(self._storage, self._holder)
        commit_attempt(self._storage, attempt, manifest)

    def tidy(self, summary: Summary) -> None:
        """On rank 0, after a commit."""
        catalog.tidy(self._storage, step_name(summary.step), summary.best_step, self._retention)

    def abort(self, attempt: str) -> None:
        abort_attempt(self._storage, attempt)


class Server:
    """Carries out a trainer's orders, one after another."""

    def __init__(self, channel: Channel, settings: Settings) -> None:
        self._channel = channel
        self._scribe = Scribe(_Storage(settings.root, channel), settings.rank, settings.holder, Retention(*settings.retention))
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

    def _answer(self, order: Write | Commit | Tidy | Abort) -> None:
        try:
            answer = Done(self._carry_out(order))
        except Exception as e:  # noqa: BLE001 - whatever it is, the trainer must hear of it
            answer = Failed(type(e).__name__, str(e), traceback.format_exc())
        self._channel.send(answer)

    def _carry_out(self, order: Write | Commit | Tidy | Abort) -> Written | None:
        if isinstance(order, Abort):
            return self._scribe.abort(order.attempt)
        if isinstance(order, Tidy):
            return self._scribe.tidy(order.summary)
        plan = self._plan
        assert plan is not None
        if isinstance(order, Commit):
            return self._scribe.commit(order.attempt, Manifest(order.summary, plan.tensors, plan.aliases, order.indexes, order.record))
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
