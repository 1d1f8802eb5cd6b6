"""Knobs refuse what they cannot mean, whatever its type."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from diffguide.errors import ParamError
from diffguide.method import Method
from diffguide.processors.pag import PAG

NUMBERS = st.floats(-0.5, 1.5) | st.sampled_from([0, 1, 10**400])
THINGS = NUMBERS | st.text(max_size=3) | st.booleans() | st.none()


def is_window(value: object) -> bool:
    """Two numbers of 0..1 in order."""
    if not isinstance(value, tuple) or len(value) != 2 or not {type(v) for v in value} <= {int, float}:
        return False
    return 0 <= value[0] <= value[1] <= 1


@given(st.tuples(NUMBERS, NUMBERS) | st.tuples(THINGS, THINGS) | st.lists(THINGS, max_size=3).map(tuple) | THINGS)
@example(("a", "b"))
@example((0.5, "b"))
@example((0.2, 0.2))
def test_a_window_is_two_numbers_in_order_and_nothing_else(value: object) -> None:
    if is_window(value):
        assert PAG(window=value).window == value
    else:
        with pytest.raises(ParamError, match=r"PAG\.window"):
            PAG(window=value)


@pytest.mark.parametrize(
    ("name", "kebab"), [("PAG", "pag"), ("AStar", "a-star"), ("BoxDiff", "box-diff"), ("R2D2", "r2-d2")]
)
def test_names_of_the_shell(name: str, kebab: str) -> None:
    assert type(name, (Method,), {}).name() == kebab
