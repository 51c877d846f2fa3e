"""Training state that is only described: a large model's shapes under any layout and world size, and ranks that save and load it
without data.

What a rank computes is the engine's own code. Two things are left out: a save's shard files (their digests are made up, as many
bytes as they would have), and a load's reads of them.
"""

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from unittest import mock

import msgspec
import torch
from msgspec import Struct

from engine import dcp
from engine.catalog.lease import take
from engine.format.checksum import DIGEST_BYTES, block_count
from engine.format.layout import REPLICATED, Flat, Grid, Layout, LogicalTensor, Mesh, Part
from engine.format.manifest import MANIFEST, IndexEntry, Line, Manifest, Summary
from engine.format.names import attempt_name, step_name
from engine.format.record import encode_record
from engine.plan import reads
from engine.plan.image import Image, ShardLayout
from engine.plan.match import Allow, match
from engine.plan.reads import Need, runs, slices
from engine.planning import GlobalPlan, make_plan
from engine.state import boxes
from engine.state.boxes import held_boxes
from engine.state.progress import Progress, capture_rng
from engine.state.shard import Shard, torch_dtype
from engine.storage import LocalStorage, Reader, Storage
from engine.transfer import read, write
from engine.transfer.commit import commit_attempt
from engine.transfer.stage import LiveImages
from engine.transfer.stored import StoredCheckpoint

EXPERTS, HIDDEN, VOCABULARY = 128, 5120, 202_048
STEP = 1000
Shapes = dict[str, tuple[int, ...]]


def shapes(count: int) -> Shapes:
    """The first ``count`` parameters of a mixture of experts like Llama 4 Maverick, every second layer dense; 10,000 of them have
    4 · 10¹¹ elements."""
    return dict(itertools.islice(_parameters(), count))


