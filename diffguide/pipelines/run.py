"""A recipe carried out: load the model, attach the methods, draw each picture from its own seed."""

import importlib.metadata
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffguide.describe import make_all
from diffguide.errors import ModelError, ParamError
from diffguide.guide import Guide
from diffguide.method import Context
from diffguide.pipelines.source import load, scheduler_class
from diffguide.processors import named
from diffguide.recipe import Recipe
from diffguide.registry import of_pipe, sites_of
from diffguide.report import Report


@dataclass(frozen=True)
class Picture:
    """One picture of a recipe.

    Attributes:
        image: RGB.
        recipe: the recipe with the number of this picture and the versions of the libraries.
        report: passes and losses of the guide; all zeros where nothing was attached.
        maps: word maps, float32 [h, w], if they were asked for.
        seconds: wall time, decoding included.
    """

    image: Image.Image
    recipe: Recipe
    report: Report
    maps: dict[str, np.ndarray]
    seconds: float

    @property
    def seed(self) -> int:
        """The seed of this picture's noise."""
        return self.recipe.seed + self.recipe.index


@dataclass(frozen=True)
class Step:
    """A denoising step that has just been done.

    Attributes:
        number: from 0.
        steps: how many there are.
        latents: as the pipeline holds them, of the one picture that is being drawn.
        guide: what is attached; `guide.maps` are the means over the steps so far.
    """

    number: int
    steps: int
    latents: torch.Tensor
    guide: Guide


def run(
    recipe: Recipe,
    pipe: Any = None,
    *,
    index: int | None = None,
    capture_maps: bool | Sequence[str] = False,
    progress: bool = True,
) -> list[Picture]:
    """All pictures of a recipe; see `draw`."""
    return list(draw(recipe, pipe, index=index, capture_maps=capture_maps, progress=progress))


