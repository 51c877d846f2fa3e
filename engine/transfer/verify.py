"""Verify: every byte of a committed step, and everything that its files say about each other. All problems, not only the first."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError
from engine.format.checksum import digest
from engine.format.layout import Absent, LogicalTensor
from engine.format.manifest import MANIFEST, Chunk, FileEntry
from engine.format.names import parse_step
from engine.format.record import decode_record
from engine.format.safetensors import Entry, as_stored, decode_header
from engine.format.tiling import Tiling
from engine.state.boxes import part_box, whole
from engine.storage import Reader, Storage
from engine.transfer.promised import CHUNK_BYTES, Boxes, Promised
from engine.transfer.scan import Bad, Scans
from engine.transfer.stored import StoredCheckpoint, StoredIndex


class Problem(Struct, frozen=True):
    """One thing that is wrong. ``rank`` wrote ``file``; ``tensor`` is affected; ``begin`` and ``end`` are bytes of ``file``, of which
    0 and 0 say nothing; ``shared_with``: other steps whose folders have the same file, by hard links."""

    file: str
    what: str
    rank: int | None = None
    tensor: str = ""
    begin: int = 0
    end: int = 0
    shared_with: tuple[str, ...] = ()

    def __str__(self) -> str:
        rank = "" if self.rank is None else f" (rank {self.rank})"
        tensor = f"{self.tensor}: " if self.tensor else ""
        place = f"bytes {self.begin} to {self.end} " if self.end else ""
        shared = f"; the same file is in {', '.join(self.shared_with)}" if self.shared_with else ""
        return f"{self.file}{rank}: {tensor}{place}{self.what}{shared}"


def verify(storage: Storage, folder: str, on_bytes: Callable[[int], object] = lambda _: None) -> list[Problem]:
    """Everything that is wrong with the step in ``folder``; nothing if it is sound. ``on_bytes`` is told of bytes as they are read.

    Raises :class:`CheckpointNotFound` for a folder that is empty or not there.
    """
    present = storage.names(folder)
    if not present:
        raise CheckpointNotFound(f"{storage.root}/{folder} is not a folder with files in it")
    try:
        stored = StoredCheckpoint(storage, folder)
    except EngineError as e:
        return [Problem(MANIFEST, f"{_told(e, storage, folder)}. Nothing else can be checked without it")]
    found = _Verification(stored, on_bytes)
    found.check_manifest()
    found.check_layouts()
    with Scans(storage) as scans:
        for writer in range(len(stored.manifest.indexes)):
            found.check_rank(writer, scans)
    found.check_tiling()
    found.check_folder(present)
    return _with_links(_joined(found.problems), storage, folder)


class _Verification:
    def __init__(self, stored: StoredCheckpoint, on_bytes: Callable[[int], object]) -> None:
        self.problems: list[Problem] = []
        self._stored, self._on_bytes = stored, on_bytes
        self._tensors = stored.manifest.tensors
        self._belong = {MANIFEST}
        self._unread: list[int] = []  # ranks whose index, or a part of it, cannot be read
        self._size_bytes = 0
        self._promised: Promised | None = None
        self._tiling, self._totals, self._misplaced = Tiling(), [0] * len(self._tensors), set[int]()

    def _add(self, file: str, what: str, **more: Any) -> None:
        self.problems.append(Problem(file, what, **more))

    def check_manifest(self) -> None:
        """Envelope, checksums and rules are checked by who opens it."""
        stored, summary = self._stored, self._stored.manifest.summary
        if summary.tensors != len(self._tensors):
            self._add(MANIFEST, f"has {len(self._tensors)} tensors; its head says {summary.tensors}")
        self._check_record(stored.manifest.record, MANIFEST)
        self._on_bytes(stored.manifest_bytes)

    def _check_record(self, record: bytes, file: str, rank: int | None = None) -> None:
        try:
            decode_record(record)
        except EngineError as e:
            self._add(file, str(e), rank=rank)

    def check_layouts(self) -> None:
        """What they promise has room in the indexes that are there."""
        stored = self._stored
        sizes = [_size_of(stored.storage, stored.path(stored.manifest.index_name(writer))) for writer in range(len(stored.manifest.indexes))]
        try:
            self._promised = Promised(self._tensors, sum(filter(None, sizes)) // CHUNK_BYTES)
        except CheckpointCorrupt as e:
            if None not in sizes:  # else some are missing, as is said of each
                self._add(MANIFEST, str(e))

    def check_rank(self, rank: int, scans: Scans) -> None:
        name = self._stored.manifest.index_name(rank)
        self._belong.add(name)
        try:
            index = StoredIndex(self._stored.storage, self._stored.path(name), rank, self._stored.manifest)
        except EngineError as e:
            self._add(name, _told(e, self._stored.storage, self._stored.folder), rank=rank)
            self._unread.append(rank)
            return
        chunks, lost = self._read(index, name, rank)
        self._size_bytes += index.size_bytes
        self._on_bytes(index.size_bytes)
        self._check_boxes(name, rank, chunks, index, lost)
        by_file: list[list[Chunk]] = [[] for _ in index.files]
        for chunk in chunks:
            by_file[chunk.file].append(chunk)
        for file, own in zip(index.files, by_file, strict=True):
            if file.name in self._belong:
                self._add(file.name, "is listed in the indexes of two ranks", rank=rank)
            else:
                self._check_file(file, rank, own, not lost, scans)

    def _read(self, index: StoredIndex, name: str, rank: int) -> tuple[list[Chunk], set[int]]:
        """All chunks, and the pages that cannot be read."""
        chunks, lost = [], set[int]()
        for number, page in enumerate(index.head.pages):
            try:
                chunks += index.chunks_of(number)
            except EngineError as e:
                tensors = index.tensors_of(number)
                lost.add(number)
                begin = index.body_at + page.offset
                about = self._tensors[tensors.start].name + (f" and up to {len(tensors) - 1} more" if len(tensors) > 1 else "")
                told = _told(e, self._stored.storage, self._stored.folder)
                self._add(name, f"are the page of {about}: {told}", rank=rank, begin=begin, end=begin + page.size_bytes)
        try:
            self._check_record(index.record(), name, rank)
            index.check_body()
        except EngineError as e:
            if not lost:
                self._add(name, _told(e, self._stored.storage, self._stored.folder), rank=rank)
        if lost:
            self._unread.append(rank)
        return chunks, lost

    def _check_boxes(self, name: str, rank: int, chunks: Iterable[Chunk], index: StoredIndex, lost: set[int]) -> None:
        """The boxes in an index are those that the manifest's rules give its rank."""
        found: dict[int, Boxes] = {}
        for chunk in chunks:
            found.setdefault(chunk.tensor, []).append((chunk.offsets, chunk.sizes))
            self._totals[chunk.tensor] += self._tiling.number(chunk.offsets, chunk.sizes)
        if self._promised is None:
            return
        promised = self._promised.of(rank)
        for number in sorted(promised.keys() | found.keys()):
            boxes, listed = promised.get(number, []), found.get(number, [])
            if boxes != listed and sorted(boxes) != sorted(listed) and index.page_of(number) not in lost:
                self._misplaced.add(number)
                self._add(name, _difference(boxes, listed), rank=rank, tensor=self._tensors[number].name)

    def _check_file(self, file: FileEntry, rank: int, chunks: list[Chunk], is_all: bool, scans: Scans) -> None:
        """``is_all``: every chunk of the file is known."""
        self._belong.add(file.name)
        self._size_bytes += file.size_bytes
        path = self._stored.path(file.name)
        try:
            with closing(self._stored.storage.open(path)) as reader:
                if reader.size_bytes != file.size_bytes:
                    self._add(file.name, f"has {reader.size_bytes} bytes, {file.size_bytes} expected", rank=rank)
                told = _header_problem(reader, file, [_entry(chunk, file, self._tensors) for chunk in chunks], is_all)
            if told:
                self._add(file.name, told, rank=rank, end=file.header_bytes)
        except FileNotFoundError:
            self._add(file.name, "is missing", rank=rank)
            return
        except EngineError as e:
            self._add(file.name, _told(e, self._stored.storage, self._stored.folder), rank=rank)
            return
        self._on_bytes(file.header_bytes)
        if is_all:
            self._check_places(file, rank, chunks)

        def done(size_bytes: int, bad: Sequence[Bad]) -> None:
            self._on_bytes(size_bytes)
            for b in bad:
                self._add(file.name, b.why, rank=rank, tensor=self._tensors[b.chunk.tensor].name, begin=b.begin, end=b.end)

        if sum(chunk.nbytes for chunk in chunks) <= file.size_bytes:  # else some overlap: bytes are not read again for each
            scans.start(path, chunks, done)

    def _check_places(self, file: FileEntry, rank: int, chunks: Iterable[Chunk]) -> None:
        """Chunks fill their file: no gap, no overlap, nothing left over."""
        end = file.header_bytes
        for chunk in sorted(chunks, key=lambda c: (c.offset, c.nbytes)):
            if chunk.offset != end:
                kind = "belong to no tensor" if chunk.offset > end else "belong to two tensors"
                self._add(file.name, kind, rank=rank, begin=min(end, chunk.offset), end=max(end, chunk.offset))
            end = chunk.offset + chunk.nbytes
        if end != file.size_bytes:
            self._add(file.name, "belong to no tensor", rank=rank, begin=end, end=file.size_bytes)

    def check_tiling(self) -> None:
        """The boxes of all ranks tile each tensor: computed from the boxes alone, as a check of the rules and of what follows from them."""
        for number, (tensor, total) in enumerate(zip(self._tensors, self._totals, strict=True)):
            if self._unread or number in self._misplaced:
                continue
            absent = [part_box(tensor, part) for part in tensor.parts if isinstance(part.layout, Absent)]
            covered = total + sum(self._tiling.number(box.offsets, box.sizes) for box in absent)
            everything = whole(tensor.shape)
            if not self._tiling.same(covered, self._tiling.number(everything.offsets, everything.sizes)):
                self._add(MANIFEST, "the boxes that the ranks wrote overlap or leave gaps", tensor=tensor.name)

    def check_folder(self, present: Iterable[str]) -> None:
        for name in sorted(set(present) - self._belong):
            if self._unread:
                self._add(name, f"is in no index that can be read; those of ranks {self._unread[:16]} cannot, or not all of them")
            else:
                self._add(name, "does not belong to this step: nothing refers to it")
        if self._size_bytes != self._stored.manifest.summary.size_bytes and not self._unread:
            self._add(MANIFEST, f"says {self._stored.manifest.summary.size_bytes} bytes for indexes and shards that have {self._size_bytes}")


