"""Command lines whose flags may also come from a YAML file or from an earlier run: tokens placed before, so that the
command line wins."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from engine.errors import UsageError


class RecipeParser(argparse.ArgumentParser):
    """Flags are declared with underscores and accepted with hyphens too; none may be abbreviated.

    What is wrong with them is a :class:`UsageError`, for they may come from a file that one rank alone has read.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def flag(self, name: str, **options: Any) -> None:
        self.add_argument(*dict.fromkeys((name, "--" + name[2:].replace("_", "-"))), dest=name[2:], **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help tells what there is")

    def as_tokens(self, values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Values by flag name as command-line tokens, None setting nothing; and the names that are no flag here."""
        actions = {action.dest: action for action in self._actions}
        tokens, unknown = [], []
        for name, value in values.items():
            action = actions.get(name)
            if action is None:
                unknown.append(name)
            elif action.nargs == 0:
                tokens += [action.option_strings[0]] if value else []
            elif value is not None:
                tokens.append(f"{action.option_strings[0]}={value}")
        return tokens, unknown


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of flag names to values; numbers such as ``1e-5``, text to YAML, are read by the flag's own type."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UsageError(f"--config_path {path}: cannot be read as YAML: {e}") from e
    if not isinstance(values, dict):
        raise UsageError(f"--config_path {path}: expected a mapping of flag names to values, found a {type(values).__name__}")
    return values


def positive(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def not_negative(text: str) -> int:
    """An argument type: a whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def scientific(number: float) -> str:
    """``1e-05`` as people write it: ``1e-5``; ``0.00025`` is ``2.5e-4``."""
    mantissa, exponent = f"{number:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
