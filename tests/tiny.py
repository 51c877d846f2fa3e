"""The smallest real checkpoint: one process, one linear layer with momentum, saved by a Checkpointer."""

import copy
from contextlib import closing
from pathlib import Path

import msgspec
import torch
from torch import nn

from engine import Progress
from engine.format.checksum import digest
from engine.format.manifest import RankIndex, _seal, index_name, open_index, read_manifest, read_page
from engine.storage import LocalStorage
from tests.now import Checkpointer


def make(seed=0, width=3, **changes):
    """A module and an optimizer that has taken a step. ``changes``: optimizer, dtype."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width)).to(changes.get("dtype", torch.float32))
    optimizer = changes.get("optimizer", torch.optim.AdamW)(module.parameters(), lr=0.1)
    module(torch.randn(5, 4, dtype=changes.get("dtype", torch.float32))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return module, optimizer


def train_with(module, optimizer):
    """The pair after one step."""
    module(torch.randn(5, 4)).sum().backward()
    optimizer.step()
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


def opened(step: Path, rank: int = 0) -> tuple[dict, dict]:
    """A step's manifest and a rank's index as builtins: ``summary``, ``tensors`` …; ``rank``, ``files``, ``chunks``, ``record``."""
    storage = LocalStorage(step)
    with closing(storage.open("manifest")) as reader:
        root, _ = read_manifest(reader, "manifest")
    with closing(storage.open(index_name(rank))) as reader:
        head, sealed = open_index(reader, "index")
        chunks = [chunk for page in head.pages for chunk in read_page(sealed, page, "index")]
        index = RankIndex(head.rank, head.files, tuple(chunks), sealed.page(head.record))
    return msgspec.to_builtins(root, builtin_types=(bytes,)), msgspec.to_builtins(index, builtin_types=(bytes,))


def seal_manifest(manifest: dict) -> bytes:
    """Whatever the builtins are, with right checksums."""
    body = {key: value for key, value in manifest.items() if key != "summary"}
    return _seal("manifest", msgspec.msgpack.encode(manifest["summary"]), msgspec.msgpack.encode(body))


def seal_index(index: dict, head=None) -> tuple[bytes, list]:
    """As one page, with right checksums; and the manifest's entry. ``head`` changes the head's builtins before it is sealed."""
    chunks = sorted(index["chunks"], key=lambda chunk: chunk[:2])
    page, pages = msgspec.msgpack.encode(chunks), []
    if chunks:
        pages.append([chunks[0][0], len(chunks), 0, len(page), digest(page)])
    else:
        page = b""
    record = [0, 0, len(page), len(index["record"]), digest(index["record"])]
    builtins = {"rank": index["rank"], "files": index["files"], "pages": pages, "record": record}
    if head is not None:
        head(builtins)
    encoded = msgspec.msgpack.encode(builtins)
    data = _seal("index", encoded, page + index["record"])
    return data, [len(data), digest(data[: len(data) - len(page) - len(index["record"])])]


def forge(step: Path, manifest=None, index=None, head=None) -> None:
    """Rewrite a step as an attacker would: the functions change the builtins, all checksums are made right."""
    root, chunks = opened(step)
    if index is not None or head is not None:
        if index is not None:
            index(chunks)
        data, entry = seal_index(chunks, head)
        root["indexes"] = [entry, *root["indexes"][1:]]
        (step / "rank_00000.index").write_bytes(data)
    if manifest is not None:
        manifest(root)
    (step / "manifest").write_bytes(seal_manifest(root))
