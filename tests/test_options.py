"""Options are checked when they are given: a word that is not known is refused with the words there are, a value that would have no
effect with what is missing. Nothing is made of a path that is none."""

import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engine import Checkpointer, Progress
from engine.catalog import find
from engine.errors import CheckpointNotFound, UsageError
from engine.storage import LocalStorage
from tests.now import Checkpointer as Now


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"keep_lst": 3},
            r"keep_lst=3 is neither an option nor a member.*; did you mean 'keep_last'\?\. The options are config, keep_last",
        ),
        ({"on_failur": "warn"}, "did you mean 'on_failure'"),
        ({"event": [print]}, "did you mean 'events'"),
        ({"hook": print}, "hook=.* is neither an option nor a member"),
        ({"replicas": "al"}, "replicas='al' is not known; use one of 'all', 'sample', 'off'; did you mean 'all'"),
        ({"names": True}, "names=True is not known; use one of 'tolerate', 'refuse'"),
        ({"on_failure": "ignore"}, "on_failure='ignore' is not known; use one of 'raise', 'warn'"),
        ({"max_in_flight": -1}, "max_in_flight=-1: give a whole number of at least 0"),
        ({"max_in_flight": True}, "max_in_flight=True: give a whole number"),
        ({"keep_last": 0}, "keep_last=0: give a whole number of at least 1"),
        ({"keep_best": 2, "monitor": "loss"}, "keep_best=2 has no effect without keep_last"),
        ({"keep_every": 2}, "keep_every=2 has no effect without keep_last"),
        ({"keep_best": 2, "keep_last": 1}, "keep_best=2 has no effect without monitor"),
        ({"monitor": 3}, "monitor=3: give the name of a metric"),
        ({"monitor": "loss", "mode": "smallest"}, "mode is 'smallest'"),
        ({"timeout_seconds": 0}, "timeout_seconds=0: give a positive number of seconds"),
        ({"timeout_seconds": "10"}, "timeout_seconds='10': give a positive number"),
        ({"events": print}, "events is a builtin_function_or_method; give a list"),
        ({"events": [logging.getLogger()]}, "events takes functions, TensorBoard writers and W&B runs; RootLogger is none of them"),
        ({"config": SimpleNamespace(lr=1)}, "config is a SimpleNamespace; give a mapping"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_option_is_refused_when_it_is_given(tmp_path, option, message):
    with pytest.raises(UsageError, match=message):
        Checkpointer(tmp_path / "run", nn.Linear(2, 2), **option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"missing": "warn"}, "missing='warn' is not known; use one of 'error', 'fresh'"),
        ({"corrupt": "skip"}, "corrupt='skip' is not known; use one of 'error', 'previous'"),
        ({"override": "lr"}, r"override='lr': give a list of texts, override=\['lr'\]"),
        *(({f"allow_{kind}": "*"}, rf"allow_{kind}='\*': give a list") for kind in ("missing", "unexpected", "cast", "resize", "changed")),
        ({"allow_missing": [3]}, r"allow_missing=\[3\]: give a list of texts"),
        ({"extend_rows": "mean"}, "extend_rows='mean': give a mapping from patterns to one of keep, zeros, mean"),
    ],
    ids=str,
)
def test_an_option_of_a_resume_is_refused_before_anything_is_looked_for(tmp_path, option, message):
    with pytest.raises(UsageError, match=message):
        Now(tmp_path, nn.Linear(2, 2)).resume(**option)


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://bucket/run", "hdfs://host/run", "file:///tmp/run"])
def test_a_url_is_not_made_a_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for use in (lambda: Checkpointer(path, nn.Linear(2, 2)), lambda: LocalStorage(path), lambda: find(tmp_path, path)):
        with pytest.raises(UsageError, match=f"{path[:4].rstrip(':')}.* is not a storage that is known here"):
            use()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_working_directory(path):
    with pytest.raises(UsageError, match="the run's folder is empty; give a path"):
        Checkpointer(path, nn.Linear(2, 2))


def test_a_word_that_is_nearly_one_is_not_only_a_path(tmp_path):
    with pytest.raises(CheckpointNotFound, match=r"did you mean 'latest'\? 'lates' is none of latest, best, epoch:N and step:N"):
        find(tmp_path, "lates")


def test_numbers_may_be_of_any_integer_type(tmp_path):
    model = nn.Linear(2, 2)
    checkpointer = Now(tmp_path, model, keep_last=np.int64(1), max_in_flight=np.int32(0))
    for step in (np.int64(3), torch.tensor(4)):
        assert checkpointer.save(Progress(step=step)) == f"{tmp_path}/step_0000000{int(step)}"
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == ["step_00000004"]
    assert Now(tmp_path, model).resume().step == 4
