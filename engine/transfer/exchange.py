"""Exchange: each home reads and verifies its blocks once, and sends every other rank what it needs of them.

In rounds of bounded size, in which all ranks take part to the end, so that a rank that fails does not leave the others waiting: it
says so in the next round, which is then everyone's last.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from msgspec import Struct

from engine.errors import PeerError
from engine.plan.exchange import Round, cells, overlaps, quota
from engine.plan.reads import Cut, Need, Slice, runs, slices
from engine.state.boxes import Box, whole
from engine.state.shard import bytes_of
from engine.transfer.read import Asked, Direct, File, FileReader, Reads, read_buffer, unpack

T = TypeVar("T")

_MORE, _DONE, _FAILED = 0, 1, 2

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")

_Inner = tuple[tuple[int, ...], tuple[int, ...]]
_Parcels = list[list[torch.Tensor]]
"""Bytes in pieces, one list a rank."""


class _Ask(Struct, frozen=True, array_like=True):
    """What one rank needs of a home: by file the chunks' numbers, each with the box inside it (None for all of it), in the order in
    which it wants to be served. ``quota_bytes`` at a time."""

    quota_bytes: int
    files: list[tuple[File, list[tuple[int, _Inner | None]]]]


@contextlib.contextmanager
def process_group(timeout_seconds: float) -> Iterator[Any]:
    """A group of all ranks for one load: of gloo, whatever training uses. Every rank enters it, in the same order as other groups."""
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def exchange(reads: Reads, group: Any) -> int:
    """Fill this rank's targets, and serve the others; returns the bytes that this rank read. Every rank calls this, once a load.

    Raises :class:`CheckpointCorrupt` for what this rank read, naming file, tensor and writing rank, and :class:`PeerError` if the
    others are not heard of within the group's timeout. Where another rank has failed it returns early: that rank raises, and the
    caller must make it everyone's error.
    """
    return _Exchange(reads, _Channel(reads.rank, reads.world_size, group)).run()


class _Exchange:
    def __init__(self, reads: Reads, channel: "_Channel") -> None:
        self._reads, self._channel = reads, channel
        self._failure: Exception | None = None
        self._own: list[tuple[File, Direct, list[list[Slice]]]] = []
        self._bytes_read = 0

    def run(self) -> int:
        asked = self._reads.asked()
        rounds = self._rounds(self._tell(asked))
        streams = {home: self._expected(home, files) for home, files in asked.items() if home != self._reads.rank}
        arriving: _Arriving | None = None
        while True:
            parcels = self._next(rounds)  # read while the last ones travel
            if arriving is not None:
                self._take(arriving, streams)
            status = _FAILED if self._failure else _DONE if parcels is None else _MORE
            parcels = parcels or [[] for _ in range(self._reads.world_size)]
            sizes, statuses = self._channel.announce(parcels, status)
            if _FAILED in statuses:
                break
            if _MORE not in statuses:
                self._check_end(streams)
                self._read_own()
                break
            arriving = self._channel.send(parcels, sizes)
        if self._failure:
            raise self._failure
        return self._bytes_read

    def _tell(self, asked: dict[int, dict[File, list[Need]]]) -> list[_Ask]:
        """Ask every home; returns what this one is asked, by rank."""
        rank, limit = self._reads.rank, quota(home for home in asked if home != self._reads.rank)
        asks = [
            _Ask(limit, [(file, [_told(need) for need in needs]) for file, needs in asked.get(home, {}).items()])
            for home in range(self._reads.world_size)
        ]
        asks[rank] = _Ask(0, [])
        letters = [[torch.frombuffer(bytearray(msgspec.msgpack.encode(ask)), dtype=torch.uint8)] for ask in asks]
        sizes, _ = self._channel.announce(letters, _MORE)
        return [msgspec.msgpack.decode(bytes(bytes_of(letter)), type=_Ask) for letter in self._channel.send(letters, sizes).wait()]

    def _next(self, rounds: Iterator[_Parcels]) -> _Parcels | None:
        try:
            return None if self._failure else next(rounds, None)
        except Exception as e:  # noqa: BLE001 - whatever it is, the others must learn of it
            self._failure = e
            return None

    def _rounds(self, theirs: Sequence[_Ask]) -> Iterator[_Parcels]:
        """What goes to each rank, a round at a time."""
        quotas = [ask.quota_bytes for ask in theirs]
        now, parcels = Round(quotas), [list[torch.Tensor]() for _ in theirs]
        for requester, data in self._items(theirs):
            if not now.fits(requester, data.numel()):
                yield parcels
                now, parcels = Round(quotas), [[] for _ in theirs]
            now.add(requester, data.numel())
            parcels[requester].append(data)
        if now.total:
            yield parcels

    def _items(self, theirs: Sequence[_Ask]) -> Iterator[tuple[int, torch.Tensor]]:
        """Read all of which this rank is the home; yields (requester, bytes) in file order. Runs that only this rank needs are left for
        the end: nobody waits for them."""
        reads, buffer = self._reads, read_buffer()
        for file, needs in sorted(self._needs(theirs).items()):
            with FileReader(reads, file, buffer) as reader:
                direct, gathered = reader.split(slices(needs, self._cells(reads.rank, file)))
                by_others: dict[bool, list[list[Slice]]] = {True: [], False: []}
                for run in runs(gathered):
                    by_others[any(isinstance(need, Asked) for piece in run for need in piece.needs)].append(run)
                self._own.append((file, direct, by_others[False]))
                for run in by_others[True]:
                    reader.read(run)
                    reader.take(run)
                    for piece in run:
                        for need in piece.needs:
                            if isinstance(need, Asked):
                                yield need.requester, reader.packed(run, piece, need)
            self._bytes_read += reader.bytes_read

    def _cells(self, home: int, file: File) -> Callable[[Need], Cut]:
        return lambda need: cells(self._reads.shares(file, need), home)

    def _needs(self, theirs: Sequence[_Ask]) -> dict[File, list[Need]]:
        """Own and others' of files that this rank is a home of."""
        stored, rank = self._reads.stored, self._reads.rank
        found = {file: list(needs) for file, needs in self._reads.by_file.items() if rank in self._reads.homes.of_writer(file[0])}
        for requester, ask in enumerate(theirs):
            for file, chunks in ask.files:
                index, into = stored.index(file[0]), found.setdefault(file, [])
                for number, inner in chunks:
                    chunk = index.chunk(number)
                    box = Box(*inner) if inner else whole(chunk.sizes)
                    dtype = stored.manifest.tensors[chunk.tensor].dtype
                    into.append(Asked(-1, number, chunk.sizes, box, dtype, chunk.offset, chunk.nbytes, requester))
        return found

    def _expected(self, home: int, files: dict[File, list[Need]]) -> Iterator[tuple[Slice, Need]]:
        """What a home sends here, in its order."""
        for file, needs in files.items():
            for piece in slices(needs, self._cells(home, file)):
                for need in piece.needs:
                    yield piece, need

    def _take(self, arriving: "_Arriving", streams: dict[int, Iterator[tuple[Slice, Need]]]) -> None:
        try:
            for home, parcel in enumerate(arriving.wait()):
                left = parcel
                while left.numel():
                    piece, need = next(streams[home])
                    left = unpack(left, piece, need, self._reads.targets[need.item])
        except PeerError:
            raise
        except Exception as e:  # noqa: BLE001 - as above
            self._failure = self._failure or e

    def _check_end(self, streams: dict[int, Iterator[tuple[Slice, Need]]]) -> None:
        for home, stream in streams.items():
            if any(True for piece, need in stream if any(True for _ in overlaps(piece, need))):
                self._failure = PeerError(f"rank {home} did not send rank {self._reads.rank} all that it needs; do all ranks run the same version?")

    def _read_own(self) -> None:
        buffer = read_buffer()
        for file, direct, own in self._own:
            if direct or own:
                with FileReader(self._reads, file, buffer) as reader:
                    for run in own:
                        reader.read(run)
                        reader.take(run)
                    reader.read_direct(direct)
                self._bytes_read += reader.bytes_read


