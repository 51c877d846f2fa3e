"""The order that makes a visible step a complete one: files, folder, rename, run folder, pointer, run folder."""

import os

import torch

from engine import Checkpointer, Progress


def test_everything_is_durable_before_it_is_visible_and_the_pointer_moves_last(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, torch.nn.Linear(2, 2))
    checkpointer.save(Progress(step=1))  # makes the run folder and run.json
    events: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name(path: str) -> str:
        return "attempt" + path.split(".step_00000002.")[1][12:] if ".step_00000002." in path else os.path.relpath(path, tmp_path)

    def logged_fsync(fd: int) -> None:
        events.append(f"sync {name(os.readlink(f'/proc/self/fd/{fd}'))}")
        fsync(fd)

    def logged(real, verb: str):
        def call(source: str, target: str) -> None:
            events.append(f"{verb} {name(target)}")
            real(source, target)

        return call

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged(rename, "rename to"))
    monkeypatch.setattr(os, "replace", logged(replace, "replace"))
    checkpointer.save(Progress(step=2))
    assert events == [
        "sync .",  # the attempt's folder is made
        "sync attempt/rank_00000.0.safetensors",
        "sync attempt/rank_00000.index",
        "sync attempt",  # by every rank, before it reports
        "sync attempt/manifest",
        "sync attempt",
        "rename to step_00000002",
        "sync .",
        "sync latest.new",
        "replace latest",
        "sync .",
    ]
