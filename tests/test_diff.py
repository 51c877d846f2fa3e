"""``engine diff``: two steps are equal if their values are, however each is sharded; what differs is counted right."""

import math
import os
import tracemalloc
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cli import diff, main
from engine.cli.changes import changes, same
from engine.errors import CheckpointCorrupt
from engine.format.dtypes import ITEM_BYTES
from engine.format.layout import REPLICATED, Absent, Flat, Grid, Mesh, Part
from engine.state.shard import torch_dtype
from engine.storage import LocalStorage
from engine.transfer import values
from engine.transfer.stored import StoredCheckpoint
from tests.layouts import flats, grids, shapes
from tests.synthetic import RECORD, unsynced, with_fills, write_step

TWO = (Part(Grid(Mesh((2,)), (0,))),)
BLOCK = 128 * 1024


def told(capsys, a, b, *options, code: int) -> list[str]:
    assert main(["diff", str(a), str(b), *options]) == code
    return capsys.readouterr().out.splitlines()[2:]


def stored(step) -> StoredCheckpoint:
    return StoredCheckpoint(LocalStorage(step.parent), step.name)


# ---------------------------------------------------------------- values


@st.composite
def parts_of(draw, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """One part, or two along some dimension, of which one may be absent."""
    places: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    cuttable = [dim for dim, n in enumerate(shape) if n > 1]
    if cuttable and 0 not in shape and draw(st.booleans()):
        dim = draw(st.sampled_from(cuttable))
        cut = draw(st.integers(1, shape[dim] - 1))
        zeros, first, second = [0] * len(shape), list(shape), list(shape)
        first[dim], second[dim] = cut, shape[dim] - cut
        places = [(tuple(zeros), tuple(first)), (tuple(cut if d == dim else 0 for d in range(len(shape))), tuple(second))]
    found = []
    for offsets, sizes in places:
        inner = sizes or shape
        kinds = [grids(len(inner)), flats(math.prod(inner))] + ([st.just(Absent(0.0)), st.just(Absent(2.5))] if len(places) == 2 else [])
        found.append(Part(draw(st.one_of(kinds)), offsets, sizes))
    return tuple(found)


@given(shapes(max_dims=3), st.data())
@settings(max_examples=60)
def test_sharding_is_no_difference_and_changed_elements_are_counted_right(tmp_path_factory, shape, data):
    """Any two layouts of the same values; then some elements are changed. The reference is torch on the whole tensors."""
    one, other = data.draw(parts_of(shape)), data.draw(parts_of(shape))
    value = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) + 1
    changed = value.clone()
    for _ in range(data.draw(st.integers(0, 3)) if value.numel() else 0):
        changed.view(-1)[data.draw(st.integers(0, value.numel() - 1))] += data.draw(st.sampled_from([1.0, -7.0, 1000.0]))
    run = tmp_path_factory.mktemp("run")
    with unsynced():
        a, b = write_step(run, {"t": value}, {"t": one}, step=1), write_step(run, {"t": changed}, {"t": other}, step=2)
    x, y = with_fills(value, one), with_fills(changed, other)
    a, b = stored(a), stored(b)
    for read_all in (False, True):
        found = diff.compare(a, b, a.tensors["t"], b.tensors["t"], read_all)
        assert found.elements == int((x != y).sum())
        assert found.largest == (float((x - y).abs().max()) if x.numel() else 0)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_dtype_is_compared(tmp_path, capsys, dtype):
    """By bytes where its values are not known; in both, across another sharding."""
    kind = torch_dtype(dtype)
    value = torch.arange(12).to(kind) if kind not in (torch.float8_e8m0fnu,) else torch.arange(12, dtype=torch.uint8).view(kind)
    changed = value.clone()
    changed.view(torch.uint8)[changed.element_size() * 5 + changed.element_size() - 1] ^= 1
    write_step(tmp_path, {"t": value}, step=1)
    write_step(tmp_path, {"t": value}, {"t": TWO}, step=2)
    write_step(tmp_path, {"t": changed}, {"t": TWO}, step=3)
    assert told(capsys, f"{tmp_path}@1", f"{tmp_path}@2", code=0) == ["0 of 1 tensors differ in value"]
    _, row, _ = told(capsys, f"{tmp_path}@1", f"{tmp_path}@3", code=1)
    name, found, elements, of, *largest = row.split(maxsplit=4)
    assert (name, found, elements, of) == ("t", dtype, "1", "12")
    if dtype.startswith("F8"):
        assert largest == ["bytes differ"]
    else:
        x, y = ((v.to(torch.complex128) if v.is_complex() else v.to(torch.float64)) for v in (value, changed))
        assert float(largest[0]) == pytest.approx(float((x - y).abs().max()), rel=1e-5)


