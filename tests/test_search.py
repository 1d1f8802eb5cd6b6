"""HeadHunter on a toy objective, its state, and the objectives that come with it."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy.stats import kendalltau

from diffguide.errors import ParamError, SearchError
from diffguide.heads import Preset, load, presets
from diffguide.processors import SoftPAG
from diffguide.search import Hunt, hunt, named, objectives
from diffguide.search.heatmap import BETTER, CELL, FAILED, INK, LEFT, SAME, TOP, WORSE, heatmap, shade
from diffguide.search.objectives import things
from diffguide.search.ranking import Screen, best, going_on, tau
from diffguide.search.report import report
from diffguide.search.state import read
from diffguide.search.studio import painter, units
from diffguide.zoo.detector import detect
from diffguide.zoo.world import STYLES, Scene, Thing, caption, render

PROMPTS = ("a red circle", "a blue square")
PLAN = Hunt(PROMPTS, keep=2, steps=2, scale=5.0)
SIZE = 14  # heads of the small model


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.sd()


def red(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(p)[..., 0].mean()) for p in pictures]


def test_one_round_finds_what_trying_all_finds(pipe: Any, tmp_path: Path) -> None:
    draw = painter(pipe, PLAN)
    scores = {unit: float(np.mean(red(draw([unit]), PROMPTS))) for unit in units(pipe)}
    found = hunt(pipe, PLAN, objective=red, folder=tmp_path)
    assert len(scores) == SIZE and found.rounds == [scores]
    assert found.heads == sorted(scores, key=lambda u: (-scores[u], u))[:2] == best(scores, 2)
    assert found.plain == pytest.approx(np.mean(red(draw([]), PROMPTS)))
    assert found.best == [max(scores.values())] and found.text == ",".join(f"L{a}H{b}" for a, b in found.heads)


def test_a_later_round_tries_heads_beside_the_chosen_and_none_twice(pipe: Any) -> None:
    plan = Hunt(PROMPTS[:1], rounds=2, keep=1, steps=2, layers="down")
    found = hunt(pipe, plan, objective=red)
    first, second = found.rounds
    assert len(first) == 4 and set(second) == set(first) - {found.heads[0]} and len(set(found.heads)) == 2
    draw = painter(pipe, plan)
    for unit, value in second.items():
        assert value == pytest.approx(red(draw([found.heads[0], unit]), PROMPTS)[0])


def test_what_was_stopped_goes_on_with_nothing_lost_or_done_twice(pipe: Any, tmp_path: Path) -> None:
    asked = []

    def counted(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        asked.append(1)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return red(pictures, prompts)

    with pytest.raises(KeyboardInterrupt):
        hunt(pipe, PLAN, objective=counted, folder=tmp_path)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"round": 0, "unit": [2, ')  # killed while it wrote
    told: list[tuple[str, int, int]] = []
    found = hunt(pipe, PLAN, objective=counted, folder=tmp_path, tell=lambda *t: told.append(t))
    assert len(asked) == 1 + SIZE + 1  # the plain one and every head, and the one that was stopped
    assert told[0] == ("round 1, L2H0", 5, 15) and told[-1] == ("done", 15, 15)
    assert found == hunt(pipe, PLAN, objective=red)
    assert found == hunt(pipe, PLAN, objective=counted, folder=tmp_path) and len(asked) == SIZE + 2
    table = pq.read_table(tmp_path / "trials.parquet").to_pydict()
    assert len(table["score"]) == 1 + SIZE and table["layer"][0] is None
    assert (
        dict(zip(zip(table["layer"][1:], table["head"][1:], strict=True), table["score"][1:], strict=True))
        == (found.rounds[0])
    )


def test_another_search_in_the_same_folder_is_refused(pipe: Any, tmp_path: Path) -> None:
    hunt(pipe, Hunt(PROMPTS[:1], keep=1, steps=1, layers="mid"), objective=red, folder=tmp_path)
    with pytest.raises(SearchError, match=r"has a search with other steps \(.* there, .* here\); name another folder"):
        hunt(pipe, Hunt(PROMPTS[:1], keep=1, steps=2, layers="mid"), objective=red, folder=tmp_path)
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(SearchError, match=r"search.json is damaged"):
        hunt(pipe, Hunt(PROMPTS[:1], keep=1, steps=1, layers="mid"), objective=red, folder=tmp_path)


def test_pictures_that_failed_come_last_and_ties_go_by_order() -> None:
    scores = {(0, 0): math.nan, (0, 1): 1.0, (1, 0): 2.0, (1, 1): 1.0, (2, 0): -math.inf}
    assert best(scores, 5) == [(1, 0), (0, 1), (1, 1), (0, 0), (2, 0)]


@given(
    st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.floats(-9, 9), min_size=1), st.integers(1, 9)
)
def test_the_best_are_no_worse_than_the_rest(scores: dict[tuple[int, int], float], count: int) -> None:
    chosen = best(scores, count)
    rest = [v for u, v in scores.items() if u not in chosen]
    assert len(chosen) == min(count, len(scores)) and all(scores[u] >= max(rest, default=-99) for u in chosen)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompts": ()}, "prompts is empty"),
        ({"seeds": (1,)}, "1 of them for 2 prompts"),
        ({"rounds": 0}, "rounds = 0 is outside"),
        ({"keep": 1.5}, "keep = 1.5 is not a whole number"),
        ({"scale": 99}, "SoftPAG.scale = 99 is outside"),
        ({"objective": "beauty"}, "no objective is called 'beauty' .*brightness"),
        ({"steps": 4, "screen_steps": (4,)}, r"screen_steps = \(4,\) is outside \[1, 3\]: fewer than the 4 steps"),
        ({"steps": 4, "screen_steps": (2, 1)}, r"screen_steps = \(2, 1\) do not grow"),
        ({"screen_keep": 0}, "screen_keep = 0 is outside"),
        ({"screen_keep": 0.25}, "screen_keep = 0.25 without a screen; give screen_steps"),
        ({"screen_keep": 1.01}, "screen_keep = 1.01 is outside"),
        ({"layers": "roof"}, "'roof' matches no layer"),
        ({"keep": 8, "rounds": 2}, "14 heads, but 16 are to be chosen, 8 a round"),
    ],
)
def test_what_cannot_be_searched_is_refused(pipe: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ParamError, match=said):
        hunt(pipe, Hunt(**{"prompts": PROMPTS, "steps": 1, **more}))


def test_an_objective_that_gives_too_few_scores_is_told(pipe: Any) -> None:
    with pytest.raises(ParamError, match="the objective gave 1 scores for 2 pictures"):
        hunt(pipe, PLAN, objective=lambda pictures, prompts: [0.0])


# Screens.


def test_a_screen_sends_its_best_to_the_full_pass(pipe: Any, tmp_path: Path) -> None:
    plan = Hunt(PROMPTS[:1], rounds=2, keep=1, steps=4, scale=5.0, layers="down", screen_steps=(1, 2), screen_keep=0.6)
    told: list[tuple[str, int, int]] = []
    found = hunt(pipe, plan, objective=red, folder=tmp_path, tell=lambda *t: told.append(t))
    draw, chosen = painter(pipe, plan), []
    for number, full in enumerate(found.rounds):
        left = [unit for unit in units(pipe, "down") if unit not in chosen]
        for steps, screen in zip((1, 2), found.screens[2 * number :], strict=False):
            scores = {unit: red(draw([*chosen, unit], steps), PROMPTS)[0] for unit in left}
            assert screen == Screen(number, steps, scores, best(scores, math.ceil(0.6 * len(left))))
            left = sorted(screen.kept)
        assert full == {unit: red(draw([*chosen, unit]), PROMPTS)[0] for unit in left}
        chosen += best(full, 1)
    assert found.heads == chosen
    # four heads of which three and two go on, then three of which two and two
    assert plan.trials(4) == 1 + (4 + 3 + 2) + (3 + 2 + 2) == told[-1][1] == len(read(tmp_path))
    assert [t[1] for t in told] == [*range(17), 17]
    assert pq.read_table(tmp_path / "trials.parquet")["steps"].to_pylist()[:6] == [None, 1, 1, 1, 1, 2]


def test_a_screen_that_was_stopped_goes_on(pipe: Any, tmp_path: Path) -> None:
    plan = Hunt(PROMPTS[:1], keep=1, steps=3, layers="down", screen_steps=(1,))
    asked = []

    def counted(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return red(pictures, prompts)

    with pytest.raises(KeyboardInterrupt):
        hunt(pipe, plan, objective=counted, folder=tmp_path)
    found = hunt(pipe, plan, objective=counted, folder=tmp_path)
    assert len(asked) == plan.trials(4) + 1 and found == hunt(pipe, plan, objective=red)


def test_a_screen_that_drops_none_finds_what_no_screen_finds(pipe: Any) -> None:
    plan = Hunt(PROMPTS[:1], keep=1, steps=3, layers="down")
    found = hunt(pipe, replace(plan, screen_steps=(1,), screen_keep=1.0), objective=red)
    assert replace(found, screens=[]) == hunt(pipe, plan, objective=red)
    assert found.screened[0] in report(plan, found) and "4 of 4 heads went on" in found.screened[0]


def test_a_search_without_screens_is_kept_as_before_there_were_any(pipe: Any, tmp_path: Path) -> None:
    plan = Hunt(PROMPTS[:1], keep=1, steps=2, layers="mid")
    found = hunt(pipe, plan, objective=red, folder=tmp_path)
    assert not [key for key in json.loads((tmp_path / "search.json").read_text()) if key.startswith("screen")]
    assert "steps" not in (tmp_path / "trials.jsonl").read_text()
    with pytest.raises(
        SearchError, match=r"other screen_steps \(none there, \[1\] here\), screen_keep \(none there, 0.5 here\)"
    ):
        hunt(pipe, replace(plan, screen_steps=(1,)), objective=red, folder=tmp_path)
    assert hunt(pipe, plan, objective=red, folder=tmp_path) == found


def test_what_a_screen_would_have_lost_is_told() -> None:
    order = [(0, head) for head in range(8)]
    full = {unit: -float(unit[1]) for unit in order}
    screen = Screen(1, 5, {unit: -float((unit[1] + 5) % 8) for unit in order}, order)
    assert screen.ranks(order[:2]) == [6, 7]  # heads 3 to 7 come first, then 0 and 1
    text = screen.told(full, order[:2])
    assert "Screen of 5 steps, round 2: 8 of 8 heads went on" in text and "the chosen ranked 6, 7 in it" in text
    assert "Of the 2 chosen it would have kept with 25% 0, with 50% 0; all of them with 88%" in text
    right = Screen(1, 5, full, order).told(full, order[:2])
    assert "would have kept with 25% 2, with 50% 2; all of them with 25%" in right and "of them 1.00" in right
    some = {unit: full[unit] for unit in order[:4]}
    assert "not known; --screen-keep 1 measures it" in Screen(1, 5, full, order[:4]).told(some, order[:2])


SCORES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12)


@given(SCORES)
def test_tau_is_kendalls(pairs: list[tuple[int, int]]) -> None:
    a, b = ({(0, n): float(pair[side]) for n, pair in enumerate(pairs)} for side in (0, 1))
    x, y = zip(*pairs, strict=True)
    wanted = kendalltau(x, y).statistic if len(set(x)) > 1 and len(set(y)) > 1 else math.nan
    assert tau(a, b) == pytest.approx(wanted, nan_ok=True)
    assert tau(a | {(1, 0): math.nan, (1, 1): 1.0}, b | {(1, 0): 1.0}) == pytest.approx(wanted, nan_ok=True)


@given(st.integers(1, 2000), st.floats(1e-6, 1), st.integers(1, 30))
def test_a_screen_keeps_its_share_and_as_many_as_are_chosen(heads: int, share: float, least: int) -> None:
    kept = going_on(heads, share, least)
    assert min(heads, least) <= kept <= heads and kept >= share * heads - 1e-9
    assert kept == min(heads, least) or kept < share * heads + 1


# What is made of it.


def test_the_heat_map_shows_better_worse_failed_and_chosen() -> None:
    scores = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 0.0, (1, 1): math.nan, (2, 1): 1.5}
    page = np.asarray(heatmap(scores, 1.0, [(0, 1)]))

    def at(layer: int, head: int) -> tuple[int, ...]:
        return tuple(page[TOP + layer * CELL + CELL // 2, LEFT + head * CELL + CELL // 2].tolist())

    assert at(0, 0) == SAME and at(0, 1) == BETTER and at(1, 1) == FAILED and at(2, 0) == (255, 255, 255)
    assert at(1, 0) == shade(-0.5) and at(2, 1) == shade(0.25)
    assert tuple(page[TOP + 1, LEFT + CELL + 1]) == INK and tuple(page[TOP + 1, LEFT + 1]) == SAME


def test_the_shades_go_evenly_to_their_ends() -> None:
    assert (shade(0), shade(1), shade(-1), shade(math.nan)) == (SAME, BETTER, WORSE, FAILED)
    for way in (1, -1):
        far = [math.dist(shade(way * s / 10), SAME) for s in range(11)]
        assert far == sorted(far)


def test_the_report_tells_heads_settings_and_trials(pipe: Any) -> None:
    plan = Hunt(PROMPTS[:1], keep=1, steps=1, layers="mid")
    page = report(plan, found := hunt(pipe, plan, objective=red))
    assert f"`{found.text}`" in page and "- a red circle" in page and "| L2H0 |" in page and "| L2H1 |" in page


def test_the_presets_that_come_along_are_whole() -> None:
    assert len(presets()) >= 13
    for name, preset in presets().items():
        assert SoftPAG(heads=f"@{name}").heads == preset.heads and SoftPAG(**preset.settings)
        assert preset.model and preset.purpose and preset.source


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    preset = Preset("L2H1", "shapes-unet", "objects", "a test", {"scale": 2.0})
    preset.save(file)
    assert load(file) == preset and SoftPAG(heads=f"@{file},L0").heads == "L2H1,L0"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "mine.json is no preset of heads: Expecting"),
        ("[]", "expected an object"),
        ('{"version": 2}', "2 is newer than 1"),
        ('{"version": 1, "heads": "L1H1"}', "missing 3 required"),
        ('{"version": 1, "heads": "mid", "model": "", "purpose": "", "source": ""}', "'mid' is not of the form"),
        ('{"version": 1, "heads": "L1H1", "model": 3, "purpose": "", "source": ""}', "model: expected a text"),
    ],
)
def test_a_file_that_is_no_preset_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ParamError, match=said):
        load(file)


@pytest.mark.parametrize("name", ["@nobody", "@../secret", "@"])
def test_an_unknown_preset_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ParamError, match=r"no preset of heads is called .*sd3-medium-dark"):
        SoftPAG(heads=name)


# Objectives.


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (value, value, value))


def test_the_names_of_the_objectives() -> None:
    assert set(objectives()) == {"brightness", "contrast", "sharpness", "colourfulness", "objects", "shapes"}


def test_flat_pictures_have_brightness_alone() -> None:
    pictures = [flat(0), flat(51), flat(255)]
    assert named("brightness")(pictures, PROMPTS) == pytest.approx([0, 0.2, 1])
    for name in ("contrast", "sharpness", "colourfulness"):
        assert named(name)(pictures, PROMPTS) == pytest.approx([0, 0, 0])


def test_what_is_blurred_is_less_sharp_and_what_is_bleached_less_colourful() -> None:
    scene = Scene("white", (Thing("red", "circle", 0.3, 0.4, 0.2), Thing("blue", "star", 0.7, 0.6, 0.2)))
    picture = render(scene, 64)
    blurred = [picture.filter(ImageFilter.GaussianBlur(r)) for r in (0, 1, 2, 4)]
    sharp = list(named("sharpness")(blurred, PROMPTS * 2))
    assert sharp == sorted(sharp, reverse=True) and len(set(sharp)) == 4
    bleached = [Image.blend(picture, flat(128).resize((64, 64)), a) for a in (0, 0.3, 0.6, 0.9)]
    for name in ("colourfulness", "contrast"):
        scores = list(named(name)(bleached, PROMPTS * 2))
        assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4


def test_colourfulness_is_the_formula() -> None:
    halves = Image.new("RGB", (2, 1), (255, 0, 0))
    halves.putpixel((1, 0), (0, 0, 255))
    # rg is 1 and 0, yb 1/2 and -1: deviations 0.5 and 0.75, means 0.5 and -0.25
    wanted = math.hypot(0.5, 0.75) + 0.3 * math.hypot(0.5, -0.25)
    assert named("colourfulness")([halves], [""]) == pytest.approx([wanted])


def test_objects_counts_what_is_there_and_what_is_too_much() -> None:
    two = Scene("white", (Thing("red", "circle", 0.3, 0.4, 0.2), Thing("blue", "square", 0.7, 0.6, 0.18)))
    picture = render(two, 128)
    prompts = ["a red circle and a blue square", "a red circle", "two red circles", "a green star"]
    assert named("objects")([picture] * 4, prompts) == pytest.approx([1, 1 / 2, 1 / 3, 0])
    assert things("two red crosses to the left of a green star on a white background") == [
        ("red", "cross"),
        ("red", "cross"),
        ("green", "star"),
    ]
    for style in STYLES:
        assert things(f"{caption(two)} {style}")[0] == ("red", "circle")
    for wrong, said in (("a cat", "'cat' is no thing"), ("in fog", "names nothing of the embedded world")):
        with pytest.raises(ParamError, match=said):
            named("objects")([picture], [wrong])


def test_shapes_asks_how_well_things_are_drawn_and_not_which() -> None:
    two = Scene("white", (Thing("red", "circle", 0.3, 0.4, 0.2), Thing("blue", "square", 0.7, 0.6, 0.18)))
    sharp = render(two, 128)
    crumbled = sharp.resize((16, 16)).resize(sharp.size)
    none = Image.new("RGB", (128, 128), "white")
    good, other, worse, nothing = named("shapes")([sharp, sharp, crumbled, none], ["a red circle", "a cat", "", ""])
    assert 1 >= good == other > worse > nothing == 0
    assert good == pytest.approx(sum(thing.confidence for thing in detect(sharp).things) / 2)


def test_the_plan_is_kept_as_it_was_asked_for(pipe: Any, tmp_path: Path) -> None:
    hunt(pipe, Hunt(PROMPTS[:1], keep=1, steps=1, layers="mid"), objective=red, folder=tmp_path)
    kept = json.loads((tmp_path / "search.json").read_text())
    assert kept["prompts"] == [PROMPTS[0]] and kept["heads"] == [[2, 0], [2, 1]] and kept["objective"] == "sharpness"
