# wrong types are handed over on purpose
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffguide.errors import LayoutError, OutputError
from diffguide.layout import BOXES, REGIONS, Layout, Region, cells, rasterise_box

few = settings(max_examples=30)
SIDES = st.integers(1, 20)
CHARACTERS = 'ab é猫\t\n\0"\\<${'


@st.composite
def boxes(draw):
    x0, y0 = draw(st.floats(0, 0.99)), draw(st.floats(0, 0.99))
    return x0, y0, draw(st.floats(x0, 1, exclude_min=True)), draw(st.floats(y0, 1, exclude_min=True))


@st.composite
def masks(draw):
    h, w = draw(SIDES), draw(SIDES)
    mask = np.random.default_rng(draw(st.integers(0, 99))).random((h, w))
    mask[0, 0] = 1
    return mask > 0.5 if draw(st.booleans()) else mask


@st.composite
def regions(draw):
    place = draw(
        st.one_of(
            st.fixed_dictionaries({"box": boxes()}),
            st.fixed_dictionaries({"boxes": st.lists(boxes(), min_size=1, max_size=4)}),
            st.fixed_dictionaries({"mask": masks()}),
        )
    )
    phrase = draw(st.text(CHARACTERS, min_size=1, max_size=20).filter(str.strip))
    negative = draw(st.none() | st.text(CHARACTERS, max_size=9))
    occurrence = draw(st.none() | st.integers(0, 9))
    return Region(phrase, **place, weight=draw(st.floats(0, 10)), negative=negative, occurrence=occurrence)


@st.composite
def layouts(draw):
    overlap = draw(st.sampled_from(["average", "first", "last"]))
    return Layout(*draw(st.lists(regions(), max_size=4)), base=draw(st.none() | st.just("a field")), overlap=overlap)


def inside(box, points):
    """Which of n x n points in the middles of a fine grid a box holds, [n, n] of y, x."""
    x0, y0, x1, y1 = box
    at = (np.arange(points) + 0.5) / points
    return np.outer((y0 <= at) & (at < y1), (x0 <= at) & (at < x1))


@few
@given(boxes(), SIDES, SIDES)
def test_the_cells_of_a_box_sum_to_its_area(box, h, w):
    grid = rasterise_box(box, h, w)
    assert grid.shape == (h, w) and grid.dtype == np.float32
    assert grid.min() >= 0 and grid.max() <= 1
    x0, y0, x1, y1 = box
    assert grid.sum(dtype=float) == pytest.approx((x1 - x0) * (y1 - y0) * h * w, rel=1e-5, abs=1e-6)
    assert rasterise_box((0, 0, 1, 1), h, w).min() == 1


@few
@given(boxes(), SIDES, SIDES)
def test_a_cell_holds_the_product_of_its_overlaps(box, h, w):
    x0, y0, x1, y1 = box
    across = [max(0.0, min(x1 * w, j + 1) - max(x0 * w, j)) for j in range(w)]
    down = [max(0.0, min(y1 * h, i + 1) - max(y0 * h, i)) for i in range(h)]
    assert rasterise_box(box, h, w) == pytest.approx(np.outer(down, across), abs=1e-6)


def test_instances_that_overlap_are_counted_once():
    grid = Layout(Region("cats", boxes=[(0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5)])).rasterise(2, 2)
    assert grid.tolist() == [[[1, 0.5], [0, 0]]]


@few
@given(masks(), SIDES, SIDES)
def test_a_mask_keeps_its_mean_on_every_grid(mask, h, w):
    region = Region("owl", mask=mask)
    grid = Layout(region).rasterise(h, w)[0]
    assert grid.mean(dtype=float) == pytest.approx(region.mask.mean(dtype=float), abs=1e-5)
    assert Layout(region).rasterise(*mask.shape)[0] == pytest.approx(region.mask, abs=1e-6)


@few
@given(boxes())
def test_a_box_drawn_as_a_mask_of_its_cells_covers_the_same(box):
    y0, y1, x0, x1 = cells(box, 16, 16)
    mask = np.zeros((16, 16), bool)
    mask[y0:y1, x0:x1] = True
    whole = (x0 / 16, y0 / 16, x1 / 16, y1 / 16)
    assert Layout(Region("a", mask=mask)).rasterise(5, 7)[0] == pytest.approx(rasterise_box(whole, 5, 7), abs=1e-5)
    assert Region("a", mask=mask).instances == (whole,)


