"""``verify`` finds every flip, truncation, deletion and swap, and everything that a step's files say wrongly about each other."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointNotFound, StorageError
from engine.format.checksum import BLOCK_BYTES, block_digests, digest
from engine.format.layout import REPLICATED, Absent, Flat, Grid, Mesh, Part
from engine.format.manifest import Chunk, index_name, open_index
from engine.storage import LocalStorage
from engine.transfer import scan
from engine.transfer.promised import Promised
from engine.transfer.verify import Problem, verify
from tests.layouts import Bytes, tensors
from tests.synthetic import unsynced, write_step
from tests.tiny import opened, seal_index, seal_manifest

PARTS = {
    "model.large": (Part(Grid(Mesh((2,)), (0,))),),  # several blocks a rank
    "model.flat": (Part(Absent(), (0, 0), (2, 4)), Part(Flat(Mesh((3,)), 3, 7), (2, 0), (4, 4))),  # several boxes a rank
    "model.twice": (Part(Grid(Mesh((2,), 1), (REPLICATED,))),),
    "model.empty": (Part(Grid(Mesh((3,)), (0,))),),
}


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.large": torch.randn(2 * 3 * BLOCK_BYTES // 4 + 10, generator=generator),
        "model.flat": torch.randn(6, 4, generator=generator).bfloat16(),
        "model.twice": torch.randn(5, generator=generator),
        "model.empty": torch.zeros(0, 3),
        "model.complex": torch.randn(3, generator=generator, dtype=torch.complex128),
    }


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Two steps with the same tensors, of other values."""
    run = tmp_path_factory.mktemp("sound") / "run"
    write_step(run, values(1), PARTS, step=2)
    return write_step(run, values(0), PARTS, step=1)


@pytest.fixture
def step(sound, tmp_path) -> Path:
    shutil.copytree(sound.parent, tmp_path / "run")
    return tmp_path / "run" / sound.name


def problems(step: Path) -> list[Problem]:
    return verify(LocalStorage(step.parent), step.name)


def named(step: Path) -> set[str]:
    return {problem.file for problem in problems(step)}


def files(step: Path) -> list[Path]:
    return sorted(step.iterdir())


def test_a_sound_step_has_no_problem_and_every_byte_is_read_once(step):
    read: list[int] = []
    assert verify(LocalStorage(step.parent), step.name, read.append) == []
    assert sum(read) == sum(path.stat().st_size for path in files(step))
    assert len(files(step)) == 1 + 3 + 5, "a manifest, three indexes; flat pieces need several files"


@given(st.data())
@settings(max_examples=40)
def test_whatever_the_layouts_a_sound_step_has_no_problem(tmp_path, data):
    found = {f"t{i}": data.draw(tensors(dtype)) for i, dtype in enumerate(("F32", "BF16"))}
    given_values = {
        name: torch.zeros(tensor.shape, dtype=torch.float32 if tensor.dtype == "F32" else torch.bfloat16) for name, tensor in found.items()
    }
    with unsynced():
        step = write_step(tmp_path, given_values, {name: tensor.parts for name, tensor in found.items()})
    assert problems(step) == []


# ---------------------------------------------------------------- the sweep


