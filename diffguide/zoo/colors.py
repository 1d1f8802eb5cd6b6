"""Pixels and the colours of the palette: which colour each pixel is nearest to, and how much of it is ink."""

import numpy as np
from PIL import Image

from diffguide.errors import ParamError
from diffguide.zoo import world

NAMES = (*world.COLORS, *world.BACKGROUNDS)
PALETTE = np.array([*world.COLORS.values(), *world.BACKGROUNDS.values()], np.float32)
OBJECTS = len(world.COLORS)

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    np.float32,
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    np.float32,
)
_levels = np.arange(256) / 255
_LINEAR = np.where(_levels <= 0.04045, _levels / 12.92, ((_levels + 0.055) / 1.055) ** 2.4).astype(np.float32)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """OKLab coordinates of sRGB values 0..255, in any shape that ends in 3; distances are perceptual."""
    linear = _LINEAR[np.clip(rgb, 0, 255).astype(np.uint8)]
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


_PALETTE_LAB = oklab(PALETTE)


def names_of(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index into NAMES of every pixel's [h, w, 3] nearest colour, and the distance to it in OKLab."""
    lab = oklab(pixels).reshape(-1, 3)
    squared = (lab**2).sum(1, keepdims=True) - 2 * lab @ _PALETTE_LAB.T + (_PALETTE_LAB**2).sum(1)
    nearest = squared.argmin(1)
    distance = np.sqrt(np.maximum(np.take_along_axis(squared, nearest[:, None], 1)[:, 0], 0))
    return nearest.reshape(pixels.shape[:2]), distance.reshape(pixels.shape[:2])


def undo(pixels: np.ndarray, style: str | None) -> np.ndarray:
    """The pixels [h, w, 3] before night or fog came over them."""
    if style == "at night":
        pixels = pixels / world.NIGHT
    elif style == "in fog":
        pixels = (pixels - world.FOG * np.array(world.FOG_COLOR, np.float32)) / (1 - world.FOG)
    return np.clip(pixels, 0, 255)


def smoothed(pixels: np.ndarray) -> np.ndarray:
    """Weights 1 2 1 along both axes, so that noise names no pixel."""
    for axis in (0, 1):
        padding = [(int(a == axis),) * 2 for a in range(3)]
        wide = np.pad(pixels, padding, mode="edge")
        first, middle, last = (np.take(wide, range(i, i + pixels.shape[axis]), axis) for i in range(3))
        pixels = (first + last) / 4 + middle / 2
    return pixels


def as_pixels(picture: Image.Image | np.ndarray) -> np.ndarray:
    """Float pixels [h, w, 3] in 0..255, the longer side at most `world.SIDE`."""
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ParamError(
                f"picture is an array of shape {picture.shape} and type {picture.dtype}; expected [height, width, 3] "
                "of uint8: scale and round it first"
            )
        picture = Image.fromarray(picture)
    picture = picture.convert("RGB")
    longer = max(picture.size)
    if min(picture.size) < 16:
        raise ParamError(f"picture is {picture.width} x {picture.height} pixels; expected at least 16 on each side")
    if longer > world.SIDE:
        width, height = (max(1, round(n * world.SIDE / longer)) for n in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX)
    return np.asarray(picture, np.float32)


def coverage_of(pixels: np.ndarray, ground: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """How much of every pixel [h, w, 3] is ink and how much is ground, in 0..1."""
    way = ink - ground
    return np.clip((pixels - ground) @ way / max(float(way @ way), 1e-6), 0, 1)