@few
@given(layouts(), SIDES, SIDES)
def test_shares_sum_to_what_is_covered_under_every_rule(layout, h, w):
    covered = layout.rasterise(h, w)
    union = Layout(*layout.regions).shares(h, w).sum(0)
    shares = layout.shares(h, w)
    assert shares.shape == covered.shape and shares.dtype == np.float32
    assert shares.sum(0) == pytest.approx(union, abs=1e-5)
    assert (shares <= covered + 1e-5).all() and shares.sum(0).max(initial=0) <= 1 + 1e-5
    assert (union >= covered.max(0, initial=0) - 1e-5).all()


@few
@given(st.lists(boxes(), min_size=1, max_size=5), SIDES, SIDES)
def test_even_shares_sum_to_the_union_of_the_boxes(some, h, w):
    apart = Layout(*(Region("a", box) for box in some)).shares(h, w).sum(0)
    together = Layout(Region("a", boxes=some)).rasterise(h, w)[0]
    assert apart == pytest.approx(together, abs=1e-5)


@pytest.mark.parametrize("overlap", ["average", "first", "last"])
def test_each_point_goes_to_its_owner(overlap):
    some = [(0.1, 0.1, 0.6, 0.7), (0.3, 0.2, 0.9, 0.5), (0.4, 0.0, 0.5, 1.0)]
    held = np.stack([inside(box, 40) for box in some]).astype(float)
    if overlap == "average":
        owner = held / np.maximum(held.sum(0), 1)
    else:
        order = held if overlap == "first" else held[::-1]
        owner = order * (np.cumsum(order, axis=0) == 1)
        owner = owner if overlap == "first" else owner[::-1]
    expected = owner.reshape(3, 4, 10, 4, 10).mean((2, 4))
    layout = Layout(*(Region("a", box) for box in some), overlap=overlap)
    assert layout.shares(4, 4) == pytest.approx(expected, abs=1e-6)


def test_regions_that_only_meet_in_a_cell_keep_their_own_parts():
    layout = Layout(Region("a", (0, 0, 0.5, 1)), Region("b", (0.5, 0, 1, 1)), overlap="first")
    assert layout.shares(1, 1).ravel().tolist() == [0.5, 0.5]


def test_cells_round_half_up_and_never_vanish():
    assert cells((0, 0, 1, 1), 16, 8) == (0, 16, 0, 8)
    assert cells((0.05, 0.30, 0.45, 0.70), 16, 16) == (5, 11, 1, 7)
    assert cells((0.125, 0.375, 0.625, 0.875), 4, 4) == (2, 4, 1, 3)  # 0.5 -> 1, 1.5 -> 2, 2.5 -> 3, 3.5 -> 4
    assert cells((0.47, 0.99, 0.50, 1.0), 16, 16) == (15, 16, 7, 8)


@few
@given(boxes(), SIDES, SIDES)
def test_cells_lie_within_half_a_cell_of_the_box(box, h, w):
    y0, y1, x0, x1 = cells(box, h, w)
    assert 0 <= y0 < y1 <= h and 0 <= x0 < x1 <= w
    if x1 - x0 > 1:
        assert abs(x0 - box[0] * w) <= 0.5 + 1e-9 and abs(x1 - box[2] * w) <= 0.5 + 1e-9
    assert rasterise_box(box, h, w)[y0:y1, x0:x1].max() > 0 or min(box[2] - box[0], box[3] - box[1]) < 1e-6


@few
@given(layouts())
def test_json_gives_the_same_layout_back(layout):
    again = Layout.from_json(layout.to_json())
    assert again == layout and hash(again) == hash(layout) and repr(again) == repr(layout)
    assert Layout.from_json(json.loads(layout.to_json())) == layout


def test_a_file_gives_the_same_layout_back(tmp_path):
    layout = Layout(Region("a red fox", (0.05, 0.3, 0.45, 0.95), negative="blurry"), base="ein Wald, schön")
    layout.save(tmp_path / "layout.json")
    assert Layout.load(tmp_path / "layout.json") == layout
    assert [file.name for file in tmp_path.iterdir()] == ["layout.json"]
    with pytest.raises(OutputError, match="create the folder first"):
        layout.save(tmp_path / "absent" / "layout.json")


