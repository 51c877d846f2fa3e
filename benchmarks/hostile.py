"""Hostile checkpoints under right checksums: every reader ends in an answer or an error of ours,
soon, in little memory.

Small real checkpoints are changed in structure (``benchmarks.forge``): numbers at their extremes,
hostile text, lists repeated and emptied, types and layouts exchanged. Each is given to ``ls``,
``show``, ``verify``, ``diff``, ``export`` and a resume, in processes with limits. ``accepted`` and
``refused`` count readers that answered or raised an :class:`EngineError`. None may end in a
traceback, show a control character or a line that is not its own, or pass the limits. Some seeds
make nothing that can be written; they are not counted. ``--first N --inputs 1`` is one input again.
"""

import contextlib
import io
import logging
import multiprocessing as mp
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.forge import FORGED, Forgery
from benchmarks.harness import Result, Row, main, status_bytes
from engine.cli import main as command
from engine.errors import EngineError

INPUTS, QUICK_INPUTS = 10_000, 300
LIMIT_SECONDS, LIMIT_BYTES = 2.0, 400_000_000
"""Of CPU for one reader of one input, and by how much a process may grow for it."""
_BATCH, _WAIT_SECONDS = 250, 1800.0
_OUTCOMES = (
    "accepted",
    "refused",
    "tracebacks",
    "control_characters",
    "over_time",
    "over_memory",
)


class _TooLong(BaseException):
    """Whatever catches exceptions lets it pass."""


def _plain(seed: int) -> dict[str, Any]:
    """Members of a small run: a model with its optimizer and schedule, and an object with state."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    module(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {
        "model": (module, optimizer, scheduler),
        "average": torch.optim.swa_utils.AveragedModel(module),
    }


def _frozen(seed: int) -> dict[str, Any]:
    """A model that is frozen in part, whole layers and rows of a weight."""
    import torch
    from torch import nn

    class Rows(nn.Module):
        row_parts = {"weight": ("base", "added")}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.base, self.added = (
                nn.Parameter(torch.rand(5, 4), requires_grad=False),
                nn.Parameter(torch.rand(3, 4)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.cat([self.base, self.added]).T

    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 4), Rows())
    module[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    module(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return {"model": (module, optimizer)}


SUBJECTS: dict[str, Callable[[int], dict[str, Any]]] = {"plain": _plain, "frozen": _frozen}


def make_subjects(folder: Path) -> None:
    """Two steps of a run of each."""
    from engine import Checkpointer, Progress

    for name, build in SUBJECTS.items():
        checkpointer = Checkpointer(
            folder / name,
            max_in_flight=0,
            monitor="loss",
            config={"width": 3, "experiment_name": name},
            **build(0),
        )
        for step in (1, 2):
            checkpointer.save(
                Progress(step=step, epoch=1, samples=8 * step),
                metrics={"loss": 1 / step, "accuracy": 0.5},
            )


class _Readers:
    """Every reader of one subject's run, of which step 2 is forged."""

    def __init__(self, folder: Path, name: str) -> None:
        self.build, self.run = SUBJECTS[name], folder / name
        self.step = self.run / "step_00000002"
        self.forgery = Forgery(self.step)
        self._sound = {path.name: path.read_bytes() for path in self.step.iterdir()}
        target, out = str(self.step), str(folder / f"{name}.safetensors")
        self.commands = {
            "ls": ["ls", str(self.run)],
            "show": ["show", target],
            "show --json": ["show", "--json", target],
            "best": ["show", f"{self.run}@best"],
            "verify": ["verify", target],
            "diff": ["diff", target, str(self.run / "step_00000001")],
            "export": [
                "export",
                target,
                out,
                "--overwrite",
                *(["--member", "model"] if name == "plain" else []),
            ],
        }

    @contextlib.contextmanager
    def forged(self, files: dict[str, bytes]) -> Iterator[None]:
        for name, data in files.items():
            (self.step / name).write_bytes(data)
        try:
            yield
        finally:
            for name in files:
                if name in self._sound:
                    (self.step / name).write_bytes(self._sound[name])
                else:
                    (self.step / name).unlink()

    def resume(self) -> int:
        from engine import Checkpointer

        checkpointer = Checkpointer(self.run, max_in_flight=0, config={}, **self.build(1))
        progress = checkpointer.resume("step:2")
        assert 0 <= progress.step < 10**18
        assert min(progress.epoch, progress.samples, progress.stale) >= 0
        return 0

    def all(self) -> Iterator[tuple[str, Callable[[], int]]]:
        for name, arguments in self.commands.items():
            yield name, lambda arguments=arguments: command(arguments)
        yield "resume", self.resume


