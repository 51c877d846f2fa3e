"""Values of a state as a typed record and tensors, and back as the types that they were.

:func:`flatten` takes a state apart and :func:`unflatten` puts it together again. A type that is not
known here is never guessed: whoever flattens decides, and as a rule refuses it by name.
"""

import functools
import io
import math
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from engine.errors import CheckpointCorrupt, UsageError
from engine.format.record import MAX_INT_BITS, Array, Reference, Typed
from engine.state.shard import dtype_name, torch_dtype

SMALL_BYTES = 1 << 16
"""Up to this size a tensor may stand in a record; a larger one is stored as a tensor."""

OMIT = object()
"""What a caller's ``unknown`` returns for a value that is left out of its container."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_KEYS = (str, int, float, bool, bytes, type(None))
_FACTORIES: dict[str, Any] = {"": None, "int": int, "float": float, "list": list, "dict": dict}
_NAMES = {factory: name for name, factory in _FACTORIES.items()}

Take = Callable[[str, torch.Tensor], Any]
"""What stands in a record for the tensor at a path: a reference or an array."""

Unknown = Callable[[str, Any], Any]
"""What stands for a value of a type that is not known, or :data:`OMIT`; it may raise instead."""


def fits(value: Any) -> bool:
    """Return whether a record takes a plain value: not text that UTF-8 cannot carry, nor a huge integer."""
    if type(value) is int:
        return value.bit_length() < MAX_INT_BITS
    try:
        return type(value) is not str or bool(value.encode()) or not value
    except UnicodeEncodeError:
        return False


def is_code(value: Any) -> bool:
    """Return whether a value is part of the program, which the resuming program has as well."""
    kinds = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
    return isinstance(value, (*kinds, type, functools.partial, property))


def refuse(owner: str) -> Unknown:
    """Return an ``unknown`` that raises :class:`UsageError`, naming ``owner``, path and type."""

    def unknown(path: str, value: Any) -> Any:
        kind = type(value)
        if kind in (str, int):
            what = (
                "text that UTF-8 cannot carry" if kind is str else f"an integer of {value.bit_length()} bits; a record takes up to {MAX_INT_BITS - 1}"
            )
            raise UsageError(f"{owner}: {path} is {what}")
        raise UsageError(
            f"{owner}: {path} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold. It takes tensors, arrays, "
            "numbers, text, bytes, and lists, tuples, sets and dicts of them. Keep such a value out of the state, or make the "
            "object a member of its own with state_dict() and load_state_dict()"
        )

    return unknown


def flatten(value: Any, path: str, take: Take, unknown: Unknown) -> Any:
    """Return ``value`` as what a record can hold, with ``take(path, tensor)`` for each tensor."""

    def walk(inner: Any, name: Any) -> Any:
        return flatten(inner, f"{path}.{name}", take, unknown)

    kind = type(value)
    if kind in _PLAIN:
        return value if fits(value) else unknown(path, value)
    if isinstance(value, torch.Tensor):
        known = kind in (torch.Tensor, torch.nn.Parameter, DTensor)
        return _tensor(value, path, take) if known else unknown(path, value)
    if kind in (list, tuple):
        return kind(_kept(walk(inner, i) for i, inner in enumerate(value)))
    if kind in (dict, OrderedDict, Counter) or (kind is defaultdict and value.default_factory in _NAMES):
        return _mapping(value, path, walk, unknown)
    if isinstance(value, np.generic):
        return Typed("numpy", _array(np.asarray(value), path, unknown))
    if isinstance(value, np.ndarray):
        return _array(value, path, unknown) if value.nbytes <= SMALL_BYTES else Typed("ndarray", take(path, torch.from_numpy(value.copy())))
    if kind in (set, frozenset):
        return Typed(kind.__name__, _kept(walk(inner, i) for i, inner in enumerate(sorted(value, key=repr))))
    if kind is deque:
        return Typed("deque", [value.maxlen, _kept(walk(inner, i) for i, inner in enumerate(value))])
    simple = _simple(value)
    return unknown(path, value) if simple is None else simple


def _kept(values: Any) -> list[Any]:
    return [value for value in values if value is not OMIT]


def _mapping(value: Mapping[Any, Any], path: str, walk: Callable[[Any, Any], Any], unknown: Unknown) -> Any:
    for key in value:
        if type(key) not in _KEYS and not (type(key) is tuple and all(type(part) in _KEYS for part in key)):
            return unknown(f"a key of {path}", key)
    pairs = [(key, walk(inner, key)) for key, inner in value.items()]
    pairs = [(key, inner) for key, inner in pairs if inner is not OMIT]
    kind = type(value)
    simple = all(type(key) in _KEYS and not (type(key) is int and abs(key) >= 2**63) for key, _ in pairs)
    plain = dict(pairs) if simple else Typed("items", [[key, inner] for key, inner in pairs])
    if isinstance(value, defaultdict):
        return Typed("defaultdict", [_NAMES[value.default_factory], plain])
    return plain if kind is dict else Typed(kind.__name__, plain)


def _tensor(value: torch.Tensor, path: str, take: Take) -> Any:
    if value.is_sparse or value.layout is not torch.strided or value.is_quantized:
        raise UsageError(f"{path} is a tensor of layout {value.layout}, which cannot be saved; convert it with .to_dense() or .dequantize()")
    if value.is_meta:
        raise UsageError(f"{path} is on the meta device: it has no values to save")
    if isinstance(value, DTensor):
        dims = [placement.dim if isinstance(placement, Shard) else -1 for placement in value.placements]
        return Typed("dtensor", [take(path, value), dims])
    if type(value) is torch.nn.Parameter:
        return Typed("parameter", [_tensor(value.detach(), path, take), value.requires_grad])
    order = _order(value)
    return take(path, value.detach()) if order is None else Typed("permuted", [take(path, value.detach().permute(order)), order])


def is_permuted(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements lie in memory in a different order of dimensions, as eigenvectors do."""
    return _order(tensor) is not None


