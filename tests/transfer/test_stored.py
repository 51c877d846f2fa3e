"""A committed step is hostile input: forged with right checksums, it is refused before anything is read, allocated or filled."""

import os
import resource

import pytest

from engine import Checkpointer
from engine.errors import CheckpointCorrupt, CheckpointNotFound, EngineError
from engine.storage import LocalStorage
from engine.transfer.stored import StoredCheckpoint
from tests.tiny import forge, make, same, save, state


@pytest.fixture
def step(tmp_path):
    return save(tmp_path / "run")


def _chunk(data, number=0):
    """A chunk as a list, in the order of :class:`engine.format.manifest.Chunk`'s fields."""
    data["chunks"] = [list(chunk) for chunk in data["chunks"]]
    return data["chunks"][number]


def _last(data):
    """The chunk at the end of the file."""
    offsets = [chunk[_OFFSET] for chunk in data["chunks"]]
    return _chunk(data, offsets.index(max(offsets)))


def _drop_last(data):
    last = _last(data)
    data["chunks"] = [chunk for chunk in data["chunks"] if chunk is not last]


def _file(data):
    data["files"] = [list(file) for file in data["files"]]
    return data["files"][0]


def _tensor(data, number=0):
    data["tensors"] = [list(tensor) for tensor in data["tensors"]]
    return data["tensors"][number]


def _set(get, field, value):
    def change(data):
        target = get(data)
        target[field] = value(target[field]) if callable(value) else value

    return change


def _part(layout):
    return ((layout, (), ()),)


_NAME, _DTYPE, _SHAPE, _PARTS = range(4)
MANIFESTS = {
    "no ranks": (_set(lambda d: d, "world_size", 0), "for a world size of 0"),
    "more ranks": (_set(lambda d: d, "world_size", 10**9), "1 rank indexes for a world size of 1000000000"),
    "negative ranks": (_set(lambda d: d, "world_size", -1), "for a world size of -1"),
    "twice": (lambda d: d.update(tensors=[*d["tensors"], d["tensors"][0]]), "listed twice"),
    "dtype": (_set(_tensor, _DTYPE, "F33"), "has dtype F33"),
    "negative shape": (_set(_tensor, _SHAPE, (-3, -4)), r"shape \[-3, -4\]"),
    "dimensions": (_set(_tensor, _SHAPE, (1,) * 65), "shape"),
    "no parts": (_set(_tensor, _PARTS, ()), "cover 0 of 12"),
    "half a part": (_set(_tensor, _PARTS, ((("grid", ((1,), ()), (-1,), 0), (0, 0), (2, 4)),)), "cover 8 of 12"),
    "overlap": (_set(_tensor, _PARTS, ((("grid", ((1,), ()), (-1,), 0), (0, 0), (3, 4)),) * 2), "overlap"),
    "other rank": (_set(_tensor, _PARTS, _part(("grid", ((1,), (3,)), (-1,), 0))), "ranks that a world size of 1 does not have"),
    "rank -1": (_set(_tensor, _PARTS, _part(("grid", ((1,), (-1,)), (-1,), 0))), "ranks that a world size of 1 does not have"),
    "huge mesh": (_set(_tensor, _PARTS, _part(("grid", ((2**31, 2**31), ()), (0, 1), 0))), "ranks that a world size of 1 does not have"),
    "empty mesh": (_set(_tensor, _PARTS, _part(("grid", ((0,), ()), (0,), 0))), "mesh of shape"),
    "no chunk": (_set(_tensor, _PARTS, _part(("flat", ((1,), ()), 0, 0))), "do not fit"),
    "negative start": (_set(_tensor, _PARTS, _part(("flat", ((1,), ()), -4, 12))), "do not fit"),
    "writer": (_set(_tensor, _PARTS, _part(("grid", ((1,), ()), (-1,), 7))), "writer 7"),
    "cut dimension": (_set(_tensor, _PARTS, _part(("grid", ((1,), ()), (9,), 0))), "cannot cut"),
    "stray offsets": (_set(_tensor, _PARTS, ((("grid", ((1,), ()), (-1,), 0), (5,), ()),)), "offsets"),
}
_TENSOR, _OFFSETS, _SIZES, _FILE, _OFFSET, _NBYTES, _DIGESTS = range(7)
INDEXES = {
    "rank": (_set(lambda d: d, "rank", 1), "belongs to rank 1"),
    "no tensor": (_set(_chunk, _TENSOR, 999), "of none of the"),
    "tensor -1": (_set(_chunk, _TENSOR, -1), "of none of the"),
    "no file": (_set(_last, _FILE, 1), "in file 1 of 1"),
    "file -1": (_set(_chunk, _FILE, -1), "in file -1 of 1"),
    "dimensions": (_set(_chunk, _SIZES, (12,)), "has 1 dimensions"),
    "offsets": (_set(_chunk, _OFFSETS, (0,)), "dimensions"),
    "outside": (_set(_chunk, _OFFSETS, (1, 0)), "lies outside"),
    "negative": (_set(_chunk, _OFFSETS, (-1, 0)), "lies outside"),
    "huge": (_set(_chunk, _SIZES, (2**40, 2**40)), "lies outside"),
    "bytes": (_set(_chunk, _NBYTES, lambda n: n + 4), "bytes for 12 elements"),
    "overlap": (_set(lambda d: _chunk(d, 1), _OFFSET, 4096), "overlaps another or lies outside"),
    "hole": (_set(_chunk, _OFFSET, lambda o: o + 4), "overlaps another or lies outside"),
    "header": (_set(_chunk, _OFFSET, 0), "overlaps another or lies outside"),
    "negative offset": (_set(_chunk, _OFFSET, -4096), "overlaps another or lies outside"),
    "past the end": (_set(_chunk, _OFFSET, 2**60), "overlaps another or lies outside"),
    "digest length": (_set(_chunk, _DIGESTS, lambda d: d[:-1]), "block checksums"),
    "more digests": (_set(_chunk, _DIGESTS, lambda d: d * 2), "block checksums"),
    "no digests": (_set(_chunk, _DIGESTS, b""), "block checksums"),
    "size": (_set(_file, 1, lambda n: n + 4096), "its chunks end at"),
    "header size": (_set(_file, 2, 0), "it refers to a file"),
    "negative header": (_set(_file, 2, -8), "it refers to a file"),
    "huge header": (_set(_file, 2, 2**60), "it refers to a file"),
    "missing chunk": (_drop_last, "its chunks end at"),
}
NAMES = [
    "../../secret.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..",
    "",
    ".hidden.safetensors",
    "x\0.safetensors",
    "manifest",
    "x.safetensors\n",
    "a\\b.safetensors é",
]


