import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.format.names import parse_step, step_name


@given(st.integers(0, 10**18 - 1))
def test_a_step_is_named_and_read_back(step):
    assert parse_step(step_name(step)) == step


@pytest.mark.parametrize(
    "name",
    [
        "step_5", "step_000000005", ".step_00000005.ab12", "step_00000005.old", "step_00000005\n", "step_-0000005", "xstep_00000005", "step_",
        "step_٠٠٠٠٠٠٠٥", "latest", "",
    ],
)  # fmt: skip
def test_other_names_are_no_steps(name):
    assert parse_step(name) is None


def test_names_of_eight_digits_sort_as_numbers_do():
    numbers = [0, 9, 10, 99, 12345678]
    assert sorted(map(step_name, numbers)) == [step_name(n) for n in numbers]
