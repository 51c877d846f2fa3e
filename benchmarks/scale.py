"""Thousands of ranks in one process: what planning, committing and resharding cost beside the bytes of the state themselves.

The state is a model of 10,000 parameters with Adam's three states each (benchmarks/imagined.py), under FSDP2, HSDP, ZeRO-1/2 and
ZeRO-3. Plans, indexes, manifests and reads are the engine's own, of sampled ranks one after the other; a commit's rounds run
against a real TCPStore, all other ranks in a second process. No tensor has storage.
"""

import contextlib
import gc
import multiprocessing as mp
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from benchmarks.harness import Result, Row, main
from benchmarks.imagined import LAYOUTS, STEP, Loaded, begin, describe, manifest, plan_save, reshard, shapes, write_index
from engine.format.checksum import DIGEST_BYTES
from engine.format.manifest import IndexEntry, encode_manifest
from engine.storage import LocalStorage
from engine.sync import Ranks, Store, _Report, compare
from engine.transfer import replicas
from engine.transfer.commit import commit_attempt

_SHOWN = (
    "what",
    "layout",
    "world",
    "params",
    "rank",
    "seconds",
    "cpu_seconds",
    "root_mb",
    "index_mb",
    "calls_a_rank",
    "over_needed",
    "header_mb",
    "reads",
)
_MB = 1e6


# ---------------------------------------------------------------------- plans


