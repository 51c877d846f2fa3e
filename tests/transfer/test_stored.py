"""A committed step is hostile input: forged with right checksums, it is refused before anything is read, allocated or filled."""

import os
import re
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import Progress
from engine.errors import CheckpointCorrupt, CheckpointNotFound
from engine.format.manifest import PAGE_CHUNKS
from engine.storage import LocalStorage
from engine.transfer.stored import StoredCheckpoint
from tests.now import Checkpointer
from tests.tiny import forge, make, same, save, state


@pytest.fixture
def step(tmp_path):
    return save(tmp_path / "run")


def _chunk(data, number=None):
    """A chunk as a list, in the order of :class:`engine.format.manifest.Chunk`'s fields; by default one of a (3, 4) weight."""
    data["chunks"] = [list(chunk) for chunk in data["chunks"]]
    return next(chunk for chunk in data["chunks"] if tuple(chunk[2]) == (3, 4)) if number is None else data["chunks"][number]


def _last(data):
    """The chunk at the end of the file."""
    offsets = [chunk[_OFFSET] for chunk in data["chunks"]]
    return _chunk(data, offsets.index(max(offsets)))


def _later(data):
    """One that has the shape and dtype of chunks before it."""
    data["chunks"] = [list(chunk) for chunk in data["chunks"]]
    first, *_, last = [chunk for chunk in data["chunks"] if tuple(chunk[2]) == (3, 4)]
    assert first is not last
    return last


def _head(data):
    return data["summary"]


def _file(data):
    data["files"] = [list(file) for file in data["files"]]
    return data["files"][0]


def _tensor(data):
    """As a list; the weight of shape (3, 4)."""
    data["tensors"] = [list(tensor) for tensor in data["tensors"]]
    return next(tensor for tensor in data["tensors"] if tensor[0] == "model.0.weight")


def _set(get, field, value):
    def change(data):
        target = get(data)
        target[field] = value(target[field]) if callable(value) else value

    return change


def _part(layout, offsets=(), sizes=(), narrow=""):
    return (layout, offsets, sizes, narrow)


def _mesh(shape, first=0, strides=(), ranks=()):
    return (shape, first, strides, ranks)


