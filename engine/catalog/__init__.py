"""Which steps a run has, and which one a name means."""

from engine.catalog.resolve import Step, find, steps

__all__ = ["Step", "find", "steps"]
