"""The one binding to ``torch.distributed.checkpoint``: tensors, planners, storage writer and reader.

Saves and loads run through ``dcp.save`` and ``dcp.load`` with ``no_dist=True`` on each rank: the plan of every rank follows from
layout rules that all ranks know, so there is nothing to gather or scatter, and agreement is ``engine.sync``'s.
"""

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from msgspec import Struct
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from engine.errors import CheckpointCorrupt, UsageError
from engine.format.layout import LogicalTensor
from engine.plan.image import ShardLayout, Source, shard_layout
from engine.plan.reads import absent, sources
from engine.state.boxes import Box, written_boxes
from engine.state.shard import Shard, dtype_name, torch_dtype
from engine.transfer.exchange import exchange
from engine.transfer.read import Reads, Request, fill, part
from engine.transfer.stored import StoredCheckpoint

_KEY = "state"
"""The one top-level key of the state dict given to DCP: it decorates a call a key, which 10,000 keys would pay for."""


class ShardTensor(torch.Tensor):
    """A rank's shard, speaking DCP's ``_Checkpointable`` protocol: global size, local boxes. A handle, not for computing.

    It must be a ``torch.Tensor``: DCP dispatches to the protocol for tensors only.
    """

    _shard: Shard
    _boxes: tuple[Box, ...]
    _rank: int

    @staticmethod
    def __new__(cls: type["ShardTensor"], shard: Shard, boxes: Sequence[Box], rank: int) -> "ShardTensor":
        tensor = torch.Tensor._make_wrapper_subclass(cls, shard.tensor.shape, dtype=torch_dtype(shard.tensor.dtype))  # type: ignore[attr-defined]
        tensor._shard, tensor._boxes, tensor._rank = shard, tuple(boxes), rank
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise UsageError(f"a checkpoint handle cannot compute ({func}); use the live tensor")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShardTensor({self._shard.name}, {tuple(self.shape)}, boxes={self._boxes})"

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        data = [_write_data(self._shard.tensor.dtype, self._shard.tensor.shape, box) for box in self._boxes]
        return [WriteItem(MetadataIndex(fqn, one.chunk.offsets), WriteItemType.SHARD, tensor_data=one) for one in data]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box in self._boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for box in self._boxes:
            if box.offsets == tuple(index.offset or ()):
                return self._shard.view(box, self._rank)
        raise UsageError(f"rank {self._rank} has no box of {index.fqn} at {index.offset}")


def _write_data(dtype: str, shape: tuple[int, ...], box: Box) -> TensorWriteData:
    return TensorWriteData(_chunk(box), TensorProperties(dtype=torch_dtype(dtype)), torch.Size(shape))


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


class _Handles(Mapping[str, ShardTensor]):
    """The state dict for DCP: what a rank writes of each shard. A handle is made when it is asked for, which DCP leaves to our planner:
    to make 10,000 of them takes longer than to copy what they stand for."""

    def __init__(self, shards: Sequence[Shard], boxes: Sequence[Sequence[Box]], rank: int) -> None:
        self._shards, self._boxes, self._rank = shards, boxes, rank
        self._places: dict[str, int] = {}

    def __getitem__(self, name: str) -> ShardTensor:
        if not self._places:
            self._places = {name: place for place, name in enumerate(self._names()) if self._boxes[place]}
        place = self._places[name]
        return ShardTensor(self._shards[place], self._boxes[place], self._rank)

    def __iter__(self) -> Iterator[str]:
        return (name for name, boxes in zip(self._names(), self._boxes, strict=True) if boxes)

    def __len__(self) -> int:
        return sum(map(bool, self._boxes))

    def _names(self) -> Iterator[str]:
        return (shard.tensor.name for shard in self._shards)

    def is_of(self, shards: Sequence[Shard]) -> bool:
        """Whether these are the shards, each the same object."""
        return shards is self._shards or (len(shards) == len(self._shards) and all(map(operator.is_, shards, self._shards)))

    def views(self) -> list[torch.Tensor]:
        """The live view of each box of each shard."""
        return [shard.view(box, self._rank) for shard, boxes in zip(self._shards, self._boxes, strict=True) for box in boxes]


NO_FROZEN = 1 << 40
"""Where the writers of frozen parts begin if there are none."""


