"""The detector's own figures, on drawn pictures that are spoiled as a model might spoil them."""

import argparse
import io
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from diffguide.errors import ParamError
from diffguide.zoo import detector, world
from diffguide.zoo.detector import Reading, Score, detect, overlay, score


def _noise(picture: Image.Image, rng: random.Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 6, (picture.height, picture.width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).round().astype(np.uint8))


def _jpeg(picture: Image.Image, _: random.Random) -> Image.Image:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=60)
    return Image.open(data)


def _blur(picture: Image.Image, _: random.Random) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(1.2 * picture.width / world.SIDE))


def _resample(picture: Image.Image, _: random.Random) -> Image.Image:
    small = picture.resize((round(picture.width * 0.93), round(picture.height * 0.93)), Image.Resampling.BILINEAR)
    return small.resize(picture.size, Image.Resampling.BILINEAR)


DAMAGES: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "noise": _noise,  # sigma 6
    "jpeg": _jpeg,  # quality 60
    "blur": _blur,  # 1.2 pixels of the canvas
    "resample": _resample,  # 7 % smaller and back
}


@dataclass(frozen=True)
class Figures:
    """The detector's own figures.

    `found` and `extra` are shares of the objects in the truth; `milliseconds` are of one core, for one picture.
    """

    scenes: int
    found: float
    extra: float
    median_iou: float
    milliseconds: float

    def __str__(self) -> str:
        return (
            f"{self.scenes} scenes: found {self.found:.2%}, not there {self.extra:.2%}, "
            f"median IoU {self.median_iou:.3f}, {self.milliseconds:.1f} ms a picture"
        )


def measure(
    scenes: Sequence[world.Scene],
    side: int = world.SIDE,
    damage: str | None = None,
    *,
    seed: int = 0,
    failed: Callable[[Image.Image, Reading, world.Scene], object] | None = None,
) -> Figures:
    """Draw scenes, damage the pictures in a way of DAMAGES, read them and compare; `failed` is told every mistake."""
    if damage is not None and damage not in DAMAGES:
        raise ParamError(f"damage = {damage!r} is unknown; expected None or one of {', '.join(DAMAGES)}")
    if not scenes:
        raise ParamError("there are no scenes to measure on; give at least one")
    rng = random.Random(seed)
    scores: list[Score] = []
    seconds = 0.0
    for scene in scenes:
        picture = world.render(scene, side)
        if damage is not None:
            picture = DAMAGES[damage](picture, rng)
            picture.load()
        start = time.thread_time()  # of this core, whoever else is busy
        reading = detect(picture, scene.style)
        seconds += time.thread_time() - start
        scores.append(score(reading, scene))
        if failed and (not scores[-1].complete or scores[-1].extra or reading.background != scene.background):
            failed(picture, reading, scene)
    wanted = sum(s.wanted for s in scores)
    return Figures(
        scenes=len(scores),
        found=sum(s.present for s in scores) / wanted,
        extra=sum(s.extra for s in scores) / wanted,
        median_iou=float(np.median([value for s in scores for value in s.ious if value is not None])),
        milliseconds=1000 * seconds / len(scores),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffguide.zoo.detector", description=(detector.__doc__ or "").split(".")[0]
    )
    parser.add_argument("--scenes", type=int, default=1000, help="how many scenes to draw and read (default 1000)")
    parser.add_argument("--seed", type=int, default=7, help="seed of the scenes (default 7)")
    parser.add_argument("--side", type=int, default=world.SIDE, help="pixels on a side (default 128)")
    parser.add_argument("--damage", choices=[*DAMAGES], help="spoil the pictures first, as a model might")
    parser.add_argument("--sheet", metavar="PNG", help="save up to 40 pictures that were misread, as one sheet")
    options = parser.parse_args(arguments)
    if options.scenes < 1:
        parser.error(f"--scenes is {options.scenes}; expected at least 1")
    rng = random.Random(options.seed)
    scenes = [world.sample_scene(rng) for _ in range(options.scenes)]
    misread: list[Image.Image] = []

    def keep(picture: Image.Image, reading: Reading, scene: world.Scene) -> None:
        misread.append(overlay(picture, reading, [t.box for t in scene.things]))

    print(measure(scenes, options.side, options.damage, seed=options.seed, failed=keep))
    print(f"{len(misread)} pictures misread")
    if options.sheet and misread:
        side = misread[0].width
        sheet = Image.new("RGB", (side * min(8, len(misread)), side * -(-min(40, len(misread)) // 8)))
        for (row, column), image in zip(itertools.product(range(5), range(8)), misread, strict=False):
            sheet.paste(image, (column * side, row * side))
        sheet.save(options.sheet)
