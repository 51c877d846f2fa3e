"""Peak host memory of a save and of a load beyond what training holds, on two real ranks; and what many saves leave behind.

The peak is the kernel's (VmHWM, reset before each call). A save may need at most the rank's shard bytes, a load at most the
largest run of blocks that is read at once.

Many saves: 200 in one process, as fast as they are taken. From the 20th to the last, when both are durable: growth of resident
memory and of open descriptors, of the trainer and of all its child processes, and of /dev/shm with anonymous files in memory
(memfd). ``staging_images`` is the largest number of such files that the trainer had open or mapped after any save.
"""

import contextlib
import ctypes
import gc
import logging
import os
import shutil
import tempfile
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Result, main, status_bytes
from benchmarks.pool import Pool
from engine import Checkpointer, Progress
from engine.plan.reads import RUN_BYTES

_LAYERS, _WIDTH = 8, 2048
_MIB = 2**20


def measure_rank(engine: str, run: str, layers: int) -> dict[str, Any]:
    """A small checkpoint first, for the code; then the first save and the first load of the large state."""
    small = Checkpointer(f"{run}_small", nn.Linear(2, 2))
    small.save(Progress(step=1))
    small.wait()
    small.resume("latest")
    small.close()
    member = _build(engine, layers)
    checkpointer = Checkpointer(run, member)

    def save() -> None:
        checkpointer.save(Progress(step=1))
        checkpointer.wait()

    save_bytes = _peak_beyond(save)
    load_bytes = _peak_beyond(lambda: checkpointer.resume("latest"))
    checkpointer.close()
    return {"shard_bytes": _local_bytes(member), "save_bytes": save_bytes, "load_bytes": load_bytes}


def _build(engine: str, layers: int) -> Any:
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers)))
    if engine == "zero3":
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
        }
        config["zero_force_ds_cpu_optimizer"] = False
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config, dist_init_required=False)
        loss = wrapped(torch.randn(2, _WIDTH)).square().mean()
        wrapped.backward(loss)
        wrapped.step()
        return wrapped
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, _WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _local_bytes(member: Any) -> int:
    from engine.state.member import Member
    from engine.state.pick import adapter_for

    shards = Member("", adapter_for("model", member), torch.distributed.get_rank()).shards()
    return sum(local.numel() * local.element_size() for shard in shards for local in shard.locals if local is not None)


def _peak_beyond(act: Any) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that training freed must not count as there already
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from the present
    before = status_bytes("VmRSS")
    act()
    return status_bytes("VmHWM") - before


# ---------------------------------------------------------------------- many saves


def measure_many(run: str, saves: int) -> list[dict[str, Any]]:
    """What is held after each of ``saves``, and at the 20th and the last also when it is durable."""
    logging.getLogger("engine").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    checkpointer, rows = Checkpointer(run, model, keep_last=2), []
    checkpointer.prepare()
    for step in range(1, saves + 1):
        torch._foreach_mul_([p.detach() for p in model.parameters()], 0.999)  # as training does
        checkpointer.save(Progress(step=step))
        images = len(_memfds("self"))
        if step in (20, saves):
            checkpointer.wait()
            gc.collect()
            rows.append({"saves": step, **_held()})
        rows.append({"saves": step, "images": images})
    checkpointer.close()
    return rows


def _held() -> dict[str, float]:
    """By this process and its children."""
    found, sizes = [os.getpid(), *_children(os.getpid())], {}
    for process in found:
        sizes |= _memfds(process)
    shm = os.statvfs("/dev/shm")
    return {
        "processes": len(found),
        "rss_mb": sum(status_bytes("VmRSS", process) for process in found) / 1e6,
        "descriptors": sum(len(os.listdir(f"/proc/{process}/fd")) for process in found),
        "shm_mb": ((shm.f_blocks - shm.f_bfree) * shm.f_frsize + sum(sizes.values())) / 1e6,
    }


def _children(process: int) -> list[int]:
    """And theirs."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[1]) == process:
                found += [int(name), *_children(int(name))]
    return found


def _memfds(process: int | str) -> dict[int, int]:
    """The bytes of each, by inode: open ones, and what is mapped of those that are not."""
    sizes: dict[int, int] = {}
    with open(f"/proc/{process}/maps") as file:
        for line in file:
            addresses, *_, inode, path = f"{line.strip()} -".split(maxsplit=5)
            if path.startswith("/memfd:"):
                first, last = (int(address, 16) for address in addresses.split("-"))
                sizes[int(inode)] = sizes.get(int(inode), 0) + last - first
    for name in os.listdir(f"/proc/{process}/fd"):
        path = f"/proc/{process}/fd/{name}"
        with contextlib.suppress(OSError):
            if os.readlink(path).startswith("/memfd:"):
                found = os.stat(path)
                sizes[found.st_ino] = found.st_blocks * 512
    return sizes


def measure(quick: bool) -> Result:
    rows, pool, folder = [], Pool(2), tempfile.mkdtemp(prefix="lockstep_memory_")
    try:
        many = measure_many(os.path.join(folder, "many"), 40 if quick else 200)
        for engine in ("fsdp2", "zero3"):
            run = os.path.join(folder, engine)
            for rank, found in enumerate(pool.run(measure_rank, engine, run, 2 if quick else _LAYERS)):
                rows.append({"engine": engine, "rank": rank, **{k.replace("_bytes", "_mib"): v / _MIB for k, v in found.items()}})
    finally:
        pool.close()
        shutil.rmtree(folder, ignore_errors=True)
    early, late = (row for row in many if "rss_mb" in row)
    figures = {
        "peak_save_over_shard": max(row["save_mib"] / row["shard_mib"] for row in rows),
        "peak_load_over_run": max(row["load_mib"] for row in rows) * _MIB / RUN_BYTES,
        "rss_growth_mb": late["rss_mb"] - early["rss_mb"],
        "fd_growth": late["descriptors"] - early["descriptors"],
        "shm_growth_mb": late["shm_mb"] - early["shm_mb"],
        "staging_images": max(row["images"] for row in many if "images" in row),
    }
    return [*rows, early, late], figures


if __name__ == "__main__":
    main(measure, __doc__, ("engine", "rank", "shard_mib", "save_mib", "load_mib", "saves", "processes", "rss_mb", "descriptors", "shm_mb"))