def test_gaps_at_the_edges_of_types():
    def found(dtype, a, b):
        return values.gap(dtype, np.atleast_1d(a).view(values.raw_type(dtype)), np.atleast_1d(b).view(values.raw_type(dtype)))

    inf, nan = np.float32(np.inf), np.float32(np.nan)
    assert found("F32", np.float32(0.0), np.float32(-0.0)) == (1, 0)
    assert found("F32", nan, nan) == (0, 0)
    assert found("F32", nan, -nan) == (1, 0), "another NaN"
    assert found("F32", nan, np.float32(1)) == (1, math.inf)
    assert found("F32", inf, inf) == (0, 0)
    assert found("F32", inf, -inf) == (1, math.inf)
    assert found("F32", inf, np.float32(1)) == (1, math.inf)
    assert found("F64", np.float64(1e308), np.float64(-1e308)) == (1, math.inf)
    assert found("I64", np.int64(-(2**63)), np.int64(2**63 - 1)) == (1, 2**64 - 1)
    assert found("U64", np.uint64(0), np.uint64(2**64 - 1)) == (1, 2**64 - 1)
    assert found("I8", np.int8(-128), np.int8(127)) == (1, 255)
    assert found("BOOL", np.uint8(0), np.uint8(1)) == (1, 1)
    assert found("C128", np.complex128(3 + 4j), np.complex128(0)) == (1, 5.0)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@pytest.mark.parametrize("fill", [0.0, 1.0, 2.5, -3.0, 1 / 3, 65504, -0.0])
def test_fills_are_what_torch_would_fill(dtype, fill):
    kind = torch_dtype(dtype)
    if (dtype[0] in "UI" and not -100 < fill < 100) or (dtype[0] == "U" and fill < 0):
        return  # torch refuses it, or means nothing by it
    if dtype.startswith("F8") and (fill or math.copysign(1, fill) < 0):
        with pytest.raises(Exception, match="cannot be compared"):
            values.fill_value(dtype, fill)
        return
    if dtype == "F8_E8M0":
        return  # has no zero: its least value is all zero bits
    assert values.fill_value(dtype, fill).tobytes() == torch.zeros(1, dtype=kind).fill_(fill).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """40 MB under two layouts; the third step differs in two blocks."""
    run = tmp_path_factory.mktemp("large")
    value = torch.arange(10_000_000, dtype=torch.float32).reshape(1000, 10_000)
    write_step(run, {"t": value}, {"t": TWO}, step=1)
    write_step(run, {"t": value}, {"t": (Part(Grid(Mesh((3,)), (1,))),)}, step=2)
    value[0, 0], value[999, 9999] = -1, 1e9
    write_step(run, {"t": value}, {"t": TWO}, step=3)
    return run


def _read(monkeypatch) -> list[int]:
    read: list[int] = []
    real = values.read_blocks

    def counted(*arguments):
        found = real(*arguments)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(values, "read_blocks", counted)
    monkeypatch.setattr(diff, "read_blocks", counted)
    return read


