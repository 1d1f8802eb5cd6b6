"""Painted masks: what a brush left on the editor, as the place of a region."""

import base64
import io
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from diffguide.app.canvas import Drawing, drawing_of
from diffguide.layout import Region

SIDE = 256  # pixels of the longer side of a mask that is kept


def painted(painting: dict[str, Any] | None, which: float | None, drawing: Any) -> Any:
    """The drawing with a region's place painted instead of boxed; regions are counted from 1."""
    now, at = _chosen(which, drawing)
    layers = (painting or {}).get("layers") or []
    covered = np.max([layer[..., 3] for layer in layers], axis=0) if layers else np.zeros((1, 1), np.uint8)
    if not covered.any():
        raise gr.Error("nothing is painted; paint where the region belongs", print_exception=False)
    width, height = now.size
    share = SIDE / max(width, height)
    small = Image.fromarray(covered).resize((max(1, round(width * share)), max(1, round(height * share))))
    inside = np.asarray(small) >= 128
    if not inside.any():
        raise gr.Error("too little is painted; paint a larger place", print_exception=False)
    out = io.BytesIO()
    Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(out, format="PNG", optimize=True)
    mask = "png:" + base64.b64encode(out.getvalue()).decode()
    return _with(now, at, {"mask": mask, "box": Region("mask", mask=inside).instances[0]})


def boxed(which: float | None, drawing: Any) -> Any:
    """The drawing with a region's mask given up for its bounding box."""
    now, at = _chosen(which, drawing)
    return _with(now, at, {"mask": None})


def _chosen(which: float | None, drawing: Any) -> tuple[Drawing, int]:
    now = drawing_of(drawing)
    number = int(which or 0)
    if not 1 <= number <= len(now.items):
        there = f"1 to {len(now.items)}" if now.items else "none; draw one first"
        raise gr.Error(f"there is no region {number} (there are: {there})", print_exception=False)
    return now, number - 1


def _with(now: Drawing, at: int, change: dict[str, Any]) -> Any:
    items = [*now.items]
    items[at] = items[at].model_copy(update={**change, "group": None})
    return gr.update(value=now.model_copy(update={"items": tuple(items)}).model_dump(mode="json", exclude_none=True))
