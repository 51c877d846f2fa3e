"""Images are files that the safetensors package opens, with every box where the plan says."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from engine.format.dtypes import ITEM_BYTES, STORED_AS_BYTES
from engine.plan import image
from engine.plan.image import Source, lay_out
from engine.state.shard import torch_dtype


def _sources(specs) -> list[Source]:
    """From (name, dtype, sizes); a name that comes again gets other offsets."""
    sources = []
    for number, (name, dtype, sizes) in enumerate(specs):
        offsets = tuple(number for _ in sizes)
        sources.append(Source(number, name, dtype, offsets, sizes, int(np.prod(sizes, dtype=np.int64)) * ITEM_BYTES[dtype]))
    return sources


_SPECS = st.lists(
    st.tuples(
        st.sampled_from(["model.a", "model.b", "optim.état", 'quo"te\\', "c" * 300]),
        st.sampled_from(sorted(ITEM_BYTES)),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=12,
)


def _check_images(images, sources):
    assert sorted(item for one in images for item in one.items) == [source.item for source in sources]
    for one in images:
        names = [entry.name for entry in one.entries]
        assert len(set(names)) == len(names), "two boxes of a tensor in one file"
        position = 0
        for item, entry in zip(one.items, one.entries, strict=True):
            source = sources[item]
            assert (entry.name, entry.dtype, entry.offsets, entry.sizes, entry.nbytes) == (
                source.name, source.dtype, source.offsets, source.sizes, source.nbytes,
            )  # fmt: skip
            assert entry.offset == position, "a hole or an overlap"
            assert (len(one.header) + position) % ITEM_BYTES[entry.dtype] == 0, "not aligned to its item size"
            position += entry.nbytes
        assert position == one.data_bytes
        assert len(one.header) % 4096 == 0


@given(_SPECS)
def test_files_have_no_holes_no_second_box_of_a_tensor_and_aligned_items(specs):
    sources = _sources(specs)
    images = lay_out(sources)
    _check_images(images, sources)
    most = max(map(len, (list(g) for _, g in itertools.groupby(sorted(name for name, _, _ in specs)))), default=0)
    assert len(images) == most, "no more files than boxes of one tensor"


@settings(max_examples=50)
@given(specs=_SPECS)
def test_the_safetensors_package_reads_every_box(specs, tmp_path):
    sources = _sources(specs)
    rng = np.random.default_rng(len(specs))
    for number, one in enumerate(lay_out(sources)):
        data = rng.integers(0, 256, one.data_bytes, dtype=np.uint8)
        for entry in one.entries:
            if entry.dtype == "BOOL":
                data[entry.offset : entry.offset + entry.nbytes] &= 1
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(one.header + data.tobytes())
        with safe_open(path, framework="pt") as file:
            assert sorted(file.keys()) == sorted(entry.name for entry in one.entries)
            sharding = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for entry in one.entries:
                found = file.get_tensor(entry.name)
                raw = data[entry.offset : entry.offset + entry.nbytes]
                assert np.array_equal(found.reshape(-1).view(torch.uint8).numpy() if found.numel() else np.empty(0, np.uint8), raw)
                if entry.dtype in STORED_AS_BYTES:
                    assert found.dtype == torch.uint8
                    assert found.numel() == entry.nbytes
                else:
                    assert found.dtype == torch_dtype(entry.dtype)
                    assert tuple(found.shape) == entry.sizes
                    assert tuple(sharding[entry.name]["saved_offsets"]) == entry.offsets


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_dtype_has_the_width_that_torch_gives_it(dtype):
    assert torch_dtype(dtype).itemsize == ITEM_BYTES[dtype]


def test_headers_are_split_below_the_limit(monkeypatch, tmp_path):
    limit = 8192
    monkeypatch.setattr(image, "MAX_HEADER_BYTES", limit)
    sources = _sources([(f"model.layers.{i}.weight", "F32", (3, 2)) for i in range(100)] + [("model.layers.7.weight", "F32", (3, 2))])
    images = lay_out(sources)
    _check_images(images, sources)
    assert len(images) > 3
    assert all(len(one.header) <= limit for one in images), [len(one.header) for one in images]
    for number, one in enumerate(images):
        (tmp_path / str(number)).write_bytes(one.header + bytes(one.data_bytes))
        with safe_open(tmp_path / str(number), framework="np") as file:
            assert len(file.keys()) == len(one.entries)


@pytest.mark.parametrize("name", ["w", "model." + "x" * 500, "é" * 300, "𝄞" * 300, '"' * 300], ids=["short", "long", "accents", "clefs", "quotes"])
def test_the_estimate_of_an_entry_covers_what_its_header_spends(name, monkeypatch):
    """Else a file's header could pass the limit that readers have."""
    shape, count = (123_456, 123_456, 16, 16), 2000
    sources = [Source(i, f"{i:05d}{name}", "BF16", shape, shape, 2) for i in range(count)]
    monkeypatch.setattr(image, "MAX_HEADER_BYTES", 100_000)
    images = lay_out(sources)
    assert len(images) > 1
    assert max(len(one.header) for one in images) < 200_000, "readers refuse 100 MB, the limit is 50 MB"


def test_a_rank_that_writes_nothing_has_no_file():
    assert lay_out([]) == []


def test_an_empty_tensor_has_an_entry_of_no_bytes(tmp_path):
    sources = _sources([("a", "F32", (0, 3)), ("b", "F32", (2,)), ("c", "I8", (0,))])
    (one,) = lay_out(sources)
    (tmp_path / "x").write_bytes(one.header + bytes(one.data_bytes))
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert {name: tuple(file.get_tensor(name).shape) for name in ("a", "b", "c")} == {"a": (0, 3), "b": (2,), "c": (0,)}
