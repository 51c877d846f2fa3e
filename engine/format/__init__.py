"""What is on disk, to the byte (see docs/format.md). No torch: the catalogue commands start without it."""