def draw(
    recipe: Recipe,
    pipe: Any = None,
    *,
    index: int | None = None,
    capture_maps: bool | Sequence[str] = False,
    progress: bool = True,
    title: str | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Iterator[Picture]:
    """The pictures of a recipe, one after the other.

    Each has a generator of its own on the CPU, seeded `seed + index`, and is drawn alone: on one machine a picture
    comes out bit-identical whichever others are drawn, which a batch does not promise.

    Args:
        recipe: what to draw.
        pipe: a pipeline to use instead of loading `recipe.model`; it is given back as it was.
        index: draw only this picture.
        capture_maps: also collect word maps, of the named words or, with True, of every word of the prompt.
        progress: show a bar on stderr.
        title: what stands before the bar; the number of the picture if not given.
        on_step: called after each step; what it raises ends the drawing, with the pipeline as it was. A pipeline that
            takes no `callback_on_step_end` never calls it.

    Raises:
        DiffguideError: something in the recipe is wrong; everything that can be checked is, before the first step.
    """
    methods = make_all(recipe.methods, recipe.layout)
    if capture_maps:
        words = () if capture_maps is True else tuple(capture_maps)
        capture: Any = named("capture-maps")
        methods.append(capture(words=words))
    scheduler = scheduler_class(recipe.scheduler) if recipe.scheduler else None
    numbers = range(recipe.num_images) if index is None else [index]
    if index is not None and not 0 <= index < recipe.num_images:
        raise ParamError(f"index = {index} is outside 0 to {recipe.num_images - 1}, the pictures of this recipe")
    if pipe is None:
        pipe = load(recipe.model, recipe.dtype, recipe.device)
    options = call_options(recipe, pipe)
    check_prompt(Guide(pipe, *methods), recipe)
    kept, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", None)
    try:
        for number in numbers:
            if scheduler is not None:
                pipe.scheduler = from_config(scheduler, kept.config)
            pipe.set_progress_bar_config(
                desc=title or f"picture {number + 1} of {recipe.num_images}", disable=not progress
            )
            generator = torch.Generator("cpu").manual_seed((recipe.seed + number) % 2**63)
            began = time.perf_counter()
            with Guide(pipe, *methods) as guide:
                image = pipe(**options, **_telling(on_step, pipe, guide, recipe), generator=generator).images[0]
            maps = {word: values[0] for word, values in guide.maps.items()}
            done = recipe.model_copy(update={"index": number, "versions": versions()})
            yield Picture(image, done, guide.report, maps, time.perf_counter() - began)
    finally:
        pipe.scheduler = kept
        pipe.set_progress_bar_config(**(bar or {}))


def tells_steps(pipe: Any) -> bool:
    """Whether a pipeline calls back after each step."""
    return "callback_on_step_end" in inspect.signature(pipe.__call__).parameters


def _telling(on_step: Callable[[Step], None] | None, pipe: Any, guide: Guide, recipe: Recipe) -> dict[str, Any]:
    """The argument of the pipeline's call that makes it call `on_step`."""
    if on_step is None or not tells_steps(pipe):
        return {}

    def told(pipe: Any, number: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        on_step(Step(number, getattr(pipe, "num_timesteps", recipe.steps), given["latents"], guide))
        return given

    return {"callback_on_step_end": told}


def call_options(recipe: Recipe, pipe: Any) -> dict[str, Any]:
    """The arguments of the pipeline's call, without the generator."""
    options = {
        "prompt": recipe.prompt,
        "negative_prompt": recipe.negative_prompt,
        "height": recipe.height,
        "width": recipe.width,
        "num_inference_steps": recipe.steps,
        "guidance_scale": recipe.guidance_scale,
    }
    options = {name: value for name, value in options.items() if value is not None}
    known = inspect.signature(pipe.__call__).parameters
    strange = [name for name in options if name not in known]
    missing = [
        name
        for name, p in known.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name not in options
    ]
    if "num_frames" in known:
        raise ModelError(f"{type(pipe).__name__} draws videos; a recipe draws pictures: use diffguide.Guide in Python")
    if strange or missing:
        told = f"takes no {strange[0]}" if strange else f"also needs {missing[0]}"
        raise ModelError(f"{type(pipe).__name__} {told}; a recipe draws with text-to-image pipelines")
    factor = cell(pipe)
    for name in ("height", "width"):
        if options.get(name, factor) % factor:
            raise ParamError(f"{name} = {options[name]} is not a multiple of {factor} pixels, which this model needs")
    if ("height" in options) != ("width" in options) and hasattr(pipe, "unet"):
        # StableDiffusionPipeline forgets the one side that is given; the others fill in the missing one by themselves
        options = dict(zip(("width", "height"), own_size(pipe), strict=True)) | options
    return options


def own_size(pipe: Any) -> tuple[int, int]:
    """Width and height in pixels that a pipeline draws where none is asked for."""
    family, name = of_pipe(pipe)
    *_, h, w = family.example_size(getattr(pipe, name))
    return w * cell(pipe), h * cell(pipe)


def cell(pipe: Any) -> int:
    """Pixels of a latent cell."""
    return getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", 8)


def check_prompt(guide: Guide, recipe: Recipe) -> None:
    """Let the methods look up their words before anything is drawn; raises PromptError and the like."""
    active = [m for m in guide.methods if not m.inert and m.asks("prepare")]
    if not active:
        return
    factor = cell(guide.pipe)
    high, wide = guide.family.example_size(guide.model)
    size = (recipe.height // factor if recipe.height else high, recipe.width // factor if recipe.width else wide)
    sites = sites_of(guide.family, guide.model)
    for method in active:
        method.prepare(
            Context(
                prompts=[recipe.prompt],
                find=lambda b, phrase, occurrence=None: guide.family.columns(
                    guide.pipe, recipe.prompt, phrase, occurrence
                ),
                content=lambda b: guide.family.content(guide.pipe, recipe.prompt),
                step=0,
                steps=recipe.steps,
                sigma=1.0,
                sites=sites,
                grids={site: guide.family.grid(site, size) for site in sites},
                size=size,
                pictures=[0],
            )
        )


def from_config(scheduler: Any, config: Any) -> Any:
    """A scheduler with another's noise schedule; raises ModelError if a library it needs is missing."""
    try:
        return scheduler.from_config(config)
    except (ImportError, ValueError) as error:
        raise ModelError(
            f"{scheduler.__name__} does not go with this model: {' '.join(str(error).split())[:240]}"
        ) from error


def versions() -> dict[str, str]:
    """Of the libraries that pixels depend on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
