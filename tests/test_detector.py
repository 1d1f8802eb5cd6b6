"""The detector reads the embedded world, also where pictures are spoiled, and scores what it read."""

import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw

from diffguide.errors import ParamError
from diffguide.zoo import detector, world
from diffguide.zoo.detector import Found, Reading, detect, iou, match, measure, overlay, score
from diffguide.zoo.shapes import box_of
from diffguide.zoo.world import Scene, Thing


def scenes(count: int, seed: int, **options: float) -> list[Scene]:
    rng = random.Random(seed)
    return [world.sample_scene(rng, **options) for _ in range(count)]


coordinate = st.floats(0, 1, allow_subnormal=False)
box = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3]))
)
kind = st.sampled_from([("red", "circle"), ("blue", "star")])
found = st.builds(lambda k, b, c: Found(*k, b, c), kind, box, coordinate)
readings = st.lists(found, max_size=5).map(lambda things: Reading("white", tuple(things)))
targets = st.lists(st.builds(lambda k, b: (*k, b), kind, box), max_size=4)


# --- the bar


def test_truth_is_read_as_it_is():
    figures = measure(scenes(200, seed=7))
    assert figures.found >= 0.99
    assert figures.extra <= 0.01
    assert figures.median_iou > 0.95


@pytest.mark.parametrize("damage", detector.DAMAGES)
def test_a_spoiled_picture_is_still_read(damage):
    figures = measure(scenes(40, seed=11), damage=damage)
    assert figures.found >= 0.97
    assert figures.extra <= 0.03
    assert figures.median_iou > 0.93


@pytest.mark.parametrize("style", world.STYLES)
def test_every_style_is_read_when_named(style):
    styled = [Scene(s.background, s.things, style) for s in scenes(30, seed=5, styled=0)]
    figures = measure(styled)
    # an outlined circle of radius 0.13 is a ring, so a sketch cannot be read without mistakes
    assert figures.found >= (0.95 if style == "as a sketch" else 0.99)


@pytest.mark.parametrize("side", [96, 256, 512])
def test_boxes_do_not_depend_on_the_size_of_the_picture(side):
    for scene in scenes(4, seed=2, styled=0):
        result = score(detect(world.render(scene, side)), scene)
        assert result.complete and result.extra == 0
        assert all(value is not None and value > 0.9 for value in result.ious)


@pytest.mark.parametrize("background", world.BACKGROUNDS)
@pytest.mark.parametrize("color", world.COLORS)
def test_every_colour_is_read_on_every_ground(background, color):
    scene = Scene(background, (Thing(color, "star", 0.3, 0.3, 0.12), Thing(color, "ring", 0.7, 0.7, 0.15)))
    reading = detect(world.render(scene))
    assert reading.background == background
    assert score(reading, scene).complete and len(reading.things) == 2


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("r", [world.SMALLEST, world.LARGEST])
def test_every_shape_is_read_at_both_ends_of_its_size(shape, r):
    (thing,) = detect(world.render(Scene("beige", (Thing("green", shape, 0.5, 0.5, r),)))).things
    assert thing.kind == ("green", shape)
    assert thing.confidence > 0.8


# --- what a small diffusion model does to a picture


def canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (128, 128), world.BACKGROUNDS["white"])
    return image, ImageDraw.Draw(image)


@pytest.mark.parametrize("rim", ["pink", "orange"])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_rim_of_another_palette_colour_is_no_thing(rim, width):
    image, draw = canvas()
    draw.ellipse((40, 40, 88, 88), fill=world.COLORS["red"], outline=world.COLORS[rim], width=width)
    (thing,) = detect(image).things
    assert thing.kind == ("red", "circle")
    assert iou(thing.box, (40 / 128, 40 / 128, 89 / 128, 89 / 128)) > 0.8


def test_stains_and_holes_in_a_thing_change_nothing():
    image, draw = canvas()
    draw.rectangle((30, 30, 90, 90), fill=world.COLORS["blue"])
    draw.rectangle((40, 40, 47, 47), fill=world.COLORS["purple"])
    draw.rectangle((70, 60, 72, 62), fill=world.BACKGROUNDS["white"])
    (thing,) = detect(image).things
    assert thing.kind == ("blue", "square")


