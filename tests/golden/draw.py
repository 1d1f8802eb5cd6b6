"""Draw the reference pictures of the tests again: look at each before committing it."""

import random
from pathlib import Path

from PIL import Image

from diffguide.zoo.world import SIDE, STYLES, Scene, render, sample_scene

FOLDER = Path(__file__).parent


def scenes() -> list[Scene]:
    """Twelve scenes of a fixed seed: nine plain ones and one of each style."""
    rng = random.Random(12)
    found = [sample_scene(rng, styled=0.0) for _ in range(9)]
    for style in STYLES:
        scene = sample_scene(rng, styled=0.0)
        found.append(Scene(scene.background, scene.things, style))
    return found


def world() -> Image.Image:
    """The scenes in three rows of four, at half size."""
    page = Image.new("RGB", (4 * SIDE // 2, 3 * SIDE // 2))
    for i, scene in enumerate(scenes()):
        small = render(scene).resize((SIDE // 2, SIDE // 2), Image.Resampling.BOX)
        page.paste(small, (i % 4 * SIDE // 2, i // 4 * SIDE // 2))
    return page


if __name__ == "__main__":
    world().save(FOLDER / "world.png", optimize=True)
    print(f"drew {FOLDER / 'world.png'}")
