"""What nobody trains, on several ranks: linked while the ranks hold it alike, written anew where they no longer do, and always right."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.pool import Pools
from engine.format.safetensors import decode_header
from engine.storage import LocalStorage
from engine.transfer.verify import verify
from tests.dist import reuse
from tests.dist.rows import BASE, ROWS

FROZEN = "model.frozen.weight"


def steps_of(run: Path) -> list[Path]:
    return sorted(run.glob("step_*"))


def inodes(step: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in step.glob("frozen.*")}


def boxes_in(step: Path, pattern: str) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Every tensor's name in files, with the offsets and sizes of its box."""
    found = []
    for path in sorted(step.glob(pattern)):
        data = path.read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        found += [(entry.name, entry.offsets, entry.sizes) for entry in decode_header(header, path.name)]
    return found


def names_in(step: Path, pattern: str) -> set[str]:
    return {name for name, _, _ in boxes_in(step, pattern)}


def assert_sound(*steps: Path) -> None:
    for step in steps:
        assert verify(LocalStorage(step.parent), step.name) == []


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("engine", "world", "behind"), [("fsdp2", 2, 0), ("zero3", 2, 2), ("zero2", 3, 0), ("ddp", 3, 2)], ids=str)
def test_frozen_weights_are_linked_and_a_resume_goes_on_linking(pools: Pools, tmp_path, engine, world, behind):
    run = tmp_path / "run"
    found = pools[world].run(reuse.save_steps, engine, str(run), 1, 4, behind=behind)
    again = pools[world].run(reuse.save_steps, engine, str(run), 4, 6, resume="latest", behind=behind)
    steps = steps_of(run)
    assert_sound(*steps)
    assert len({tuple(sorted(inodes(step).items())) for step in steps}) == 1
    assert all(names_in(step, "frozen.*.safetensors") == {FROZEN} for step in steps)
    assert FROZEN not in names_in(steps[0], "rank_*.safetensors")
    for rank in range(world):
        (first, linked), *later = found[rank]["bytes"]
        assert not linked
        assert first >= later[0][0]
        assert all(reused for _, reused in later + again[rank]["bytes"])
    assert sum(reused for _, reused in (rank["bytes"][1] for rank in found)) == sum(path.stat().st_size for path in steps[0].glob("frozen.*"))
    assert again[0]["difference"] == 0.0
    assert_same(again[0]["resumed"], found[0]["states"][3])

    shutil.copytree(steps[2], tmp_path / "alone" / steps[2].name)
    shutil.rmtree(run)
    assert_sound(tmp_path / "alone" / steps[2].name)
    alone = pools[world].run(reuse.save_steps, engine, str(tmp_path / "alone"), 4, 4, resume="latest")[0]
    assert_same(alone["resumed"], found[0]["states"][3])
    tolerance = 1e-6 if engine == "ddp" else 0  # which sums in another order before it has rebuilt its buckets
    assert alone["losses"] == pytest.approx(found[0]["losses"], rel=tolerance, abs=0)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_the_world_may_change_in_mid_run(pools: Pools, tmp_path, engine):
    states, first = {}, 1
    for world in (2, 3, 1):
        found = pools[world].run(reuse.save_steps, engine, str(tmp_path), first, first + 3, resume="latest" if first > 1 else "")[0]
        if first > 1:
            assert found["step"] == first - 1
            assert found["difference"] == 0.0
            assert_same(found["resumed"], states[first - 1])
            (_, linked), *later = found["bytes"]
            assert not linked, "cut otherwise, it is another file"
            assert all(reused for _, reused in later)
        states |= found["states"]
        first += 3
    steps = steps_of(tmp_path)
    assert len(steps) == 9
    assert_sound(*steps)
    for i in range(0, 9, 3):
        assert inodes(steps[i]) == inodes(steps[i + 2])
        assert names_in(steps[i], "frozen.*.safetensors") == {FROZEN}
    for step in (1, 3, 4, 9):  # saved on 2, 2, 3 and 1
        loaded = pools[2].run(reuse.save_steps, engine, str(tmp_path), 0, 0, resume=f"step:{step}", more=0)[0]
        assert_same(loaded["resumed"], states[step])