def test_layouts_differ_where_their_fields_differ():
    one = Region("a", mask=np.eye(2))
    assert one != Region("a", mask=np.ones((2, 2))) and one != Region("a", mask=np.eye(2), weight=2)
    assert Layout(one) != Layout(one, overlap="last") and Layout(one) != Layout(one, base="b")


def test_a_mask_is_the_same_from_array_picture_path_and_text(tmp_path):
    levels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    picture = Image.fromarray(levels)
    picture.save(tmp_path / "mask.png")
    file = io.BytesIO()
    picture.save(file, format="PNG")
    text = "png:" + base64.b64encode(file.getvalue()).decode()
    sources = [levels / 255, picture, tmp_path / "mask.png", str(tmp_path / "mask.png"), text, picture.convert("RGB")]
    first, *others = [Region("owl", mask=source) for source in sources]
    assert all(other == first for other in others)
    assert np.array_equal(first.mask, (levels / 255).astype(np.float32))
    with pytest.raises(ValueError, match="read-only"):
        first.mask[0, 0] = 1


def test_a_region_does_not_change_with_the_array_it_came_from():
    array = np.ones((2, 2), np.float32)
    region = Region("owl", mask=array)
    array[:] = 0
    assert region.mask.min() == 1


def test_edges_off_by_rounding_are_clipped():
    assert Region("a", (-1e-9, 0, 0.1 + 0.2 + 0.7 + 1e-9, 1)).box == (0, 0, 1, 1)


def test_regions_and_layouts_cannot_be_changed():
    region = Region("a", (0, 0, 1, 1))
    with pytest.raises(ValueError, match="frozen"):
        region.weight = 2.0
    with pytest.raises(AttributeError):
        Layout(region).base = "b"


@few
@given(boxes(), st.sampled_from(range(4)), st.floats(1.01, 1e9) | st.floats(-1e9, -0.01) | st.just(float("nan")))
def test_a_number_outside_the_picture_is_refused_by_name(box, place, number):
    bad = [*box[:place], number, *box[place + 1 :]]
    with pytest.raises(LayoutError, match=rf"^box: {('x0', 'y0', 'x1', 'y1')[place]} = .* is outside \[0, 1\]"):
        Region("a", bad)


@few
@given(boxes())
def test_an_inverted_box_is_refused_by_name(box):
    x0, y0, x1, y1 = box
    for bad, text in (
        ((x1, y0, x0, y1), "x0 = {} is not below x1 = {}"),
        ((x0, y1, x1, y0), "y0 = {} is not below y1"),
    ):
        data = {"version": 1, "regions": [{"phrase": "a", "box": [0, 0, 1, 1]}, {"phrase": "b", "box": list(bad)}]}
        with pytest.raises(LayoutError) as caught:
            Layout.from_json(data)
        assert str(caught.value).startswith("regions[1].box: " + text.format(*((x1, x0) if "x0" in text else (y1,))))


