"""Methods as data: what is listed can be set, what is set comes back, what is wrong is told by name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffguide import describe
from diffguide.errors import LayoutError, ParamError
from diffguide.layout import Layout, Region
from diffguide.params import Param
from diffguide.processors import methods
from diffguide.recipe import MethodSpec

LAYOUT = Layout(Region("a red circle", box=(0.1, 0.1, 0.5, 0.5)))
KNOBS = [(name, knob) for name, cls in sorted(methods().items()) for knob in cls.params()]
IDS = [f"{name}.{knob.name}" for name, knob in KNOBS]


def values(knob: Param) -> st.SearchStrategy:
    """Values that a knob takes."""
    low, high = knob.low, knob.high
    numbers = st.floats(low, high, allow_nan=False, allow_infinity=False)
    if knob.choices:
        return st.sampled_from(knob.choices)
    if knob.name == "window":
        return st.tuples(numbers, numbers).map(lambda pair: tuple(sorted(pair)))
    integers = st.integers(0 if low is None else int(low), 500 if high is None else int(high))
    kinds = {"float": numbers, "int": integers, "bool": st.booleans(), "str": st.text(max_size=9)}
    if isinstance(knob.type, type) and knob.type.__name__ in kinds and not hasattr(knob.type, "__args__"):
        return kinds[knob.type.__name__]
    (item, _) = knob.type.__args__
    words = st.text("abc ", min_size=1).map(str.strip).filter(bool)
    # a length of its own is asked of refine and targets together
    size = {"min_size": 3, "max_size": 3} if knob.name in ("refine", "targets") else {"max_size": 3}
    return st.lists(words if item is str else kinds[item.__name__], **size).map(tuple)


def written(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def test_every_method_is_listed_in_plain_json():
    rows = describe.table()
    assert [row["name"] for row in rows] == sorted(methods())
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert row["help"] and not row["help"].startswith(row["class"] + "(")
        assert [p["name"] for p in row["params"]] == [p.name for p in methods()[row["name"]].params()]


def test_layout_methods_are_known():
    assert {row["name"] for row in describe.table() if row["layout"]} >= {"bacon", "backward-guidance"}
    assert not {row["name"] for row in describe.table() if row["layout"]} & {"pag", "attend-excite", "capture-maps"}


@pytest.mark.parametrize(("name", "knob"), KNOBS, ids=IDS)
@settings(max_examples=20)
@given(data=st.data())
def test_a_value_survives_recipe_and_command_line(name, knob, data):
    value = data.draw(values(knob))
    method = describe.make(name, {knob.name: value}, LAYOUT)
    assert getattr(method, knob.name) == value
    spec = MethodSpec(name=name, params=describe.to_recipe_params(method))
    read = MethodSpec.model_validate_json(spec.model_dump_json())
    assert describe.make_all([read], LAYOUT) == [method]
    text = f"{value[0]}:{value[1]}" if knob.name == "window" else written(value)
    if text.strip() == text:
        given = describe.assignments([f"{name}.{knob.name}={text}"], [name])
        assert describe.make(name, given[name], LAYOUT) == method


@pytest.mark.parametrize("name", sorted(methods()))
def test_defaults_need_no_words_in_a_recipe(name):
    assert describe.to_recipe_params(describe.make(name, {}, LAYOUT)) == {}


@pytest.mark.parametrize(("name", "knob"), [(n, k) for n, k in KNOBS if k.low is not None and k.name != "window"])
def test_beyond_the_ends_is_refused_by_name(name, knob):
    for beyond in (knob.low - 1, knob.high + 1):
        value = [beyond] if hasattr(knob.type, "__args__") else beyond
        with pytest.raises(ParamError, match=rf"\.{knob.name} = "):
            describe.make(name, {knob.name: value}, LAYOUT)


@pytest.mark.parametrize(
    "value", [3, "0:1", None, [0.5], [0.1, 0.2, 0.3], ["a", "b"], [0.1, "b"], [True, 1], [0.9, 0.1]]
)
def test_a_window_is_two_numbers_in_order(value):
    with pytest.raises(ParamError, match="window"):
        describe.make("pag", {"window": value})


def test_unknown_names_are_told_with_the_known_ones():
    with pytest.raises(ParamError, match=r"no method is called 'bacn' \(known: .*bacon"):
        describe.make("bacn")
    with pytest.raises(ParamError, match=r"pag has no parameter 'sale' \(known: window, interval, scale, layers\)"):
        describe.make("pag", {"sale": 1})
    with pytest.raises(ParamError, match="not attached; add --method pag"):
        describe.assignments(["pag.scale=1"], ["bacon"])


@pytest.mark.parametrize("text", ["", "pag", "pag.scale", "scale=3", "pag.=3", ".scale=3", "=", "pag=3"])
def test_a_malformed_assignment_is_told_its_form(text):
    with pytest.raises(ParamError, match=r"NAME\.param=VALUE"):
        describe.assignments([text], ["pag"])


@pytest.mark.parametrize("layout", [None, Layout()])
def test_a_layout_method_without_regions_says_what_to_pass(layout):
    with pytest.raises(LayoutError, match=r"bacon needs a layout"):
        describe.make("bacon", {}, layout)
