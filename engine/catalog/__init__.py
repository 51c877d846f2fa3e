"""Which steps a run has, which one a name means, which may go; and which runs there are. No torch."""

from engine.catalog import lease
from engine.catalog.history import is_on_line, lineage_after, previous
from engine.catalog.lineage import descends_from, next_lineage
from engine.catalog.listing import Step, read_manifest, read_summary, steps, summaries
from engine.catalog.pointers import point_best
from engine.catalog.removal import delete_step
from engine.catalog.resolve import find
from engine.catalog.retention import Retention, expired
from engine.catalog.runs import Run, find_run, new_run, runs, runs_below
from engine.catalog.settling import settle
from engine.catalog.tidy import Tidying

__all__ = [
    "Retention",
    "Run",
    "Step",
    "Tidying",
    "delete_step",
    "descends_from",
    "expired",
    "find",
    "find_run",
    "is_on_line",
    "lease",
    "lineage_after",
    "new_run",
    "next_lineage",
    "point_best",
    "previous",
    "read_manifest",
    "read_summary",
    "runs",
    "runs_below",
    "settle",
    "steps",
    "summaries",
]