def _parameters() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from {"embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN), "norm.weight": (HIDDEN,)}.items()
    yield from {"logit_scale": (), "patch_embed.weight": (1408, 3, 14, 14), "patch_embed.bias": (1408,)}.items()
    for layer in itertools.count():
        prefix = f"layers.{layer}"
        for leaf, rows in {"q_proj": HIDDEN, "k_proj": 1024, "v_proj": 1024}.items():
            yield f"{prefix}.self_attn.{leaf}.weight", (rows, HIDDEN)
            yield f"{prefix}.self_attn.{leaf}.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}.self_attn.temperature", (1,)
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
        if layer % 2 == 0:
            yield from _mlp(f"{prefix}.mlp", 16_384)
            continue
        yield f"{prefix}.mlp.router.weight", (EXPERTS, HIDDEN)
        yield from _mlp(f"{prefix}.mlp.shared_expert", 8192)
        for expert in range(EXPERTS):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", 8192)


def _mlp(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for leaf, shape in {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)}.items():
        yield f"{prefix}.{leaf}.weight", shape


# ---------------------------------------------------------------------- layouts


def fsdp2(found: Shapes, world: int) -> dict[str, Layout]:
    """``fully_shard`` refuses 0-d parameters: they are left to it as ignored ones, whole on every rank."""
    cut, whole = Grid(Mesh((world,)), (0,)), Grid(Mesh((world,)), (REPLICATED,))
    return {name: cut if shape else whole for name, shape in found.items()}


def hsdp(found: Shapes, world: int) -> dict[str, Layout]:
    """Eight replicas of each shard."""
    mesh = Mesh((8, world // 8))
    cut, whole = Grid(mesh, (REPLICATED, 0)), Grid(Mesh((world,)), (REPLICATED,))
    return {name: cut if shape else whole for name, shape in found.items()}


def zero1(found: Shapes, world: int) -> dict[str, Layout]:
    """Stages 1 and 2: one flat buffer for matrices and one for what takes no weight decay."""
    layouts: dict[str, Layout] = {}
    for group in ([name for name in found if len(found[name]) > 1], [name for name in found if len(found[name]) <= 1]):
        sizes = [math.prod(found[name]) for name in group]
        chunk = -(-sum(sizes) // (2 * world)) * 2  # DeepSpeed aligns to two elements a rank
        for name, start in zip(group, itertools.accumulate(sizes, initial=0), strict=False):
            layouts[name] = Flat(Mesh((world,)), start, chunk)
    return layouts


def zero3(found: Shapes, world: int) -> dict[str, Layout]:
    """Each parameter cut by itself."""
    return {name: Flat(Mesh((world,)), 0, -(-math.prod(shape) // world)) for name, shape in found.items()}


LAYOUTS = {layout.__name__: layout for layout in (fsdp2, hsdp, zero1, zero3)}


@lru_cache(maxsize=2)
def describe(layout: str, world: int, count: int) -> tuple[LogicalTensor, ...]:
    """Parameters and Adam's states of them, as an adapter enumerates them."""
    found = shapes(count)
    layouts = LAYOUTS[layout](found, world)
    whole = Part(Grid(Mesh((world,)), (REPLICATED,)))
    tensors = [LogicalTensor(f"model.{name}", "F32", shape, (Part(layouts[name]),)) for name, shape in found.items()]
    for name, shape in found.items():
        tensors.append(LogicalTensor(f"optim.state.{name}.step", "F32", (), (whole,)))
        tensors += [LogicalTensor(f"optim.state.{name}.{key}", "F32", shape, (Part(layouts[name]),)) for key in ("exp_avg", "exp_avg_sq")]
    return tuple(tensors)


def live(tensors: Sequence[LogicalTensor], rank: int) -> list[Shard]:
    """What ``rank`` holds, as tensors without storage."""
    return [Shard(tensor, tuple(_local(tensor, part, rank) for part in tensor.parts)) for tensor in tensors]


def _local(tensor: LogicalTensor, part: Part, rank: int) -> torch.Tensor | None:
    held = held_boxes(tensor, part, rank)
    if not held:
        return None
    return _empty((sum(box.numel for box in held),) if isinstance(part.layout, Flat) else held[0].sizes, tensor.dtype)


@lru_cache(maxsize=4096)
def _empty(sizes: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.empty(sizes, dtype=torch_dtype(dtype), device="meta")


def _forget() -> None:
    """What is timed begins as in a new process: boxes that other ranks here have computed are none of its business."""
    boxes._held_boxes.cache_clear()
    boxes._writers.cache_clear()
    boxes._tiling_problem.cache_clear()
    reads.sources.cache_clear()


# ---------------------------------------------------------------------- save


class Planned(Struct):
    """A rank's plan with its files laid out, ready to be written."""

    rank: int
    plan: GlobalPlan
    shards: list[Shard]
    planner: dcp.ShardSavePlanner
    writer: dcp.ShardWriter
    seconds: float
    cpu_seconds: float


def begin(storage: Storage) -> str:
    """An attempt's folder; its name."""
    attempt = attempt_name(take(storage), step_name(STEP), 1)
    storage.claim_folder(attempt)
    return attempt


def plan_save(tensors: tuple[LogicalTensor, ...], rank: int, plan: GlobalPlan | None = None) -> Planned:
    """All that a rank computes at its first save before it copies a byte. ``plan``: another rank's, to save the time; only the
    boxes are this rank's own then."""
    shards, writer = live(tensors, rank), dcp.ShardWriter(rank)
    _forget()
    began, cpu = time.perf_counter(), time.process_time()
    plan = plan or make_plan(tensors, rank)
    planner = plan.planner if plan.planner._rank == rank else dcp.ShardSavePlanner(plan.assigned, rank)
    planner.set_up_planner({"state": planner.handles(shards)})
    writer.begin(plan.numbers, plan.classes, lambda layout, views: None)
    writer.prepare_local_plan(planner.create_local_plan())
    return Planned(rank, plan, shards, planner, writer, time.perf_counter() - began, time.process_time() - cpu)


def write_index(planned: Planned, storage: Storage, attempt: str) -> tuple[IndexEntry, float]:
    """A rank's part of a save but for its shard files: the index as it would be, and the seconds."""
    own_record, found = encode_record({"rng": capture_rng(), "objects": {}}), list[IndexEntry]()

    def sink(layout: ShardLayout, views: list[torch.Tensor]) -> None:
        with mock.patch.object(write, "_write_image", _made_up):
            found.append(write.write_shards(storage, attempt, layout, LiveImages(layout, views), own_record).index)

    began = time.perf_counter()
    planned.writer.begin(planned.plan.numbers, planned.plan.classes, sink)
    dcp.save(planned.shards, planned.writer, planned.planner)
    return found[0], time.perf_counter() - began


def _made_up(storage: Storage, path: str, image: Image, *args: object) -> list[bytes]:
    return [bytes(DIGEST_BYTES * block_count(entry.nbytes)) for entry in image.entries]


def manifest(plan: GlobalPlan, names: Sequence[str], world: int, attempt: str, entries: Mapping[int, IndexEntry]) -> Manifest:
    """As rank 0 makes it. Ranks without an entry get a made-up one of the same size."""
    values = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False}
    model = {"engine": "imagined", "counters": {}, "optimizer": "AdamW", "groups": [{"params": list(names), "values": values}], "scalars": {}}
    record = {"progress": msgspec.to_builtins(Progress(1, STEP, 10**6)), "models": {"": model}, "objects": {}, "per_rank": [], "config": {}}
    summary = Summary(
        engine="imagined", world_size=world, epoch=1, step=STEP, samples=10**6, created=time.time(), attempt=attempt, lineage=(Line("a", 0),),
        metrics={}, monitor="", mode="", best_step=-1, tensors=len(plan.listed), size_bytes=0,
    )  # fmt: skip
    usual = next(iter(entries.values()), IndexEntry(1_000_000, bytes(DIGEST_BYTES)))
    return Manifest(summary, plan.listed, {}, tuple(entries.get(rank, usual) for rank in range(world)), encode_record(record))


# ---------------------------------------------------------------------- load


class Loaded(Struct):
    """What a load of one rank cost in metadata. ``touched_bytes``: read of index files, by the storage's count; ``needed_bytes``:
    the entries in them of the chunks that it reads. ``header_bytes``: of the shard files it opens."""

    rank: int
    seconds: float
    cpu_seconds: float
    open_seconds: float
    root_bytes: int
    touched_bytes: int
    needed_bytes: int
    indexes: int
    index_reads: int
    header_bytes: int
    files: int
    reads: int
    data_bytes: int


class CountingStorage:
    """Counts what is read of each file, for :class:`StoredCheckpoint`."""

    def __init__(self, storage: LocalStorage) -> None:
        self._storage = storage
        self.root = storage.root
        self.read: dict[str, list[int]] = {}
        """By path, the size of each read."""

    def open(self, path: str) -> "_CountingReader":
        return _CountingReader(self._storage.open(path), self.read.setdefault(path, []))


class _CountingReader:
    def __init__(self, reader: Reader, read: list[int]) -> None:
        self._reader, self._read = reader, read
        self.size_bytes = reader.size_bytes

    def read_into(self, offset: int, target: memoryview) -> None:
        self._read.append(len(target))
        self._reader.read_into(offset, target)

    def close(self) -> None:
        self._reader.close()


class _Unread:
    """In place of the reader of shard files: counts what it would read."""

    def __init__(self) -> None:
        self.needed_bytes = self.header_bytes = self.files = self.reads = 0

    def __call__(self, needed: read.Reads, file: read.File, *args: object) -> "_Unread":
        rank, number = file
        self._index = needed.stored.index(rank)
        self.header_bytes += self._index.files[number].header_bytes
        self.files += 1
        return self

    def fill(self, needs: list[Need]) -> int:
        chunks = [self._index.chunk(number) for number in {need.chunk for need in needs}]
        self.needed_bytes += sum(len(msgspec.msgpack.encode(chunk)) for chunk in chunks)
        found = [list(run) for run in runs(slices(needs))]
        self.reads += len(found)
        return sum(piece.nbytes for run in found for piece in run)


def writers(stored: Sequence[LogicalTensor], tensors: Sequence[LogicalTensor], rank: int) -> set[int]:
    """The ranks whose indexes ``rank`` needs to fill ``tensors``."""
    by_name = {tensor.name: tensor for tensor in stored}
    pairings = [dcp.Pairing(shard, by_name[shard.name]) for shard in live(tensors, rank)]
    return {request.rank for request in dcp.ShardLoadPlanner(pairings, rank).create_local_plan().planner_data}


def load(storage: LocalStorage, folder: str, tensors: Sequence[LogicalTensor], rank: int) -> Loaded:
    """Everything that ``rank`` does in a load, but for reading shard files."""
    shards, counted, unread = live(tensors, rank), CountingStorage(storage), _Unread()
    _forget()
    began, cpu = time.perf_counter(), time.process_time()
    stored = StoredCheckpoint(counted, folder)  # pyright: ignore[reportArgumentType]  # a load only opens
    opened = time.perf_counter()
    pairs = match(tensors, stored.tensors, {}, Allow()).pairs
    with mock.patch.object(read, "FileReader", unread):
        data_bytes = dcp.load([dcp.Pairing(shard, pairs[shard.name]) for shard in shards], stored, rank)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    root_bytes = sum(counted.read.pop(stored.path(MANIFEST)))
    return Loaded(
        rank, seconds, cpu_seconds, opened - began, root_bytes, sum(map(sum, counted.read.values())), unread.needed_bytes, len(counted.read),
        sum(map(len, counted.read.values())), unread.header_bytes, unread.files, unread.reads, data_bytes,
    )  # fmt: skip


def reshard(storage: LocalStorage, source: tuple[str, int], target: tuple[str, int], count: int, ranks: Sequence[int]) -> list[Loaded]:
    """Save (layout, world size) and load it under another: what each of ``ranks`` costs. Only the indexes that these need are made."""
    stored, tensors = describe(*source, count), describe(*target, count)
    plan = make_plan(stored, 0)
    needed = set().union(*(writers(plan.listed, tensors, rank) for rank in ranks))
    attempt = begin(storage)
    entries = {writer: write_index(plan_save(stored, writer, plan), storage, attempt)[0] for writer in sorted(needed)}
    commit_attempt(storage, attempt, manifest(plan, list(shapes(count)), source[1], attempt, entries))
    return [load(storage, step_name(STEP), tensors, rank) for rank in ranks]
