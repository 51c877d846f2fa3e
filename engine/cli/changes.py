"""How the records of two steps differ: progress, hyper-parameters by parameter, config. What only tells how a job ran is left out."""

from collections.abc import Callable
from typing import Any

from engine.errors import CheckpointCorrupt

Values = dict[Any, Any]

_HOW_IT_RAN = {"engine", "optimizer_class", "int_steps", "local_states"}
_SHOWN = 3
_MOST_LOOKS = 1 << 22
"""At values of param groups. Fifty thousand parameters in groups of their own take a million and a half."""
_KEY_CHARACTERS = 200
"""Of a key, so that the paths below a long one are not each as long."""


def changes(a: Any, b: Any) -> list[str]:
    """One line a difference: where, what it was, what it is."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if same(a, b) else ["the records are not of the same kind"]
    lines = []
    for key in [*a, *(key for key in b if key not in a)]:
        if key == "models" and isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
            for name in [*a[key], *(name for name in b[key] if name not in a[key])]:
                lines += _model(name or "model", a[key].get(name), b[key].get(name))
        else:
            lines += _nested(_key(key), a, b, key)
    return lines


def _model(name: str, a: Any, b: Any) -> list[str]:
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [f"model {name}: only in {'A' if b is None else 'B'}"] if a is None or b is None else _nested(name, {0: a}, {0: b}, 0)
    ignored = _HOW_IT_RAN if a.get("engine") == b.get("engine") else {*_HOW_IT_RAN, "counters"}  # engines count different things
    lines = []
    for key in [*a, *(key for key in b if key not in a)]:
        if key == "groups":
            lines += _groups(name, a.get(key), b.get(key))
        elif key not in ignored:
            lines += _nested(f"{name}.{_key(key)}", a, b, key)
    return lines


def _groups(name: str, a: Any, b: Any) -> list[str]:
    """By parameter: how they are grouped and in which order is no matter."""
    first, second = _by_parameter(a), _by_parameter(b)
    alike: dict[tuple[int, int], tuple[Values | None, Values | None, list[str]]] = {}
    for parameter in [*first, *(p for p in second if p not in first)]:
        x, y = first.get(parameter), second.get(parameter)
        alike.setdefault((id(x), id(y)), (x, y, []))[2].append(parameter)
    if sum(len(x or ()) + len(y or ()) for x, y, _ in alike.values()) > _MOST_LOOKS:
        raise CheckpointCorrupt(f"{name}: its param groups have more values than optimizers do: too many to compare")
    found: dict[str, tuple[int, list[str]]] = {}
    for x, y, names in alike.values():
        for line in _group(x, y):
            count, shown = found.get(line, (0, []))
            found[line] = count + len(names), [*shown, *names[:_SHOWN]][:_SHOWN]
    return [f"{name}: {line} for {count} parameters ({', '.join(shown)}{' …' if count > _SHOWN else ''})" for line, (count, shown) in found.items()]


def _group(x: Values | None, y: Values | None) -> list[str]:
    if x is None or y is None:
        return [f"in no param group of {'A' if x is None else 'B'}"]
    return [line for key in [*x, *(key for key in y if key not in x)] for line in _nested(_key(key), x, y, key)]


def _key(key: Any) -> str:
    return _short(str(key), _KEY_CHARACTERS, str)


def _by_parameter(groups: Any) -> dict[str, Values]:
    listed = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    sound = [group for group in listed if isinstance(group.get("values"), dict) and isinstance(group.get("params"), list)]
    return {str(name): group["values"] for group in sound for name in group["params"]}


def _nested(path: str, a: dict[Any, Any], b: dict[Any, Any], key: Any) -> list[str]:
    if key not in a or key not in b:
        return [f"{path}: only in {'B' if key not in a else 'A'}: {_short((b if key not in a else a)[key])}"]
    x, y = a[key], b[key]
    if isinstance(x, dict) and isinstance(y, dict):
        return [line for inner in [*x, *(k for k in y if k not in x)] for line in _nested(f"{path}.{_key(inner)}", x, y, inner)]
    return [] if same(x, y) else [f"{path}: {_short(x)} → {_short(y)}"]


def same(x: Any, y: Any) -> bool:
    """Equal, where NaN equals NaN, and 1 is neither 1.0 nor True."""
    if type(x) is not type(y):
        return False
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(same, x, y))
    return bool(x == y) or (x != x and y != y)


def _short(value: Any, most: int = 120, told: Callable[[Any], str] = repr) -> str:
    text = told(value)
    return text if len(text) <= most else f"{text[:most]}…"
