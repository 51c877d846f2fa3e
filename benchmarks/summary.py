"""One table of all figures that ``make bench`` left in benchmarks/results, with the target of each that has one, and where and with
what they were measured."""

import argparse
import glob
import json
import os
from typing import Any

from benchmarks.harness import Row, table

_RESULTS = os.path.join(os.path.dirname(__file__), "results")

TARGETS: dict[str, dict[str, str]] = {
    "tiny_tensors": {"save_ratio_dcp": ">= 20", "load_ratio_dcp": ">= 20"},
    "memory": {
        "peak_save_over_shard": "<= 2.05",
        "peak_load_over_run": "<= 1",
        "rss_growth_mb": "<= 8",
        "fd_growth": "<= 0",
        "shm_growth_mb": "<= 1",
        "staging_images": "<= 2",
    },
    "stall": {"blocked_over_memcpy": "<= 1.2", "blocked_over_dcp_thread": "<= 0.2", "first_over_second_save": "<= 2"},
    "stall_tiny": {"tiny_worst_step_ms": "<= 20"},
    "hostile": {"tracebacks": "<= 0", "control_characters": "<= 0", "over_time": "<= 0", "over_memory": "<= 0"},
    "crash": {"torn_visible": "<= 0", "committed_lost": "<= 0"},
    "interference": {"steps_ratio": ">= 0.9"},
    "throughput": {"save_over_raw": ">= 0.9", "load_over_raw": ">= 0.8", "load_over_dcp": ">= 2"},
    "reshard": {"worst_read_amplification": "<= 1.05"},
    "incremental": {"later_bytes_over_trainable": "<= 1.05", "max_difference": "<= 0"},
    "frozen_vocab": {
        "flops_over_hook": "<= 0.83334",
        "peak_1024_over_hook": "<= 0.6",
        "peak_4096_over_hook": "<= 0.4",
        "optimizer_bytes_over_hook": "<= 0.5",
        "frozen_drift": "<= 0",
    },
    "frozen_vocab_gpu": {
        "S_whole_speedup_over_hook": ">= 1.8",
        "L_whole_speedup_over_hook": ">= 1.5",
        "S_half_whole_speedup_over_hook": ">= 3",
        "S_embedding_backward_speedup_over_hook": ">= 3",
        "L_embedding_backward_speedup_over_hook": ">= 6",
        "S_optimizer_share": ">= 0.85",
        "L_cross_entropy_share": ">= 0.8",
        "L_head_share": ">= 0.85",
        "S_head_speedup_over_liger": ">= 1.1",
        "S_whole_speedup_over_peft": ">= 1.5",
    },
    "matrix": {"cells_failed": "<= 0", "cells_unexpected": "<= 0"},
    "state_zoo": {"wrong": "<= 0", "refused_later": "<= 0", "exact_share": ">= 0.95"},
    "state_fuzz": {"different": "<= 0", "crashed": "<= 0"},
    "sampler": {"bytes_per_sample": "<= 16"},
}
"""By benchmark and figure. All other figures are only reported."""


def rows(results: dict[str, dict[str, Any]]) -> list[Row]:
    found: list[Row] = []
    for name in sorted({*results, *TARGETS}):
        figures, targets = results.get(name, {}).get("figures", {}), TARGETS.get(name, {})
        for figure in [*figures, *(figure for figure in targets if figure not in figures)]:
            value, target = figures.get(figure), targets.get(figure, "")
            found.append({"benchmark": name, "figure": figure, "value": "not measured" if value is None else value, "target": target})
            found[-1]["met"] = "" if not target or value is None else "yes" if is_met(value, target) else "NO"
    return found


def is_met(value: float, target: str) -> bool:
    relation, limit = target.split()
    return value <= float(limit) if relation == "<=" else value >= float(limit)


def measured_on(results: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each machine with its versions, and what was measured there."""
    names: dict[str, list[str]] = {}
    for name, result in sorted(results.items()):
        machine, versions = result["machine"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        line = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; {versions}"
        names.setdefault(line, []).append(name)
    return [f"{line}: {'all' if len(names) == 1 else ', '.join(measured)}" for line, measured in names.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", default=_RESULTS, help="where the JSON files are")
    results = {}
    for path in glob.glob(os.path.join(parser.parse_args().folder, "*.json")):
        with open(path) as file:
            results[os.path.basename(path).removesuffix(".json")] = json.load(file)
    found = rows(results)
    print(table(found))
    judged = [row["met"] for row in found if row["met"]]
    print(f"\n{judged.count('yes')} of {len(judged)} targets met\n" + "\n".join(measured_on(results)))


if __name__ == "__main__":
    main()
