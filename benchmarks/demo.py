"""One run through three engines: ZeRO-2 on two ranks, killed in the middle of an epoch; ZeRO-3 on one rank; FSDP2 on two.

Each part is the recipe under DeepSpeed's launcher, as a user starts it. ``--check_resume`` compares every restored tensor with
the files on disk, read by the safetensors package.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

RECIPE = "recipes/causvid.py"
CAPTIONS, BATCH = 96, 16  # captions an epoch, and a step of all ranks together
STEPS_PER_EPOCH = CAPTIONS // BATCH
KILL_AT_STEP = 2 * STEPS_PER_EPOCH + STEPS_PER_EPOCH // 2
TIMEOUT_SECONDS = 180
_LOSS = re.compile(r"epoch (\d+) step (\d+) generator_loss (\S+) critic_loss (\S+)")
_DIFFERENCE = re.compile(r"largest difference of any restored tensor: (\S+)")
_RESUMED = re.compile(r"resumed \S*/(step_\d+) \((.*?)\)")


@dataclass
class Part:
    """What one launch printed."""

    engine: str
    ranks: int
    saved_by: str = "—"
    resumed: str = "fresh"
    difference: str = "—"
    losses: list[tuple[int, int, float]] = field(default_factory=list)  # epoch, step, critic loss
    ended: str = "finished"

    def read(self, line: str) -> None:
        if found := _LOSS.search(line):
            self.losses.append((int(found[1]), int(found[2]), float(found[4])))
        elif found := _DIFFERENCE.search(line):
            self.difference = found[1]
        elif found := _RESUMED.search(line):
            self.resumed, self.saved_by = found[1], found[2]


def launch(run: str, part: Part, epochs: int, *, resume: bool, kill_at: int | None = None) -> Part:
    command = ["deepspeed", "--num_gpus", str(part.ranks), RECIPE, "--experiment_dir", run, "--engine", part.engine]
    command += ["--num_epochs", str(epochs), "--batch_size", str(BATCH // part.ranks), "--max_captions", str(CAPTIONS), "--log_iters", "1"]
    command += ["--resume", "latest", "--check_resume"] if resume else ["--teacher_steps", "100"]
    print("\n$ " + " ".join(command), flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    last: list[str] = []
    for line in _lines(process):
        last = [*last[-30:], line]
        part.read(line)
        if not line.startswith(("[20", "/", "  ")) and "warn" not in line.lower():  # launchers' logs; warnings and the lines they quote
            print("  " + line, flush=True)
        if kill_at is not None and part.losses and part.losses[-1][1] >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
            part.ended = f"killed in epoch {part.losses[-1][0]}, after step {part.losses[-1][1]}"
            print(f"  … all processes killed (SIGKILL) after step {part.losses[-1][1]}, in the middle of epoch {part.losses[-1][0]}", flush=True)
            kill_at = None
    code = process.wait(TIMEOUT_SECONDS)
    if code and part.ended == "finished":
        raise SystemExit(f"demo: the launcher exited with {code}; its last lines:\n" + "\n".join(last))
    return part


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """The output until it ends; a launch that takes too long is killed, and said to be."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    assert process.stdout is not None
    for line in process.stdout:
        yield line.rstrip()
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise SystemExit(f"demo: a launch took longer than {TIMEOUT_SECONDS} s; killed")


def show(parts: list[Part]) -> None:
    table = Table(title="One run, three engines", title_justify="left")
    for column in ("resumed from", "saved by", "now under", "ranks", "largest difference", "critic loss, first → last step", "ended"):
        table.add_column(column)
    for part in parts:
        (_, first, loss), (_, last, loss_last) = part.losses[0], part.losses[-1]
        losses = f"{loss:.4f} (step {first}) → {loss_last:.4f} (step {last})"
        table.add_row(part.resumed, part.saved_by, part.engine, str(part.ranks), part.difference, losses, part.ended)
    Console(width=150).print(table)
    print(
        "Every restored tensor equals the stored one to the bit. A step that is run again on a different number of ranks has a loss that\n"
        "differs in the last digits: each rank draws its own noise, and sums are taken in a different order (docs/reproducibility.md)."
    )


def check(parts: list[Part]) -> None:
    """What the table should show; anything else fails the demo."""
    killed, *resumed = parts
    assert killed.ended.startswith("killed"), killed
    previous = 2 * STEPS_PER_EPOCH  # the last step that was saved before the kill
    for part in resumed:
        assert float(part.difference) == 0.0, part
        assert part.losses[0][1] == previous + 1, (part.losses[0], previous)
        previous = part.losses[-1][1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", default="runs/demo", help="the run's folder; an earlier one is replaced")
    args = parser.parse_args()
    shutil.rmtree(args.run, ignore_errors=True)
    began = time.monotonic()
    parts = [
        launch(args.run, Part("zero2", 2), 4, resume=False, kill_at=KILL_AT_STEP),
        launch(args.run, Part("zero3", 1), 3, resume=True),
        launch(args.run, Part("fsdp2", 2), 4, resume=True),
    ]
    print()
    show(parts)
    check(parts)
    print(f"\n{time.monotonic() - began:.0f} s. The run is in {args.run}: `engine ls {args.run}` lists its steps, TensorBoard reads {args.run}/logs.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
