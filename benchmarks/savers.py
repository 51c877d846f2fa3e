"""The engine and its peers behind one form: ``save`` returns when training may go on, ``wait`` when the checkpoint is durable.

All of them fsync. Every rank makes one and calls its methods in the same order; ``clean`` deletes what was saved, before the next
measurement. DCP gets the state dicts as they are (its cheapest way), a process group of its own, and in process mode a stager in
shared memory that is kept from save to save.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.training import local_tensors
from engine import Checkpointer, Progress


class Saver:
    def __init__(self, folder: str, member: Any) -> None:
        self.folder, self.member, self.step = folder, member, 0
        self._changing = [t for t in local_tensors(member) if t.ndim]

    def change(self) -> None:
        """As training does: no save finds what the last one left. Makes no objects, which a garbage collection would have to search."""
        torch._foreach_mul_(self._changing, 0.999)

    def save(self) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        """Nothing is in flight, unless a subclass says otherwise."""

    def clean(self) -> None:
        """Off the clock: what was written is deleted, and what is dirty is written."""
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.sync()
        dist.barrier()

    def close(self) -> None:
        self.wait()
        self.clean()


class Ours(Saver):
    """``attach_seconds``: until the staging image is laid out and prefaulted."""

    def __init__(self, folder: str, member: Any) -> None:
        super().__init__(folder, member)
        began = time.perf_counter()
        self._checkpointer = Checkpointer(folder, member)
        self._checkpointer.prepare()
        self.attach_seconds = time.perf_counter() - began

    def save(self) -> None:
        self.step += 1
        self._checkpointer.save(Progress(step=self.step))

    def wait(self) -> None:
        self._checkpointer.wait()

    def clean(self) -> None:
        """The run's folder stays; any step may be deleted, also the one that `latest` names."""
        if dist.get_rank() == 0:
            for name in os.listdir(self.folder):
                if name.startswith("step_"):
                    shutil.rmtree(f"{self.folder}/{name}")
            os.sync()
        dist.barrier()

    def close(self) -> None:
        self._checkpointer.close()
        self.clean()


class Dcp(Saver):
    """``dcp.save``: synchronous."""

    def __init__(self, folder: str, member: Any) -> None:
        super().__init__(folder, member)
        self._group = dist.new_group(backend="gloo")

    def _given(self) -> dict[str, Any]:
        self.step += 1
        module, optimizer = self.member
        writer = dcp.FileSystemWriter(f"{self.folder}/{self.step}", sync_files=True)
        state = {"model": module.state_dict(), "optim": optimizer.state_dict()}
        return {"state_dict": state, "storage_writer": writer, "process_group": self._group}

    def save(self) -> None:
        dcp.save(**self._given())


class DcpThread(Dcp):
    _future: Any = None

    def save(self) -> None:
        self._future = dcp.async_save(**self._given(), async_checkpointer_type=AsyncCheckpointerType.THREAD)

    def wait(self) -> None:
        if self._future is not None:
            self._future.result()

    def is_done(self) -> bool:
        return self._future is None or self._future.done()


class DcpProcess(DcpThread):
    def __init__(self, folder: str, member: Any) -> None:
        super().__init__(folder, member)
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # a pool's ranks may have no children else
        self._stager = DefaultStager(StagingOptions(False, True, False, False))
        address, os.environ["MASTER_ADDR"] = os.environ["MASTER_ADDR"], "127.0.0.1"  # the first save starts its process there
        with _no_stderr():  # on which that process tells of every save
            self.save()
            self.wait()
        os.environ["MASTER_ADDR"] = address
        self.clean()

    def save(self) -> None:
        self._future = dcp.async_save(**self._given(), async_checkpointer_type=AsyncCheckpointerType.PROCESS, async_stager=self._stager)

    def close(self) -> None:
        from torch.distributed.checkpoint import _async_process_executor

        super().close()
        self._stager.close()
        _async_process_executor._CHECKPOINT_PROCESS = None  # its end ends the process


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """For processes started meanwhile, for good."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class DeepSpeed(Saver):
    """``save_checkpoint``, which does not fsync: that is added. Rank 0 also writes the whole module."""

    def save(self) -> None:
        self.step += 1
        self.member.save_checkpoint(self.folder, tag=str(self.step))
        folder = f"{self.folder}/{self.step}"
        for path in (*(f"{folder}/{name}" for name in os.listdir(folder)), folder):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        dist.barrier()


class Memcpy(Saver):
    """No save: one copy of the rank's state into memory that is there already."""

    def __init__(self, member: Any) -> None:
        super().__init__("", member)
        self._from = local_tensors(member)
        self._into = [t.clone() for t in self._from]

    def save(self) -> None:
        torch._foreach_copy_(self._into, self._from)

    def clean(self) -> None:
        dist.barrier()