def _order(tensor: torch.Tensor) -> list[int] | None:
    """The dimensions by falling stride, where they make the tensor contiguous and it is not. Sums depend on it in the last bits."""
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim))
    return order if tensor.permute(order).is_contiguous() else None


def _simple(value: Any) -> Any:
    if isinstance(value, torch.Size):
        return Typed("size", list(value))
    if isinstance(value, torch.dtype):
        return Typed("dtype", str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return Typed("device", str(value))
    if isinstance(value, torch.Generator):
        return Typed("generator", [str(value.device), small_array(value.get_state())])
    if type(value) is range:
        return Typed("range", [value.start, value.stop, value.step])
    if type(value) is slice:
        return Typed("slice", [value.start, value.stop, value.step])
    if type(value) is bytearray:
        return Typed("bytearray", bytes(value))
    if type(value) is io.BytesIO:
        return Typed("bytesio", value.getvalue())
    return None


def _array(value: np.ndarray, path: str, unknown: Unknown) -> Any:
    try:
        tensor = torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape).copy())
    except TypeError:
        return unknown(path, value)
    return Array("numpy", dtype_name(tensor.dtype), tuple(value.shape), _data(tensor))


def small_array(tensor: torch.Tensor) -> Any:
    """Return a tensor as an array of the record, marked where it lies on an accelerator."""
    array = Array("torch", dtype_name(tensor.dtype), tuple(tensor.shape), _data(tensor.detach().cpu()))
    return array if tensor.device.type == "cpu" else Typed("accelerator", array)


