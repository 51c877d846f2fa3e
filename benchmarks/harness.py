"""What every benchmark shares: its command line, the machine it ran on, and one JSON form.

The JSON is ``{machine, versions, rows, figures: {name: number}}``.
"""

import argparse
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Row = dict[str, Any]
Result = tuple[list[Row], dict[str, float]]


def main(
    measure: Callable[..., Result],
    description: str | None,
    shown: Sequence[str] = (),
    plot: Callable[[list[Row], str], None] | None = None,
    options: Mapping[str, tuple[type, str]] | None = None,
    **others: Callable[[bool], Result],
) -> None:
    """``measure(quick)`` returns rows and figures. Prints a table of the rows' ``shown`` columns (all, if empty), then the figures.
    ``plot(rows, path)``, where there is one, draws them. ``options``: what else ``measure`` takes by name, its type, and what it is.
    Each of the ``others`` is measured instead where ``--NAME`` is given."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a smaller run of the same measurement")
    parser.add_argument("--json", metavar="FILE", help="also write everything here")
    if plot:
        parser.add_argument("--plot", metavar="FILE", help="also draw the rows here, as SVG or PNG by its ending")
    for name, other in others.items():
        parser.add_argument(f"--{name}", dest="measure", action="store_const", const=other, default=measure, help="measure this instead")
    for name, (kind, told) in (options or {}).items():
        parser.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "TEXT", help=told)
    args = parser.parse_args()
    given = {name: value for name in options or {} if (value := getattr(args, name)) is not None}
    rows, figures = (args.measure if others else measure)(args.quick, **given)
    print(table(rows, shown))
    print("\n" + "\n".join(f"{name:40} {value:.6g}" for name, value in figures.items()))
    print(f"\n{machine()['cpu']}, {machine()['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine(), "versions": versions(), "rows": rows, "figures": figures}, file, indent=1)
    if plot and args.plot:
        plot(rows, args.plot)


def table(rows: Sequence[Row], shown: Sequence[str] = ()) -> str:
    if not rows:
        return "(no rows)"
    columns = list(shown) or list(rows[0])
    cells = [columns] + [[_cell(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory / 2**30, 1), "system": platform.platform()}


def status_bytes(field: str, process: int | str = "self") -> int:
    """Of a line of /proc/PROCESS/status, such as VmRSS."""
    with open(f"/proc/{process}/status") as file:
        found = re.search(rf"{field}:\s+(\d+) kB", file.read())
    assert found, f"the kernel does not tell {field}"
    return int(found[1]) * 1024


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("lockstep", "torch", "deepspeed", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def interleaved(pairs: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Seconds of ``pairs`` runs each, taken in turns (and in alternating order), so that both see the same machine."""
    a, b = [], []
    for i in range(pairs):
        for measure, into in ((ours, a), (theirs, b)) if i % 2 == 0 else ((theirs, b), (ours, a)):
            into.append(measure())
    return a, b


median = statistics.median
