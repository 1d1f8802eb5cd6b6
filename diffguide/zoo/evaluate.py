"""How good an embedded model is, read by the detector: reconstructions, and prompts of one, two and three things."""

import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffguide.zoo import no_zeros
from diffguide.zoo.autoencoder import to_model, to_picture
from diffguide.zoo.detector import detect, score
from diffguide.zoo.world import Scene, caption, plain, render, sample_scene

STEPS, GUIDANCE = 30, 4.0
SEED = 2_000_000  # of scenes that no training run draws


@dataclass
class Scores:
    """Shares of 0..1.

    Attributes:
        truth_found: things read right off rendered scenes, by the detector alone.
        truth_extra: things read that are not there, per thing.
        reconstruction_found: the same after the autoencoder.
        reconstruction_extra: likewise.
        complete: pictures with every thing of the prompt right, by the number of things.
        present: things that are right, likewise.
        extra: things that are not in the prompt, per picture, likewise.
    """

    truth_found: float
    truth_extra: float
    reconstruction_found: float
    reconstruction_extra: float
    complete: dict[int, float]
    present: dict[int, float]
    extra: dict[int, float]
    pictures: int
    scenes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(pipe: Any, *, pictures: int = 100, scenes: int = 300, batch: int = 10) -> Scores:
    """Score a pipeline on `scenes` reconstructions and on `pictures` prompts each of one.

    Two and three different kinds.
    """
    rng = random.Random(SEED)
    drawn = [sample_scene(rng) for _ in range(scenes)]
    truth = [render(s) for s in drawn]
    again = []
    with torch.no_grad():
        for i in range(0, scenes, 20):
            x = to_model(np.stack([np.asarray(p) for p in truth[i : i + 20]]), pipe.device).to(pipe.vae.dtype)
            again += [to_picture(y.float()) for y in pipe.vae(x).sample]
    before = [score(detect(p, s.style), s) for p, s in zip(truth, drawn, strict=True)]
    after = [score(detect(p, s.style), s) for p, s in zip(again, drawn, strict=True)]
    wanted = sum(s.wanted for s in before)
    complete, present, extra = {}, {}, {}
    quiet = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    for count in (1, 2, 3):
        asked = [_different_kinds(rng, count) for _ in range(pictures)]
        found = []
        for i in tqdm(range(0, pictures, batch), f"{count} things", unit="batch"):
            part = asked[i : i + batch]
            noise = [torch.Generator().manual_seed(SEED + i + n) for n in range(len(part))]
            prompts = [caption(s) for s in part]
            options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "generator": noise, **no_zeros(pipe)}
            images = pipe(prompts, **options).images
            found += [score(detect(p), s) for p, s in zip(images, part, strict=True)]
        complete[count] = sum(s.complete for s in found) / pictures
        present[count] = sum(s.present for s in found) / (pictures * count)
        extra[count] = sum(s.extra for s in found) / pictures
    pipe.set_progress_bar_config(**quiet)
    return Scores(
        sum(s.present for s in before) / wanted,
        sum(s.extra for s in before) / wanted,
        sum(s.present for s in after) / wanted,
        sum(s.extra for s in after) / wanted,
        complete,
        present,
        extra,
        pictures,
        scenes,
    )


def _different_kinds(rng: random.Random, count: int) -> Scene:
    while True:
        scene = plain(sample_scene(rng, count=count))
        if len({t.kind for t in scene.things}) == count:
            return scene
