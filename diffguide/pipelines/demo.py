"""The main job on the embedded model: one prompt and seed, drawn without and with a layout, judged by the detector."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from diffguide.errors import ParamError
from diffguide.layout import Layout, Region
from diffguide.pipelines import pictures
from diffguide.pipelines.run import Picture, draw
from diffguide.pipelines.source import load
from diffguide.recipe import MethodSpec, Recipe
from diffguide.zoo import GUIDANCE_SCALE, detector

PROMPT = "a red circle, a blue square and a yellow star on a white background"
LAYOUT = Layout(
    Region("a red circle", box=(0.06, 0.08, 0.42, 0.44)),
    Region("a blue square", box=(0.58, 0.10, 0.92, 0.44)),
    Region("a yellow star", box=(0.30, 0.54, 0.70, 0.92)),
    base="a white background",
)
STEPS = 30


@dataclass(frozen=True)
class Verdict:
    """What the detector, which does not know the prompt, says of one picture.

    `objects` has phrase, found (bool), IoU with the wanted box (0..1) for each region; `extra` counts what else it saw.
    """

    title: str
    picture: Picture
    objects: tuple[tuple[str, bool, float], ...]
    extra: int

    @property
    def lines(self) -> list[str]:
        told = [self.title]
        for phrase, found, overlap in self.objects:
            place = "in its box" if overlap >= detector.IN_BOX else "out of its box"
            told.append(f"{phrase}: {f'{place}, IoU {overlap:.2f}' if found else 'not found'}")
        return [*told, f"other objects: {self.extra}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "title": self.title,
            "objects": [{"phrase": p, "found": f, "iou": round(v, 4)} for p, f, v in self.objects],
            "extra": self.extra,
            "seconds": round(self.picture.seconds, 2),
        }


def recipes(seed: int, model: str, device: str | None, steps: int = STEPS) -> dict[str, Recipe]:
    """The two recipes by title; they differ in the method alone."""
    common: dict[str, Any] = {
        "model": model,
        "prompt": PROMPT,
        "layout": LAYOUT,
        "scheduler": "ddim",
        "steps": steps,
        "guidance_scale": GUIDANCE_SCALE,
        "seed": seed,
        "device": device,
    }
    return {"unguided": Recipe(**common), "guided by bacon": Recipe(**common, methods=[MethodSpec(name="bacon")])}


def judge(title: str, picture: Picture) -> Verdict:
    """Ask the detector."""
    targets = [(*kind(r.phrase), r.instances[0]) for r in LAYOUT.regions]
    try:
        reading = detector.detect(picture.image)
    except ParamError as error:
        raise ParamError(f"the detector cannot read this model's picture: {error}") from error
    score = detector.score(reading, targets)
    found = [thing is not None for thing in detector.match(reading, targets)]
    objects = [(r.phrase, f, v or 0.0) for r, f, v in zip(LAYOUT.regions, found, score.ious, strict=True)]
    return Verdict(title, picture, tuple(objects), score.extra)


def kind(phrase: str) -> tuple[str, str]:
    """Colour and shape of a phrase such as "a red circle"."""
    *_, colour, shape = phrase.split()
    return colour, shape


def run_demo(
    seed: int = 0,
    model: str = "shapes-unet",
    device: str | None = None,
    steps: int = STEPS,
    *,
    pipe: Any = None,
    progress: bool = True,
) -> tuple[Image.Image, list[Verdict]]:
    """Both pictures side by side with the wanted boxes and the verdicts below, and the verdicts."""
    pipe = load(model, device=device) if pipe is None else pipe
    verdicts = []
    for title, recipe in recipes(seed, model, device, steps).items():
        (picture,) = draw(recipe, pipe, progress=progress, title=title)
        verdicts.append(judge(title, picture))
    boxes = [r.instances[0] for r in LAYOUT.regions]
    return pictures.side_by_side([(pictures.boxed(v.picture.image, boxes), v.lines) for v in verdicts]), verdicts