def test_of_what_is_laid_out_alike_only_blocks_with_other_checksums_are_read(large, capsys, monkeypatch):
    read = _read(monkeypatch)
    assert told(capsys, f"{large}@1", f"{large}@3", code=1)[-1] == "1 of 1 tensors differ in value"
    assert sum(read) <= 4 * BLOCK
    read.clear()
    assert told(capsys, f"{large}@1", f"{large}@1", code=0) == ["0 of 1 tensors differ in value; 1 are equal by their checksums, unread"]
    assert not read
    assert told(capsys, f"{large}@1", f"{large}@1", "--read", code=0) == ["0 of 1 tensors differ in value"]
    assert sum(read) == 2 * 40_000_000


def test_memory_is_bounded_and_little_is_read_twice(large, capsys, monkeypatch):
    read = _read(monkeypatch)
    tracemalloc.start()
    told(capsys, f"{large}@1", f"{large}@2", code=0)
    told(capsys, f"{large}@1", f"{large}@1", "--read", code=0)
    row = told(capsys, f"{large}@2", f"{large}@3", code=1)[1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert row.split()[2:] == ["2", "10000000", "9.9e+08"]
    assert peak < 30_000_000
    assert sum(read) < 1.1 * 6 * 40_000_000


def test_a_bad_byte_under_a_difference_is_an_error_not_a_difference(tmp_path, capsys):
    write_step(tmp_path, {"t": torch.zeros(10)}, step=1)
    step = write_step(tmp_path, {"t": torch.ones(10)}, step=2)
    with (step / "rank_00000.0.safetensors").open("r+b") as file:
        file.seek(4100)
        file.write(b"?")
    assert main(["diff", f"{tmp_path}@1", f"{tmp_path}@2"]) == CheckpointCorrupt.exit_code
    assert "bytes 4096 to 4136, of t, have changed" in capsys.readouterr().err
    os.unlink(step / "rank_00000.0.safetensors")
    assert main(["diff", f"{tmp_path}@1", f"{tmp_path}@2"]) == CheckpointCorrupt.exit_code


# ---------------------------------------------------------------- names, shapes, and what is no tensor


def test_tensors_of_one_side_and_of_other_shapes_and_dtypes_are_named(tmp_path, capsys):
    write_step(tmp_path, {"same": torch.ones(2), "gone": torch.ones(2), "shape": torch.ones(2, 3), "type": torch.ones(2)}, step=1)
    write_step(tmp_path, {"same": torch.ones(2), "new": torch.ones(2), "shape": torch.ones(3, 2), "type": torch.ones(2).half()}, step=2)
    assert told(capsys, f"{tmp_path}@1", f"{tmp_path}@2", code=1) == [
        "only in A: gone",
        "only in B: new",
        "shape: F32 [2, 3] → F32 [3, 2]",
        "type: F32 [2] → F16 [2]",
        "0 of 1 tensors differ in value; 1 are equal by their checksums, unread",
    ]


def _record(change) -> dict:
    record = deepcopy(RECORD)
    change(record)
    return record


RECORDS = {
    "progress": (lambda r: r["progress"].update(samples=9), ["progress.samples: 8 → 9"]),
    "a rate": (lambda r: r["models"][""]["groups"][0]["values"].update(lr=0.2), ["model: lr: 0.1 → 0.2 for 1 parameters (w)"]),
    "a parameter": (
        lambda r: r["models"][""]["groups"][0]["params"].append("v"), ["model: in no param group of A for 1 parameters (v)"]
    ),
    "config": (lambda r: r["config"].update(width=4, depth=2), ["config.width: 3 → 4", "config.depth: only in B: 2"]),
    "an object": (lambda r: r["objects"].update(ema={}), ["objects.ema: only in B: {}"]),
    "a model": (lambda r: r["models"].update(critic={}), ["model critic: only in B"]),
    "another kind": (lambda r: r["progress"].update(samples=8.0), ["progress.samples: 8 → 8.0"]),
    "how it ran": (lambda r: r["models"][""].update(engine="zero2", optimizer_class="FusedAdam", counters={"micro_steps": 3}, int_steps=True), []),
    "counters of the same engine": (lambda r: r["models"][""].update(counters={"skipped": 3}), ["model.counters.skipped: only in B: 3"]),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_what_is_no_tensor_is_compared_by_name(tmp_path, capsys, case):
    change, lines = RECORDS[case]
    write_step(tmp_path, {"w": torch.ones(2)}, step=1)
    write_step(tmp_path, {"w": torch.ones(2)}, step=2, record=_record(change))
    *found, _ = told(capsys, f"{tmp_path}@1", f"{tmp_path}@2", code=1 if lines else 0)
    assert found == lines


def test_how_parameters_are_grouped_and_ordered_is_no_difference():
    def grouped(*groups):
        return {"models": {"": {"groups": [{"params": list(names), "values": {"lr": lr}} for names, lr in groups]}}}

    assert changes(grouped(("ab", 1.0), ("c", 2.0)), grouped(("c", 2.0), ("b", 1.0), ("a", 1.0))) == []
    assert changes(grouped(("abcd", 1.0)), grouped(("cbad", 2.0))) == ["model: lr: 1.0 → 2.0 for 4 parameters (a, b, c …)"]


@pytest.mark.parametrize(
    "broken", [None, 3, [], {"models": 3}, {"models": {"": {"groups": 3}}}, {"models": {"": {"groups": [{"params": 3, "values": {}}]}}}]
)
def test_records_of_any_kind_are_compared(broken):
    assert changes(broken, broken) == []
    assert changes(RECORD, broken)
    assert changes(broken, RECORD)


def test_equality_tells_kinds_apart_but_not_nans():
    assert same(math.nan, math.nan)
    assert same({"a": [1, (2.0, math.nan)]}, {"a": [1, (2.0, math.nan)]})
    for a, b in ((1, 1.0), (1, True), ([1], (1,)), ({"a": 1}, {"a": 1, "b": 2}), ([1], [1, 2]), ("1", 1)):
        assert not same(a, b)
        assert not same(b, a)


def test_the_ranks_own_state_counts_where_the_ranks_are_as_many(tmp_path, capsys, monkeypatch):
    import tests.synthetic as synthetic

    parts = {"w": TWO}
    write_step(tmp_path, {"w": torch.ones(2)}, parts, step=1)
    real = synthetic.encode_record
    monkeypatch.setattr(
        synthetic, "encode_record", lambda value: real({"rng": {"seed": 99}, "objects": {}} if value.get("rng") == {"seed": 1} else value)
    )
    write_step(tmp_path, {"w": torch.ones(2)}, parts, step=2)
    write_step(tmp_path, {"w": torch.ones(2)}, step=3)
    assert told(capsys, f"{tmp_path}@1", f"{tmp_path}@2", code=1)[0] == "random state and other state of the ranks' own: differs on ranks 1"
    assert told(capsys, f"{tmp_path}@1", f"{tmp_path}@3", code=0) == ["0 of 1 tensors differ in value"]


def test_declared_absent_without_end_is_compared_without_counting_to_it(tmp_path, capsys):
    """Elements that no file backs: 2**55 of them take no time."""
    rows = 2**50
    parts = {"t": (Part(Absent(), (0, 0), (rows, 32)), Part(Grid(Mesh((1,)), (REPLICATED,)), (rows, 0), (1, 32)))}
    other = {"t": (Part(Absent(1.0), (0, 0), (rows, 32)), Part(Flat(Mesh((2,)), 0, 16), (rows, 0), (1, 32)))}

    class Sparse(torch.Tensor):
        """As large as that, with one row."""

        shape = (rows + 1, 32)

        def __getitem__(self, place):
            return torch.ones(1, 32)[:, place[1]]

    value = torch.ones(1).as_subclass(Sparse)
    write_step(tmp_path, {"t": value}, parts, step=1)
    write_step(tmp_path, {"t": value}, other, step=2)
    _, row, _ = told(capsys, f"{tmp_path}@1", f"{tmp_path}@2", code=1)
    assert row.split() == ["t", "F32", str(rows * 32), str((rows + 1) * 32), "1"]
