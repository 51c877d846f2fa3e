"""Where checkpoints lie. The one place that touches files; faults are injected here."""

from engine.storage.base import Reader, Storage, Writer
from engine.storage.local import LocalStorage
from engine.storage.mark import Mark

__all__ = ["LocalStorage", "Mark", "Reader", "Storage", "Writer"]
