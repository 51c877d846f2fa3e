"""DeepSpeed's JSON with ``"auto"`` where the recipe's own arguments decide."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import UsageError

REQUIRED = ("gradient_clipping", "zero_optimization.stage")
OWNED_BY_RECIPE = ("optimizer", "scheduler")


def load(path: Path, arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration to hand to ``deepspeed.initialize``.

    ``arguments`` maps dotted keys to the value the command line gives them: ``"auto"`` becomes that value, any other
    must equal it. ``defaults`` fill an ``"auto"`` but give way to an explicit value. No ``"auto"`` may be left over.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UsageError(f"DeepSpeed configuration {path}: cannot be read as JSON: {e}") from e
    for section in OWNED_BY_RECIPE:
        if section in config:
            raise UsageError(f'{path}: remove "{section}": the recipe builds its own and DeepSpeed would ignore this one')
    flat = dict(_leaves(config))
    for key in REQUIRED:
        if key not in flat:
            raise UsageError(f'{path}: "{key}" is missing: DeepSpeed has a default of its own for it; set it, or use "auto"')
    values = {**defaults, **arguments}
    for key, found in flat.items():
        if found == "auto":
            if key not in values:
                raise UsageError(f'{path}: "{key}" is "auto", but only these can be: {", ".join(sorted(values))}')
            _set(config, key, values[key])
        elif key in arguments and found != arguments[key]:
            raise UsageError(f'{path}: "{key}" is {found!r}, but the command line makes it {arguments[key]!r}; make them equal, or use "auto"')
    return config


def _leaves(section: Mapping[str, Any], prefix: str = ""):
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _set(config: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        config = config[section]
    config[key] = value
