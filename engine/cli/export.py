"""``engine export``: a model of a step as an ordinary file."""

from engine.cli.target import locate
from engine.cli.text import Bar, megabytes
from engine.export import export_step
from engine.transfer.stored import StoredCheckpoint


def export(target: str, path: str, member: str | None, overwrite: bool) -> str:
    """Writes the file; returns the line to print."""
    stored = StoredCheckpoint(*locate(target))
    bar = Bar(stored.manifest.summary.size_bytes)
    try:
        done = export_step(stored, path, member, overwrite, bar.add)
    finally:
        seconds = bar.close()
    return f"{path}: {done.tensors} tensors of {stored.where}, {megabytes(done.size_bytes)} MB verified and written in {seconds:.2f} s"
