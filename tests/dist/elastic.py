"""A job under ``torchrun --max-restarts``: ``elastic.py RUN CALL AT``. Of its first incarnation a rank dies while the writer process of
rank 0 is stopped before the AT-th CALL of its commit of step 2; the second one goes on from what is there, then lets the orphan go on."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine import Checkpointer, Progress
from engine.transfer import process
from tests import faulty_writer

STEPS = 4


def main(run: str, calls: str, at: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, incarnation = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    notes = Path(run).with_name("notes")
    notes.mkdir(exist_ok=True)
    if rank == 0 and incarnation == 0:
        process.COMMAND = faulty_writer.command("stop", calls, int(at))
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    checkpointer = Checkpointer(run, model, timeout_seconds=30)
    (notes / f"writer_{incarnation}_{rank}").write_text(str(checkpointer._saves._process.pid))  # type: ignore[union-attr]
    progress = checkpointer.resume(missing="fresh")
    (notes / f"resumed_{incarnation}_{rank}").write_text(str(progress.step))
    for step in range(progress.step + 1, STEPS + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        checkpointer.save(Progress(step=step))
        if step == 1:
            checkpointer.wait()
        if incarnation == 0 and step == 2:
            writer = int((notes / "writer_0_0").read_text())
            while _state(writer) != "T":
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)
    checkpointer.wait()
    dist.barrier()
    orphan = int((notes / "writer_0_0").read_text())
    if rank == 0:
        (notes / "orphan").write_text(_state(orphan))
        os.kill(orphan, signal.SIGCONT)
        while _state(orphan) not in ("", "Z"):
            time.sleep(0.01)
    dist.barrier()
    checkpointer.close()
    dist.destroy_process_group()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
