"""Meshes: every position has a rank of its own, described as shortly as can be; those that are not so are told apart."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.format.layout import MAX_DIMS, Mesh, mesh_of
from tests.layouts import meshes


def ranks(mesh: Mesh) -> list[int]:
    """As docs/format.md says it, position by position."""
    if mesh.ranks:
        return list(mesh.ranks)
    strides = mesh.strides or [math.prod(mesh.shape[i + 1 :]) for i in range(len(mesh.shape))]
    return [mesh.first + sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*map(range, mesh.shape))]


@given(meshes(max_dims=3))
def test_positions_and_ranks_are_inverse(mesh):
    expected = ranks(mesh)
    assert mesh.is_sound
    assert [mesh.rank_at(position) for position in range(mesh.size)] == expected
    assert mesh.largest == max(expected)
    for rank in range(-1, max(expected) + 3):
        assert mesh.position_of(rank) == (expected.index(rank) if rank in expected else None)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple), st.integers(0, 5), st.data())
def test_regular_ranks_are_described_in_a_few_bytes_and_others_listed(shape, first, data):
    """Any order of a grid's dimensions, with gaps, is regular; an exchange of two ranks is not, where there are enough."""
    strides, step = [0] * len(shape), 1
    for dim in data.draw(st.permutations(range(len(shape)))):
        strides[dim], step = step, step * shape[dim] + data.draw(st.integers(0, 2))
    expected = tuple(first + sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*map(range, shape)))
    mesh = mesh_of(shape, expected)
    assert tuple(ranks(mesh)) == expected
    assert not mesh.ranks
    if len(expected) > 3:
        other = (*expected[:-2], expected[-1], expected[-2])
        mesh = mesh_of(shape, other)
        assert tuple(ranks(mesh)) == other
        assert mesh.is_sound


@given(
    st.lists(st.integers(-1, 4), max_size=3).map(tuple),
    st.integers(-1, 2),
    st.lists(st.integers(-1, 9), max_size=3).map(tuple),
    st.lists(st.integers(-1, 5), max_size=8).map(tuple),
)
def test_sound_meshes_have_a_rank_of_its_own_at_every_position(shape, first, strides, listed):
    mesh = Mesh(shape, first, strides, listed)
    if not mesh.is_sound:
        return
    found = ranks(mesh)
    assert len(found) == len(set(found)) == mesh.size >= 1
    assert min(found) >= 0


@pytest.mark.parametrize("shape", [(1,) * (MAX_DIMS + 1), (1,) * 10**6, (2**63,) * 10**5], ids=["65", "a million", "huge"])
def test_more_dimensions_than_libraries_know_are_refused_at_once(shape):
    assert not Mesh(shape).is_sound
    assert Mesh((1,) * MAX_DIMS).is_sound
