# wrong types are handed over on purpose
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from diffguide.errors import OutputError, RecipeError
from diffguide.layout import Layout, Region
from diffguide.recipe import Recipe, save_json, save_png, write_atomically

few = settings(max_examples=25)
TEXT = st.text('ab é猫\t\n\0"\\<${', max_size=20)
NAME = st.text("ab-1", min_size=1, max_size=9)
SCALAR = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(-1e18, 1e18) | TEXT
LAYOUT = Layout(Region("a red fox", (0.05, 0.3, 0.45, 0.95)), Region("owl", mask=np.eye(9) * 0.3), base="a forest")
LEAST = {"version": 1, "model": "shapes-unet", "prompt": "a red circle"}

methods = st.fixed_dictionaries({"name": NAME, "params": st.dictionaries(NAME, SCALAR | st.lists(SCALAR, max_size=3))})
recipes = st.builds(
    Recipe,
    model=NAME,
    prompt=TEXT,
    negative_prompt=st.none() | TEXT,
    layout=st.sampled_from([None, LAYOUT, LAYOUT.to_dict()]),
    methods=st.lists(methods, max_size=3),
    scheduler=st.none() | NAME,
    steps=st.integers(1, 1000),
    guidance_scale=st.floats(0, 100),
    seed=st.integers(0, 2**63 - 1),
    num_images=st.integers(3, 64),
    width=st.none() | st.integers(1, 1024).map(lambda n: 8 * n),
    height=st.none() | st.integers(1, 1024).map(lambda n: 8 * n),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    device=st.sampled_from([None, "cpu", "cuda:1"]),
    index=st.integers(0, 2),
    versions=st.dictionaries(NAME, NAME),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@few
@given(recipes)
def test_json_gives_the_same_recipe_back(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(recipe.to_dict()) == recipe
    assert Recipe.from_json(recipe.to_json()).to_json() == recipe.to_json()


@few
@given(recipe=recipes)
def test_a_png_gives_picture_and_recipe_back(folder, recipe):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    save_png(Image.fromarray(pixels), folder / "picture.png", recipe)
    assert Recipe.load(folder / "picture.png") == recipe
    with Image.open(folder / "picture.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels)
    assert not [file for file in folder.iterdir() if file.suffix == ".part"]


def test_a_json_file_gives_the_recipe_back(tmp_path):
    recipe = Recipe(model="m", prompt="ein Fuchs, schön", methods=[{"name": "pag", "params": {"window": (0.0, 0.5)}}])
    save_json(tmp_path / "recipe.json", recipe)
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert recipe.methods[0].params == {"window": [0.0, 0.5]}


def test_a_big_recipe_fits_in_a_picture(tmp_path):
    noise = np.random.default_rng(0).random((1000, 1000))
    recipe = Recipe(model="m", prompt="p", layout=Layout(Region("owl", mask=noise)))
    assert len(recipe.to_json()) > 2**20
    save_png(Image.new("RGB", (8, 8)), tmp_path / "big.png", recipe)
    assert Recipe.load(tmp_path / "big.png") == recipe


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_recipe_behind_the_pixels_is_found_too(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "moved.png")
    data, end = (tmp_path / "moved.png").read_bytes(), chunk(b"IEND", b"")
    assert data.endswith(end)
    note = chunk(b"iTXt", b"diffguide" + bytes(5) + json.dumps(LEAST).encode())
    (tmp_path / "moved.png").write_bytes(data[: -len(end)] + note + end)
    assert Recipe.load(tmp_path / "moved.png").prompt == "a red circle"


def test_the_least_recipe_has_defaults():
    recipe = Recipe.from_json(LEAST)
    assert (recipe.index, recipe.num_images, recipe.device, recipe.layout, recipe.methods) == (0, 1, None, None, ())
    assert Recipe(model="shapes-unet", prompt="a red circle") == recipe


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("prompt", ["", "x" * 10_000], ["x" * 10_001, None, 3, "\ud800"]),
        ("negative_prompt", [None, "x" * 10_000], ["x" * 10_001]),
        ("model", ["m"], ["", "x" * 1001, None]),
        ("methods", [[], [{"name": "x"}] * 16], [[{"name": "x"}] * 17, 3, "x", {}]),
        ("steps", [1, 1000], [0, 1001, 2.0, "2", True, None]),
        ("guidance_scale", [0, 0.0, 100.0], [-0.1, 100.1, float("nan"), "1"]),
        ("seed", [0, 2**63 - 1], [-1, 2**63]),
        ("num_images", [1, 64], [0, 65]),
        ("width", [8, 8192, None], [0, 12, 8200, 8.0]),
        ("height", [8, 8192, None], [0, 12, 8200]),
        ("dtype", ["bfloat16"], ["int8", None]),
        ("device", ["cpu", "cuda:0"], ["cuda:0; rm", ""]),
        ("index", [0], [-1, 1]),
        ("versions", [{"torch": "2.15"}], [{"torch": 2}, {"torch": "x" * 101}, {str(i): "1" for i in range(101)}]),
        (
            "layout",
            [LAYOUT.to_dict()],
            ["{}", 3, {}, {"version": 1, "regions": [{"phrase": "a", "box": [1, 0, 0, 1]}]}],
        ),
        ("version", [1], [2, 0, True, "1", None, 1.0]),
        ("wdith", [], [512]),
    ],
)
def test_both_ends_of_every_field(field, inside, outside):
    for value in inside:
        kept = Recipe.from_json(LEAST | {field: value}).to_dict()[field]
        assert kept == ([{"params": {}} | method for method in value] if field == "methods" else value)
    for value in outside:
        with pytest.raises(RecipeError) as caught:
            Recipe.from_json(LEAST | {field: value})
        text = str(caught.value)
        assert text.startswith(field)
        assert "\n" not in text and len(text) < 300 and "pydantic" not in text


@pytest.mark.parametrize("value", [{}, [[1]], float("inf"), float("nan"), 10**400, "x" * 10_001, "\ud800", [0] * 4097])
def test_parameters_are_numbers_texts_and_flat_lists(value):
    with pytest.raises(RecipeError, match=r"^methods\[1\]\.params\.scale: expected a finite number"):
        Recipe(**LEAST, methods=[{"name": "a"}, {"name": "b", "params": {"scale": value}}])


def test_messages_name_what_is_wrong():
    for change, message in (
        ({"version": 2}, "version: 2 is newer than 1, the newest known here; upgrade diffguide"),
        (
            {"layout": {"version": 1, "regions": [{"phrase": "a", "box": [0.9, 0, 0.2, 1]}]}},
            "layout: regions[0].box: x0",
        ),
        ({"methods": [{"name": "a", "parms": {}}]}, "methods[0].parms: unknown field"),
        ({"self": 1}, "self: unknown field"),
        ({1: 1}, "1: unknown field"),
        ({"index": 4, "num_images": 4}, "index: 4 is not below num_images = 4"),
    ):
        with pytest.raises(RecipeError) as caught:
            Recipe.from_json(LEAST | change)
        assert str(caught.value).startswith(message)
    for source, message in (
        ("{", "not JSON"),
        ("[" * 10**5, "not JSON"),
        ("[]", "expected an object"),
        ("{}", "version: "),
    ):
        with pytest.raises(RecipeError, match=message):
            Recipe.from_json(source)


def test_a_picture_without_a_recipe_says_what_would_write_one(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(RecipeError, match=r"plain\.png: this PNG carries no recipe; `diffguide generate` writes one"):
        Recipe.load(tmp_path / "plain.png")


def test_files_that_are_no_recipe_are_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    save_png(Image.new("RGB", (64, 64)), tmp_path / "good.png", Recipe(**LEAST))
    (tmp_path / "head.png").write_bytes((tmp_path / "good.png").read_bytes()[:30])
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("diffguide", json.dumps(LEAST | {"steps": 0}))
    Image.new("RGB", (8, 8)).save(tmp_path / "wrong.png", pnginfo=notes)
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("diffguide", " " * (3 * 2**20), zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=notes)
    (tmp_path / "big.json").write_bytes(b" " * (16 * 2**20 + 1))
    for name, message in (
        ("photo.jpg", "only a PNG carries a recipe"),
        ("head.png", "not a sound PNG"),
        ("wrong.png", "steps: "),
        ("bomb.png", "not a sound PNG"),
        ("big.json", "larger than 16 MiB"),
        ("absent.json", "cannot be read: No such file"),
        (".", "cannot be read: "),
        ("a\0b", "cannot be read: "),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            Recipe.load(tmp_path / name)
        assert str(caught.value).count(str(tmp_path / name)) == 1


def test_a_huge_picture_is_not_unpacked_in_search_of_a_recipe(tmp_path):
    Image.new("1", (8, 8)).save(tmp_path / "huge.png")
    data = (tmp_path / "huge.png").read_bytes()
    for side, message in ((8200, "8200 x 8200 pixels are too many"), (20_000, "not a sound PNG: .*decompression bomb")):
        header = chunk(b"IHDR", struct.pack(">II", side, side) + data[24:29])
        (tmp_path / "huge.png").write_bytes(data[:8] + header + data[33:])
        with pytest.raises(RecipeError, match=message):
            Recipe.load(tmp_path / "huge.png")


def test_only_a_png_is_given_a_recipe(tmp_path):
    with pytest.raises(OutputError, match=r"only a \.png keeps its recipe"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "picture.jpg", Recipe(**LEAST))
    with pytest.raises(OutputError, match=r"cannot write .*picture\.png: .*mode F"):
        save_png(Image.new("F", (8, 8)), tmp_path / "picture.png", Recipe(**LEAST))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, fault):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise fault("stop")

    with pytest.raises(OutputError if fault is OSError else fault, match="stop"):
        write_atomically(path, write)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]
    write_atomically(path, lambda file: file.write(b"new"))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"new"]


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "absent" / "out.png", "No such file or directory; create the folder first"),
        (tmp_path / "file" / "out.png", "Not a directory"),
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / ("x" * 300), "name too long"),
        ("", "not the name of a file"),
        ("a\0b", "not the name of a file"),
    ):
        with pytest.raises(OutputError, match=message):
            write_atomically(path, lambda file: file.write(b"x"))
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_written_file_has_the_usual_mode(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    write_atomically(tmp_path / "ours", lambda file: file.write(b""))
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_data_modules_load_no_heavy_library():
    code = (
        "import sys, diffguide.layout, diffguide.recipe, diffguide.tokens\n"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
