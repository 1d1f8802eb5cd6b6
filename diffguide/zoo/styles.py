"""Tells in which style a picture of the embedded world is drawn: plainly, at night, in fog or as a sketch.

Each style is tried in turn. Under the right one the rim has the colour of one of the world's grounds in that style, and
what the detector finds, the style undone, looks like the world's shapes. Nothing is learnt. A ring is no wider than the
line of a sketch, so a sketch of nothing but rings and small crosses is drawn as the plain picture is, and no reader is
right always.
"""

import numpy as np
from PIL import Image

from diffguide.zoo.colors import as_pixels, oklab
from diffguide.zoo.detector import detect
from diffguide.zoo.world import BACKGROUNDS, STYLES, apply_style

STYLE_NAMES = ("plain", *(style.split()[-1] for style in STYLES))
RIM = 2  # pixels at each edge, where no thing is
GROUND = 3.0  # weight of the distance of the ground, in OKLab, against the confidence of the things
SHARPNESS = 24.0  # of the probabilities


def style_probabilities(picture: Image.Image) -> np.ndarray:
    """Of each of STYLE_NAMES, [4], for a picture of any size from 16 pixels up."""
    fits = np.array([fit(picture, style) for style in (None, *STYLES)])
    shares = np.exp(SHARPNESS * (fits - fits.max()))
    return shares / shares.sum()


def fit(picture: Image.Image, style: str | None) -> float:
    """How well a style explains a picture: the mean confidence of its things, less its ground's distance; at most 1."""
    pixels = as_pixels(picture)
    sides = (pixels[:RIM], pixels[-RIM:], pixels[:, :RIM], pixels[:, -RIM:])
    rim = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
    distance = np.linalg.norm(oklab(_grounds(style)) - oklab(rim), axis=1).min()
    things = detect(picture, style).things
    return sum(thing.confidence for thing in things) / max(1, len(things)) - GROUND * float(distance)


def _grounds(style: str | None) -> np.ndarray:
    """Colours [4, 3] of the empty canvases of a style."""
    strip = Image.fromarray(np.array([list(BACKGROUNDS.values())], np.uint8))
    return np.asarray(apply_style(strip, style), np.float32)[0]