_WHOLE = ("grid", _mesh((1,)), (-1,), 0)
_NAME, _DTYPE, _SHAPE, _PARTS = range(4)
OTHER = "ranks that a world size of 1 does not have"
MESHES = {
    "other rank": (_mesh((1,), 3), OTHER),
    "listed rank": (_mesh((1,), 0, (), (3,)), OTHER),
    "rank -1": (_mesh((1,), 0, (), (-1,)), "mesh of shape"),
    "first -1": (_mesh((2,), -1), "mesh of shape"),
    "huge": (_mesh((2**31, 2**31)), OTHER),
    "2**60": (_mesh((2**60,)), OTHER),
    "60 dimensions": (_mesh((2,) * 60), OTHER),
    "65 dimensions": (_mesh((1,) * 65), "length <= 64"),
    "a million dimensions": (_mesh((1,) * 10**6), "length <= 64"),
    "empty": (_mesh((0,)), "mesh of shape"),
    "none": (_mesh(()), "mesh of shape"),
    "negative": (_mesh((-1, -1)), "mesh of shape"),
    "too few ranks": (_mesh((2,), 0, (), (0,)), "mesh of shape"),
    "a rank twice": (_mesh((2,), 0, (), (0, 0)), "mesh of shape"),
    "a million ranks": (_mesh((10**6,), 0, (), tuple(range(10**6))), OTHER),
    "one stride for two": (_mesh((1, 1), 0, (1,)), "mesh of shape"),
    "no stride": (_mesh((2,), 0, (0,)), "mesh of shape"),
    "negative stride": (_mesh((2,), 1, (-1,)), "mesh of shape"),
    "strides that do not nest": (_mesh((2, 2), 0, (1, 1)), "mesh of shape"),
    "huge strides": (_mesh((2, 2), 0, (2**62, 1)), OTHER),
}
_NAME, _DTYPE, _SHAPE, _PARTS = range(4)
MANIFESTS = {
    "no ranks": (_set(_head, "world_size", 0), "for a world size of 0"),
    "no ranks and no indexes": (lambda d: (_head(d).update(world_size=0), d.update(indexes=[])), "0 rank indexes for a world size of 0"),
    "too many ranks": (
        lambda d: (_head(d).update(world_size=2**20 + 1), d.update(indexes=[[1, b"d" * 16]] * (2**20 + 1))),
        "1048577 rank indexes for",
    ),
    "more ranks": (_set(_head, "world_size", 10**9), "1 rank indexes for a world size of 1000000000"),
    "twice": (lambda d: d.update(tensors=[*d["tensors"], d["tensors"][0]]), "listed twice"),
    "alias": (lambda d: d.update(aliases={"model.tied": "model.gone"}), "another name of model.gone, which there is not"),
    "dtype": (_set(_tensor, _DTYPE, "F33"), "has dtype F33"),
    "negative shape": (_set(_tensor, _SHAPE, (-3, -4)), r"shape \[-3, -4\]"),
    "dimensions": (_set(_tensor, _SHAPE, (1,) * 65), "length <= 64"),
    "huge shape": (_set(_tensor, _SHAPE, (2**62, 2**62)), "no tensor is that large"),
    "huge empty shape": (_set(_tensor, _SHAPE, (0, 2**62, 2**62)), "no tensor is that large"),
    "no parts": (_set(_tensor, _PARTS, ()), "cover 0 of"),
    "half a part": (_set(_tensor, _PARTS, (_part(_WHOLE, (0, 0), (2, 4)),)), "cover 8 of 12"),
    "overlap": (_set(_tensor, _PARTS, (_part(_WHOLE, (0, 0), (3, 4)),) * 2), "overlap"),
    "overlap of many": (_set(_tensor, _PARTS, (_part(_WHOLE, (0, 0), (3, 4)),) * 10**5), "its 100000 parts overlap or leave gaps"),
    "many wholes": (_set(_tensor, _PARTS, (_part(_WHOLE),) * 17), "is outside its shape"),
    "other dimensions of many": (_set(_tensor, _PARTS, (_part(_WHOLE, (0,), (3,)),) * 17), "is outside its shape"),
    "a bad rule of many": (
        _set(_tensor, _PARTS, (_part(_WHOLE, (0, 0), (3, 4)),) * 17 + (_part(("flat", _mesh((1,)), 0, 0), (0, 0), (3, 4)),)),
        "fit",
    ),
    "other dimensions": (_set(_tensor, _PARTS, (_part(_WHOLE, (0,), (3,)),)), "is outside its shape"),
    "negative part": (_set(_tensor, _PARTS, (_part(_WHOLE, (-1, 0), (3, 4)),)), "is outside its shape"),
    "stray offsets": (_set(_tensor, _PARTS, (_part(_WHOLE, (5,), ()),)), "offsets"),
    **{
        f"fill {fill}": (_set(_tensor, _PARTS, (_part(("absent", fill)),)), re.escape("to be filled with"))
        for fill in (float("nan"), float("inf"), 1e300)
    },
    "kept as a larger type": (_set(_tensor, _PARTS, (_part(_WHOLE, narrow="F64"),)), "kept as F64"),
    "kept as nothing known": (_set(_tensor, _PARTS, (_part(_WHOLE, narrow="F12"),)), "kept as F12"),
    "no chunk": (_set(_tensor, _PARTS, (_part(("flat", _mesh((1,)), 0, 0)),)), "do not fit"),
    "negative start": (_set(_tensor, _PARTS, (_part(("flat", _mesh((1,)), -4, 12)),)), "do not fit"),
    "start past the end": (_set(_tensor, _PARTS, (_part(("flat", _mesh((1,)), 2**63, 12)),)), "do not fit"),
    "negative chunk": (_set(_tensor, _PARTS, (_part(("flat", _mesh((1,)), 0, -(2**63))),)), "do not fit"),
    "writer": (_set(_tensor, _PARTS, (_part(("grid", _mesh((1,)), (-1,), 7)),)), "writer 7"),
    "cut dimension": (_set(_tensor, _PARTS, (_part(("grid", _mesh((1,)), (9,), 0)),)), "cannot cut"),
    "cut dimensions": (_set(_tensor, _PARTS, (_part(("grid", _mesh((1,)), (0, 0), 0)),)), "cannot cut"),
    **{f"mesh: {name}": (_set(_tensor, _PARTS, (_part(("grid", mesh, (-1,) * len(mesh[0]), 0)),)), told) for name, (mesh, told) in MESHES.items()},
}
_TENSOR, _OFFSETS, _SIZES, _FILE, _OFFSET, _NBYTES, _DIGESTS = range(7)
INDEXES = {
    "rank": (_set(lambda d: d, "rank", 1), "belongs to rank 1"),
    "no tensor": (_set(_chunk, _TENSOR, 999), "of none of the"),
    "tensor -1": (_set(_chunk, _TENSOR, -1), "not in the order of their tensors"),
    "no file": (_set(_last, _FILE, 1), "in file 1 of 1"),
    "file -1": (_set(_chunk, _FILE, -1), "in file -1 of 1"),
    "dimensions": (_set(_chunk, _SIZES, (12,)), "has 1 dimensions"),
    "offsets": (_set(_chunk, _OFFSETS, (0,)), "dimensions"),
    "outside": (_set(_chunk, _OFFSETS, (1, 0)), "lies outside"),
    "negative": (_set(_chunk, _OFFSETS, (-1, 0)), "lies outside"),
    "huge": (_set(_chunk, _SIZES, (2**40, 2**40)), "lies outside"),
    "bytes": (_set(_chunk, _NBYTES, lambda n: n + 4), "bytes for 12 elements"),
    "many dimensions": (_set(_chunk, _SIZES, (1,) * 65), "length <= 64"),
    "header": (_set(_chunk, _OFFSET, 0), "lies outside rank_00000.0.safetensors"),
    "negative offset": (_set(_chunk, _OFFSET, -4096), "lies outside rank_00000.0.safetensors"),
    "past the end": (_set(_chunk, _OFFSET, 2**60), "lies outside rank_00000.0.safetensors"),
    "header, after its like": (_set(_later, _OFFSET, 0), "lies outside rank_00000.0.safetensors"),
    "past the end, after its like": (_set(_later, _OFFSET, 2**60), "lies outside rank_00000.0.safetensors"),
    "no file, after its like": (_set(_later, _FILE, 1), "in file 1 of 1"),
    "twice": (lambda d: d.update(chunks=[*d["chunks"], d["chunks"][0]]), "listed twice"),
    "digest length": (_set(_chunk, _DIGESTS, lambda d: d[:-1]), "block checksums"),
    "more digests": (_set(_chunk, _DIGESTS, lambda d: d * 2), "block checksums"),
    "no digests": (_set(_chunk, _DIGESTS, b""), "block checksums"),
    "a file twice": (lambda d: d.update(files=[*d["files"], d["files"][0]]), "a file is listed twice"),
    "header size": (_set(_file, 2, 0), "it refers to a file"),
    "negative header": (_set(_file, 2, -8), "it refers to a file"),
    "huge header": (_set(_file, 2, 2**60), "it refers to a file"),
    "a terabyte of header": (lambda d: d.update(files=[[d["files"][0][0], 2**41, 2**40, b"h" * 16]]), "it refers to a file"),
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
    "x.safetensors\x1b[31m",
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


def _negative_page(head):
    """Which makes room for the one before it to overlap the next."""
    first = head["pages"][0]
    first[3] += 7
    head["pages"].append([5, 1, first[3], -7, b"d" * 16])


HEADS = {
    "a negative page": (_negative_page, "leave a gap or overlap"),
    "a gap between pages": (lambda d: d["record"].__setitem__(2, d["record"][2] + 1), "leave a gap or overlap at byte"),
    "overlapping pages": (lambda d: d["record"].__setitem__(2, 0), "leave a gap or overlap at byte 0"),
    "a page twice": (lambda d: d["pages"].append(d["pages"][0]), "not in the order of their tensors"),
    "a page of no tensor": (lambda d: d["pages"][0].__setitem__(0, 10**6), "not in the order of their tensors"),
    "a page without chunks": (lambda d: d["pages"][0].__setitem__(1, 0), "not in the order of their tensors"),
    "a short record": (lambda d: d["record"].__setitem__(3, d["record"][3] - 1), "its pages end at byte"),
    "a negative record": (lambda d: d["record"].__setitem__(3, -1), "leave a gap or overlap"),
    "no pages": (lambda d: d.update(pages=[]), "leave a gap or overlap"),
    "count": (lambda d: d["pages"][0].__setitem__(1, 2**62), f"chunks, {2**62} expected"),
    "a later first tensor": (lambda d: d["pages"][0].__setitem__(0, 1), "should be there by the manifest, but is not|is in the page of tensors 1 to"),
    "a digest of no length": (lambda d: d["pages"][0].__setitem__(4, b""), "checksum of its page"),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_forged_head_of_an_index_is_refused(step, case):
    change, told = HEADS[case]
    forge(step, head=change)
    _refused(step, told, "rank_00000.index")


def test_a_chunk_in_the_page_of_other_tensors_is_refused(step):
    """Nobody who looks for its tensor would find it, and two pages could have the same chunk."""
    forge(step, head=lambda d: d["pages"][0].__setitem__(0, 1))
    stored = StoredCheckpoint(LocalStorage(step.parent), step.name)
    with pytest.raises(CheckpointCorrupt, match="a chunk of tensor 0 is in the page of tensors 1 to"):
        stored.index(0).find(3, (0,))


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
    with pytest.raises(CheckpointCorrupt, match=r"model\.0\.weight\S* at \[0, 0\] has sizes \[1, 4\]"):
        Checkpointer(step.parent, model).resume("latest")


def test_a_chunk_that_the_layout_promises_but_the_index_lacks_is_refused(step):
    def drop(data):
        chunk = _chunk(data)
        data["chunks"].remove(chunk)

    forge(step, index=drop)
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
    _refused(step, f"is truncated or has bytes added: {2**40} bytes", name)
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


def test_of_an_index_the_head_is_read_once_and_pages_only_on_demand(tmp_path, monkeypatch):
    many = nn.ParameterList([torch.zeros(1) for _ in range(2 * PAGE_CHUNKS)])
    step = Path(Checkpointer(tmp_path, many).save(Progress(step=1)))
    read = []
    real = LocalStorage.open
    monkeypatch.setattr(LocalStorage, "open", lambda self, path: read.append(path) or real(self, path))
    stored = StoredCheckpoint(LocalStorage(step.parent), step.name)
    assert read == [f"{step.name}/manifest"]
    index = stored.index(0)
    assert stored.index(0) is index
    assert len(index.head.pages) == 2
    assert index.bytes_read < 1000, "the head"
    first = index.bytes_read + index.head.pages[0].size_bytes
    for number in range(PAGE_CHUNKS):
        found = index.find(number, (0,))
        assert found is not None
        assert index.chunk(found).tensor == number
    assert index.bytes_read == first
    assert index.find(0, (1,)) is None
    assert index.find(PAGE_CHUNKS, (0,)) is not None
    assert index.bytes_read == first + index.head.pages[1].size_bytes


@pytest.mark.parametrize("name", ["manifest", "rank_00000.index"])
def test_a_flip_of_any_byte_is_refused(step, name):
    data = (step / name).read_bytes()
    storage = LocalStorage(step.parent)

    def read() -> None:
        index = StoredCheckpoint(storage, step.name).index(0)
        chunks = [chunk for page in range(len(index.head.pages)) for chunk in index.chunks_of(page)]
        assert len(chunks) == 19
        index.record()

    read()
    for position in range(0, len(data), 7 if len(data) > 4000 else 1):  # each byte: tests/transfer/test_verify.py
        broken = bytearray(data)
        broken[position] ^= 0x10
        (step / name).write_bytes(broken)
        with pytest.raises(CheckpointCorrupt, match=name):
            read()
