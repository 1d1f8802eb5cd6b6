"""Wrong things in Python are refused at once, by name, with the fix."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from diffguide.cli.drawing import check_writable
from diffguide.errors import (
    AttachError,
    DiffguideError,
    FamilyError,
    LayoutError,
    OutputError,
    ParamError,
    RecipeError,
)
from diffguide.guide import Guide
from diffguide.layout import Layout, Region
from diffguide.method import Method
from diffguide.processors import PAG, AStar, AttendExcite, Bacon, methods
from diffguide.recipe import Recipe

PLACED = [cls for cls in methods().values() if "layout" in cls.__dataclass_fields__]


@pytest.mark.parametrize("cls", PLACED, ids=lambda c: c.name())
@pytest.mark.parametrize("layout", ["layout.json", {"regions": []}, [], [Layout(Region("x", box=(0, 0, 1, 1))), 3]])
def test_what_is_no_layout_is_refused_when_the_method_is_made(cls: type[Method], layout: Any) -> None:
    with pytest.raises(LayoutError, match=rf"{cls.__name__}.layout = .* is not a Layout; .*Layout.load"):
        cls(layout)  # type: ignore[call-arg]


@pytest.mark.parametrize("cls", PLACED, ids=lambda c: c.name())
def test_a_layout_without_regions_is_refused(cls: type[Method]) -> None:
    with pytest.raises(LayoutError, match=f"{cls.__name__}.layout has no region"):
        cls(Layout())  # type: ignore[call-arg]


def test_no_layout_at_all() -> None:
    with pytest.raises(LayoutError, match="layout = None"):
        Bacon(None)  # type: ignore[arg-type]
    assert AStar(None).layout is None


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda pipe: AttendExcite(words="circle"), ParamError, "is not a tuple, each of its items a text"),
        (lambda pipe: Guide(PAG(), pipe), AttachError, "takes the pipeline first"),
        (lambda pipe: Guide(pipe.unet, PAG()), FamilyError, "is a model; pass the pipeline that it is part of"),
        (lambda pipe: Guide(pipe, PAG(layers="foo")).__enter__(), AttachError, "'foo' matches none: use down, mid"),
    ],
)
def test_the_message_says_what_to_do(make: Any, error: type[DiffguideError], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)) as told:
        make(tiny.sd())
    assert len(str(told.value)) < 300


def test_a_window_on_the_command_line() -> None:
    (window,) = [knob for knob in Bacon.params() if knob.name == "window"]
    with pytest.raises(ParamError, match=r"0.5' is not a pair start:stop such as 0:0.3"):
        window.parse("Bacon", "0.5")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    layout, picture = tmp_path / "layout.json", tmp_path / "empty.png"
    layout.write_text(Layout(Region("x", box=(0, 0, 1, 1))).to_json())
    picture.write_bytes(b"")
    for path, words in ((layout, "this is a layout, not a recipe: .* --layout"), (picture, "not a PNG, whatever")):
        with pytest.raises(RecipeError, match=words):
            Recipe.load(path)
    with pytest.raises(OutputError, match=r"empty.png is a file, not a folder"):
        check_writable(picture / "a.png")