GOOD = {"phrase": "a", "box": [0, 0, 1, 1]}


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"phrase": "a", "box": [0, 0, 1]}, "regions[0].box: expected four numbers (x0, y0, x1, y1), got [0, 0, 1]"),
        ({"phrase": "a", "box": ["0", 0, 1, 1]}, "regions[0].box: expected four numbers"),
        ({"phrase": "a", "box": [0, 0, True, 1]}, "regions[0].box: expected four numbers"),
        ({"phrase": "a", "box": [0, 0, 10**400, 1]}, "regions[0].box: expected four numbers"),
        ({"phrase": "a", "boxes": [[0, 0, 1, 1], [1, 0, 0, 1]]}, "regions[0].boxes[1]: x0 = 1.0 is not below x1 = 0.0"),
        ({"phrase": "a", "boxes": []}, "regions[0].boxes: "),
        ({"phrase": "a", "boxes": [[0, 0, 1, 1]] * (BOXES + 1)}, "regions[0].boxes: "),
        ({"phrase": "a"}, "regions[0]: give exactly one of box, boxes and mask, got none"),
        (GOOD | {"boxes": [[0, 0, 1, 1]]}, "regions[0]: give exactly one of box, boxes and mask, got box and boxes"),
        ({"box": [0, 0, 1, 1]}, "regions[0].phrase: missing"),
        (GOOD | {"phrase": " "}, "regions[0].phrase: "),
        (GOOD | {"phrase": "a" * 301}, "regions[0].phrase: "),
        (GOOD | {"phrase": "\ud800"}, "regions[0].phrase: "),
        (GOOD | {"weight": 10.1}, "regions[0].weight: "),
        (GOOD | {"weight": -0.1}, "regions[0].weight: "),
        (GOOD | {"weight": float("nan")}, "regions[0].weight: "),
        (GOOD | {"weight": "1"}, "regions[0].weight: "),
        (GOOD | {"negative": 3}, "regions[0].negative: "),
        (GOOD | {"occurrence": -1}, "regions[0].occurrence: "),
        (GOOD | {"wieght": 1}, "regions[0].wieght: unknown field (known: phrase, box, "),
        ({"phrase": "a", "mask": "/etc/hostname"}, 'regions[0].mask: expected "png:" and base64'),
        ({"phrase": "a", "mask": "png:*"}, "regions[0].mask: "),
        ({"phrase": "a", "mask": "png:aGVsbG8="}, "regions[0].mask: cannot be read as a picture"),
        ([], "regions[0]: expected an object"),
    ],
)
def test_a_bad_region_is_refused_by_name_in_one_line(region, message):
    with pytest.raises(LayoutError) as caught:
        Layout.from_json({"version": 1, "regions": [region]})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 and "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"regions": []}, 'version: expected 1, got None; write "version": 1'),
        ({"version": 2, "regions": []}, "version: 2 is newer than 1, the newest known here; upgrade diffguide"),
        ({"version": True, "regions": []}, "version: expected 1, got True"),
        ({"version": 1}, "regions: expected a list, got None"),
        ({"version": 1, "regions": [GOOD] * (REGIONS + 1)}, "regions: 33 of them, at most 32 fit"),
        ({"version": 1, "regions": [{"phrase": "a", "boxes": [[0, 0, 1, 1]] * 70}] * 2}, "regions: 140 boxes in all"),
        ({"version": 1, "regions": [], "basis": "b"}, "basis: unknown field (known: version, base, overlap, regions)"),
        ({"version": 1, "regions": [], "base": "\ud800"}, "base: expected text"),
        ({"version": 1, "regions": [], "overlap": []}, "overlap: expected one of average, first, last, got []"),
        ('{"version": 1', "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("3", "expected an object with version, base, overlap, regions, got 3"),
    ],
)
def test_a_bad_layout_is_refused_by_name(source, message):
    with pytest.raises(LayoutError) as caught:
        Layout.from_json(source)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((3, 3)), "mask: empty"),
        (np.ones((3, 3, 3)), r"mask: expected a 2-D array .* shape \(3, 3, 3\)"),
        (np.ones((2, 4097)), "mask: 4097 x 2 pixels"),
        (np.zeros((0, 3)), "mask: 3 x 0 pixels"),
        (np.full((2, 2), 255, np.uint8), "mask: values reach from 255 to 255"),
        (np.full((2, 2), np.nan), "mask: values reach from nan"),
        (np.full((2, 2), "a"), "mask: expected a 2-D array"),
        ("absent.png", "mask: cannot be read as a picture"),
    ],
)
def test_a_bad_mask_is_refused(mask, message):
    with pytest.raises(LayoutError, match=message):
        Region("owl", mask=mask)


def test_only_regions_make_a_layout():
    with pytest.raises(LayoutError, match=r"regions\[1\]: expected a Region, got dict"):
        Layout(Region("a", (0, 0, 1, 1)), GOOD)
    with pytest.raises(LayoutError, match="at least one cell"):
        Layout(Region("a", (0, 0, 1, 1))).rasterise(0, 4)


def test_unreadable_files_are_named(tmp_path):
    cases = {"latin.json": "é".encode("latin-1"), "big.json": b" " * (16 * 2**20 + 1), "list.json": b"[]"}
    for (name, data), message in zip(
        cases.items(), ("not UTF-8", "larger than 16 MiB", "expected an object"), strict=True
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(LayoutError, match=message) as caught:
            Layout.load(tmp_path / name)
        assert str(caught.value).count(name) == 1
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(LayoutError, match="cannot be read"):
            Layout.load(path)
