"""What a search looks for: functions of pictures and their prompts that give a score each, more being better.

Each public function of this file is an objective by its name; those of `WITH_ARGUMENT` want one behind a colon. Any
callable of the same form will do.
"""

import inspect
import sys
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffguide.errors import ParamError
from diffguide.planning import read
from diffguide.zoo.detector import detect, score
from diffguide.zoo.styles import STYLE_NAMES, style_probabilities
from diffguide.zoo.world import COLORS, SHAPES, plural

Objective = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[float]]
WITH_ARGUMENT = {"style": "STYLE", "clip": "FOLDER", "hps": "FOLDER", "pickscore": "FOLDER", "aesthetic": "FOLDER"}


def brightness(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Mean luma, 0 to 1 (Rec. 601)."""
    return [float(_luma(p).mean()) for p in pictures]


def contrast(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Standard deviation of luma, 0 to 1/2."""
    return [float(_luma(p).std()) for p in pictures]


def sharpness(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Mean absolute Laplacian of luma, 0 to 4: how much a pixel differs from its four neighbours together."""
    return [float(np.abs(_laplacian(_luma(p))).mean()) for p in pictures]


def colourfulness(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Hasler and Süsstrunk's M3 of 2003, 0 for grey to about 1.

    With the opponent axes rg = R - G and yb = (R + G) / 2 - B of colours in 0..1: the length of their standard
    deviations and 0.3 times that of their means.
    """
    scores = []
    for picture in pictures:
        r, g, b = _colours(picture).transpose(2, 0, 1)
        rg, yb = r - g, (r + g) / 2 - b
        scores.append(float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())))
    return scores


def objects(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Of the embedded world: wanted things that are there, over wanted things and those nobody asked for, 0 to 1.

    Raises ParamError where a prompt names something that is not of the world.
    """
    scores = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        found = score(detect(picture), [(color, shape, None) for color, shape in things(prompt)])
        scores.append(found.present / (found.wanted + found.extra))
    return scores


def shapes(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Of the embedded world: how well the things seen fit their shapes and colours, the mean of the detector's
    confidence, 0 to 1; 0 where nothing is seen. Whether they were asked for does not count: see `objects`.
    """
    seen = [[thing.confidence for thing in detect(picture).things] for picture in pictures]
    return [sum(each) / len(each) if each else 0.0 for each in seen]


def objectives() -> dict[str, Objective]:
    """All that come with diffguide, by name."""
    public = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    return {n: f for n, f in public if [*inspect.signature(f).parameters] == ["pictures", "prompts"]}


class Style:
    """Of the embedded world: the probability, 0 to 1, that a picture is drawn in a style, as the zoo reads it.

    `style` is "night", "fog", "sketch" or "plain"; raises ParamError for others.
    """

    def __init__(self, style: str) -> None:
        if style not in STYLE_NAMES:
            raise ParamError(f"no style is called {style!r:.60} (known: {', '.join(STYLE_NAMES)})")
        self.place = STYLE_NAMES.index(style)

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return [float(style_probabilities(picture)[self.place]) for picture in pictures]


def named(name: str) -> Objective:
    """The objective of this name, such as "sharpness", "style:night" or "clip:FOLDER".

    Raises:
        ParamError: there is none of this name, or its argument is missing or unknown.
        ModelError: the folder is not there, or does not hold such a model.
    """
    kind, _, argument = name.partition(":")
    if kind in WITH_ARGUMENT:
        if not argument:
            raise ParamError(f"the objective {kind} wants an argument: {kind}:{WITH_ARGUMENT[kind]}")
        if kind == "style":
            return Style(argument)
        from diffguide.search import checkpoints

        return getattr(checkpoints, kind)(argument)
    known = objectives()
    if name not in known:
        every = [*known, *(f"{kind}:{what}" for kind, what in WITH_ARGUMENT.items())]
        raise ParamError(f"no objective is called {name!r:.60} (known: {', '.join(every)})")
    return known[name]


def things(prompt: str) -> list[tuple[str, str]]:
    """Colour and shape of every thing that a prompt of the embedded world counts."""
    shapes = {form: shape for shape in SHAPES for form in (shape, plural(shape))}
    found = []
    for thing in read(prompt):
        words = thing.phrase.split()
        if len(words) < 2 or words[-1] not in shapes or words[-2] not in COLORS:
            raise ParamError(f"{thing.phrase!r:.60} is no thing of the embedded world, such as 'red circle'")
        found += [(words[-2], shapes[words[-1]])] * thing.number
    if not found:
        raise ParamError(f"{prompt!r:.200} names nothing of the embedded world")
    return found


def _colours(picture: Image.Image) -> NDArray[np.float64]:
    """[height, width, 3] in 0..1."""
    return np.asarray(picture.convert("RGB"), np.float64) / 255


def _luma(picture: Image.Image) -> NDArray[np.float64]:
    """[height, width] in 0..1."""
    return _colours(picture) @ np.array([0.299, 0.587, 0.114])


def _laplacian(a: NDArray[np.float64]) -> NDArray[np.float64]:
    """Four times each inner value less its neighbours."""
    return 4 * a[1:-1, 1:-1] - a[:-2, 1:-1] - a[2:, 1:-1] - a[1:-1, :-2] - a[1:-1, 2:]
