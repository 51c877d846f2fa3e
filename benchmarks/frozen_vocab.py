"""Whole training steps of a model whose vocabulary was extended: the rows that were there stay frozen, in the embedding and the head.

A step is forward, backward, clip_grad_norm_, fused AdamW and zero_grad. hook: all rows are parameters, and a hook on each gradient clones
it and zeroes what belongs to frozen rows; hook_compiled: with torch.compile of the loss; peft: PEFT's trainable tokens, which leave out
the head's bias. Each is a process of its own, in turns. Ids and targets are random over the whole vocabulary.

Peaks are the kernel's (VmHWM), reset after the first step, which makes the moments; beyond the process's memory before there was a model,
but after steps of a tiny one, for the code. ``process_`` figures are of the whole processes. FLOPs are those of the head's forward and
backward. Drift is the largest change of any frozen element, of weights and bias, over 100 steps of a small model.

--gpu: the same in bf16, with a bias, and its parts, on a GPU; also Liger's head with the hook. Milliseconds are medians by CUDA events, each
after a write of more than the cache holds. ``peak_mb`` is all allocated memory, ``beyond_mb`` what the part added. A share is the time that the
bytes or FLOPs that must be would take, at the rates of one copy and one large matrix product of the same GPU, over the measured one.
cross_entropy is the kernel alone, forward and backward on whole logits.
"""

import ctypes
import gc
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Result, Row, main, median, status_bytes
from benchmarks.vocab_peers import PEERS, Peer, Size, peers, versions

_TINY = Size(64, 32, 16, 8)
_SMALL = Size(2_400, 1_200, 128, 256)
_FULL = Size(24_000, 12_000, 1_280, 1_024)
_MEASURED = {"peak": "peak_mb", "process_peak": "process_peak_mb", "seconds": "seconds"}
"""The columns, by what their figures are called."""
_MB = 1e6


