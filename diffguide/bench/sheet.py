"""A contact sheet: a row for each scene, a column for the truth and for each method."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 128  # pixels
GAP, LINE = 8, 14
LETTERS = 22  # of a heading, in a cell's width
INK, FRAME = (30, 30, 30), (255, 0, 255)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Row:
    """A scene: what was asked, where its things should be (boxes in 0..1), pictures (None: a gap), a word on each."""

    caption: str
    boxes: Sequence[Box]
    pictures: Sequence[Image.Image | None]
    notes: Sequence[str]


def contact_sheet(titles: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """Titles over columns, captions over rows, wanted boxes as thin magenta frames on every picture."""
    font = ImageFont.load_default(11)
    width = GAP + len(titles) * (CELL + GAP)
    letters = max(12, (width - 2 * GAP) // 6)
    captions = [textwrap.wrap(row.caption, letters) for row in rows]
    heads = [heading(title) for title in titles]
    top = GAP + LINE * max(map(len, heads))
    height = top + sum(len(lines) * LINE + CELL + LINE + GAP for lines in captions)
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    for column, lines in enumerate(heads):
        for number, line in enumerate(lines):
            pen.text((GAP + column * (CELL + GAP), GAP + number * LINE), line, INK, font)
    y = top
    for row, lines in zip(rows, captions, strict=True):
        for line in lines:
            pen.text((GAP, y), line, INK, font)
            y += LINE
        for column, (picture, note) in enumerate(zip(row.pictures, row.notes, strict=True)):
            x = GAP + column * (CELL + GAP)
            if picture is not None:
                page.paste(framed(picture, row.boxes), (x, y))
            pen.text((x, y + CELL), note, INK, font)
        y += CELL + LINE + GAP
    return page


def heading(title: str) -> list[str]:
    """A title in lines as wide as a column, broken before the plus signs of its settings, long ones before values."""
    words = [w if len(w) <= LETTERS else w.replace("=", "= ", 1) for w in title.replace("+", " +").split()]
    return textwrap.wrap(" ".join(words), LETTERS, break_on_hyphens=False) or [""]


def framed(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The picture at the sheet's size with one-pixel frames."""
    small = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(small)
    for box in boxes:
        pen.rectangle([round(v * (CELL - 1)) for v in box], outline=FRAME)
    return small