def _told(need: Need) -> tuple[int, _Inner | None]:
    return need.chunk, None if need.inner.sizes == need.sizes else (need.inner.offsets, need.inner.sizes)


def _sizes(parcels: _Parcels) -> list[int]:
    return [sum(item.numel() for item in parcel) for parcel in parcels]


class _Channel:
    """All-to-all of bytes. Raises :class:`PeerError` when a rank is lost."""

    def __init__(self, rank: int, world_size: int, group: Any) -> None:
        self._rank, self._world_size, self._group = rank, world_size, group

    def announce(self, parcels: _Parcels, status: int) -> tuple[list[int], list[int]]:
        """Tell every rank how much it will be sent; returns how much each will send here, and their statuses."""
        mine, others = (
            torch.tensor([[size, status] for size in _sizes(parcels)], device="cpu"),
            torch.empty((self._world_size, 2), dtype=torch.int64, device="cpu"),
        )
        self.told(lambda: dist.all_to_all_single(others, mine, group=self._group))
        return others[:, 0].tolist(), others[:, 1].tolist()

    def send(self, parcels: _Parcels, sizes: list[int]) -> "_Arriving":
        """``sizes``: of the parcels that arrive."""
        sent, received = torch.cat([_NOTHING, *chain.from_iterable(parcels)]), torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        work = self.told(lambda: dist.all_to_all_single(received, sent, sizes, _sizes(parcels), group=self._group, async_op=True))
        return _Arriving(self, work, sent, received, sizes)

    def told(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except RuntimeError as e:
            raise PeerError(
                f"rank {self._rank} lost another rank while they exchanged what they read; look at the logs for a crash or a hang ({e})"
            ) from e


@dataclass
class _Arriving:
    """Parcels on their way. ``sent`` must live until they are there."""

    channel: _Channel
    work: Any
    sent: torch.Tensor
    received: torch.Tensor
    sizes: list[int]

    def wait(self) -> list[torch.Tensor]:
        self.channel.told(self.work.wait)
        return list(self.received.split(self.sizes))