def _alone(measure: Callable[..., Any], *args: Any) -> Any:
    """In a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(measure, *args).result()


def measure_steps(name: str, size: Size, steps: int) -> Row:
    _begin()
    tiny = PEERS[name](_TINY, torch.float32, "cpu")
    for _ in range(2):
        tiny.step(*_TINY.batch("cpu"))
    del tiny
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status_bytes("VmRSS")
    peer, (ids, target) = PEERS[name](size, torch.float32, "cpu"), size.batch("cpu")
    loss = peer.step(ids, target).item()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from the present
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        peer.step(ids, target)
        seconds.append(time.perf_counter() - began)
    peak = status_bytes("VmHWM")
    row: Row = {"method": name, "tokens": size.N, "seconds": median(seconds), "peak_mb": (peak - before) / _MB, "process_peak_mb": peak / _MB}
    return row | {"optimizer_mb": peer.optimizer_bytes() / _MB, "loss": loss}


def measure_drift(name: str, steps: int) -> Row:
    """The largest change of a frozen and of a trained element."""
    _begin()
    peer, batch = PEERS[name](_SMALL, torch.float32, "cpu"), _SMALL.batch("cpu")
    before = [[t.detach().clone() for t in tensors] for tensors in (peer.frozen, peer.trained)]
    for _ in range(steps):
        peer.step(*batch)
    now = peer.frozen, peer.trained
    frozen, trained = (max((b - a).abs().max().item() for a, b in zip(*pair, strict=True)) for pair in zip(before, now, strict=True))
    return {"drift": frozen, "trained_change": trained}


def head_flops(name: str, size: Size) -> int:
    """Counted on tensors without storage."""
    peer = PEERS[name](size, torch.float32, "meta")
    x, target = torch.empty(size.N, size.D, device="meta", requires_grad=True), torch.empty(size.N, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        peer.head(x, target).backward()
    return counter.get_total_flops()


def _begin() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def measure(quick: bool) -> Result:
    size, tokens, rounds = (_SMALL, (256, 1_024), 1) if quick else (_FULL, (1_024, 4_096), 3)
    names, found = peers("cpu"), {}
    for i in range(rounds):
        for count in tokens:
            for name in names[:: 1 if i % 2 == 0 else -1]:
                found.setdefault((name, count), []).append(_alone(measure_steps, name, replace(size, N=count), 2))
    rows: dict[tuple[str, int], Row] = {}
    for name in names:
        drift = _alone(measure_drift, name, 100)
        for count in tokens:
            medians = {column: median([run[column] for run in found[name, count]]) for column in _MEASURED.values()}
            rows[name, count] = {**found[name, count][0], **medians, **drift, "packages": versions(name)}
            if name in ("ours", "hook"):
                rows[name, count]["head_gflop"] = head_flops(name, replace(size, N=count)) / 1e9
    return list(rows.values()), _figures(rows, names, tokens)


def _figures(rows: dict[tuple[str, int], Row], names: list[str], tokens: tuple[int, int]) -> dict[str, float]:
    ours, hook = rows["ours", tokens[0]], rows["hook", tokens[0]]
    figures = {
        "flops_over_hook": ours["head_gflop"] / hook["head_gflop"],
        "optimizer_bytes_over_hook": ours["optimizer_mb"] / hook["optimizer_mb"],
        "frozen_drift": ours["drift"],
        **{f"{_prefix(name)}drift": rows[name, tokens[0]]["drift"] for name in names if name != "ours"},
        "trained_change": ours["trained_change"],
        "loss_difference": max(abs(rows["ours", count]["loss"] - rows["hook", count]["loss"]) for count in tokens),
    }
    for name in [name for name in names if name != "hook"]:
        for count in tokens:
            for what, column in _MEASURED.items():
                figures[f"{_prefix(name)}{what}_{count}_over_hook"] = rows[name, count][column] / rows["hook", count][column]
    return figures


def _prefix(name: str) -> str:
    return {"ours": "", "hook_compiled": "compiled_"}.get(name, f"{name}_")


# ---------------------------------------------------------------------- on a GPU

_SIZES = {"S": Size(24_000, 12_000, 1_280, 8_192), "S_odd": Size(24_001, 12_001, 1_280, 8_192), "L": Size(256_000, 128_000, 4_096, 16_384)}
_FLUSH_BYTES = 512 * 2**20
_WHOLE_ROW = 32_768
"""As many logits of a token stay on the chip, so that they are read once."""

Part = tuple[Callable[[], Any], Callable[[Any], Any]]
"""What is not measured, and what is, of what the former returned."""


def rates(device: str, copied: int = 2**30, width: int = 8_192) -> dict[str, float]:
    """``bytes`` read and written, and ``flops``, a millisecond."""
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    into, square = torch.empty_like(source), torch.randn(width, width, dtype=torch.bfloat16, device=device)
    copy = _milliseconds((lambda: None, lambda _: into.copy_(source)), device, 20)
    product = _milliseconds((lambda: None, lambda _: square @ square), device, 20)
    return {"bytes": 2 * copied / copy, "flops": 2 * width**3 / product}


def measure_parts(name: str, size: Size, device: str, rounds: int) -> list[Row]:
    _begin()
    peer, (ids, target) = PEERS[name](size, torch.bfloat16, device), size.batch(device)
    rows = []
    for part, what in _parts(peer, size, ids, target).items():
        row: Row = {"method": name, "part": part}
        try:
            for _ in range(5):
                what[1](what[0]())
            row |= {"ms": _milliseconds(what, device, rounds), **_peak(what, device)}
        except torch.OutOfMemoryError:
            row["out_of_memory"] = True
        rows.append({**row, "packages": versions(name)})
        peer.forget()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _parts(peer: Peer, size: Size, ids: Tensor, target: Tensor) -> dict[str, Part]:
    """The whole step first: it makes the moments, which are there while its parts are measured."""
    like = {"dtype": torch.bfloat16, "device": ids.device}

    def embed() -> tuple[Tensor, Tensor]:
        peer.forget()
        return peer.embed(ids), torch.ones(size.N, size.D, **like)

    def inputs() -> Tensor:
        peer.forget()
        return torch.rand(size.N, size.D, **like).requires_grad_()

    def gradients() -> None:
        for parameter in peer.trained:
            parameter.grad = torch.full_like(parameter, 1e-3)

    parts: dict[str, Part] = {
        "whole": (peer.forget, lambda _: peer.step(ids, target)),
        "embedding_backward": (embed, lambda given: given[0].backward(given[1])),
        "head": (inputs, lambda x: peer.head(x, target).backward()),
        "optimizer": (gradients, lambda _: peer.update()),
    }
    if not size.ignored:  # ours never sees ignored tokens
        parts["cross_entropy"] = (lambda: torch.randn(size.N, peer.width, **like), lambda logits: peer.cross_entropy(logits, target))
    return parts


def _milliseconds(part: Part, device: str, rounds: int) -> float:
    """The median, after a fourth as many to warm up."""
    prepare, act = part
    if device != "cuda":
        return 1000 * median([_seconds(act, prepare()) for _ in range(rounds)])
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    found = []
    for _ in range(rounds // 4 + rounds):
        given = prepare()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(4):
            flush.zero_()  # the cache is cold, and the host runs ahead: launches are not measured unless they take longer than this
        begin.record()
        act(given)
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
        del given  # before the next is made
    return median(found[rounds // 4 :])


def _seconds(act: Callable[[Any], Any], given: Any) -> float:
    began = time.perf_counter()
    act(given)
    return time.perf_counter() - began


def _peak(part: Part, device: str) -> Row:
    if device != "cuda":
        return {}
    given = part[0]()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    part[1](given)
    peak = torch.cuda.max_memory_allocated()
    return {"peak_mb": peak / _MB, "beyond_mb": (peak - before) / _MB}


def floors(size: Size, rate: dict[str, float]) -> dict[str, float]:
    """Milliseconds for what must be, of each part, in bf16. A head's gradients cost 2 N V D and 2 N R D. Of logits each is read, once where
    a row stays on the chip and else twice, and its gradient written. A trained element has weight, gradient and two moments read, all but
    the gradient written, and the gradient read once before, for the norm."""
    R, kept, passes = size.V - size.base, size.kept, 2 if size.V <= _WHOLE_ROW else 3
    found = {
        "embedding_backward": 2 * (R * size.D + size.N * size.D * R / size.V) / rate["bytes"],
        "cross_entropy": 2 * passes * kept * size.V / rate["bytes"],
        "optimizer": 2 * 8 * (2 * R * size.D + R) / rate["bytes"],
    }
    found["head"] = (4 * kept * size.V * size.D + 2 * kept * R * size.D) / rate["flops"] + found["cross_entropy"]
    found["whole"] = found["embedding_backward"] + found["head"] + found["optimizer"]
    return found


def measure_on(device: str, sizes: dict[str, Size], names: list[str], rounds: int, rate: dict[str, float]) -> Result:
    rows, figures = [], {"copy_gb_per_second": rate["bytes"] / 1e6, "gemm_tflops": rate["flops"] / 1e9}
    for size_name, full in sizes.items():
        for ignored in (0.0, 0.5):
            size, prefix = replace(full, ignored=ignored), f"{size_name}_half" if ignored else size_name
            floor, ms = floors(size, rate), {}
            for name in names:
                for row in _alone(measure_parts, name, size, device, rounds):
                    rows.append({"size": size_name, "ignored": ignored, **row})
                    if "ms" in row:
                        ms[name, row["part"]] = row["ms"]
                        rows[-1]["share"] = floor[row["part"]] / row["ms"]
            for (name, part), value in ms.items():
                if name == "ours":
                    figures[f"{prefix}_{part}_share"] = floor[part] / value
                elif ("ours", part) in ms:
                    figures[f"{prefix}_{part}_speedup_over_{name}"] = value / ms["ours", part]
    return rows, figures


def measure_gpu(quick: bool) -> Result:
    if not torch.cuda.is_available():
        raise SystemExit(f"--gpu needs a CUDA device; torch {torch.__version__} finds none")
    sizes = {"S": _SIZES["S"]} if quick else _SIZES
    rows, figures = measure_on("cuda", sizes, peers("cuda"), 20, _alone(rates, "cuda"))
    return [*rows, {"size": _alone(torch.cuda.get_device_name), "packages": versions("ours")}], figures


if __name__ == "__main__":
    main(measure, __doc__, gpu=measure_gpu)