def plans(layout: str, world: int, count: int, samples: int) -> Row:
    """Rank 0's and the middle rank's first save, and the indexes of ``samples`` more. Seconds are those of the slower rank, each the
    better of two tries: the machine has other work. The sum of indexes is rank 0's, which has the small replicated tensors, and the
    others' mean times their number."""
    tensors = describe(layout, world, count)
    with _folder() as storage:
        attempt = begin(storage)
        timed = [min((plan_save(tensors, rank) for _ in range(2)), key=lambda planned: planned.seconds) for rank in (0, world // 2)]
        plan, written = timed[0].plan, {planned.rank: write_index(planned, storage, attempt) for planned in timed}
        for rank in {(2 * i + 1) * world // (2 * samples) for i in range(samples)} - written.keys():
            written[rank] = write_index(plan_save(tensors, rank, plan), storage, attempt)
        entries = {rank: entry for rank, (entry, _) in written.items()}
        root = encode_manifest(manifest(plan, list(shapes(count)), world, attempt, entries))
    others = statistics.mean(entry.size_bytes for rank, entry in entries.items() if rank)
    return {
        "what": "plan", "layout": layout, "world": world, "params": count, "seconds": max(planned.seconds for planned in timed),
        "cpu_seconds": max(planned.cpu_seconds for planned in timed),
        "index_seconds": max(seconds for _, seconds in written.values()), "root_mb": len(root) / _MB,
        "index_mb": (entries[0].size_bytes + others * (world - 1)) / _MB, "index_mb_rank0": entries[0].size_bytes / _MB, "sampled": len(entries),
    }  # fmt: skip


# ---------------------------------------------------------------------- rounds


class CountingStore:
    """Counts calls, the bytes of keys and values, and the seconds from a look in vain to the next that was not."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()
        self.bytes = 0
        self.waited = 0.0
        self._since: float | None = None

    def set(self, key: str, value: bytes, /) -> None:
        self._count("set", key, value)
        self._store.set(key, value)

    def get(self, key: str, /) -> bytes:
        return self._count("get", key, self._store.get(key))

    def check(self, keys: list[str], /) -> bool:
        self._count("check", *keys)
        found, now = self._store.check(keys), time.perf_counter()
        if not found:
            self._since = self._since or now
        elif self._since is not None:
            self.waited, self._since = self.waited + now - self._since, None
        return found

    def compare_set(self, key: str, expected: bytes, desired: bytes, /) -> bytes:
        self._count("compare_set", key, desired)
        return self._count("", self._store.compare_set(key, expected, desired))

    def delete_key(self, key: str, /) -> bool:
        self._count("delete_key", key)
        return self._store.delete_key(key)

    def has_extended_api(self) -> bool:
        return self._store.has_extended_api()

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        self._count("multi_get", *keys)
        found = self._store.multi_get(keys)
        self._count("", *found)
        return found

    def _count(self, call: str, *sent: Any) -> Any:
        if call:
            self.calls[call] += 1
        self.bytes += sum(map(len, sent))
        return sent[-1]


def agreement() -> dict[str, Any]:
    """What each rank reports of a save that all agree on, as the checkpointer words it."""
    digest = bytes(DIGEST_BYTES)
    alike = {"are at another [epoch, step, samples]": [1, STEP, 10**6], "have other tensors, shapes or layouts": digest}
    alike |= {"have other optimizer settings, schedules or counters": digest, "have another state of data": digest}
    shared = {"Mesh(shape=(4096,), first=0, strides=(), ranks=())(-1,)[-1]": digest}
    return {"alike": alike, "shared": shared, "index": [1_200_000, digest, 1_200_000_000]}


def agreed(reports: list[dict[str, Any]]) -> list[str]:
    compare([report["alike"] for report in reports])
    return replicas.drifted([report["shared"] for report in reports])


ROUNDS = [("save", agreement())]
"""What a rank other than rank 0 reports in a save, round by round."""


class Others:
    """All ranks but rank 0, one after the other where they would act at once: they report, then read the decision."""

    def __init__(self, store: Store, world: int) -> None:
        self._ranks = [Ranks(rank, world, store) for rank in range(1, world)]

    def report(self, what: str, value: Any) -> None:
        for rank in self._ranks:
            rank._number += 1
            rank._report(what, _Report(what, value))

    def conclude(self) -> None:
        for rank in self._ranks:
            rank._await(rank.timeout_seconds, True)
            rank._tidy()


def _be_the_others(port: int, pipe: Connection) -> None:
    """In a process of its own: takes a world size, plays a save, answers with calls and bytes."""
    while world := pipe.recv():
        store = _counting(dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False), world)
        others = Others(store, world)
        pipe.send("ready")
        for what, value in ROUNDS:
            others.report(what, value)
            others.conclude()
        pipe.send((sum(store.calls.values()), store.bytes))


def _counting(store: Any, world: int) -> CountingStore:
    return CountingStore(dist.PrefixStore(f"lockstep-{world}", store))  # a name space for each save


def commits(worlds: Sequence[int], count: int) -> list[Row]:
    """Rank 0's part of a save but for its own shards, timed from the first report to the decision that the step is committed."""
    host = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_be_the_others, args=(host.port, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its death is seen
    try:
        return [_commit(world, count, host, pipe) for world in worlds]
    finally:
        pipe.send(0)
        process.join(10)


def _commit(world: int, count: int, host: Any, pipe: Connection) -> Row:
    plan, names, store = plan_save(describe("fsdp2", world, count), 0).plan, list(shapes(count)), _counting(host, world)
    ranks = Ranks(0, world, store)
    pipe.send(world)
    assert pipe.recv() == "ready"
    with _folder() as storage, _collector_paused():
        began = time.perf_counter()
        attempt = begin(storage)

        def conclude(reports: list[dict[str, Any]]) -> list[str]:
            drifted = agreed(reports)
            entries = {rank: IndexEntry(*report["index"][:2]) for rank, report in enumerate(reports)}
            commit_attempt(storage, attempt, manifest(plan, names, world, attempt, entries))
            return drifted

        ranks.round("save", agreement, conclude, changes="committed")
        seconds = time.perf_counter() - began
    calls, size_bytes = pipe.recv()
    return {
        "what": "commit", "layout": "fsdp2", "world": world, "params": count, "seconds": seconds, "waited_seconds": store.waited,
        "calls_a_rank": calls / (world - 1), "bytes_a_rank": size_bytes / (world - 1), "calls_rank0": sum(store.calls.values()),
        "mb_rank0": store.bytes / _MB, "calls": calls + sum(store.calls.values()), "store_mb": (size_bytes + store.bytes) / _MB,
    }  # fmt: skip


# ---------------------------------------------------------------------- loads


def loads(source: tuple[str, int], target: tuple[str, int], count: int, ranks: Sequence[int]) -> list[Row]:
    with _folder() as storage, _collector_paused():
        return [_load_row(source, target, count, found) for found in reshard(storage, source, target, count, ranks)]


def _load_row(source: tuple[str, int], target: tuple[str, int], count: int, found: Loaded) -> Row:
    return {
        "what": "load", "layout": f"{source[0]} → {target[0]}", "world": f"{source[1]} → {target[1]}", "params": count, "rank": found.rank,
        "seconds": found.seconds, "cpu_seconds": found.cpu_seconds, "open_seconds": found.open_seconds,
        "over_needed": found.touched_bytes / found.needed_bytes,
        "touched_mb": found.touched_bytes / _MB, "needed_mb": found.needed_bytes / _MB, "indexes": found.indexes, "index_reads": found.index_reads,
        "header_mb": found.header_bytes / _MB, "reads": found.reads, "data_mb": found.data_bytes / _MB,
    }  # fmt: skip


@contextlib.contextmanager
def _folder() -> Iterator[LocalStorage]:
    with tempfile.TemporaryDirectory(prefix="lockstep_scale_") as folder:
        yield LocalStorage(folder)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """As in a save and a load."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(quick: bool) -> Result:
    worlds, counts = ((64, 256), (150, 500)) if quick else ((64, 512, 4096), (1000, 3000, 10_000))
    world, count = worlds[-1], counts[-1]
    with _collector_paused():
        rows = [plans(layout, w, c, 8 if (w, c) == (world, count) else 2) for layout in LAYOUTS for w in worlds for c in counts]
    rows += commits(worlds, count)
    half, few = world // 2, (16, 150) if quick else (64, 1000)
    resharded = loads(("fsdp2", world), ("fsdp2", half), count, (0, 1, half // 2 - 1, half - 1))
    rows += resharded
    rows += loads(("fsdp2", world), ("zero3", half), count, (half // 2 - 1,))
    for w in worlds[:-1]:
        rows += loads(("fsdp2", w), ("fsdp2", w // 2), count, (w // 4 - 1,))
    for source, target in (("fsdp2", "zero1"), ("zero1", "zero1"), ("zero1", "zero3"), ("zero1", "fsdp2"), ("zero3", "zero1"), ("hsdp", "zero3")):
        rows += loads((source, few[0]), (target, few[0] // 2), few[1], (few[0] // 4 - 1,))
    return rows, _figures(rows, resharded, world, count)


def _figures(rows: list[Row], resharded: list[Row], world: int, count: int) -> dict[str, float]:
    planned = {row["layout"]: row for row in rows if row["what"] == "plan" and (row["world"], row["params"]) == (world, count)}
    commit = next(row for row in rows if row["what"] == "commit" and row["world"] == world)
    ratios = [row["over_needed"] for row in resharded]
    return {
        f"plan_seconds_{world}": planned["fsdp2"]["seconds"],
        f"plan_seconds_{world}_slowest_layout": max(row["seconds"] for row in planned.values()),
        f"plan_cpu_seconds_{world}": planned["fsdp2"]["cpu_seconds"],
        f"root_mb_{world}": max(row["root_mb"] for row in planned.values()),
        f"index_mb_{world}": planned["fsdp2"]["index_mb"],
        f"rank0_seconds_{world}": commit["seconds"],
        f"rank0_waited_seconds_{world}": commit["waited_seconds"],
        "store_calls_a_rank": commit["calls_a_rank"],
        "store_bytes_a_rank": commit["bytes_a_rank"],
        f"store_calls_{world}": commit["calls"],
        f"store_mb_{world}": commit["store_mb"],
        "index_bytes_over_needed": max(ratios),
        "index_bytes_over_needed_mean": statistics.mean(ratios),
        "load_plan_seconds": max(row["seconds"] for row in resharded),
        "load_plan_cpu_seconds": max(row["cpu_seconds"] for row in resharded),
        "load_header_mb": max(row["header_mb"] for row in resharded),
        "load_reads": max(row["reads"] for row in resharded),
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


# ---------------------------------------------------------------------- plot


def plot(rows: list[Row], path: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "lockstep"  # the same file for the same rows
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    planned = [row for row in rows if row["what"] == "plan"]
    world, count = max(row["world"] for row in planned), max(row["params"] for row in planned)
    for layout in LAYOUTS:
        by_world = [row for row in planned if row["layout"] == layout and row["params"] == count]
        by_count = [row for row in planned if row["layout"] == layout and row["world"] == world]
        _curve(axes[0][0], by_world, "world", "seconds", layout)
        _curve(axes[0][1], by_count, "params", "seconds", layout)
        _curve(axes[0][2], by_count, "params", "root_mb", layout)
        _curve(axes[1][0], by_world, "world", "index_mb", layout)
    committed = [row for row in rows if row["what"] == "commit"]
    _curve(axes[1][1], committed, "world", "seconds", "all rounds and the manifest")
    _curve(axes[1][1], committed, "world", "waited_seconds", "of it waiting for reports")
    loaded = [row for row in rows if row["what"] == "load" and row["layout"] == "fsdp2 → fsdp2" and row["params"] == count]
    slowest = {row["world"]: row for row in sorted(loaded, key=lambda row: row["touched_mb"])}
    for key, told in (("touched_mb", "touched"), ("needed_mb", "needed")):
        _curve(axes[1][2], sorted(slowest.values(), key=_saved_on), _saved_on, key, told)
    titles = (
        f"seconds to plan a rank's first save, {count:,} parameters", f"the same, {world:,} ranks", f"root manifest, {world:,} ranks (MB)",
        f"all indexes, {count:,} parameters (MB)", "rank 0's seconds in a commit", "FSDP2 to half as many ranks: index MB a rank",
    )  # fmt: skip
    for ax, title, along in zip(axes.flat, titles, ("ranks", "parameters", "parameters", "ranks", "ranks", "ranks"), strict=True):
        ax.set(title=title, xlabel=along, xscale="log", ylim=(0, None))
        ax.title.set_size("medium")
        ax.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def _saved_on(row: Row) -> int:
    return int(row["world"].split()[0])


def _curve(ax: Any, rows: Sequence[Row], along: Any, key: str, label: str) -> None:
    ax.plot([along(row) if callable(along) else row[along] for row in rows], [row[key] for row in rows], marker="o", label=label)


if __name__ == "__main__":
    main(measure, __doc__, _SHOWN, plot)
