"""Large tensors at the speed of the storage: one process, 2 GiB in 64 parameters, against plain system calls, DCP and torch.save.

Everything is fsynced. raw: os.write of 16 MiB pieces out of memory that is there, and preadv of the same bytes into such memory.
A save of ours is ``save()`` and ``wait()``; torch.load is followed by ``load_state_dict``. Loads are from a warm page cache: all
files are read once before (a save need not leave them there). Medians of interleaved rounds; each deletes its files, and the disk
is idle when the next begins.
"""

import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from benchmarks.harness import Result, Row, main, median
from benchmarks.training import Weights
from engine import Checkpointer, Progress
from engine.state.shard import bytes_of

_PIECE_BYTES = 16 * 2**20


class _Raw:
    """Writes the parameters, and reads them into one buffer."""

    def __init__(self, folder: str, model: nn.Module) -> None:
        self._path = f"{folder}/raw"
        self._pieces = [bytes_of(p.detach().view(-1).view(torch.uint8)) for p in model.parameters()]
        self._into = bytes_of(torch.ones(sum(len(piece) for piece in self._pieces), dtype=torch.uint8))

    def save(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for piece in self._pieces:
            for begin in range(0, len(piece), _PIECE_BYTES):
                part = piece[begin : begin + _PIECE_BYTES]
                assert os.write(descriptor, part) == len(part)
        os.fsync(descriptor)
        os.close(descriptor)

    def load(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY)
        for begin in range(0, len(self._into), _PIECE_BYTES):
            part = self._into[begin : begin + _PIECE_BYTES]
            assert os.preadv(descriptor, [part], begin) == len(part)
        os.close(descriptor)

    def clean(self) -> None:
        os.unlink(self._path)


class _Ours:
    def __init__(self, folder: str, model: nn.Module) -> None:
        self._folder, self._step = f"{folder}/ours", 0
        self._checkpointer = Checkpointer(self._folder, model)
        self._checkpointer.prepare()

    def save(self) -> None:
        self._step += 1
        self._checkpointer.save(Progress(step=self._step))
        self._checkpointer.wait()

    def load(self) -> None:
        self._checkpointer.resume("latest")

    def clean(self) -> None:
        shutil.rmtree(f"{self._folder}/step_{self._step:08d}")

    def close(self) -> None:
        self._checkpointer.close()


class _Dcp:
    def __init__(self, folder: str, model: nn.Module) -> None:
        self._folder, self._model = f"{folder}/dcp", model

    def save(self) -> None:
        dcp.save(self._model.state_dict(), storage_writer=dcp.FileSystemWriter(self._folder, sync_files=True), no_dist=True)

    def load(self) -> None:
        dcp.load(self._model.state_dict(), storage_reader=dcp.FileSystemReader(self._folder), no_dist=True)

    def clean(self) -> None:
        shutil.rmtree(self._folder)


class _Torch:
    def __init__(self, folder: str, model: nn.Module) -> None:
        self._path, self._model = f"{folder}/torch.pt", model

    def save(self) -> None:
        with open(self._path, "wb") as file:
            torch.save(self._model.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())

    def load(self) -> None:
        self._model.load_state_dict(torch.load(self._path, weights_only=True))

    def clean(self) -> None:
        os.unlink(self._path)


def compare(folder: str, model: nn.Module, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each round's save and load; one round before is not counted."""
    ours = _Ours(folder, model)
    compared = {"raw": _Raw(folder, model), "ours": ours, "dcp": _Dcp(folder, model), "torch": _Torch(folder, model)}
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in compared}
    for i in range(-1, rounds):
        for name in list(compared)[:: 1 if i % 2 == 0 else -1]:
            torch._foreach_mul_([p.detach() for p in model.parameters()], 0.999)  # as training does
            os.sync()
            saved = _seconds(compared[name].save)
            _read_once(folder)
            loaded = _seconds(compared[name].load)
            compared[name].clean()
            if i >= 0:
                found[name][0].append(saved)
                found[name][1].append(loaded)
    ours.close()
    return found


def _seconds(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _read_once(folder: str) -> None:
    piece = bytearray(_PIECE_BYTES)
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb", buffering=0) as file:
                while file.readinto(piece):
                    pass


def measure(quick: bool) -> Result:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    logging.getLogger("engine").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model, folder = Weights(8 if quick else 64, (4096, 2048)), tempfile.mkdtemp(prefix="lockstep_throughput_")
    try:
        found = compare(folder, model, 1 if quick else 5)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    gigabytes = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    save, load = ({name: median(seconds[i]) for name, seconds in found.items()} for i in range(2))
    rows: list[Row] = [{"what": name, "save_gb_a_second": gigabytes / save[name], "load_gb_a_second": gigabytes / load[name]} for name in found]
    for row in rows:
        row |= {"save_seconds": save[row["what"]], "load_seconds": load[row["what"]]}
    return rows, {
        "save_over_raw": save["raw"] / save["ours"],
        "load_over_raw": load["raw"] / load["ours"],
        "save_over_dcp": save["dcp"] / save["ours"],
        "load_over_dcp": load["dcp"] / load["ours"],
        "save_over_torch": save["torch"] / save["ours"],
        "load_over_torch": load["torch"] / load["ours"],
    }


if __name__ == "__main__":
    main(measure, __doc__)