def read(act: Callable[[], int]) -> tuple[set[str], str]:
    """Let one reader read; return what came of it, and what it showed."""
    shown, seen, told = io.StringIO(), logging.StreamHandler(), logging.getLogger("engine")
    seen.setStream(shown)
    told.handlers, told.propagate = [seen], False
    told.setLevel(logging.INFO)
    _reset_peak()
    before, began, outcomes = status_bytes("VmRSS"), time.process_time(), set[str]()
    signal.setitimer(signal.ITIMER_PROF, 2 * LIMIT_SECONDS)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            outcomes.add("accepted" if act() in (0, 1) else "refused")
    except EngineError as e:
        outcomes.add("refused")
        shown.write(str(e))
    except _TooLong:
        outcomes.add("over_time")
    except MemoryError:
        shown.write(ascii(traceback.format_exc()[-1500:]))
        outcomes.add("over_memory")
    except BaseException:  # noqa: BLE001 - what this looks for
        outcomes.add("tracebacks")
        shown.write(ascii(traceback.format_exc()[-1500:]))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    text = shown.getvalue()
    if time.process_time() - began > LIMIT_SECONDS:
        outcomes.add("over_time")
    if status_bytes("VmHWM") - before > LIMIT_BYTES:
        outcomes.add("over_memory")
    if any(line.startswith(FORGED) or not line.isprintable() for line in text.split("\n")):
        outcomes.add("control_characters")
    return outcomes, text


def _reset_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def read_all(folder: str, seeds: range, now: Any, found: Any) -> None:
    """In a process of its own: a row for each input and reader with an outcome that may not be, and
    how many had each."""
    signal.signal(signal.SIGPROF, _too_long)
    limit = status_bytes("VmSize") + 16 * LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    readers = [_Readers(Path(folder), name) for name in SUBJECTS]
    for one in readers:  # what is imported or made once counts for no input
        for _, act in one.all():
            read(act)
    for seed in seeds:
        now.value = seed
        one = readers[seed % len(readers)]
        try:
            files = one.forgery.forge(seed)
        except ValueError:
            continue
        with one.forged(files):
            for name, act in one.all():
                outcomes, text = read(act)
                found.put(
                    (
                        seed,
                        name,
                        sorted(outcomes),
                        ascii(text[-600:]) if outcomes - {"accepted", "refused"} else "",
                    )
                )
    found.put(None)


def _too_long(*_: Any) -> None:
    raise _TooLong


def _batches(folder: str, seeds: range) -> Iterator[tuple[int, str, list[str], str]]:
    """Each batch in a process, so that what one input leaves behind is not the next one's."""
    context = mp.get_context("spawn")
    while seeds:
        batch, found, now = seeds[:_BATCH], context.SimpleQueue(), context.Value("q", seeds[0])
        with tempfile.TemporaryDirectory(prefix="lockstep_hostile_") as own:
            shutil.copytree(folder, own, dirs_exist_ok=True)
            process = context.Process(target=read_all, args=(own, batch, now, found))
            process.start()
            ended = time.monotonic() + _WAIT_SECONDS
            while True:
                if not found.empty():
                    if (one := found.get()) is None:
                        break
                    yield one
                elif not process.is_alive() or time.monotonic() > ended:
                    yield (
                        now.value,
                        "all",
                        ["over_time" if process.is_alive() else "tracebacks"],
                        f"the process ended with {process.exitcode}",
                    )
                    batch = batch[: now.value - batch[0] + 1]
                    break
                else:
                    time.sleep(0.01)
            process.kill()
            process.join()
        seeds = seeds[len(batch) :]


def measure(quick: bool, inputs: int | None = None, first: int = 0) -> Result:
    began, rows = time.perf_counter(), dict[str, Row]()
    count = inputs or (QUICK_INPUTS if quick else INPUTS)
    seen = set[int]()
    with tempfile.TemporaryDirectory(prefix="lockstep_hostile_") as folder:
        make_subjects(Path(folder))
        for seed, reader, outcomes, text in _batches(folder, range(first, first + count)):
            row = rows.setdefault(reader, {"reader": reader, "inputs": 0, **dict.fromkeys(_OUTCOMES, 0), "seeds": {}})
            seen.add(seed)
            row["inputs"] += 1
            for outcome in outcomes:
                row[outcome] += 1
                if outcome not in ("accepted", "refused") and len(row["seeds"].setdefault(outcome, [])) < 5:
                    row["seeds"][outcome].append([seed, text])
    totals = {outcome: sum(row[outcome] for row in rows.values()) for outcome in _OUTCOMES}
    return list(rows.values()), {
        "inputs": len(seen),
        **totals,
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    main(
        measure,
        __doc__,
        shown=("reader", "inputs", *_OUTCOMES),
        options={"inputs": (int, "how many inputs"), "first": (int, "the seed of the first")},
    )