def _positions(path: Path) -> Iterator[int]:
    """Every byte of manifests, indexes and small data, and of headers up to the padding; samples of padding and large data."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        yield from range(len(data))
        return
    text = len(data[: 8 + struct.unpack_from("<Q", data)[0]].rstrip(b" "))
    header = 8 + struct.unpack_from("<Q", data)[0]
    yield from range(text)
    yield from range(text, header, 997)
    yield header - 1
    small = len(data) - header < 1000
    yield from range(header, len(data), 1 if small else 4999)
    yield len(data) - 1


def test_the_sweep_of_flips(step):
    """One bit of each position, another bit each time; what is found is in that file, and for data names the tensor and its bytes."""
    swept = 0
    for path in files(step):
        rank = None if path.name == "manifest" else int(path.name[5:10])
        size = path.stat().st_size
        header = 0
        if path.suffix == ".safetensors":
            header = 8 + struct.unpack_from("<Q", path.read_bytes())[0]
        with path.open("r+b") as file:
            for position in _positions(path):
                byte = os.pread(file.fileno(), 1, position)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << position % 8]), position)
                found = problems(step)
                assert found, f"a flip at {position} of {path.name} is not seen"
                first = next(problem for problem in found if problem.file == path.name)
                if header:
                    assert len(found) == 1, found
                    assert first.rank == rank
                    assert first.begin <= position < first.end <= size
                    assert bool(first.tensor) == (position >= header)
                os.pwrite(file.fileno(), byte, position)
                swept += 1
    assert problems(step) == []
    assert swept > 3500
    print(f"{swept} flips")


def test_the_sweep_of_lengths(step):
    """Every file shorter by a byte, empty, and longer by a byte."""
    for path in files(step):
        data = path.read_bytes()
        for other in (data[:-1], data[: len(data) // 2], b"", data + b"\0", data + b" "):
            path.write_bytes(other)
            assert path.name in named(step), f"{path.name} with {len(other)} of {len(data)} bytes is not seen"
        path.write_bytes(data)
    assert problems(step) == []


def test_the_sweep_of_what_a_file_can_become(step):
    for path in files(step):
        aside = path.with_name(f".aside.{path.name}")
        for become in (Path.unlink, _link, _link_outside, _fifo, _folder, _unreadable):
            os.rename(path, step.parent / aside.name)
            become(path) if become is not Path.unlink else None
            found = [problem for problem in problems(step) if problem.file == path.name]
            assert found, f"{path.name} as {become.__name__} is not seen"
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
            os.rename(step.parent / aside.name, path)
    assert problems(step) == []


def _link(path: Path) -> None:
    """To the very file."""
    os.symlink(path.parent.parent / f".aside.{path.name}", path)


def _link_outside(path: Path) -> None:
    os.symlink("/dev/zero", path)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _unreadable(path: Path) -> None:
    """A file of zeros of the same length."""
    path.write_bytes(bytes((path.parent.parent / f".aside.{path.name}").stat().st_size))


def test_the_sweep_of_swaps(step):
    """Each file for every other of its kind, in this step, and for that of the same name in the other."""
    other, swapped = step.parent / "step_00000002", 0
    for path in files(step):
        data = path.read_bytes()
        kind = [p for p in files(step) if p.suffix == path.suffix and p != path]
        for source in [*kind, other / path.name]:
            path.write_bytes(source.read_bytes())
            assert problems(step), f"{source} in the place of {path.name} is not seen"
            swapped += 1
        path.write_bytes(data)
        for twin in kind:
            if path.name < twin.name:
                again = twin.read_bytes()
                path.write_bytes(again), twin.write_bytes(data)
                assert {path.name, twin.name} & named(step), f"{path.name} and {twin.name} exchanged are not seen"
                path.write_bytes(data), twin.write_bytes(again)
                swapped += 1
    assert problems(step) == []
    assert swapped == 48


def test_a_step_under_the_name_of_another_is_told(step):
    other = step.parent / "step_00000002"
    shutil.rmtree(other)
    step.rename(other)
    (problem,) = problems(other)
    assert "step_00000002 holds step 1: it has been renamed or is a copy" in str(problem)


@pytest.mark.parametrize("name", ["core.123", "rank_00003.index", "rank_00000.7.safetensors", ".hidden", "manifest.new"])
def test_what_nothing_refers_to_does_not_belong(step, name):
    (step / name).write_text("")
    (problem,) = problems(step)
    assert (problem.file, problem.what) == (name, "does not belong to this step: nothing refers to it")


def test_all_problems_are_told_not_only_the_first(step):
    (step / "rank_00000.0.safetensors").unlink()
    with (step / "rank_00001.0.safetensors").open("r+b") as file:
        for block in (0, 2):
            file.seek(4096 + block * BLOCK_BYTES + 5)
            file.write(b"????")
    os.truncate(step / "rank_00002.index", 100)
    (step / "stray").mkdir()
    told = [str(problem) for problem in problems(step)]
    assert told[0] == "rank_00000.0.safetensors (rank 0): is missing"
    assert told[1] == f"rank_00001.0.safetensors (rank 1): model.large: bytes 4096 to {4096 + BLOCK_BYTES} have changed since they were written"
    assert told[2].startswith(f"rank_00001.0.safetensors (rank 1): model.large: bytes {4096 + 2 * BLOCK_BYTES} to {4096 + 3 * BLOCK_BYTES} have")
    assert told[-3].startswith("rank_00002.1.safetensors: is in no index that can be read; those of ranks [2] cannot")
    assert told[-2].startswith("rank_00002.index (rank 2): rank_00002.index is truncated or has bytes added: 100 bytes")
    assert told[-1].startswith("stray: is in no index that can be read")
    assert len(told) == 7


def test_neighbouring_bad_blocks_are_told_as_one_range(step, monkeypatch):
    monkeypatch.setattr(scan, "PIECE_BYTES", BLOCK_BYTES)  # so that they are found by different threads
    with (step / "rank_00001.0.safetensors").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(2 * BLOCK_BYTES))
    (problem,) = problems(step)
    assert (problem.begin, problem.end) == (4096, 4096 + 2 * BLOCK_BYTES)


def test_a_truncated_file_names_the_tensors_that_have_lost_bytes(step):
    path = step / "rank_00001.0.safetensors"
    size = path.stat().st_size
    os.truncate(path, 4096 + 2 * BLOCK_BYTES + 1)
    found = problems(step)
    assert found[0].what == f"has {4096 + 2 * BLOCK_BYTES + 1} bytes, {size} expected"
    assert {p.tensor for p in found[1:]} == {"model.large", "model.twice", "model.flat"}
    large = next(p for p in found if p.tensor == "model.large")
    assert (large.begin, large.what) == (4096 + 2 * BLOCK_BYTES, "are not in the file, at least in part")


def test_every_step_that_has_a_bad_file_by_a_hard_link_is_named(step):
    """A copy is not shared; a link is, under whatever name."""
    path = step / "rank_00001.0.safetensors"
    for number in (3, 4, 5):
        shutil.copytree(step, step.parent / f"step_{number:08d}")
    for number, name in ((3, path.name), (5, "frozen.safetensors")):
        (step.parent / f"step_{number:08d}" / path.name).unlink()
        os.link(path, step.parent / f"step_{number:08d}" / name)
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"????")
    (problem,) = problems(step)
    assert problem.shared_with == ("step_00000003", "step_00000005")
    assert str(problem).endswith("; the same file is in step_00000003, step_00000005")


def test_a_medium_that_fails_is_a_problem_like_any_other(step, monkeypatch):
    real = LocalStorage.open

    class Failing:
        def __init__(self, reader) -> None:
            self._reader, self.size_bytes, self.close = reader, reader.size_bytes, reader.close

        def read_into(self, offset: int, target: memoryview) -> None:
            if offset > 4096:
                raise StorageError("cannot read: Input/output error")
            self._reader.read_into(offset, target)

    monkeypatch.setattr(
        LocalStorage, "open", lambda self, path: Failing(real(self, path)) if path.endswith("00000.0.safetensors") else real(self, path)
    )
    monkeypatch.setattr(scan, "WINDOW_BYTES", BLOCK_BYTES)
    found = problems(step)
    assert {p.file for p in found} == {"rank_00000.0.safetensors"}
    assert all(p.what == "are lost: cannot read: Input/output error" for p in found)
    assert min(p.begin for p in found) == 4096 + 48, "the first read, of the complex tensor, did not fail"


def test_a_file_that_goes_away_meanwhile_is_a_problem_like_any_other(step, monkeypatch):
    """Retention may delete a step that is being looked at."""
    real, opened_before = LocalStorage.open, []

    def vanishing(self, path):
        if path.endswith("00000.0.safetensors"):
            opened_before.append(path)
            if len(opened_before) > 1:  # the header was read
                raise FileNotFoundError(path)
        return real(self, path)

    monkeypatch.setattr(LocalStorage, "open", vanishing)
    found = problems(step)
    assert {p.file for p in found} == {"rank_00000.0.safetensors"}
    assert {p.tensor for p in found} == {"model.large", "model.flat", "model.empty", "model.complex"}
    assert all(p.what.startswith("are lost: ") for p in found)


def test_a_folder_without_files_is_not_found(tmp_path):
    for name in ("empty", "none"):
        if name == "empty":
            (tmp_path / name).mkdir()
        with pytest.raises(CheckpointNotFound, match="is not a folder with files in it"):
            verify(LocalStorage(tmp_path), name)


# ---------------------------------------------------------------- forged with right checksums


def forge(step: Path, change, rank: int = 0) -> None:
    """``change(manifest, index)`` changes builtins of a step; all checksums are made right, those of headers too."""
    manifest, index = opened(step, rank)
    index["chunks"] = [list(chunk) for chunk in index["chunks"]]
    index["files"] = [list(file) for file in index["files"]]
    change(manifest, index)
    for file in index["files"]:
        if (step / file[0]).exists():
            file[3] = digest((step / file[0]).read_bytes()[: file[2]])
    data, entry = seal_index(index)
    manifest["indexes"] = [entry if i == rank else old for i, old in enumerate(manifest["indexes"])]
    (step / index_name(rank)).write_bytes(data)
    manifest["summary"]["size_bytes"] = sum(path.stat().st_size for path in files(step) if path.name != "manifest")
    (step / "manifest").write_bytes(seal_manifest(manifest))


def test_forging_without_a_change_is_no_problem(step):
    forge(step, lambda manifest, index: None)
    assert problems(step) == []


def _of(manifest, index, name):
    """The chunks of a tensor."""
    number = next(i for i, tensor in enumerate(manifest["tensors"]) if tensor[0] == name)
    return [chunk for chunk in index["chunks"] if chunk[0] == number]


def _told(step: Path) -> str:
    return "\n".join(map(str, problems(step)))


def test_a_chunk_that_the_layout_promises_but_the_index_lacks(step):
    forge(step, lambda m, i: i["chunks"].remove(_of(m, i, "model.complex")[0]))
    told = _told(step)
    assert "rank_00000.index (rank 0): model.complex: lacks the box at [0] of [3]; its layout says otherwise" in told
    assert "rank_00000.0.safetensors (rank 0): bytes 4096 to 4144 belong to no tensor" in told
    assert "its header, which has model.complex beside what the index has" in told


def test_bytes_at_the_end_of_a_file_that_are_in_no_chunk(step):
    def change(manifest, index):
        index["chunks"].remove(max((c for c in index["chunks"] if c[3] == 0 and c[5]), key=lambda chunk: chunk[4]))

    size = (step / "rank_00000.0.safetensors").stat().st_size
    forge(step, change)
    assert f"to {size} belong to no tensor" in _told(step)


def test_a_checksum_over_all_pages_that_does_not_match(step):
    """Though each page's does: a reader that takes indexes whole would refuse it."""
    path = step / "rank_00002.index"
    data = bytearray(path.read_bytes())
    data[40] ^= 1  # of the body's digest
    path.write_bytes(data)
    manifest, _ = opened(step)
    _, found = open_index(Bytes(bytes(data)), "index")
    manifest["indexes"] = [*manifest["indexes"][:2], [len(data), found.digest]]
    (step / "manifest").write_bytes(seal_manifest(manifest))
    (problem,) = problems(step)
    assert (problem.file, problem.what.partition(": ")[2][:27]) == ("rank_00002.index", "its checksum does not match")


