"""Progress, and random state that comes back or is derived anew."""

import random

import numpy as np
import torch

from engine.format.record import decode_record, encode_record
from engine.state.progress import Progress, capture_rng, derive_rng, restore_rng


def _draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist(), torch.randn(3).tolist()


def test_every_generator_continues_where_it_was_captured():
    derive_rng(7, 0, 0)
    np.random.randn(1)  # leaves a cached second Gaussian
    random.gauss(0, 1)  # likewise
    state = decode_record(encode_record(capture_rng()))
    expected = [_draw() for _ in range(3)]
    derive_rng(8, 0, 0)
    restore_rng(state)
    assert [_draw() for _ in range(3)] == expected


def test_derived_state_is_reproducible_and_differs_by_seed_step_and_rank():
    drawn = {}
    for key in [(1, 5, 0), (1, 5, 1), (1, 6, 0), (2, 5, 0), (-1, 5, 0), (2**63, 5, 0)]:
        derive_rng(*key)
        drawn[key] = _draw()
        derive_rng(*key)
        assert _draw() == drawn[key]
    for i in range(len(_draw())):
        assert len({str(values[i]) for values in drawn.values()}) == len(drawn)


def test_advance_counts_a_step_and_its_samples():
    progress = Progress(epoch=2, step=10, samples=320)
    progress.advance(32)
    assert (progress.epoch, progress.step, progress.samples) == (2, 11, 352)


def test_two_progresses_share_nothing():
    a, b = Progress(), Progress()
    a.metrics["loss"] = 1.0
    a.history.append({"loss": 1.0})
    assert (b.metrics, b.history) == ({}, [])
