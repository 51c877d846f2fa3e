"""Scan: every byte of a shard file against its checksums, several pieces at once.

Threads, not processes: reading releases the interpreter's lock, and one thread digests faster than disks deliver.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from types import TracebackType
from typing import NamedTuple

from engine.errors import EngineError
from engine.format.checksum import BLOCK_BYTES, DIGEST_BYTES, block_count, digest
from engine.format.manifest import Chunk
from engine.storage import Storage

WINDOW_BYTES = 1024 * 1024
"""What is read at once: digested while it is in the processor's cache."""
PIECE_BYTES = 64 * 1024 * 1024
"""What one thread takes at once."""
THREADS = 8


class Block(NamedTuple):
    """The bytes from ``begin`` to ``end`` of a file, of ``chunk``, and their checksum."""

    begin: int
    end: int
    digest: bytes
    chunk: Chunk


class Bad(NamedTuple):
    """Bytes that are not what was written. ``why`` continues the sentence "bytes … to …"."""

    chunk: Chunk
    begin: int
    end: int
    why: str


Piece = Sequence[tuple[Chunk, int, int]]
"""Runs of blocks, from a first to before another, of chunks in the order of their file."""


def pieces(chunks: Iterable[Chunk]) -> Iterator[Piece]:
    """The blocks of one file's chunks, in pieces of about ``PIECE_BYTES``."""
    piece: list[tuple[Chunk, int, int]] = []
    total, most = 0, PIECE_BYTES // BLOCK_BYTES
    for chunk in sorted(chunks, key=lambda c: (c.offset, c.nbytes)):
        blocks = block_count(chunk.nbytes)
        for first in range(0, blocks, most):
            piece.append((chunk, first, min(first + most, blocks)))
            total += min(PIECE_BYTES, chunk.nbytes - first * BLOCK_BYTES)
            if total >= PIECE_BYTES:
                yield piece
                piece, total = [], 0
    if piece:
        yield piece


def scan(storage: Storage, path: str, piece: Piece) -> list[Bad]:
    """What of a piece is not as its checksums say."""
    bad: list[Bad] = []
    buffer = memoryview(bytearray(WINDOW_BYTES))
    try:
        opened = closing(storage.open(path))
    except (EngineError, FileNotFoundError) as e:  # it was there a moment ago
        return [Bad(block.chunk, block.begin, block.end, f"are lost: {e}") for block in _blocks(piece)]
    with opened as reader:
        for window in _windows(_blocks(piece)):
            begin = window[0].begin
            have = max(0, min(window[-1].end, reader.size_bytes) - begin)
            try:
                reader.read_into(begin, buffer[:have])
            except EngineError as e:
                bad += [Bad(block.chunk, block.begin, block.end, f"are lost: {e}") for block in window]
                continue
            for block in window:
                if block.end - begin > have:
                    bad.append(Bad(block.chunk, block.begin, block.end, "are not in the file, at least in part"))
                elif digest(buffer[block.begin - begin : block.end - begin]) != block.digest:
                    bad.append(Bad(block.chunk, block.begin, block.end, "have changed since they were written"))
    return bad


def _blocks(piece: Piece) -> Iterator[Block]:
    for chunk, first, stop in piece:
        end = chunk.offset + chunk.nbytes
        for block in range(first, stop):
            begin = chunk.offset + block * BLOCK_BYTES
            yield Block(begin, min(begin + BLOCK_BYTES, end), chunk.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES], chunk)


def _windows(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Blocks that are read at once."""
    window: list[Block] = []
    for block in blocks:
        if window and (block.begin != window[-1].end or block.end - window[0].begin > WINDOW_BYTES):
            yield window
            window = []
        window.append(block)
    if window:
        yield window


class Scans:
    """Scans under way on threads. ``done`` is called here, not on them, with each piece's size and what is wrong with it."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pool = ThreadPoolExecutor(THREADS, "verify")
        self._running: dict[Future[list[Bad]], tuple[int, Callable[[int, list[Bad]], None]]] = {}

    def __enter__(self) -> "Scans":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            while self._running and error is None:
                self._take()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def start(self, path: str, chunks: Iterable[Chunk], done: Callable[[int, list[Bad]], None]) -> None:
        """Waits while enough is under way, so that no more than that is kept in memory."""
        for piece in pieces(chunks):
            size_bytes = sum(min(stop * BLOCK_BYTES, chunk.nbytes) - first * BLOCK_BYTES for chunk, first, stop in piece)
            self._running[self._pool.submit(scan, self._storage, path, piece)] = size_bytes, done
            while len(self._running) >= 2 * THREADS:
                self._take()

    def _take(self) -> None:
        finished, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for future in finished:
            size_bytes, done = self._running.pop(future)
            done(size_bytes, future.result())