def test_a_box_that_the_layout_does_not_give(step):
    def change(manifest, index):
        chunk = _of(manifest, index, "model.twice")[0]
        chunk[1:3], chunk[5], chunk[6] = [[0], [4]], 16, b"d" * 16

    forge(step, change, rank=1)
    told = _told(step)
    assert "model.twice: lacks the box at [0] of [5], has the box at [0] of [4]; its layout says otherwise" in told


def test_a_chunk_that_overlaps_another(step):
    def change(manifest, index):
        first, second = sorted((chunk for chunk in index["chunks"] if chunk[3] == 0 and chunk[5]), key=lambda chunk: chunk[4])[:2]
        second[4] = first[4]

    forge(step, change)
    assert "belong to two tensors" in _told(step)


def test_boxes_that_agree_with_a_wrong_rule_are_seen_not_to_tile(step, monkeypatch):
    """If the code that both wrote the boxes and expects them is wrong: the sum over all boxes does not depend on it."""
    real, number = Promised.of, [tensor[0] for tensor in opened(step)[0]["tensors"]].index("model.complex")

    def change(manifest, index):
        index["chunks"].remove(_of(manifest, index, "model.complex")[0])

    forge(step, change)
    monkeypatch.setattr(Promised, "of", lambda self, writer: {n: boxes for n, boxes in real(self, writer).items() if n != number})
    assert "manifest: model.complex: the boxes that the ranks wrote overlap or leave gaps" in _told(step)


