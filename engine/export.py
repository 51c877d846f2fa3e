"""Export: one model of a step as an ordinary file, with the names of its state dict. Torch is imported for pickled files only."""

import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, NamedTuple

import numpy as np

from engine.catalog import find
from engine.errors import CheckpointCorrupt, StorageError, UsageError
from engine.format.dtypes import ITEM_BYTES, STORED_AS_BYTES
from engine.format.layout import LogicalTensor
from engine.format.manifest import MANIFEST
from engine.format.names import METADATA
from engine.format.record import decode_record
from engine.format.safetensors import HEADER_ALIGN_BYTES, READ_HEADER_BYTES
from engine.state.boxes import Box, flat_to_boxes, shift
from engine.state.places import Places
from engine.storage import LocalStorage
from engine.transfer.stored import StoredCheckpoint
from engine.transfer.values import WINDOW_ELEMENTS, raw_type, read_box

SAFETENSORS, PICKLED = ".safetensors", (".pt", ".pth", ".bin")


FREE_BYTES, GROWTH = 1 << 28, 16
"""An export has at most 256 MiB more than as many times the bytes of the step's files."""


class Exported(NamedTuple):
    """What was written: how many tensors, and their bytes without the header."""

    tensors: int
    size_bytes: int


class _Model(NamedTuple):
    """By key of its state dict: its tensors, widest elements first, and further names of tied ones with the key that each is tied to."""

    tensors: dict[str, LogicalTensor]
    aliases: dict[str, str]


_Pieces = Iterator[tuple[str, memoryview]]
"""The bytes of all elements, verified: tensor by tensor, in row-major order, a window at a time, each with its key."""


def export_model(
    run: str | os.PathLike[str], what: str, path: str | os.PathLike[str], *, member: str | None = None, overwrite: bool = False
) -> Exported:
    """Write a model of the step that ``what`` names in ``run`` to ``path``, under the keys of the model's own state dict.

    Args:
        run: the run's folder.
        what: ``latest``, ``best``, ``epoch:N``, ``step:N`` or the path of a step, as for :meth:`~engine.Checkpointer.resume`.
        path: the file. ``.safetensors`` is streamed, 2²⁰ elements at a time; a tied weight is there once, with its further names in the
            metadata, as Hugging Face has it. ``.pt``, ``.pth`` and ``.bin`` are ``torch.save`` of a dict of tensors, held in memory
            whole; tied weights share their storage.
        member: which model, where the run has several.
        overwrite: whether a file at ``path`` may be replaced.

    Parameters have the dtype of the checkpoint: the fp32 master where training kept one. Persistent buffers are rank 0's. Every byte read is
    verified, and what is declared absent has its fill value. The file appears when it is complete and durable. One process, any engine.

    Raises what :func:`engine.catalog.find` does, :class:`CheckpointCorrupt` for damage, :class:`UsageError` for a path or member that
    cannot be taken, and :class:`StorageError` where the file cannot be written. Then nothing is left at ``path`` but what was there.
    """
    return export_step(StoredCheckpoint(*find(run, what)), path, member, overwrite)


def export_step(
    stored: StoredCheckpoint, path: str | os.PathLike[str], member: str | None, overwrite: bool, on_bytes: Callable[[int], object] = lambda _: None
) -> Exported:
    """As :func:`export_model`. ``on_bytes`` is told of bytes as they are verified."""
    target = os.path.abspath(os.fspath(path))
    _check_target(target, overwrite)
    model = _model(stored, member)
    _check_size(stored, model, os.path.dirname(target))
    write = _write_safetensors if target.endswith(SAFETENSORS) else _write_pickled
    with _created(target) as file:
        write(file, model, _pieces(stored, model, on_bytes))
    return Exported(len(model.tensors), sum(tensor.size_bytes for tensor in model.tensors.values()))


def _check_target(path: str, overwrite: bool) -> None:
    if not path.endswith((SAFETENSORS, *PICKLED)):
        raise UsageError(f"{path} is to be written as what? Its name should end in {SAFETENSORS}, or in {', '.join(PICKLED)} for torch.load")
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} is not a folder; make it, or export to another one")
    if os.path.lexists(os.path.join(folder, MANIFEST)):
        raise UsageError(f"{folder} is a checkpoint, which holds nothing but its own files; export to another folder")
    if os.path.isdir(path) or (os.path.lexists(path) and not overwrite):
        raise UsageError(
            f"{path} is there already; give another name{'' if os.path.isdir(path) else ', or --overwrite (overwrite=True) to replace it'}"
        )


def _check_size(stored: StoredCheckpoint, model: _Model, folder: str) -> None:
    """Before anything is written: a few bytes may declare any number of elements absent, or lay all tensors over the same bytes."""
    size_bytes = sum(tensor.size_bytes for tensor in model.tensors.values())
    most = FREE_BYTES + GROWTH * stored.size_on_disk()
    if size_bytes > most:
        raise CheckpointCorrupt(
            f"{stored.where}: the model would be {size_bytes} bytes as one file; from the files of this step come at most {most}. "
            "Tensors are declared absent, or share their bytes, as no save leaves them. Restore the step from a copy"
        )
    free = shutil.disk_usage(folder).free
    if size_bytes > free:
        raise StorageError(f"the model is {size_bytes} bytes, of which {folder} has room for {free}; nothing was written")