def _size_of(storage: Storage, path: str) -> int | None:
    """None where it cannot be opened."""
    try:
        with closing(storage.open(path)) as reader:
            return reader.size_bytes
    except (EngineError, FileNotFoundError):
        return None


def _told(error: EngineError, storage: Storage, folder: str) -> str:
    """The message without the paths that all of a step's files begin with."""
    return str(error).replace(f"{storage.root}/{folder}/" if folder else f"{storage.root}/", "")


def _difference(boxes: Boxes, listed: Boxes) -> str:
    told, expected, found = [], Counter(boxes), Counter(listed)
    for verb, rest in (("lacks", expected - found), ("has", found - expected)):
        for offsets, sizes in list(rest)[:1]:
            more = f" and {rest.total() - 1} more" if rest.total() > 1 else ""
            told.append(f"{verb} the box at {list(offsets)} of {list(sizes)}{more}")
    return f"{', '.join(told)}; its layout says otherwise"


def _entry(chunk: Chunk, file: FileEntry, tensors: Sequence[LogicalTensor]) -> Entry:
    tensor = tensors[chunk.tensor]
    return as_stored(Entry(tensor.name, tensor.dtype, chunk.offsets, chunk.sizes, chunk.offset - file.header_bytes, chunk.nbytes))


def _header_problem(reader: Reader, file: FileEntry, expected: Sequence[Entry], is_all: bool) -> str:
    """ "": the header is the one that was written, and says what the index says."""
    header = bytearray(min(file.header_bytes, reader.size_bytes))
    reader.read_into(0, memoryview(header))
    if digest(header) != file.header_digest:
        return "are its header, which has changed since it was written"
    try:
        entries = {entry.name: entry for entry in decode_header(bytes(header), file.name)}
    except EngineError as e:
        return f"are its header: {e}"
    for entry in expected:
        if entries.pop(entry.name, None) != entry:
            return f"are its header, which has not {entry.name} as the index has it"
    return f"are its header, which has {min(entries)} beside what the index has" if entries and is_all else ""