def _rewrite(step: Path, name: str, change) -> None:
    """Another header of the same length."""
    data = (step / name).read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    info = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    change(header, info)
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(info)
    text = json.dumps(header).encode()
    assert len(text) <= size
    (step / name).write_bytes(struct.pack("<Q", size) + text.ljust(size) + data[8 + size :])


HEADERS = {
    "a name": (
        lambda h, i: (h.update({"model.twist": h.pop("model.twice")}), i.update({"model.twist": i.pop("model.twice")})),
        "has not model.twice",
    ),
    "a dtype": (lambda h, i: h["model.twice"].update(dtype="I32"), "has not model.twice as the index has it"),
    "a shape": (lambda h, i: (h["model.twice"].update(shape=[5, 1]), i["model.twice"].update(saved_offsets=[0, 0])), "has not model.twice as"),
    "an offset that stock readers use": (lambda h, i: i["model.large"].update(saved_offsets=[1]), "has not model.large as the index has it"),
    "a name that stock readers lack": (lambda h, i: i.pop("model.large"), "DCP_SHARDING_INFO names other tensors"),
    "a hole": (lambda h, i: h["model.flat"].update(data_offsets=[n + 2 for n in h["model.flat"]["data_offsets"]]), "begins at"),
    "bytes": (lambda h, i: h["model.flat"].update(data_offsets=[0, 1]), "has 1 bytes"),
    "no metadata": (lambda h, i: h["__metadata__"].update(format=3), "Expected `str`"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_says_other_than_the_index(step, case):
    """Under a right checksum: what stock tools read is what ours read."""
    change, told = HEADERS[case]
    _rewrite(step, "rank_00001.0.safetensors", change)
    forge(step, lambda manifest, index: None, rank=1)
    (problem,) = problems(step)
    assert problem.file == "rank_00001.0.safetensors"
    assert told in problem.what


def test_a_file_in_the_indexes_of_two_ranks(step):
    def change(manifest, index):
        shutil.copy(step / "rank_00000.0.safetensors", step / "shared.safetensors")
        index["files"][0][0] = "shared.safetensors"

    forge(step, change)
    (step / "rank_00000.0.safetensors").unlink()
    forge(step, lambda m, i: i["files"][0].__setitem__(0, "shared.safetensors"), rank=1)
    assert "shared.safetensors (rank 1): is listed in the indexes of two ranks" in _told(step)


@pytest.mark.parametrize(
    ("field", "told"), [("tensors", "has 5 tensors; its head says 7"), ("size_bytes", "says 7 bytes for indexes and shards that have")]
)
def test_a_summary_that_says_other_than_its_manifest(step, field, told):
    manifest, _ = opened(step)
    manifest["summary"][field] = 7
    (step / "manifest").write_bytes(seal_manifest(manifest))
    assert told in _told(step)


def test_a_record_that_cannot_be_decoded(step):
    manifest, _ = opened(step)
    manifest["record"] = b"\xc1"
    (step / "manifest").write_bytes(seal_manifest(manifest))
    assert "manifest: a state record cannot be decoded" in _told(step)
    forge(step, lambda m, i: i.update(record=b"\xc1"), rank=2)
    assert "rank_00002.index (rank 2): a state record cannot be decoded" in _told(step)


def test_of_many_pages_the_bad_one_is_named_and_the_rest_is_still_checked(tmp_path):
    many = {f"t{i:04}": torch.full((2,), float(i)) for i in range(1200)}
    step = write_step(tmp_path, many)
    path = step / "rank_00000.index"
    head, sealed = open_index(Bytes(path.read_bytes()), "index")
    assert len(head.pages) == 3
    begin = sealed.body_at + head.pages[1].offset
    for at, name in ((begin + 5, path.name), ((step / "rank_00000.0.safetensors").stat().st_size - 3, "rank_00000.0.safetensors")):
        with (step / name).open("r+b") as file:
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
    bad, page = problems(step)
    assert page.file == "rank_00000.index"
    assert (page.begin, page.end) == (begin, begin + head.pages[1].size_bytes)
    assert page.what.startswith("are the page of t0512 and up to 511 more")
    assert bad.file == "rank_00000.0.safetensors"
    assert bad.tensor.startswith("t")


def test_pieces_hold_every_block_once_in_the_order_of_the_file(monkeypatch):
    monkeypatch.setattr(scan, "PIECE_BYTES", 2 * BLOCK_BYTES)
    sizes = [5 * BLOCK_BYTES + 3, 10, 0, BLOCK_BYTES, 7]
    offsets = [4096 + sum(sizes[:i]) for i in range(len(sizes))]
    chunks = [Chunk(i, (0,), (n,), 0, o, n, block_digests(memoryview(bytes(n)))) for i, (n, o) in enumerate(zip(sizes, offsets, strict=True))]
    found = [block for piece in scan.pieces(reversed(chunks)) for block in scan._blocks(piece)]
    assert [block.begin for block in found] == sorted(block.begin for block in found)
    assert found[0].begin == 4096
    assert all(a.end == b.begin for a, b in pairwise(found))
    assert b"".join(block.digest for block in found) == b"".join(chunk.digests for chunk in chunks)
    assert len(list(scan.pieces(chunks))) == 4


def test_verify_needs_no_torch(step):
    code = (
        "import sys; from engine.storage import LocalStorage; from engine.transfer.verify import verify;"
        f"assert verify(LocalStorage({str(step.parent)!r}), {step.name!r}) == []; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