def _refused(step, told, where):
    model = make(seed=1)
    before = state(model)
    checkpointer = Checkpointer(step.parent, model)
    with pytest.raises(CheckpointCorrupt, match=told) as error:
        checkpointer.resume("latest")
    assert str(step / where) in str(error.value)
    assert same(state(model), before), "live state has changed"


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_forged_manifest_is_refused(step, case):
    change, told = MANIFESTS[case]
    forge(step, manifest=change)
    _refused(step, told, "manifest")


@pytest.mark.parametrize("case", INDEXES)
def test_a_forged_index_is_refused(step, case):
    change, told = INDEXES[case]
    forge(step, index=change)
    _refused(step, told, "rank_00000.index")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_name_that_is_not_plain_is_refused(step, name):
    forge(step, index=_set(_file, 0, name))
    _refused(step, "it refers to a file named", "rank_00000.index")


def test_forging_without_a_change_is_accepted(step):
    """So that the refusals above are for what was forged."""
    forge(step, manifest=lambda d: None, index=lambda d: None)
    model = make(seed=1)
    Checkpointer(step.parent, model).resume("latest")
    assert same(state(model), state(make(seed=0)))


def test_a_chunk_of_other_sizes_than_the_layout_gives_is_refused(step):
    """Two half boxes where one whole box is declared: each fits its tensor, but what is asked for is in neither."""

    def halve(data):
        chunk = _chunk(data)
        assert tuple(chunk[_SIZES]) == (3, 4)
        rest = list(chunk)
        chunk[_SIZES], chunk[_NBYTES] = (1, 4), 16
        rest[_OFFSETS], rest[_SIZES], rest[_OFFSET], rest[_NBYTES] = (1, 0), (2, 4), chunk[_OFFSET] + 16, 32
        data["chunks"].append(rest)

    forge(step, index=halve)
    model = make(seed=1)
    with pytest.raises(CheckpointCorrupt, match=r"model\.0\.weight at \[0, 0\] has sizes \[1, 4\]"):
        Checkpointer(step.parent, model).resume("latest")


def test_a_chunk_that_the_layout_promises_but_the_index_lacks_is_refused(step):
    def move(data):
        first = next(i for i, chunk in enumerate(data["chunks"]) if len(chunk[_SIZES]) == 1)
        chunk = _chunk(data, first)
        chunk[_TENSOR] = next(c[_TENSOR] for c in data["chunks"] if c[_TENSOR] != chunk[_TENSOR] and c[_SIZES] == chunk[_SIZES])

    forge(step, index=move)
    with pytest.raises(CheckpointCorrupt, match=r"should be there by the manifest, but is not"):
        Checkpointer(step.parent, make(seed=1)).resume("latest")


def test_a_shard_that_is_a_link_or_a_pipe_is_refused(step):
    path = step / "rank_00000.0.safetensors"
    os.rename(path, step / "elsewhere")
    os.symlink("elsewhere", path)
    _refused(step, "is a symbolic link", path.name)
    path.unlink()
    os.mkfifo(path)
    _refused(step, "is not a regular file", path.name)


@pytest.mark.parametrize("name", ["manifest", "rank_00000.index"])
def test_a_sparse_file_of_a_terabyte_is_refused_unread(step, name):
    os.truncate(step / name, 2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _refused(step, f"has {2**40} bytes, at most", name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_sparse_shard_of_a_terabyte_is_refused_unread(step):
    path = step / "rank_00000.0.safetensors"
    os.truncate(path, 2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _refused(step, f"has {2**40} bytes, {'[0-9]+'} expected", path.name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointNotFound, match="holds no checkpoint: it has no file 'manifest'"):
        StoredCheckpoint(LocalStorage(tmp_path), "")


def test_an_index_is_read_once_and_only_on_demand(step, monkeypatch):
    read = []
    real = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, path, limit: read.append(path) or real(self, path, limit))
    stored = StoredCheckpoint(LocalStorage(step.parent), step.name)
    assert read == [f"{step.name}/manifest"]
    stored.index(0)
    stored.index(0)
    assert read == [f"{step.name}/manifest", f"{step.name}/rank_00000.index"]


@pytest.mark.parametrize("name", ["manifest", "rank_00000.index"])
def test_a_flip_of_any_byte_is_refused(step, name):
    data = (step / name).read_bytes()
    storage = LocalStorage(step.parent)
    StoredCheckpoint(storage, step.name).index(0)
    for position in range(0, len(data), 7 if len(data) > 4000 else 1):
        broken = bytearray(data)
        broken[position] ^= 0x10
        (step / name).write_bytes(broken)
        with pytest.raises(EngineError, match=name):
            StoredCheckpoint(storage, step.name).index(0)