def test_touching_things_of_two_colours_are_two_things():
    image, draw = canvas()
    draw.rectangle((20, 40, 59, 79), fill=world.COLORS["red"])
    draw.rectangle((60, 40, 99, 79), fill=world.COLORS["green"])
    reading = detect(image)
    assert {t.kind for t in reading.things} == {("red", "square"), ("green", "square")}
    wanted = [("red", "square", (20 / 128, 40 / 128, 60 / 128, 80 / 128))]
    assert iou(next(t.box for t in reading.things if t.color == "red"), wanted[0][2]) > 0.9
    assert len(reading.things) == 2


def test_two_things_of_one_colour_that_touch_at_a_corner_are_two_things():
    things = (Thing("green", "square", 0.3, 0.3, 0.2), Thing("green", "square", 0.64, 0.64, 0.2))
    assert score(detect(world.render(Scene("white", things))), Scene("white", things)).present == 2


@given(st.tuples(*[st.integers(-14, 14)] * 3))
@settings(max_examples=25)
def test_slightly_wrong_colours_keep_their_names(shift):
    scene = Scene("white", (Thing("red", "heart", 0.3, 0.4, 0.2), Thing("blue", "cross", 0.75, 0.7, 0.15)))
    picture = np.asarray(world.render(scene, supersample=2), int) + shift
    assert score(detect(picture.clip(0, 255).astype(np.uint8)), scene).complete


def test_specks_below_the_least_area_are_no_things():
    image, draw = canvas()
    draw.rectangle((60, 60, 65, 65), fill=world.COLORS["red"])  # 36 pixels; 0.3 % are 49
    assert detect(image).things == ()
    draw.rectangle((60, 60, 67, 67), fill=world.COLORS["red"])
    assert [t.kind for t in detect(image).things] == [("red", "square")]


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_an_empty_canvas_holds_nothing(background):
    assert detect(Image.new("RGB", (128, 128), world.BACKGROUNDS[background])) == Reading(background, ())


@given(hnp.arrays(np.uint8, st.tuples(st.integers(16, 40), st.integers(16, 40), st.just(3))))
@settings(max_examples=50)
def test_any_picture_is_read_without_complaint(picture):
    for style in (None, *world.STYLES):
        for thing in detect(picture, style).things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 and 0 <= thing.confidence <= 1


@given(hnp.arrays(bool, (12, 12)), hnp.arrays(np.float64, (12, 12), elements=st.floats(0, 1)), st.booleans())
def test_the_box_of_a_speck_is_never_empty(mask, coverage, sketch):
    mask[5, 5] = True
    for shape in world.SHAPES:
        x0, y0, x1, y1 = box_of(mask, ~mask, coverage, shape, 1.0, sketch=sketch)
        assert x0 < x1 and y0 < y1


def test_what_cannot_be_read_is_refused_by_name():
    with pytest.raises(ParamError, match="'at noon'"):
        detect(Image.new("RGB", (64, 64)), "at noon")
    with pytest.raises(ParamError, match="uint8"):
        detect(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(ParamError, match="16"):
        detect(Image.new("RGB", (8, 64)))
    with pytest.raises(ParamError, match="'rain'"):
        measure(scenes(1, seed=0), damage="rain")


# --- components


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 2)))
def test_components_are_what_a_flood_reaches(labels):
    ids = detector.components(labels)
    assert ((ids == 0) == (labels == 0)).all()
    reached = np.zeros(labels.shape, int)
    count = 0
    for start in zip(*np.nonzero(labels), strict=True):
        if reached[start]:
            continue
        count += 1
        front = [start]
        while front:
            y, x = front.pop()
            inside = 0 <= y < labels.shape[0] and 0 <= x < labels.shape[1]
            if inside and not reached[y, x] and labels[y, x] == labels[start]:
                reached[y, x] = count
                front += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    assert len(set(zip(ids.ravel(), reached.ravel(), strict=True))) == len(np.unique(ids)) == len(np.unique(reached))


# --- scores