def _joined(problems: Iterable[Problem]) -> list[Problem]:
    """By file and place, neighbouring bytes of one tensor as one."""
    joined: list[Problem] = []
    for p in sorted(problems, key=lambda p: (p.file, p.begin, p.tensor, p.end)):
        last = joined[-1] if joined else None
        if last and p.begin and (last.file, last.tensor, last.what, last.rank, last.end) == (p.file, p.tensor, p.what, p.rank, p.begin):
            joined[-1] = replace(last, end=p.end)
        else:
            joined.append(p)
    return joined


def _with_links(problems: list[Problem], storage: Storage, folder: str) -> list[Problem]:
    """Names the other steps that have the same file, not a copy of it: they have the same problem."""
    names = {problem.file for problem in problems} if folder else ()
    linked = {found: name for name in names if (found := _identity(f"{storage.root}/{folder}/{name}")) is not None and found[1] > 1}
    shared: dict[str, set[str]] = {}
    for other in storage.names("") if linked else ():
        if parse_step(other) is not None and other != folder:
            for found in (_identity(f"{storage.root}/{other}/{name}") for name in storage.names(other)):
                if found in linked:
                    shared.setdefault(linked[found], set()).add(other)
    return [replace(p, shared_with=tuple(sorted(shared.get(p.file, ())))) for p in problems]


def _identity(path: str) -> tuple[tuple[int, int], int] | None:
    """What tells hard links of one file, and how many there are."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino), found.st_nlink