@pytest.mark.parametrize(("engine", "world", "behind"), [("fsdp2", 2, 0), ("zero3", 2, 0), ("ddp", 3, 0), ("fsdp2", 3, 2)])
def test_an_average_leaves_the_frozen_files_on_all_ranks_at_once(pools: Pools, tmp_path, engine, world, behind):
    found = pools[world].run(reuse.save_steps, engine, str(tmp_path), 1, 7, ema=True, behind=behind)
    steps = steps_of(tmp_path)
    assert_sound(*steps)
    still = {FROZEN, f"ema.{FROZEN}"}
    assert [f"ema.model.{name}" in names_in(steps[behind + 1], "frozen.*.safetensors") for name in ("gain", "norm.weight")] == [True] * 2
    for step in steps[behind + 2 :]:
        assert names_in(step, "frozen.*.safetensors") == still
    assert len({tuple(sorted(inodes(step).items())) for step in steps[behind + 2 :]}) == 1
    for step in (1, behind + 2, behind + 3, 6):
        loaded = pools[world].run(reuse.save_steps, engine, str(tmp_path), 0, 0, resume=f"step:{step}", more=0, ema=True)[0]
        assert loaded["difference"] == 0.0
        assert_same(loaded["resumed"], found[0]["states"][step])


def test_links_may_fail_on_one_rank_alone(pools: Pools, tmp_path):
    found = pools[2].run(reuse.save_where_one_rank_cannot_link, str(tmp_path), 1)
    assert [bool(reused) for _, reused in found[0]] == [False, True, True, True]
    assert [bool(reused) for _, reused in found[1]] == [False, True, False, True]
    assert_sound(*steps_of(tmp_path))


def test_after_one_rank_failed_the_ranks_still_agree_on_what_is_frozen(pools: Pools, tmp_path):
    errors = pools[2].run(reuse.save_where_one_rank_fails_to_capture, str(tmp_path), 1)
    assert not any(errors[0])
    assert [bool(error) for error in errors[1]] == [number == 3 for number in range(1, 9)]
    steps = steps_of(tmp_path)
    assert [int(step.name[5:]) for step in steps] == [1, 2, 4, 5, 6, 7, 8]
    assert_sound(*steps)
    assert names_in(steps[-1], "frozen.*.safetensors") == {FROZEN, f"ema.{FROZEN}"}


@pytest.mark.parametrize(("engine", "dtype"), [("ddp", "fp32"), ("zero1", "bf16"), ("zero3", "fp32"), ("fsdp2", "fp32")])
def test_frozen_rows_are_linked_and_trainable_ones_beside_them_are_not(pools: Pools, tmp_path, engine, dtype):
    losses = pools[2].run(reuse.save_rows, engine, str(tmp_path), dtype)[0]
    steps = steps_of(tmp_path)
    assert_sound(*steps)
    assert len({tuple(sorted(inodes(step).items())) for step in steps}) == 1
    assert inodes(steps[0])
    weights = {"model.embed.weight", "model.head.weight", "model.head.bias"}
    assert names_in(steps[3], "frozen.*.safetensors") == weights
    kept = {name: [(o[0], o[0] + s[0]) for n, o, s in boxes_in(steps[3], "frozen.*.safetensors") if n == name] for name in weights}
    own = {name: [(o[0], o[0] + s[0]) for n, o, s in boxes_in(steps[3], "rank_*.safetensors") if n == name] for name in weights}
    for name in weights:
        assert (min(a for a, _ in kept[name]), max(b for _, b in kept[name])) == (0, BASE)
        assert (min(a for a, _ in own[name]), max(b for _, b in own[name])) == (BASE, ROWS)
    loaded = pools[2].run(reuse.load_rows, engine, str(tmp_path), dtype)[0]
    assert loaded["difference"] == 0.0
    assert loaded["losses"] == losses


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_stock_pytorch_loads_a_step_with_linked_files(pools: Pools, tmp_path, engine):
    pools[2].run(reuse.save_for_stock, engine, str(tmp_path))
    step, expected = tmp_path / "step_00000002", f"{tmp_path}/expected.pt"
    assert names_in(step, "frozen.*.safetensors") == {FROZEN}
    assert all(path.stat().st_nlink == 2 for path in step.glob("frozen.*"))
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "stock_reader.py"), str(step), expected]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(r), "WORLD_SIZE": "2", "RENDEZVOUS": f"{tmp_path}/rendezvous"} for r in range(2)]
    processes = [subprocess.Popen(command, env=clean | extra, stderr=subprocess.PIPE, text=True) for extra in [*ranks, {}]]
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
