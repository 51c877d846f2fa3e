"""Many small tensors: 5,000 × 1 KiB under real names, saved and loaded against DCP's FileSystemWriter and FileSystemReader.

One process, both sides with fsync, seconds as the median of interleaved pairs. Also the bytes on disk over the payload, there and
for tensors of 4 MiB.
"""

import itertools
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from benchmarks.harness import Result, interleaved, main, median
from engine import Checkpointer, Progress

_LEAVES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LEAVES += ("input_layernorm", "post_attention_layernorm")


class Many(nn.Module):
    """``count`` parameters of ``numel`` floats, named as in a Llama checkpoint."""

    def __init__(self, count: int, numel: int) -> None:
        super().__init__()
        for name in itertools.islice(_names(), count):
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(leaf, nn.Parameter(torch.randn(numel)))


def _names() -> Iterator[str]:
    for layer in itertools.count():
        for leaf in _LEAVES:
            yield f"layers.{layer}.{leaf}.weight"


class _Ours:
    def __init__(self, folder: str, model: nn.Module) -> None:
        self.folder = f"{folder}/ours"
        self.checkpointer = Checkpointer(self.folder, model)
        self.step = 0

    def save(self) -> float:
        self.step += 1
        began = time.perf_counter()
        self.checkpointer.save(Progress(step=self.step))
        self.checkpointer.wait()
        seconds = time.perf_counter() - began
        if self.step > 1:
            shutil.rmtree(f"{self.folder}/step_{self.step - 1:08d}")
        return seconds

    def load(self) -> float:
        began = time.perf_counter()
        self.checkpointer.resume("latest")
        return time.perf_counter() - began

    def disk_bytes(self) -> int:
        return _disk_bytes(f"{self.folder}/step_{self.step:08d}")


class _Dcp:
    def __init__(self, folder: str, model: nn.Module) -> None:
        self.folder = f"{folder}/dcp"
        self.model = model

    def save(self) -> float:
        shutil.rmtree(self.folder, ignore_errors=True)
        began = time.perf_counter()
        dcp.save({"model": self.model.state_dict()}, storage_writer=dcp.FileSystemWriter(self.folder, sync_files=True), no_dist=True)
        return time.perf_counter() - began

    def load(self) -> float:
        began = time.perf_counter()
        dcp.load({"model": self.model.state_dict()}, storage_reader=dcp.FileSystemReader(self.folder), no_dist=True)
        return time.perf_counter() - began

    def disk_bytes(self) -> int:
        return _disk_bytes(self.folder)


def _disk_bytes(folder: str) -> int:
    return sum(os.path.getsize(f"{folder}/{name}") for name in os.listdir(folder))


def compare(count: int, numel: int, pairs: int) -> dict[str, float]:
    model, folder = Many(count, numel), tempfile.mkdtemp(prefix="lockstep_tiny_")
    try:
        ours, theirs = _Ours(folder, model), _Dcp(folder, model)
        first_save = ours.save()
        theirs.save()
        saves = interleaved(pairs, ours.save, theirs.save)
        loads = interleaved(pairs, ours.load, theirs.load)
        payload = count * numel * 4
        return {
            "first_save": first_save,
            "save": median(saves[0]),
            "save_dcp": median(saves[1]),
            "load": median(loads[0]),
            "load_dcp": median(loads[1]),
            "disk_over_payload": ours.disk_bytes() / payload,
            "disk_over_payload_dcp": theirs.disk_bytes() / payload,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(quick: bool) -> Result:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    torch.set_num_threads(1)
    count, pairs = (1000, 3) if quick else (5000, 7)
    tiny = compare(count, 256, pairs)
    large = compare(8 if quick else 64, 1 << 20, pairs)
    rows = [{"tensors": f"{count} × 1 KiB", **tiny}, {"tensors": f"{8 if quick else 64} × 4 MiB", **large}]
    return rows, {
        "save_ratio_dcp": tiny["save_dcp"] / tiny["save"],
        "first_save_ratio_dcp": tiny["save_dcp"] / tiny["first_save"],
        "load_ratio_dcp": tiny["load_dcp"] / tiny["load"],
        "large_save_ratio_dcp": large["save_dcp"] / large["save"],
        "large_load_ratio_dcp": large["load_dcp"] / large["load"],
        "disk_over_payload_tiny": tiny["disk_over_payload"],
        "disk_over_payload_large": large["disk_over_payload"],
    }


if __name__ == "__main__":
    main(measure, __doc__)