def _data(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


Give = Callable[[Reference], Any]
"""The tensor for a reference."""


def unflatten(plain: Any, give: Give, device: torch.device | None = None) -> Any:
    """Return the value that was flattened. ``device``: where tensors go that lay on an accelerator.

    Raises :class:`CheckpointCorrupt` for a kind that :func:`flatten` does not make.
    """

    def walk(inner: Any) -> Any:
        return unflatten(inner, give, device)

    if isinstance(plain, dict):
        return {key: walk(inner) for key, inner in plain.items()}
    if isinstance(plain, list | tuple):
        return type(plain)(walk(inner) for inner in plain)
    if isinstance(plain, Reference):
        return give(plain)
    if isinstance(plain, Array):
        return from_array(plain)
    if not isinstance(plain, Typed):
        return plain
    try:
        if plain.kind == "accelerator":
            tensor = walk(plain.value)
            return tensor if device is None else tensor.to(device)
        return _MAKERS[plain.kind](walk(plain.value))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise CheckpointCorrupt(f"a state record holds a {plain.kind!r} that this version cannot make: {e!r}") from e


def from_array(array: Array) -> Any:
    data = bytearray(array.data)
    dtype = torch_dtype(array.dtype)
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
    tensor = flat.reshape(array.shape)
    return tensor.numpy() if array.kind == "numpy" else tensor


def _generator(parts: Any) -> torch.Generator:
    generator = torch.Generator(parts[0] if parts[0] == "cpu" or torch.cuda.is_available() else "cpu")
    generator.set_state(parts[1].cpu())
    return generator


_MAKERS: dict[str, Callable[[Any], Any]] = {
    "OrderedDict": OrderedDict,
    "Counter": Counter,
    "defaultdict": lambda parts: defaultdict(_FACTORIES[parts[0]], parts[1]),
    "items": lambda pairs: {key: inner for key, inner in pairs},
    "set": set,
    "frozenset": frozenset,
    "deque": lambda parts: deque(parts[1], maxlen=parts[0]),
    "size": torch.Size,
    "dtype": lambda name: _DTYPES[name],
    "device": torch.device,
    "generator": _generator,
    "range": lambda parts: range(*parts),
    "slice": lambda parts: slice(*parts),
    "bytearray": bytearray,
    "bytesio": io.BytesIO,
    "numpy": lambda array: array[()],
    "ndarray": lambda tensor: tensor.numpy(),
    "parameter": lambda parts: torch.nn.Parameter(parts[0], requires_grad=parts[1]),
    "dtensor": lambda parts: parts[0],
    "permuted": lambda parts: parts[0].permute([parts[1].index(dim) for dim in range(len(parts[1]))]),
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def placements(dims: list[int]) -> list[Any]:
    """Return the placements of a DTensor that was flattened with these ``dims``."""
    return [Replicate() if dim < 0 else Shard(dim) for dim in dims]


def references(plain: Any) -> dict[str, list[int] | None]:
    """Return the names of the tensors that a flattened value refers to, with a DTensor's cut."""
    found: dict[str, list[int] | None] = {}

    def walk(inner: Any, dims: list[int] | None) -> None:
        if isinstance(inner, Reference):
            found[inner.name] = dims
        elif isinstance(inner, Typed):
            if inner.kind == "dtensor" and isinstance(inner.value, list) and len(inner.value) == 2:
                walk(inner.value[0], inner.value[1])
            else:
                walk(inner.value, None)
        elif isinstance(inner, dict):
            for value in inner.values():
                walk(value, None)
        elif isinstance(inner, list | tuple):
            for value in inner:
                walk(value, None)

    walk(plain, None)
    return found


def holds_tensors(plain: Any) -> bool:
    """Return whether a flattened value has tensors in it, as references or as arrays."""
    if isinstance(plain, Reference) or (isinstance(plain, Array) and plain.kind == "torch"):
        return True
    if isinstance(plain, Typed):
        return plain.kind != "generator" and holds_tensors(plain.value)
    inner = plain.values() if isinstance(plain, dict) else plain if isinstance(plain, list | tuple) else ()
    return any(map(holds_tensors, inner))


def differing(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Return where two flattened values differ, as (path, of ``a``, of ``b``); NaN equals NaN."""
    a, b = _bare(a), _bare(b)
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        return [d for key in keys for d in differing(a.get(key, MISSING), b.get(key, MISSING), f"{path}.{key}" if path else str(key))]
    if type(a) is not type(b):
        return [(path, a, b)]
    if isinstance(a, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differing(x, y, f"{path}.{i}")]
    if isinstance(a, Typed) and a.kind == b.kind:
        return differing(a.value, b.value, path)
    same = a == b or (isinstance(a, float) and a != a and b != b)
    return [] if same else [(path, a, b)]


def _bare(value: Any) -> Any:
    """The value without where it lies: on an accelerator, on a mesh."""
    while isinstance(value, Typed) and value.kind in ("accelerator", "dtensor"):  # where it lies, not what it is
        value = value.value if value.kind == "accelerator" else value.value[0]
    return value


class _Missing:
    def __repr__(self) -> str:
        return "not there"


MISSING = _Missing()


def shown(value: Any) -> str:
    """Return a flattened value for a message, in at most 80 characters."""
    if isinstance(value, Typed):
        return shown(value.value)
    if isinstance(value, Array):
        if math.prod(value.shape) >= 8:
            return f"an array of shape {list(value.shape)}"
        value = from_array(value).tolist()
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
