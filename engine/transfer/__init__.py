"""Bytes on the move: stage, write and commit a step; open, read and verify one."""
