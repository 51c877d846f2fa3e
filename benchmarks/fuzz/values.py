"""Nested plain values that a state may hold: made from a seed, and changed by each step of training."""

import collections
import dataclasses
import enum
import io
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

DTYPES: dict[str, torch.dtype] = {
    "f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
    "u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64,
    "bool": torch.bool, "c64": torch.complex64, "c128": torch.complex128,
    "f8": torch.float8_e4m3fn, "f8b": torch.float8_e5m2,
}  # fmt: skip


class Phase(enum.Enum):
    WARM = "warm"
    COLD = "cold"


@dataclasses.dataclass
class Window:
    size: int
    sums: list[float]


Pair = collections.namedtuple("Pair", "low high")

# By kind, from a random generator. What a record may hold exactly, and what it may not.
PLAIN: dict[str, Callable[[random.Random], Any]] = {
    "int": lambda r: r.randrange(100),
    "float": lambda r: r.uniform(-3, 3),
    "big int": lambda r: 2**70 + r.randrange(100),
    "str": lambda r: f"é{r.randrange(100)}",
    "empty str": lambda r: "",
    "none": lambda r: None,
    "bool": lambda r: r.random() < 0.5,
    "complex": lambda r: complex(r.random(), -0.0),
    "bytes": lambda r: bytes([r.randrange(256), 0]),
    "nan": lambda r: {"worst": math.nan, "best": -math.inf, "zero": -0.0, "n": r.randrange(9)},
    "tuple": lambda r: (r.randrange(9), (r.random(), None), ()),
    "dict": lambda r: {"n": r.randrange(100), "inner": {"f": [r.random(), None, (1, 2)]}},
    "int keys": lambda r: {3: "x", 0: r.random(), -1: {}},
    "mixed keys": lambda r: {None: 1, True: r.randrange(9), 2.5: [], "2.5": 0, b"k": 2},
    "empty": lambda r: {},
    "tensor": lambda r: _tensor(r, (2, 3)),
    "0-d tensor": lambda r: _tensor(r, ()),
    "int tensor": lambda r: torch.tensor([r.randrange(100), -1]),
    "empty tensor": lambda r: _tensor(r, (0, 2)),
    "tensors": lambda r: {
        "amax": _tensor(r, (3,)),
        "history": [_tensor(r, (2,)), _tensor(r, (1,)).to(torch.bfloat16)],
        "n": r.randrange(9),
    },
    "tensors by int": lambda r: {0: _tensor(r, (2,)), "0": _tensor(r, (3,))},
    "transposed tensor": lambda r: _tensor(r, (3, 2)).t(),
}
ODD: dict[str, Callable[[random.Random], Any]] = {
    "OrderedDict": lambda r: collections.OrderedDict(b=r.random(), a=1),
    "defaultdict": lambda r: collections.defaultdict(int, a=r.randrange(9)),
    "Counter": lambda r: collections.Counter(a=r.randrange(1, 9)),
    "set": lambda r: {1, r.randrange(2, 9)},
    "namedtuple": lambda r: Pair(r.randrange(9), r.random()),
    "deque": lambda r: collections.deque([r.random(), 2.0], maxlen=4),
    "enum": lambda r: r.choice(list(Phase)),
    "dataclass": lambda r: Window(r.randrange(9), [r.random()]),
    "np.float64": lambda r: np.float64(r.random()),
    "np.float32": lambda r: np.float32(r.random()),
    "np.int64": lambda r: {"n": np.int64(r.randrange(9))},
    "ndarray": lambda r: np.array([[r.random(), math.nan]], dtype=np.float32),
    "0-d ndarray": lambda r: np.array(r.random()),
    "ndarray of str": lambda r: np.array([f"a{r.randrange(9)}"]),
    "bytesio": lambda r: io.BytesIO(bytes([r.randrange(256)])),
    "bytearray": lambda r: bytearray([r.randrange(256)]),
    "torch.Size": lambda r: torch.Size([2, r.randrange(9)]),
    "torch.dtype": lambda r: r.choice([torch.float32, torch.bfloat16]),
    "torch.device": lambda r: {"device": torch.device("cpu"), "n": r.randrange(9)},
    "Parameter": lambda r: torch.nn.Parameter(_tensor(r, (2,))),
    "one tensor twice": lambda r: [_tensor(r, (2,))] * 2,
    "tuple keys": lambda r: {(0, 1): r.random()},
    "bool in ints": lambda r: [True, 1, 1.0, r.randrange(9)],
    "surrogate": lambda r: f"\ud800{r.randrange(9)}",
    "expanded tensor": lambda r: _tensor(r, (1,)).expand(3),
    "sparse tensor": lambda r: torch.tensor([[0.0, r.random()]]).to_sparse(),
}  # fmt: skip


def make(kind: str, seed: int) -> Any:
    """Return a value of a kind of :data:`PLAIN` or :data:`ODD`."""
    return (PLAIN | ODD)[kind](random.Random(seed))


def _tensor(r: random.Random, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(r.randrange(2**32)))


def bump(value: Any) -> Any:
    """Return what a step of training makes of a value: another one of the same type."""
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(value.detach() + 1)
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return value + 1
    if isinstance(value, (bool, enum.Enum)) or value is None:
        return value
    if type(value) in (int, float, complex):
        return value + 1
    if isinstance(value, np.number):
        return type(value)(value + 1)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return np.asarray(value + 1)
    if type(value) is dict:
        return {key: bump(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        bumped = [bump(inner) for inner in value]
        return bumped if type(value) is list else tuple(bumped)
    return value


def numbers(value: Any) -> Iterator[float]:
    """Yield every finite number in a value, tensors by their sums."""
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided and value.dtype.is_floating_point:
            yield float(value.detach().double().sum())
    elif isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, (int, float)) and abs(value) < 1e6:
        yield float(value)


def weigh(value: Any) -> float:
    """Return a small number that changes as the value does, for training to depend on."""
    return 1e-3 * math.tanh(sum(numbers(value)) * 0.01)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return a tensor of any bits that its dtype allows, NaNs of every kind among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if count else torch.zeros(shape, dtype=dtype)