@given(box, box)
def test_iou_is_symmetric_and_a_share(a, b):
    assert iou(a, b) == pytest.approx(iou(b, a))
    assert 0 <= iou(a, b) <= 1 + 1e-9


def test_iou_of_halves_and_strangers():
    assert iou((0, 0, 1, 1), (0, 0, 1, 0.5)) == 0.5
    assert iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0
    assert iou((0, 0, 0, 1), (0, 0, 0, 1)) == 0


@given(readings, targets)
def test_matching_is_the_best_there_is(reading, wanted):
    matched = match(reading, wanted)
    used = [id(thing) for thing in matched if thing]
    assert len(used) == len(set(used))
    slots = [*reading.things, *[None] * len(wanted)]
    best = (0, 0.0)
    for way in itertools.permutations(range(len(slots)), len(wanted)):
        pairs = [(slots[i], target) for i, target in zip(way, wanted, strict=True) if slots[i]]
        if all(thing.kind == target[:2] for thing, target in pairs):
            best = max(best, (len(pairs), sum(iou(thing.box, target[2]) for thing, target in pairs)))
    got = [(thing, target) for thing, target in zip(matched, wanted, strict=True) if thing]
    assert all(thing.kind == target[:2] for thing, target in got)
    assert len(got) == best[0]
    assert sum(iou(thing.box, target[2]) for thing, target in got) == pytest.approx(best[1], abs=5e-3)


@given(readings, targets)
def test_a_score_adds_up(reading, wanted):
    result = score(reading, wanted)
    assert result.wanted == len(wanted) == len(result.ious)
    assert result.present + result.extra == len(reading.things)
    assert result.complete == (result.present == result.wanted)
    assert 0 <= result.in_box <= result.present and 0 <= result.centred <= result.present


def test_a_thing_in_the_wrong_place_is_present_but_not_in_its_box():
    reading = Reading("white", (Found("red", "circle", (0, 0, 0.2, 0.2), 1.0),))
    result = score(reading, [("red", "circle", (0.5, 0.5, 0.9, 0.9)), ("red", "circle", None), ("blue", "star", None)])
    assert (result.present, result.centred, result.in_box, result.extra) == (1, 0, 0, 0)
    result = score(reading, [("red", "circle", (0.05, 0.05, 0.5, 0.5))])
    assert (result.present, result.centred, result.in_box) == (1, 1, 0)
    result = score(reading, [("red", "circle", (0.0, 0.0, 0.2, 0.25))])
    assert (result.present, result.centred, result.in_box) == (1, 1, 1)


def test_without_a_box_the_iou_is_unknown_and_with_one_a_missing_thing_has_none():
    reading = Reading("white", (Found("red", "circle", (0, 0, 0.2, 0.2), 1.0),))
    assert score(reading, [("red", "circle", None), ("blue", "star", (0, 0, 1, 1))]).ious == (None, 0.0)


def test_of_two_alike_the_confident_one_stands_for_a_target_without_a_box():
    weak, strong = (Found("red", "circle", (0, 0, 0.2, 0.2), c) for c in (0.3, 0.9))
    assert match(Reading("white", (weak, strong)), [("red", "circle", None)]) == [strong]


# --- pictures and the command


def test_an_overlay_is_twice_the_size_and_marks_found_and_wanted_boxes():
    scene = Scene("white", (Thing("red", "circle", 0.5, 0.5, 0.2),))
    picture = world.render(scene)
    plain = np.asarray(overlay(picture))
    assert plain.shape == (256, 256, 3)
    marked = np.asarray(overlay(picture, detect(picture), [(0.1, 0.1, 0.2, 0.2)]))
    assert (marked[25:27, 30:45] == (255, 0, 255)).all(2).any()  # a wanted box in magenta
    assert (marked == 0).all(2).sum() > (plain == 0).all(2).sum() + 200  # a frame and a name in black


def test_the_command_prints_both_figures_and_the_time(capsys):
    detector.main(["--scenes", "3", "--seed", "1"])
    said = capsys.readouterr().out
    assert "found 100.00%" in said and "not there 0.00%" in said and "ms a picture" in said


def test_the_detector_needs_no_torch():
    program = "import sys, diffguide.zoo.detector; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
