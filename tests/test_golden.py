"""The reference pictures: what the world looks like does not drift."""

import runpy
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "golden"


def test_the_world_is_drawn_as_it_was() -> None:
    """Edges may differ by the resampling of another Pillow; colours, shapes and places may not."""
    drawn = np.asarray(runpy.run_path(str(FOLDER / "draw.py"))["world"](), np.int16)
    kept = np.asarray(Image.open(FOLDER / "world.png").convert("RGB"), np.int16)
    off = np.abs(drawn - kept).max(-1)
    assert drawn.shape == kept.shape and (off > 40).mean() < 0.002 and np.median(off) == 0
