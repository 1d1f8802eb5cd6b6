"""A picture of a search: layers down, heads across, the colour telling what perturbing a head does to the score."""

import math
from collections.abc import Collection

from PIL import Image, ImageDraw, ImageFont

Unit = tuple[int, int]

CELL, LEFT, TOP, BOTTOM = 22, 34, 24, 40  # pixels
BETTER, SAME, WORSE = (217, 95, 14), (247, 247, 247), (33, 102, 172)  # told apart by the colour-blind as well
FAILED, INK = (160, 160, 160), (30, 30, 30)


def heatmap(scores: dict[Unit, float], plain: float, chosen: Collection[Unit] = ()) -> Image.Image:
    """Scores of single heads against the plain score: orange above, blue below, grey failed; chosen ones are framed."""
    layers, heads = 1 + max(u[0] for u in scores), 1 + max(u[1] for u in scores)
    finite = [abs(v - plain) for v in scores.values() if math.isfinite(v)]
    largest = max(finite, default=0.0)
    unit = largest or 1.0  # where nothing differs, nothing is coloured
    width = max(LEFT + heads * CELL + 8, 250)
    page = Image.new("RGB", (width, TOP + layers * CELL + BOTTOM), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for head in range(heads):
        pen.text((LEFT + head * CELL + CELL // 2, TOP - 4), f"H{head}", INK, font, anchor="ms")
    for layer in range(layers):
        y = TOP + layer * CELL
        pen.text((LEFT - 4, y + CELL // 2), f"L{layer}", INK, font, anchor="rm")
        for head in range(heads):
            if (layer, head) not in scores:
                continue
            x = LEFT + head * CELL
            box = (x + 1, y + 1, x + CELL - 2, y + CELL - 2)
            pen.rectangle(box, fill=shade((scores[layer, head] - plain) / unit))
            if (layer, head) in chosen:
                pen.rectangle(box, outline=INK, width=2)
    y = TOP + layers * CELL + 8
    pen.text((8, y), f"plain {plain:.4g}; colours reach {largest:.3g} either way", INK, font)
    pen.text((8, y + 14), "orange better, blue worse, framed chosen", INK, font)
    return page


def shade(share: float) -> tuple[int, int, int]:
    """The colour of a share in -1..1 of the largest difference."""
    if not math.isfinite(share):
        return FAILED
    end, part = (BETTER, share) if share > 0 else (WORSE, -share)
    r, g, b = (round(s + (e - s) * min(1.0, part)) for s, e in zip(SAME, end, strict=True))
    return r, g, b
