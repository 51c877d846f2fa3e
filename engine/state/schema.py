"""What the record that all ranks share looks like, so that whoever takes it apart finds the types
that it expects.

Values that users and optimizers bring may be anything that a record holds.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct

from engine.state.progress import Progress

MAX_GROUP_VALUES = 1024


class _Group(Struct):
    params: list[str]
    values: Annotated[dict[str, Any], Meta(max_length=MAX_GROUP_VALUES)]


class _Optimizer(Struct):
    optimizer: str | None = None
    optimizer_class: str | None = None
    label: str = ""
    int_steps: bool = False
    flat: bool = False
    local_states: list[str] = []
    stateless: list[str] = []
    empty_states: list[str] = []
    groups: list[_Group] = []
    scalars: dict[str, dict[str, Any]] = {}
    nested: dict[str, dict[str, Any]] = {}
    loose: list[Annotated[list[Any], Meta(min_length=2, max_length=2)]] = []
    attributes: dict[str, Any] = {}


class _Model(_Optimizer):
    engine: str = ""
    counters: dict[str, Any] = {}
    more_optimizers: list[_Optimizer] = []
    scheduler: dict[Any, Any] | None = None
    more_schedulers: list[dict[Any, Any]] = []
    keys: dict[str, str] = {}
    empty_buffers: list[str] = []


class Shared(Struct):
    """The record of a manifest. To be checked with: what is not named here is not kept."""

    progress: Progress
    models: dict[str, _Model]
    objects: dict[str, Any]
    per_rank: list[str]
    config: dict[str, Any]
    environment: dict[str, Any] = {}


_Position = Annotated[int, Meta(ge=0, le=624)]


class _Random(Struct):
    """See :func:`engine.state.progress.capture_rng`. NumPy does not check the position that it is
    given."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, bytes, _Position, int, float]
    torch: bytes
    cuda: list[bytes]
    seed: int


class Own(Struct):
    """The record of a rank's index."""

    rng: _Random
    objects: dict[str, Any]
    extra: dict[str, dict[str, Any]] = {}
