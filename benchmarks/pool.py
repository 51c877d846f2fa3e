"""Real ranks on this machine: processes in one gloo group, kept from job to job. Shared by benchmarks and tests."""

import contextlib
import glob
import multiprocessing as mp
import os
import shutil
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

_PRELOAD = ["torch", "deepspeed", "benchmarks.zoo"]


class RankFailed(Exception):
    """A job failed on some rank, or did not end in time. Carries every failing rank's traceback."""


class Pool:
    """``world_size`` processes. A job is an importable function; it runs on every rank at once with the same arguments.

    A job that fails leaves the pool usable if every rank failed or ended; one that runs over its time has its processes killed.
    What a job does to the process for good (``F.linear``, the number of threads, DeepSpeed's flag of ``torch_autocast``) ends with it:
    the next one computes as in a new process.
    """

    def __init__(self, world_size: int, timeout_seconds: float = 120.0) -> None:
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = ""

    def run(self, job: Callable[..., Any], *args: Any, timeout_seconds: float | None = None, **kwargs: Any) -> list[Any]:
        """Every rank's result, in rank order. Raises :class:`RankFailed`."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((job, args, kwargs))
        try:
            results, failures = self._results(timeout_seconds or self.timeout_seconds)
        except BaseException:  # a test's own time limit: what the ranks still answer must not be taken for the next job's
            self.close()
            raise
        if failures:
            self.close()
            raise RankFailed("\n".join(failures))
        return results

    def _results(self, limit: float) -> tuple[list[Any], list[str]]:
        results, failures = [], []
        for rank, (process, pipe) in enumerate(self._workers):
            try:
                ok, value = pipe.recv() if pipe.poll(limit) else (False, f"no answer within {limit:.0f} s")
            except EOFError:
                process.join(5)
                ok, value = False, f"the process ended with exit code {process.exitcode}"
            results.append(value)
            if not ok:
                failures.append(f"rank {rank}: {value}")
        return results, failures

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="lockstep_pool_")
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        name = uuid.uuid4().hex[:8]  # DeepSpeed names its shared memory by address and port; nothing listens there
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, self._folder, name), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        for process, pipe in self._workers:
            with contextlib.suppress(OSError, ValueError):
                pipe.close()
            process.join(0.2)
            if process.is_alive():
                process.kill()
                process.join()
        for path in glob.glob(f"/dev/shm/deepspeed_*{os.path.basename(self._folder)}*") if self._workers else []:
            os.unlink(path)
        self._workers = []
        shutil.rmtree(self._folder, ignore_errors=True)


def use_own_tools() -> None:
    """DeepSpeed's op as `make setup` built it, and this environment's ninja: another one would build it again."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
    tools = os.path.join(sys.prefix, "bin")
    if not os.environ["PATH"].startswith(tools):
        os.environ["PATH"] = f"{tools}:{os.environ['PATH']}"


def _serve(pipe: Connection, rank: int, world_size: int, folder: str, name: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR=os.path.basename(folder), MASTER_PORT="1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    use_own_tools()
    vars(mp.current_process())["_config"]["daemon"] = False  # a job may have workers of its own, a DataLoader's
    import torch
    import torch.distributed as dist

    linear = torch.nn.functional.linear
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    with contextlib.suppress(EOFError):
        while True:
            job, args, kwargs = pipe.recv()
            # Both decide in which order sums are taken. DeepSpeed's ZeRO-3 replaces F.linear for
            # good, by one that adds the bias last: on some processors its last bits differ.
            torch.nn.functional.linear = linear
            torch.set_num_threads(1)
            if autocast := sys.modules.get("deepspeed.runtime.torch_autocast"):  # set by one engine, it changes how all later ones round
                vars(autocast).update(TORCH_AUTOCAST_INITIALIZED=False, TORCH_AUTOCAST_DTYPE=None)
            try:
                answer = (True, job(*args, **kwargs))
            except BaseException:  # noqa: BLE001 - told to the parent with its traceback
                answer = (False, traceback.format_exc())
            pipe.send(answer)
    os._exit(0)  # gloo's and DeepSpeed's threads may not end on their own


class Pools:
    """One pool a world size, started when first used."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def __getitem__(self, world_size: int) -> Pool:
        return self._pools.setdefault(world_size, Pool(world_size))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools = {}
