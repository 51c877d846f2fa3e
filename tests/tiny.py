"""The smallest real checkpoint: one process, one linear layer with momentum, saved by a Checkpointer."""

import copy
from pathlib import Path

import msgspec
import torch
from torch import nn

from engine import Checkpointer, Progress
from engine.format.checksum import digest
from engine.format.manifest import IndexEntry, Manifest, RankIndex, decode, encode


def make(seed=0, width=3, **changes):
    """A module and an optimizer that has taken a step. ``changes``: optimizer, dtype."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width)).to(changes.get("dtype", torch.float32))
    optimizer = changes.get("optimizer", torch.optim.AdamW)(module.parameters(), lr=0.1)
    module(torch.randn(5, 4, dtype=changes.get("dtype", torch.float32))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return module, optimizer


def save(run, step=1, seed=0, **changes) -> Path:
    with_step = Checkpointer(run, make(seed, **changes))
    return Path(with_step.save(Progress(epoch=step, step=step, samples=8 * step)))


def state(model) -> list[tuple]:
    """Everything live, for comparing before and after."""
    module, optimizer = model
    return [copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def forge(step: Path, manifest=None, index=None) -> None:
    """Rewrite a step as an attacker would: ``manifest`` and ``index`` change the builtins, all checksums are made right."""
    root = decode((step / "manifest").read_bytes(), Manifest, "")
    entry = root.indexes[0]
    if index is not None:
        data = msgspec.to_builtins(decode((step / "rank_00000.index").read_bytes(), RankIndex, ""), builtin_types=(bytes,))
        index(data)
        raw = encode(msgspec.convert(data, RankIndex, builtin_types=(bytes,)))
        (step / "rank_00000.index").write_bytes(raw)
        entry = IndexEntry(len(raw), digest(raw))
    data = msgspec.to_builtins(root, builtin_types=(bytes,))
    data["indexes"] = [[entry.size_bytes, entry.digest]]
    if manifest is not None:
        manifest(data)
    (step / "manifest").write_bytes(encode(msgspec.convert(data, Manifest, builtin_types=(bytes,))))
