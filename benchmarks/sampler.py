"""What a position in 100 million samples costs: memory, the time to the first batch of an epoch, and the time to the first batch after a
resume in the middle of one. Beside torch's DistributedSampler, whose epoch is skipped through, and torchdata's StatefulDataLoader.

Each is measured in a process of its own, on one rank, without workers: what a loader does besides is the same for all.
"""

import itertools
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import Result, Row, main, status_bytes

SAMPLES, QUICK_SAMPLES, BATCH, SEED = 100_000_000, 2_000_000, 1024, 3


class Numbers:
    """A map-style data set that costs nothing."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def _elastic(data: Numbers) -> tuple[Callable[[], Any], Callable[[int], Any]]:
    from torch.utils.data import DataLoader

    from engine import ElasticSampler

    sampler = ElasticSampler(data, BATCH, seed=SEED, rank=0, world_size=1)

    def seek(batches: int) -> Any:
        other = ElasticSampler(data, BATCH, seed=SEED, rank=0, world_size=1)
        other.load_state_dict(sampler.state_dict())
        other.seek(batches * BATCH)
        return next(iter(DataLoader(data, batch_sampler=other)))  # type: ignore[arg-type]

    return lambda: next(iter(DataLoader(data, batch_sampler=sampler))), seek  # type: ignore[arg-type]


def _distributed(data: Numbers) -> tuple[Callable[[], Any], Callable[[int], Any]]:
    from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

    def batches() -> BatchSampler:
        return BatchSampler(DistributedSampler(data, num_replicas=1, rank=0, seed=SEED), BATCH, drop_last=True)  # type: ignore[arg-type]

    return lambda: next(iter(DataLoader(data, batch_sampler=batches()))), lambda count: next(itertools.islice(batches(), count, None))  # type: ignore[arg-type]


def _stateful(data: Numbers) -> tuple[Callable[[], Any], Callable[[int], Any]]:
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> StatefulDataLoader[Any]:
        return StatefulDataLoader(data, BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(SEED))  # type: ignore[arg-type]

    def seek(batches: int) -> Any:
        first = loader()
        iterator = iter(first)
        next(iterator)
        state = first.state_dict()
        del iterator, first
        # as if it had been saved there; to go there would take as long again
        state["_num_yielded"] = state["_sampler_iter_yielded"] = batches
        if isinstance(inner := state.get("_sampler_iter_state"), dict) and "samples_yielded" in inner:
            inner["samples_yielded"] = batches * BATCH
        other = loader()
        other.load_state_dict(state)
        began = time.perf_counter()
        next(iter(other))
        return time.perf_counter() - began

    return lambda: next(iter(loader())), seek


KINDS = {"elastic": _elastic, "distributed": _distributed, "stateful": _stateful}


def _measure(kind: str, samples: int, answers: Any) -> None:
    import torch

    torch.set_num_threads(1)
    first, seek = KINDS[kind](Numbers(samples))
    KINDS[kind](Numbers(2 * BATCH))[0]()  # whatever is imported or made once
    before, began = status_bytes("VmRSS"), time.perf_counter()
    first()
    seconds = time.perf_counter() - began
    grown = status_bytes("VmHWM") - before
    began = time.perf_counter()
    found = seek(samples // BATCH // 2)
    seek_seconds = found if isinstance(found, float) else time.perf_counter() - began
    answers.put({"kind": kind, "bytes_per_sample": grown / samples, "first_batch_seconds": seconds, "seek_seconds": seek_seconds})


def measure(quick: bool) -> Result:
    samples, rows = QUICK_SAMPLES if quick else SAMPLES, list[Row]()
    context = multiprocessing.get_context("spawn")
    for kind in KINDS:
        answers = context.Queue()
        process = context.Process(target=_measure, args=(kind, samples, answers))
        process.start()
        rows.append(answers.get(timeout=580))
        process.join()
    ours, *peers = rows
    figures = {"samples": float(samples), **{name: value for name, value in ours.items() if name != "kind"}}
    for peer in peers:
        figures |= {f"{name}_{peer['kind']}": value for name, value in peer.items() if name != "kind"}
    return rows, figures


if __name__ == "__main__":
    main(measure, __doc__)
