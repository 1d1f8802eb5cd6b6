"""What a drawn picture is shown as: its file, its maps over time, its losses, its recipe as JSON, Python and shell."""

import base64
import json
import secrets
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffguide import describe, zoo
from diffguide.app.canvas import colour
from diffguide.app.preview import data_url
from diffguide.app.run import Drawn
from diffguide.layout import Layout
from diffguide.processors import named
from diffguide.recipe import Recipe, save_png
from diffguide.report import Report

MOST_MAPS = 24, 40  # words and steps that are sent to the page; of more steps, evenly chosen ones
FINEST = 32  # side of the maps on the page, in cells


@dataclass(frozen=True)
class Result:
    """A picture in the output folder and all that the page shows of it. `before` is the one drawn without methods."""

    path: str
    recipe: Recipe
    maps: dict[str, Any]
    curves: dict[str, Any]
    caption: str
    before: str | None = None


def keep(drawn: Drawn, folder: Path, before: str | None = None) -> Result:
    """Write a picture into the output folder, with its recipe inside, and say what there is to see."""
    recipe = drawn.picture.recipe
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{drawn.picture.seed}-{secrets.token_hex(3)}.png"
    path = folder / name
    save_png(drawn.picture.image, path, recipe)
    names = ", ".join(spec.name for spec in recipe.methods) or "no method"
    caption = f"seed {drawn.picture.seed}, {names}, {drawn.picture.seconds:.1f} s"
    return Result(str(path), recipe, maps_of(drawn), curves_of(drawn.picture.report), caption, before)


def maps_of(drawn: Drawn) -> dict[str, Any]:
    """The value of the maps' part: for each word its mean map, then one for each step, each with its peak at 255."""
    kept = list(drawn.maps.items())[: MOST_MAPS[0]]
    if not kept:
        return {}
    count, *grid = kept[0][1].shape
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_MAPS[1])).round().astype(int))
    rows, h, w = [], 0, 0
    for word, steps in kept:
        planes = np.stack([steps.mean(0), *(steps[i] for i in chosen)])
        if max(grid) > FINEST:
            planes = np.stack([_coarser(plane) for plane in planes])
        peaks = planes.max((1, 2), keepdims=True)
        levels = np.rint(255 * planes / np.where(peaks > 0, peaks, 1)).astype(np.uint8)
        h, w = levels.shape[1:]
        rows.append({"word": word, "maps": base64.b64encode(levels.tobytes()).decode()})
    image = drawn.picture.image
    layout = drawn.picture.recipe.layout
    return {
        "picture": data_url(image if max(image.size) <= 384 else image.resize(_within(image.size, 384))),
        "size": list(image.size),
        "grid": [h, w],
        "steps": len(chosen),
        "words": rows,
        "boxes": [
            {"box": list(box), "color": colour(number), "words": region.phrase.lower().split()}
            for number, region in enumerate(layout.regions if layout else ())
            for box in region.instances
        ],
    }


def _within(size: tuple[int, int], most: int) -> tuple[int, int]:
    share = most / max(size)
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))


