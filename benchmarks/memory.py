"""Peak host memory of a save and of a load beyond what training holds, on two real ranks.

The peak is the kernel's (VmHWM, reset before each call). A save may need at most the rank's shard bytes, a load at most the
largest run of blocks that is read at once.
"""

import ctypes
import gc
import os
import re
import shutil
import tempfile
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Result, main
from benchmarks.pool import Pool
from engine import Checkpointer, Progress
from engine.plan.reads import RUN_BYTES

_LAYERS, _WIDTH = 8, 2048
_MIB = 2**20


def measure_rank(engine: str, run: str, layers: int) -> dict[str, Any]:
    """A small checkpoint first, for the code; then the first save and the first load of the large state."""
    small = Checkpointer(f"{run}_small", nn.Linear(2, 2))
    small.save(Progress(step=1))
    small.resume("latest")
    member = _build(engine, layers)
    checkpointer = Checkpointer(run, member)
    save_bytes = _peak_beyond(lambda: checkpointer.save(Progress(step=1)))
    load_bytes = _peak_beyond(lambda: checkpointer.resume("latest"))
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
    before = _status("VmRSS")
    act()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"{field}:\s+(\d+) kB", file.read())
    assert found
    return int(found[1]) * 1024


def measure(quick: bool) -> Result:
    rows, pool, folder = [], Pool(2), tempfile.mkdtemp(prefix="lockstep_memory_")
    try:
        for engine in ("fsdp2", "zero3"):
            run = os.path.join(folder, engine)
            for rank, found in enumerate(pool.run(measure_rank, engine, run, 2 if quick else _LAYERS)):
                rows.append({"engine": engine, "rank": rank, **{k.replace("_bytes", "_mib"): v / _MIB for k, v in found.items()}})
    finally:
        pool.close()
        shutil.rmtree(folder, ignore_errors=True)
    return rows, {
        "peak_save_over_shard": max(row["save_mib"] / row["shard_mib"] for row in rows),
        "peak_load_over_run": max(row["load_mib"] for row in rows) * _MIB / RUN_BYTES,
    }


if __name__ == "__main__":
    main(measure, __doc__)
