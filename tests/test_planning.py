"""A layout from the prompt alone."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import diffguide
from diffguide.errors import LayoutError, PromptError
from diffguide.planning import GAP, MOST, plan, read
from diffguide.tokens import find_groups

NUMBERS = {1: "a", 2: "two", 3: "three", 4: "4"}
WORDS = ["cat", "dog", "red ball", "tall green tree", "lamp"]
RELATIONS = {
    "to the left of": (0, 1),
    "on the right of": (0, -1),
    "above": (1, 1),
    "on top of": (1, 1),
    "below": (1, -1),
    "under the": (1, -1),
}
ROUND = 2e-4  # boxes have four digits
things = st.lists(
    st.tuples(st.sampled_from(WORDS), st.integers(1, 4)), min_size=1, max_size=4, unique_by=lambda t: t[0]
)


def said(things, joint=" and "):
    return joint.join(f"{NUMBERS[n]} {word}{'s' if n > 1 else ''}" for word, n in things)


@given(things, st.integers(0, 10**6), st.floats(0.25, 4))
def test_as_many_boxes_as_the_prompt_counts_and_none_meets_another(things, seed, aspect):
    prompt = f"a photo of {said(things, ', ')} in a garden"
    layout = plan(prompt, seed=seed, aspect=aspect)
    assert [(r.phrase, len(r.instances)) for r in layout.regions] == [(w + "s" * (n > 1), n) for w, n in things]
    boxes = [box for region in layout.regions for box in region.instances]
    width, height = max(1, aspect), max(1, 1 / aspect)
    for box in boxes:
        wide, high = (box[2] - box[0]) * width, (box[3] - box[1]) * height
        assert wide == pytest.approx(high, abs=ROUND * max(width, height)) and wide > 0.05
    for a, b in itertools.combinations(boxes, 2):
        across, down = max(a[0] - b[2], b[0] - a[2]) * width, max(a[1] - b[3], b[1] - a[3]) * height
        assert max(across, down) >= GAP - ROUND * max(width, height)


@given(things, st.data(), st.integers(0, 100))
def test_each_thing_stands_on_the_side_that_the_prompt_says(things, data, seed):
    assume(len(things) > 1)
    words = [data.draw(st.sampled_from(sorted(RELATIONS))) for _ in things[1:]]
    parts = [said([thing]) for thing in things]
    layout = plan(parts[0] + "".join(f" {w} {p}" for w, p in zip(words, parts[1:], strict=True)), seed=seed)
    for word, a, b in zip(words, layout.regions, layout.regions[1:], strict=False):
        axis, way = RELATIONS[word]
        for one, other in itertools.product(a.instances, b.instances):
            first, second = (one, other) if way > 0 else (other, one)
            assert first[axis + 2] <= second[axis], word


def test_one_seed_is_one_arrangement_and_another_seed_another():
    prompt = "two cats and a dog"
    assert plan(prompt) == plan(prompt, seed=0) == diffguide.plan(prompt)
    assert len({plan(prompt, seed=seed) for seed in range(10)}) == 10


def test_phrases_are_those_that_the_words_only_methods_find():
    prompt = "three yellow crosses and a red ring, a cat on a sofa in a park"
    assert [t.phrase for t in read(prompt)] == find_groups(prompt)
    assert [t.number for t in read(prompt)] == [3, 1, 1, 1]


def test_a_thing_that_is_said_twice_is_counted_twice():
    assert [(t.phrase, t.number) for t in read("a cat and two cat and a dog")] == [("cat", 3), ("dog", 1)]


@pytest.mark.parametrize("prompt", ["", "in the park", "on a white background"])
def test_nothing_named_is_refused(prompt):
    with pytest.raises(PromptError, match=r"no noun phrase found in .*; draw a layout by hand"):
        plan(prompt)


def test_too_many_things_are_refused_and_the_most_are_not():
    assert len(plan(f"{MOST} cats").regions[0].instances) == MOST
    with pytest.raises(LayoutError, match=f"counts {MOST + 1} things, at most {MOST} are arranged; draw a layout"):
        plan(f"{MOST + 1} cats")


@pytest.mark.parametrize("aspect", [0, -1, 9, float("nan")])
def test_an_impossible_picture_is_refused(aspect):
    with pytest.raises(LayoutError, match=r"aspect = .* is outside \[0.125, 8\]; it is width over height"):
        plan("a cat", aspect=aspect)


def test_what_finds_no_place_is_refused_by_name():
    column = " above ".join(f"a {chr(97 + i) * 3}" for i in range(24))
    with pytest.raises(LayoutError, match="no arrangement found for 'a aaa above"):
        plan(column)