def _coarser(plane: np.ndarray) -> np.ndarray:
    """Means over whole blocks of cells, so that no side is longer than `FINEST`."""
    times = -(-max(plane.shape) // FINEST)
    h, w = (n // times * times for n in plane.shape)
    return plane[:h, :w].reshape(h // times, times, w // times, times).mean((1, 3))


def curves_of(report: Report) -> dict[str, Any]:
    """The value of the curves' part: each method's loss at every gradient pass, counted from 1, and what it cost."""
    series: dict[str, list[list[float]]] = {}
    steps, count = [], 0
    for step in report.steps:
        steps.append([count + 1, step.step])
        for losses in step.losses:
            count += 1
            for name, values in losses.items():
                if values and values[0] == values[0]:
                    series.setdefault(name, []).append([count, round(values[0], 5)])
    wide = steps[:: max(1, len(steps) // 12)]
    passes = f"{report.forwards:.0f} forwards and {report.backwards:.0f} backwards"
    cost = f"{passes}, {report.seconds:.1f} s, peak {report.peak_memory:.0f} MiB"
    return {
        "series": [{"name": name, "points": points} for name, points in series.items()],
        "steps": wide,
        "cost": f"With methods: {cost}." if report.forwards else "No method was attached.",
    }


def python_of(recipe: Recipe) -> str:
    """A program that draws this picture with the pipeline and the guide themselves."""
    layout = recipe.layout
    single = recipe.seed + recipe.index
    call = {
        "negative_prompt": recipe.negative_prompt,
        "height": recipe.height,
        "width": recipe.width,
        "num_inference_steps": recipe.steps,
        "guidance_scale": recipe.guidance_scale,
    }
    lines = ["import torch", ""]
    if recipe.scheduler:
        lines.insert(0, "import diffusers")
    lines += ["import diffguide as dg", "from diffguide.pipelines import load", ""]
    where = f", dtype={recipe.dtype!r}" if recipe.dtype != "float32" else ""
    lines.append(f"pipe = load({recipe.model!r}{where}, device={recipe.device!r})")
    if recipe.scheduler:
        from diffguide.pipelines.source import SCHEDULERS

        lines.append(f"pipe.scheduler = diffusers.{SCHEDULERS[recipe.scheduler]}.from_config(pipe.scheduler.config)")
    if layout is not None:
        lines += ["", *_layout_lines(layout)]
    made = [_method_line(spec.name, spec.params, layout) for spec in recipe.methods]
    lines += ["", f"with dg.Guide({', '.join(['pipe', *made])}) as guide:", "    image = pipe("]
    lines.append(f"        {recipe.prompt!r},")
    lines += [f"        {name}={value!r}," for name, value in call.items() if value is not None]
    lines += [f'        generator=torch.Generator("cpu").manual_seed({single}),', "    ).images[0]", ""]
    return "\n".join([*lines, 'image.save("picture.png")', "print(guide.report)", ""])


def _layout_lines(layout: Layout) -> list[str]:
    """The layout in Python; masks go in as their JSON."""
    if any(region.mask is not None for region in layout.regions):
        return [f"layout = dg.Layout.from_json({layout.to_json()!r})"]
    lines = ["layout = dg.Layout("]
    for region in layout.regions:
        given = {k: v for k, v in region.to_dict().items() if k != "phrase"}
        lines.append(f"    dg.Region({', '.join([repr(region.phrase), *(f'{k}={v!r}' for k, v in given.items())])}),")
    if layout.base is not None:
        lines.append(f"    base={layout.base!r},")
    if layout.overlap != "average":
        lines.append(f"    overlap={layout.overlap!r},")
    return [*lines, ")"]


def _method_line(name: str, params: Mapping[str, Any], layout: Layout | None) -> str:
    cls = named(name)
    given = ["layout=layout"] if layout is not None and layout.regions and describe.wants_layout(cls) else []
    given += [f"{key}={tuple(value) if isinstance(value, list) else value!r}" for key, value in params.items()]
    return f"dg.{cls.__name__}({', '.join(given)})"


def shell_of(recipe: Recipe) -> str:
    """Commands that draw this picture; the layout goes through a file."""
    lines = []
    option_like = recipe.prompt.startswith("-")
    parts = ["diffguide generate", *([] if option_like else [shlex.quote(recipe.prompt)])]
    if recipe.layout is not None:
        lines = ["cat > layout.json <<'END'", json.dumps(recipe.layout.to_dict(), ensure_ascii=False), "END", ""]
        parts.append("--layout layout.json")
    parts.append(f"--model={shlex.quote(recipe.model)}")
    if recipe.negative_prompt:
        parts.append(f"--negative-prompt={shlex.quote(recipe.negative_prompt)}")
    for spec in recipe.methods:
        parts.append(f"--method {spec.name}")
        parts += [
            f"--set {shlex.quote(f'{spec.name}.{key}={_written(key, value)}')}" for key, value in spec.params.items()
        ]
    if not recipe.methods:
        parts.append("--method none")
    default = zoo.GUIDANCE_SCALE if recipe.model in zoo.MODELS else 7.5
    parts.append(f"--steps {recipe.steps}")
    if recipe.guidance_scale != default:
        parts.append(f"--guidance-scale {recipe.guidance_scale!r}")
    options = {"scheduler": recipe.scheduler, "width": recipe.width, "height": recipe.height, "device": recipe.device}
    parts += [f"--{name} {value}" for name, value in options.items() if value is not None]
    if recipe.dtype != "float32":
        parts.append(f"--dtype {recipe.dtype}")
    parts += [f"--seed {recipe.seed + recipe.index}", "--out picture.png"]
    if option_like:
        parts.append(f"-- {shlex.quote(recipe.prompt)}")
    return "\n".join([*lines, " \\\n    ".join(parts), ""])


def _written(key: str, value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, list):
        return (":" if key == "window" else ",").join(map(str, value))
    return str(value).lower() if isinstance(value, bool | None) else str(value)
