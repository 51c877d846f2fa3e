"""What a run tells the person in front of it, and TensorBoard: on rank 0 only."""

import logging
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class _Lines(logging.Handler):
    def __init__(self, journal: "Journal") -> None:
        super().__init__()
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self._journal.line(self.format(record))


class Journal:
    """Lines and a bar on a terminal, lines alone elsewhere, scalars under ``RUN/logs``; silent on other ranks."""

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._console = Console(soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._scalars: SummaryWriter | None = None
        self._lines = _Lines(self)
        self._logger = logging.getLogger("engine")
        self._level = self._logger.level
        if speaks:
            self._logger.setLevel(logging.INFO)
            self._logger.addHandler(self._lines)

    def line(self, text: str) -> None:
        if self._speaks:
            self._console.print(text, markup=False)

    def open(self, run_dir: Path, *, step: int, total_steps: int, logs: str = "") -> None:
        """Start the bar and the scalars after ``step``; scalars of later steps, left by an abandoned line, are hidden. ``logs``: a folder of
        this start's own below ``RUN/logs``."""
        if not self._speaks:
            return
        self._scalars = SummaryWriter(str(run_dir / "logs" / logs), purge_step=step + 1)
        if self._console.is_terminal:
            columns = (
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._bar.add_task("step", completed=step, total=total_steps)

    def at(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def losses(self, *, epoch: int, step: int, **losses: float) -> None:
        """Nine digits: a float32 loss is told apart from its neighbours."""
        self.line(f"epoch {epoch} step {step} " + " ".join(f"{name} {value:.9g}" for name, value in losses.items()))
        if self._scalars is not None:
            for name, value in losses.items():
                self._scalars.add_scalar(f"loss/{name}", value, step)

    def close(self) -> None:
        self._logger.removeHandler(self._lines)
        self._logger.setLevel(self._level)
        if self._bar is not None:
            self._bar.stop()
        if self._scalars is not None:
            self._scalars.close()
