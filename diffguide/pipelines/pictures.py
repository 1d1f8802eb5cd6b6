"""Pictures to look at: word maps over a picture, boxes on it, pictures side by side with captions."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffguide.grid import Box
from diffguide.recipe import Recipe, save_png, write_atomically

SMALLEST = 384  # pixels: smaller pictures are enlarged before something is drawn on them
INKS = ("magenta", "black", "orangered", "teal")
HEAT = ((0.0, (20, 20, 60)), (0.4, (150, 30, 110)), (0.7, (245, 110, 40)), (1.0, (255, 245, 150)))


def enlarged(image: Image.Image) -> Image.Image:
    """The picture in RGB, times the least whole number that makes its smaller side `SMALLEST` pixels."""
    times = max(1, -(-SMALLEST // min(image.size)))
    return image.convert("RGB").resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)


def heat(image: Image.Image, values: np.ndarray) -> Image.Image:
    """A map [h, w] of values from 0 as colours over the picture, its highest value brightest."""
    base = enlarged(image)
    peak = float(values.max())
    levels = Image.fromarray((values / peak if peak > 0 else np.zeros_like(values)).astype(np.float32))
    level = np.clip(np.asarray(levels.resize(base.size, Image.Resampling.BICUBIC)), 0, 1)
    stops = [stop for stop, _ in HEAT]
    colours = np.stack([np.interp(level, stops, [rgb[c] for _, rgb in HEAT]) for c in range(3)], -1)
    share = (0.35 + 0.45 * level)[..., None]
    mixed = np.asarray(base, np.float32) * (1 - share) + colours * share
    return Image.fromarray(mixed.round().astype(np.uint8))


def boxed(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The picture, enlarged, with boxes given in 0..1."""
    image = enlarged(image)
    draw = ImageDraw.Draw(image)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        corners = (x0 * (image.width - 1), y0 * (image.height - 1), x1 * (image.width - 1), y1 * (image.height - 1))
        draw.rectangle(corners, outline=INKS[number % len(INKS)], width=max(1, image.width // 192))
    return image


def side_by_side(panels: Sequence[tuple[Image.Image, Sequence[str]]], gap: int = 12) -> Image.Image:
    """Pictures of one size in a row, each over its lines of text; the first line is its title."""
    font = ImageFont.load_default(14)
    line = 20
    width, height = panels[0][0].size
    below = gap + line * max(len(lines) for _, lines in panels)
    page = Image.new("RGB", (gap + len(panels) * (width + gap), gap + height + below + gap), "white")
    draw = ImageDraw.Draw(page)
    for number, (image, lines) in enumerate(panels):
        left = gap + number * (width + gap)
        page.paste(image, (left, gap))
        for row, text in enumerate(lines):
            draw.text((left, 2 * gap + height + row * line), text, fill="black", font=font)
    return page


def save_maps(
    maps: Mapping[str, np.ndarray], image: Image.Image, recipe: Recipe, folder: Path, start: str = ""
) -> list[Path]:
    """Write each word's map over the picture as a PNG, and all of them as arrays; returns the files.

    Files begin with `start`. `maps.npz` holds `words` [W] and `maps` [W, h, w].
    """
    written = []
    for word, values in maps.items():
        path = folder / f"{start}{file_name(word, {p.stem.removeprefix(start) for p in written})}.png"
        save_png(heat(image, values), path, recipe)
        written.append(path)
    arrays = folder / f"{start}maps.npz"
    write_atomically(
        arrays, lambda file: np.savez(file, words=np.array(list(maps)), maps=np.stack(list(maps.values())))
    )
    return [*written, arrays]


def file_name(word: str, taken: set[str]) -> str:
    """A word as a file name without its ending, unlike those taken already."""
    plain = re.sub(r"[^\w-]+", "-", word).strip("-")[:60] or "word"
    name, number = plain, 2
    while name.lower() in {t.lower() for t in taken}:
        name, number = f"{plain}-{number}", number + 1
    return name