def _model(stored: StoredCheckpoint, member: str | None) -> _Model:
    prefix, own = _prefix(stored, member)
    keys = {name: own.get(key, key) for name in (*stored.tensors, *stored.manifest.aliases) if (key := _key(name, prefix)) is not None}
    if METADATA in keys.values():
        raise CheckpointCorrupt(f"{stored.where}: a parameter or buffer has the key {METADATA}, which no save leaves")
    if len(set(keys.values())) < len(keys):
        raise CheckpointCorrupt(f"{stored.where}: parameters, buffers and tied names of the model are called the same")
    found = [name for name in stored.tensors if name in keys]
    found.sort(key=lambda name: (-ITEM_BYTES[stored.tensors[name].dtype], keys[name]))  # aligned; and the same file whatever engine saved it
    tied = sorted((keys[alias], keys[name]) for alias, name in stored.manifest.aliases.items() if alias in keys and name in keys)
    return _Model({keys[name]: stored.tensors[name] for name in found}, dict(tied))


def _prefix(stored: StoredCheckpoint, member: str | None) -> tuple[str, dict[str, str]]:
    """Return what the names of the model's tensors begin with, before ``model.`` and ``buffers.``; and by FQN the keys of its own state
    dict where they differ."""
    record = decode_record(stored.manifest.record)
    models = record.get("models") if isinstance(record, dict) else None
    if not isinstance(models, dict):
        raise CheckpointCorrupt(f"{stored.where}: its state record is not as this version writes it")
    if member is None and len(models) == 1:
        (member,) = models
    if member not in models:
        asked = "which one is not said" if member is None else f"none is called {member!r}"
        raise UsageError(f"{stored.where} has these models: {', '.join(map(repr, models)) or 'none'}; {asked}. Name one by --member (member=)")
    own = models[member].get("keys", {}) if isinstance(models[member], dict) else None
    if not isinstance(own, dict) or not all(isinstance(text, str) for pair in own.items() for text in pair):
        raise CheckpointCorrupt(f"{stored.where}: its state record is not as this version writes it")
    return f"{member}." if member else "", own


def _key(name: str, prefix: str) -> str | None:
    for kind in ("model.", "buffers."):
        if name.startswith(prefix + kind):
            return name.removeprefix(prefix + kind)
    return None


def _pieces(stored: StoredCheckpoint, model: _Model, on_bytes: Callable[[int], object]) -> _Pieces:
    for key, tensor in model.tensors.items():
        numel, places = math.prod(tensor.shape), Places(tensor)
        for start in range(0, numel, WINDOW_ELEMENTS):
            for box in flat_to_boxes(tensor.shape, start, min(start + WINDOW_ELEMENTS, numel)):
                data = memoryview(_read(stored, tensor, places, box).reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]  # as in state/shard
                yield key, data
                on_bytes(len(data))


def _read(stored: StoredCheckpoint, tensor: LogicalTensor, places: Places, box: Box) -> np.ndarray:
    found = np.empty(box.sizes, raw_type(tensor.dtype))
    for part, common in places.overlapping(box):  # they tile the tensor: seen to when the step was opened
        inner = shift(common, box.offsets, -1)
        place = tuple(slice(o, o + n) for o, n in zip(inner.offsets, inner.sizes, strict=True))
        found[place] = read_box(stored, tensor, part, common)
    return found


def _write_safetensors(file: BinaryIO, model: _Model, pieces: _Pieces) -> None:
    entries, end = {}, 0
    for key, tensor in model.tensors.items():
        if tensor.dtype in STORED_AS_BYTES:
            raise UsageError(f"{key} is of {tensor.dtype}, for which safetensors has no type that all readers know; export to a {PICKLED[0]} file")
        entries[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (end, end + tensor.size_bytes)}
        end += tensor.size_bytes
    if "format" in model.aliases:
        raise UsageError(f"a tied tensor is called format, which a safetensors file needs for itself; export to a {PICKLED[0]} file")
    metadata = {**model.aliases, "format": "pt"}
    text = json.dumps({METADATA: metadata, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    padded = -(-(8 + len(text)) // HEADER_ALIGN_BYTES) * HEADER_ALIGN_BYTES
    if padded - 8 > READ_HEADER_BYTES:
        raise UsageError(f"the names of the model's tensors are {padded} bytes, more than safetensors takes; export to a {PICKLED[0]} file")
    file.write(struct.pack("<Q", padded - 8) + text.ljust(padded - 8))
    for _, data in pieces:
        file.write(data)


def _write_pickled(file: BinaryIO, model: _Model, pieces: _Pieces) -> None:
    import torch

    from engine.state.shard import bytes_of, torch_dtype

    state = {key: torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device="cpu") for key, tensor in model.tensors.items()}
    unfilled = {key: bytes_of(tensor.view(-1).view(torch.uint8)) for key, tensor in state.items()}
    for key, data in pieces:
        unfilled[key][: len(data)] = data
        unfilled[key] = unfilled[key][len(data) :]
    try:
        torch.save({**state, **{alias: state[key] for alias, key in model.aliases.items()}}, file)
    except RuntimeError as e:  # after a write that failed, closing its archive fails too
        if isinstance(e.__context__, OSError):
            raise e.__context__ from None
        raise


@contextmanager
def _created(path: str) -> Iterator[BinaryIO]:
    """A file that has its name only once it is complete and durable. After an error nothing of it is left."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        LocalStorage(folder).sync_folder("")
    except BaseException as e:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(e, OSError):
            raise StorageError(f"cannot write {path}: {e.strerror or e}; nothing of it is left") from e
        raise
