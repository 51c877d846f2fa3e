"""A case of the fuzzer, drawn from its seed: what is trained, on what, and in which order it is saved and resumed."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.fuzz import values
from benchmarks.fuzz.modules import WIDTH, Node
from benchmarks.fuzz.optimizers import OPTIMIZERS, SCHEDULERS

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
WORLD_SIZES = (1, 2, 3)
Op = tuple[Any, ...]
"""``("train", steps)``; ``("save",)``; ``("resume", what)``: a step's number or ``latest``; and
``("unfreeze",)``: an optimizer is given one more group, with a parameter that was frozen."""

_SCALAR = "0-d parameter"
_DEEPSPEED = {
    _SCALAR: "its broadcast of the model views each parameter as bytes",
    "transposed parameter": "its broadcast of the model views each parameter as bytes",
    "two optimizers": "it drives one optimizer",
    "left out": "every parameter that wants a gradient must be in its optimizer",
    "ReduceLROnPlateau": "a scheduler is stepped without a metric",
    "fp64": "masters are fp32",
    "Muon": "masters are flat, and it takes matrices only",
    "Around": "the groups of an inner optimizer are not those that get flat masters",
    "Duck": "it drives a torch.optim.Optimizer",
    "KeyedState int": "it walks through states as if each were a dict",
}
_OUTSIDE = "a parametrization computes with parameters outside the forward that gathers them"
CANNOT: dict[str, dict[str, str]] = {
    "single": {},
    "ddp": {},
    "fsdp2": {
        _SCALAR: "fully_shard refuses it",
        "transposed parameter": "fully_shard refuses it",
        "weight": _OUTSIDE,
        "spectral": _OUTSIDE,
        "empty parameter": "its gradients are concatenated in pieces, and nothing cannot be cut",
        "Rprop": "DTensor has no index_put_",
        "Adafactor": "DTensor has no power of a norm in place",
        "Muon": "DTensor cannot add a whole row to one that is cut",
    },
    "zero1": _DEEPSPEED,
    "zero2": _DEEPSPEED,
    "zero3": _DEEPSPEED
    | {
        "weight": _OUTSIDE,
        "spectral": _OUTSIDE,
        "empty parameter": "it concatenates what is gathered, and nothing cannot be",
    },
}
"""Of what may be drawn, what an engine cannot train at all, and why. Nothing of it is in a case on that engine."""


@dataclass(frozen=True)
class Side:
    engine: str
    world_size: int

    def __str__(self) -> str:
        return f"{self.engine}×{self.world_size}"


@dataclass(frozen=True)
class Trained:
    """An optimizer with its groups, and the name of its scheduler or an empty one."""

    optimizer: str
    groups: int
    tensor_lr: bool
    scheduler: str


@dataclass(frozen=True)
class Case:
    """``tied`` and ``frozen``: see :func:`benchmarks.fuzz.modules.build`. ``frozen_given``: frozen
    parameters are in the optimizer too. ``left_out``: one that is trained is in none. ``wrapped``:
    FSDP2 shards submodules on their own. ``members``: kinds by name. ``named``: the model is a
    member with a name.

    Of the source and the target: ``sides``, ``scripts``, ``max_in_flight``, and ``around``, what is
    switched on around each call of the engine. ``late``: the Checkpointer is made when it is first
    used. ``factor``: of the target's own learning rates.
    """

    seed: int
    dtype: str
    tree: Node
    tied: int
    frozen: int
    frozen_given: bool
    left_out: bool
    wrapped: bool
    trained: tuple[Trained, ...]
    members: dict[str, str]
    named: bool
    sides: tuple[Side, Side]
    scripts: tuple[tuple[Op, ...], tuple[Op, ...]]
    max_in_flight: tuple[int, int]
    late: bool
    factor: float
    around: tuple[str, str]

    def described(self) -> str:
        leaves = Counter(_shown(node) for node in self.tree.walk() if node.kind != "tree")
        model = ", ".join((f"{n}×" if n > 1 else "") + leaf for leaf, n in leaves.items())
        marks = {
            f"{self.tied} tied": self.tied,
            f"every {self.frozen}. frozen": self.frozen,
            "frozen given": self.frozen and self.frozen_given,
            "one left out": self.left_out,
            "wrapped": self.wrapped and any(side.engine == "fsdp2" for side in self.sides),
            self.dtype: self.dtype != "fp32",
            "attached late": self.late,
            "other rates": self.factor != 1.0,
            "named": self.named,
        }
        parts = [f"{self.sides[0]} → {self.sides[1]}", f"[{model}]", *(mark for mark, holds in marks.items() if holds)]
        for one in self.trained:
            text = one.optimizer + (f" in {one.groups} groups" if one.groups > 1 else "")
            text += " with a tensor lr" if one.tensor_lr else ""
            parts.append(text + (f" under {one.scheduler}" if one.scheduler else ""))
        parts += [f"{name}: {kind}" if kind else name for name, kind in self.members.items()]
        parts += [f"{self.around[0]} around, {self.around[1]} around"] if self.around != ("nothing", "nothing") else []
        parts += [" ".join("".join(map(str, op)) for op in script) for script in self.scripts]
        return "; ".join([*parts, f"in flight {self.max_in_flight[0]}, {self.max_in_flight[1]}"])


def _shown(node: Node) -> str:
    args = [str(value).replace(" ", "") for value in node.args.values() if value not in (False, "", None)]
    return node.kind + (f"({','.join(args)})" if args else "")


@dataclass
class _Draw:
    """``banned``: features that an engine of the case cannot train."""

    random: random.Random
    banned: set[str]
    features: set[str] = field(default_factory=set)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one(self, choices: Iterable[Any]) -> Any:
        return self.random.choice([choice for choice in choices if choice not in self.banned])

    def weighted(self, choices: dict[str, float]) -> str:
        allowed = {choice: weight for choice, weight in choices.items() if choice not in self.banned}
        return self.random.choices(list(allowed), list(allowed.values()))[0]

    def flag(self, feature: str, probability: float) -> bool:
        """Whether an allowed feature is drawn."""
        return self.chance(probability) and feature not in self.banned


def draw(seed: int, without: Iterable[str] = ()) -> Case:
    """Return the case of a seed: the same one on every machine. ``without``: features to leave
    out, as if an engine could not train them."""
    r = random.Random(seed * 7919 + 17)
    sides = _sides(r)
    d = _Draw(r, {feature for side in sides for feature in CANNOT[side.engine]} | set(without))
    plain = all(not side.engine.startswith("zero") for side in sides)
    zeros = all(side.engine.startswith("zero") for side in sides)
    if not plain and not zeros:
        d.banned.add("Adagrad")  # DeepSpeed makes it anew with its defaults: a group's own are lost
    dtype = "fp32"
    if d.chance(0.2):
        dtype = d.one(["fp64", "bf16"]) if plain else "bf16" if zeros else "fp32"
    tree = _tree(d, depth=0)
    if any(0 in shape for node in tree.walk() for shape in node.args.get("shapes", ())):
        d.banned.add("Adafactor")  # it divides by the number of elements
    frozen, given = d.one([0, 0, 0, 2, 3, 5]), d.chance(0.3)
    trained, scripts = _trained(d), _scripts(d)
    can_unfreeze = frozen and not given and not any(one.scheduler for one in trained) and trained[-1].optimizer != "Duck"
    if can_unfreeze and all(side.engine == "single" for side in sides) and d.flag("unfreeze", 0.5):
        scripts = _unfreezing(d, scripts)
    return Case(
        seed=seed,
        dtype=dtype,
        tree=tree,
        tied=d.one([0, 0, 0, 1, 2]),
        frozen=frozen,
        frozen_given=given,
        left_out=d.flag("left out", 0.1),
        wrapped=d.chance(0.5),
        trained=trained,
        members=_members(d),
        named=d.chance(0.15),
        sides=sides,
        scripts=scripts,
        max_in_flight=(d.one([0, 2]), d.one([0, 2])),
        late=d.chance(0.2),
        factor=d.one([1.0, 1.0, 1.0, 0.5]),
        around=(_around(d), _around(d)),
    )


def _around(d: _Draw) -> str:
    return d.weighted({"nothing": 12, "no_grad": 1, "inference_mode": 1, "autocast": 1, "default float64": 1})


def _sides(r: random.Random) -> tuple[Side, Side]:
    def one() -> Side:
        engine = r.choice(ENGINES)
        return Side(engine, 1 if engine == "single" else r.choice(WORLD_SIZES))

    first, second = one(), one()
    how = r.random()
    if how < 0.45:
        return first, first
    if how < 0.6:  # another world size of the same engine
        return first, Side(first.engine, second.world_size if first.engine != "single" else 1)
    return first, second


NAMES = (
    "block",
    "step",
    "exp_avg",
    "optim",
    "model",
    "state",
    "module",
    "base_layer",
    "a",
    "x_y",
    "weight",
    "buffers_",
)
KEYS = ("0", "10", "with space", "weird-name", "é", "params", "lr", "run/a")


def _tree(d: _Draw, depth: int) -> Node:
    how = d.one(["list", "dict", "attributes"])
    count = d.one([3, 4, 5, 6]) if depth == 0 else d.one([1, 2, 3])
    names = d.random.sample(NAMES if how == "attributes" else KEYS + NAMES, count)
    children = {}
    for name in names:
        children[name] = _tree(d, depth + 1) if depth < 3 and d.chance(0.3) else _leaf(d)
    return Node("tree", {"how": how}, children)


LEAVES = {
    "affine": 6, "embed": 3, "norm": 4, "conv": 3, "raw": 4, "buffers": 4, "late": 0.6, "extra": 1.2,
    "window": 0.3, "noise": 1, "unused": 1,
}  # fmt: skip


def _leaf(d: _Draw) -> Node:
    kind = d.weighted(LEAVES)
    if kind == "affine":
        norm = d.one(["", "", "", "", "", "weight", "spectral"])
        return Node(kind, {"out": d.one([WIDTH, WIDTH, 1, 3, 7, 13]), "bias": d.chance(0.7), "norm": norm})
    if kind == "embed":
        return Node(kind, {"padding": d.one([None, 0])})
    if kind == "norm":
        which = [
            "layer",
            "plain layer",
            "rms",
            "group",
            "batch",
            "batch, summed up",
            "batch, not affine",
        ]
        return Node(kind, {"which": d.one(which)})
    if kind == "conv":
        return Node(kind, {"channels": d.one([1, 2, 3]), "flat": d.chance(0.5)})
    if kind == "raw":
        return Node(kind, _raw(d))
    if kind == "buffers":
        return Node(kind, {"made": [_buffer(d) for _ in range(d.one([1, 2, 3]))]})
    if kind == "late":
        return Node(kind, {"grows": d.chance(0.5)})
    if kind == "extra":
        odd = d.chance(0.25)
        return Node(kind, {"kind": d.one(values.ODD if odd else values.PLAIN)})
    return Node(kind)


def _raw(d: _Draw) -> dict[str, Any]:
    shapes = [(1,), (3,), (5, 1), (1, 1), (2, 3, 5), (7, 13), (1, 4)]
    if _SCALAR not in d.banned:
        shapes.append(())
    if "empty parameter" not in d.banned:
        shapes += [(0,), (0, 4), (3, 0)]
    chosen = d.random.sample(shapes, d.one([1, 2, 3]))
    held = d.one(["own", "own", "list", "dict"])
    return {"shapes": chosen, "held": held, "transposed": d.flag("transposed parameter", 0.15)}


def _buffer(d: _Draw) -> tuple[str, tuple[int, ...], bool, str]:
    shape = d.one([(), (1,), (3,), (0,), (2, 0, 3), (2, 3), (5, 1)])
    how = d.weighted({"stays": 6, "in place": 4, "replaced": 3, "tied": 1, "transposed": 1, "expanded": 0.3})
    dtypes = list(values.DTYPES)
    if how in ("in place", "replaced"):
        dtypes = ["f32", "f64", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "c64"]
    return d.one(dtypes), shape, d.chance(0.8), how


def _trained(d: _Draw) -> tuple[Trained, ...]:
    count = 2 if d.flag("two optimizers", 0.2) else 1
    found = []
    for i in range(count):
        name = d.one([n for n in OPTIMIZERS if n != "Muon"])
        if count == 2 and i == 0 and d.flag("Muon", 0.3):
            name = "Muon"
        if d.chance(0.25):
            name = "AdamW"
        groups = 1 if name == "Adagrad" and "two optimizers" in d.banned else d.one([1, 1, 2, 3])
        tensor_lr = d.flag("tensor lr", 0.08) and name in (
            "AdamW",
            "Adam amsgrad",
            "SGD momentum",
            "IntStep",
        )
        scheduler = d.one(SCHEDULERS) if d.chance(0.6) and not tensor_lr else ""
        if name == "Adagrad" and "two optimizers" in d.banned:
            scheduler = ""
        if name == "Duck" and scheduler not in ("Tracked", "Partial"):
            scheduler = ""  # torch's schedulers take torch's optimizers only
        found.append(Trained(name, groups, tensor_lr, scheduler))
    return tuple(found)


def _members(d: _Draw) -> dict[str, str]:
    found: dict[str, str] = {}
    if d.chance(0.2):
        found["ema"] = ""
    if d.chance(0.15):
        found["scaler"] = ""
    if d.chance(0.25):
        found["sampler"] = ""
    if d.chance(0.15):
        found["position"] = ""
    if d.chance(0.03):
        found["apart"] = ""
    if d.chance(0.1):
        found["teacher"] = ""
    if d.chance(0.3):
        found["notes"] = d.one(values.ODD if d.chance(0.4) else values.PLAIN)
    return found


def _scripts(d: _Draw) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """The source trains past its last save, so that the next losses are known. The target may have trained before it resumes."""
    step, saved, first = d.one([0, 1, 1, 2, 3]), list[int](), list[Op]()
    first.append(("train", step))
    for _ in range(d.one([1, 1, 2, 3])):
        first.append(("save",))
        saved.append(step)
        more = d.one([1, 1, 2])
        first.append(("train", more))
        step += more
        if d.chance(0.2):
            back = d.one(saved)
            more = d.one([1, 2])
            first += [("resume", back), ("train", more)]
            step = back + more
    if first[-1][1] < 2:
        first.append(("train", 1))
    what = d.one(sorted(set(saved)))
    second: list[Op] = [
        ("train", d.one([0, 0, 1, 2])),
        ("resume", d.one([what, "latest"])),
        ("train", 2),
    ]
    if d.chance(0.35):
        second += [
            ("save",),
            ("train", 1),
            ("resume", d.one([*sorted(set(saved)), "latest"])),
            ("train", 2),
        ]
    return tuple(first), tuple(second)


def _unfreezing(d: _Draw, scripts: tuple[tuple[Op, ...], tuple[Op, ...]]) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """The source unfreezes before some save; the target before it resumes, or not at all."""
    first, second = scripts
    at = d.one([i for i, op in enumerate(first) if op[0] == "save"])
    first = (*first[:at], ("unfreeze",), ("train", 1), *first[at:])
    return first, (("unfreeze",), *second) if d.chance(0.5) else second