class ShardSavePlanner(SavePlanner):
    """Plans one rank's writes. The plan follows from the assigned writers alone: one planner serves every save of the same
    tensors, with the handles of the moment."""

    def __init__(self, assigned: Sequence[LogicalTensor], rank: int, world_size: int = NO_FROZEN) -> None:
        """Parts that are laid out over writers from ``world_size`` on are frozen: that of a rank is ``world_size`` higher. By default
        there are none."""
        self._rank = rank
        self.frozen: set[tuple[str, tuple[int, ...]]] = set()
        self._boxes: list[tuple[Box, ...]] = []
        known: dict[tuple[object, ...], tuple[Box, ...]] = {}  # most tensors share a few shapes and layouts
        for tensor in assigned:
            kind = (tensor.shape, tensor.parts)
            boxes = known.get(kind)
            if boxes is None:
                own = [box for part in tensor.parts for box in written_boxes(tensor, part, rank)]
                kept = [box for part in tensor.parts for box in written_boxes(tensor, part, world_size + rank)] if world_size != NO_FROZEN else []
                boxes = tuple(own + kept)
                if kept:
                    self.frozen.update((tensor.name, box.offsets) for box in kept)
                else:
                    known[kind] = boxes
            self._boxes.append(boxes)
        self._assigned = assigned
        self._handles = _Handles((), (), rank)
        self._plan: SavePlan | None = None
        self._views: list[torch.Tensor] | None = None

    def handles(self, shards: Sequence[Shard]) -> Mapping[str, ShardTensor]:
        """The state dict for DCP. ``shards`` are in the order of ``assigned``."""
        if not self._handles.is_of(shards):
            self._handles, self._views = _Handles(shards, self._boxes, self._rank), None
        return self._handles

    def set_up_planner(self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """The handles are the planner's own."""

    def create_local_plan(self) -> SavePlan:
        if self._plan is None:
            known: dict[tuple[object, ...], TensorWriteData] = {}
            items = []
            for tensor, boxes in zip(self._assigned, self._boxes, strict=True):
                for box in boxes:
                    kind = (tensor.dtype, tensor.shape, box)
                    data = known.get(kind)
                    if data is None:
                        data = known[kind] = _write_data(*kind)
                    items.append(WriteItem(MetadataIndex(tensor.name, data.chunk.offsets), WriteItemType.SHARD, tensor_data=data))
            self._plan = SavePlan(items, planner_data=self.frozen)
        return self._plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata(state_dict_metadata={})  # the manifest is written from layout rules, not from gathered chunks

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._handles[write_item.index.fqn].__get_tensor_shard__(write_item.index)

    def views(self) -> list[torch.Tensor]:
        """The live tensor of each item of the plan; the same list while no shard is replaced."""
        if self._views is None:
            self._views = self._handles.views()
        return self._views


Sink = Callable[[ShardLayout, list[torch.Tensor]], None]
"""What becomes of a rank's files as laid out, and the live tensor of each of their items: written at once, or staged for it."""


class ShardWriter(StorageWriter):
    """Lays out one rank's files, and gives them to a sink. Keeps the layout while the plan stays the same."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._numbers: Mapping[str, int] = {}
        self._classes: Sequence[int] = ()
        self._sink: Sink | None = None
        self._has_frozen = False
        self._laid_out: tuple[SavePlan, ShardLayout] | None = None

    def begin(self, numbers: Mapping[str, int], classes: Sequence[int], sink: Sink, has_frozen: bool = False) -> None:
        """Each tensor's number in the manifest, and the geometry class by number; where the next save goes. ``has_frozen``: whether any
        rank has frozen boxes."""
        self._numbers, self._classes, self._sink, self._has_frozen = numbers, classes, sink, has_frozen

    def reset(self, checkpoint_id: Any = None) -> None:
        """DCP calls this with a path where there is one; the sink knows it."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if self._laid_out is None or self._laid_out[0] is not plan:
            boxes = _sources(plan.items, plan.planner_data)
            self._laid_out = (plan, shard_layout(self._rank, boxes, self._numbers, self._classes, self._has_frozen))
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert self._laid_out is not None
        assert self._sink is not None
        assert isinstance(planner, ShardSavePlanner)
        self._sink(self._laid_out[1], planner.views())
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Whoever wrote the files has written their index, with checksums; the manifest follows when all ranks have."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # never picked by path: DCP would not call begin()


def _sources(items: Sequence[WriteItem], frozen: set[tuple[str, tuple[int, ...]]]) -> list[Source]:
    known: dict[int, tuple[str, tuple[int, ...], tuple[int, ...], int]] = {}  # items share what is alike, by id
    found = []
    for number, item in enumerate(items):
        data, name = item.tensor_data, item.index.fqn
        assert data is not None
        if id(data) not in known:
            dtype, sizes = data.properties.dtype, data.chunk.sizes
            known[id(data)] = (dtype_name(dtype), tuple(data.chunk.offsets), tuple(sizes), dtype.itemsize * sizes.numel())
        kind, offsets, sizes, size_bytes = known[id(data)]
        found.append(Source(number, name, kind, offsets, sizes, size_bytes, bool(frozen) and (name, offsets) in frozen))
    return found


class Pairing(Struct, frozen=True):
    """A live shard and the stored tensor that fills it. Rows from ``kept_from`` on keep their live values."""

    shard: Shard
    stored: LogicalTensor
    kept_from: int | None = None


class ShardLoadPlanner(LoadPlanner):
    """Plans one rank's reads: which part of which rank's chunk fills which part of a live box. Checks that all is covered.

    The plan is a list of :class:`Request` in ``planner_data``, the field DCP has for it, and ``items`` stays empty: the four
    objects a ``ReadItem`` is made of would take a third of the time of loading small tensors, and only our reader would see them.
    """

    def __init__(self, pairings: Sequence[Pairing], rank: int) -> None:
        self._pairings = pairings
        self._rank = rank
        self._plan: LoadPlan | None = None

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """The pairings hold all that is needed."""

    def create_local_plan(self) -> LoadPlan:
        if self._plan is None:
            requests: list[Request] = []
            for pairing in self._pairings:
                self._add_requests(pairing, requests)
            self._plan = LoadPlan([], planner_data=requests)
        return self._plan

    def _add_requests(self, pairing: Pairing, requests: list[Request]) -> None:
        stored, name = pairing.stored, pairing.stored.name
        for box, view in pairing.shard.held(self._rank):
            found, missing = sources(stored.shape, stored.parts, box)
            for rank, offsets, inner, overlap in found:
                requests.append(Request(name, rank, offsets, inner, part(view, box, overlap)))
            if missing:
                missing -= _fill_absent(stored, box, view, pairing.kept_from)
            if missing:
                raise CheckpointCorrupt(f"{name}: the checkpoint lacks {missing} of the {box.numel} elements at {list(box.offsets)}")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise UsageError("a lockstep checkpoint holds no byte entries")

    def resolve_bytes(self, read_item: ReadItem) -> Any:
        raise UsageError("a lockstep checkpoint holds no byte entries")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        raise UsageError("this plan is for lockstep's own reader; another reader can use torch's default planner")

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Filled in place."""


def _fill_absent(stored: LogicalTensor, box: Box, view: torch.Tensor, kept_from: int | None) -> int:
    """Returns the elements that are settled: filled, or kept."""
    filled = 0
    for overlap, value in absent(stored, box):
        if kept_from is None or overlap.offsets[0] < kept_from:
            part(view, box, overlap).fill_(value)
        filled += overlap.numel
    return filled


class ShardReader(StorageReader):
    """Reads the ranges of a :class:`ShardLoadPlanner`'s plan from a committed step: all that is needed here, or, where :attr:`group` is
    set, its share of what all ranks need."""

    def __init__(self, stored: StoredCheckpoint, rank: int, world_size: int) -> None:
        self._stored = stored
        self._rank, self._world_size = rank, world_size
        self._reads: Reads | None = None
        self.group: Any = None
        self.bytes_read = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        """The checkpoint is given open."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Empty: what is stored, and where, follows from the manifest, which planner and reader already have."""
        return Metadata(state_dict_metadata={})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The manifest is already read and verified."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        if self._reads is None:
            self._reads = Reads(self._stored, plan.planner_data, self._rank, self._world_size)
        return replace(plan, planner_data=self._reads)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        reads = plan.planner_data
        self.bytes_read += exchange(reads, self.group) if self.group is not None else fill(reads)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def save(shards: Sequence[Shard], writer: ShardWriter, planner: ShardSavePlanner) -> None:
    """Give this rank's part to the writer's sink. No communication."""
    with _local_call():
        dcp.save({_KEY: planner.handles(shards)}, storage_writer=writer, planner=planner, no_dist=True)


class ShardLoad:
    """One load of this rank, planned when this is made: from the indexes, without communication.

    Raises :class:`CheckpointCorrupt` where the checkpoint has not all that is needed.
    """

    @torch.no_grad()
    def __init__(self, pairings: Sequence[Pairing], stored: StoredCheckpoint, rank: int, world_size: int) -> None:
        self._planner = ShardLoadPlanner(pairings, rank)
        self._reader = ShardReader(stored, rank, world_size)
        self._reads: Reads = self._reader.prepare_local_plan(self._planner.create_local_plan()).planner_data

    @property
    def is_shared(self) -> bool:
        """Whether this rank needs what another one should read for it."""
        return self._reads.is_shared

    def run(self, group: Any = None) -> int:
        """Fill this rank's live shards in place; returns the bytes that it read. With a ``group`` every rank calls this: see
        :func:`engine.transfer.exchange.exchange`. Without one there is no communication."""
        self._reader.group = group
        with _local_call(), torch.no_grad():
            dcp.load({_KEY: {}}, storage_reader=self._reader, planner=self._planner, no_dist=True)
        return self._reader.bytes_read


def load(pairings: Sequence[Pairing], stored: StoredCheckpoint, rank: int, world_size: int = 1) -> int:
    """Fill this rank's live shards in place, reading all of it here; returns the bytes read. No communication. Of ``world_size`` ranks
    that do so one checks each file's header."""
    return ShardLoad(pairings, stored, rank, world_size).run()


@contextlib.contextmanager
def _local_call() -> Iterator[None]:
    """DCP warns that a call without communication is unusual, and wraps errors in a BaseException of its own."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as e:
        error, _ = next(iter(e.failures.values()))
        raise error from None
