"""What is wrong, or not as one may expect, told before anything runs: by the form, the methods and the guide."""

from collections.abc import Iterator
from typing import Any

from diffguide import describe
from diffguide.app.canvas import Drawing, drawing_of, shortened
from diffguide.app.form import Form
from diffguide.app.run import Runner
from diffguide.errors import DiffguideError
from diffguide.explain import Plan
from diffguide.grid import rasterise
from diffguide.guide import Guide
from diffguide.layout import Layout
from diffguide.pipelines.run import call_options, cell, check_prompt, tells_steps
from diffguide.processors import named
from diffguide.recipe import Recipe
from diffguide.registry import sites_of

KEPT = 64  # plans
Note = dict[str, str]  # level: "problem", "warning", "fact" or "fine"; text


def note(level: str, text: str) -> Note:
    return {"level": level, "text": text}


def examine(form: Form, runner: Runner) -> list[Note]:
    """All there is to say about a form. The device is asked only if it is free."""
    found = list(of_regions(drawing_of(form.drawing), form.prompt or ""))
    if not (form.prompt or "").strip():
        found.append(note("problem", "the prompt is empty; write what the picture shows"))
    found += list(of_needs(form))
    if any(n["level"] == "problem" for n in found):
        return found
    try:
        recipe = form.recipe(runner.device, runner.dtype)
        found += list(of_methods(recipe))
        with runner.free() as free:
            if not free:
                return [*found, note("fact", "the device is drawing; cost and refusals are told when it is free")]
            found += list(of_guide(recipe, runner.pipe(recipe.model), runner.plans))
    except DiffguideError as error:
        return [*found, note("problem", str(error))]
    if not any(n["level"] in ("problem", "warning") for n in found):
        found.insert(0, note("fine", "No problems found."))
    return found


def of_regions(drawing: Drawing, prompt: str) -> Iterator[Note]:
    """Phrases and boxes that cannot do what was meant."""
    for number, item in enumerate(drawing.items, 1):
        phrase = item.phrase.strip()
        if not phrase:
            yield note("problem", f"region {number} has no phrase; write the words of the prompt that belong there")
        elif not item.mask and item.area <= 0:
            yield note("problem", f"region {number} ({shortened(phrase)}) has no area; draw it again")


def of_needs(form: Form) -> Iterator[Note]:
    """Methods that need regions where there are none."""
    rows = {row["name"]: row for row in describe.table()}
    for spec in form.methods:
        if spec.name in rows and rows[spec.name]["layout"] == "needed" and not drawing_of(form.drawing).items:
            yield note("problem", f"{spec.name} needs regions; draw one, or press Boxes from the prompt")


def of_methods(recipe: Recipe) -> Iterator[Note]:
    """Regions without a method that reads them, and the reverse is an error that `make` has told."""
    if recipe.layout is None:
        return
    rows = {row["name"]: row for row in describe.table()}
    names = [spec.name for spec in recipe.methods]
    if not any(rows[name]["layout"] for name in names):
        who = f"{', '.join(names)} ignores regions" if names else "no method is chosen"
        readers = ", ".join(name for name, row in rows.items() if row["layout"] == "needed")
        yield note("warning", f"the regions do nothing: {who}; add one of {readers}")


def of_guide(recipe: Recipe, pipe: Any, plans: dict[Any, Plan]) -> Iterator[Note]:
    """Refusals, words that are not found, regions too small for the maps, passes and memory; `plans` are kept."""
    call_options(recipe, pipe)
    methods = describe.make_all(recipe.methods, recipe.layout)
    guide = Guide(pipe, *methods)
    key = (recipe.model, recipe.steps, recipe.height, recipe.width, str(recipe.methods), recipe.layout is None)
    if (plan := plans.get(key)) is None:  # it asks for no layout's boxes, which change with every drag
        plan = guide.explain(steps=recipe.steps, height=recipe.height, width=recipe.width)
        plans.update({key: plan} if len(plans) < KEPT else {})
    for reason in plan.refusals:
        yield note("problem", reason)
    try:
        check_prompt(guide, recipe)
    except DiffguideError as error:
        yield note("problem", str(error))
    if recipe.layout is not None:
        yield from of_grids(
            recipe.layout,
            grids(pipe, (recipe.height, recipe.width), {n for names in plan.sites.values() for n in names}),
        )
    for text in plan.notes:
        yield note("warning", text)
    if not tells_steps(pipe):
        yield note("warning", f"{type(pipe).__name__} does not tell its steps: no previews, and no cancel midway")
    for text in plan.lines[1:]:
        does, there, _ = text.partition("; sites ")
        yield note("fact", does + (f"; {_counted(plan, text)} attention modules" if there else ""))


def _counted(plan: Plan, line: str) -> int:
    """How many modules the method of a line touches."""
    name = line.partition(":")[0]
    return next(len(sites) for method, sites in plan.sites.items() if named(method).__name__ == name)


def of_grids(layout: Layout, sides: list[tuple[int, int]]) -> Iterator[Note]:
    """Regions that are thinner than a cell, or cover less than one, on the finest grid that the methods look at."""
    if not sides:
        return
    h, w = max(sides, key=lambda grid: grid[0] * grid[1])
    for region in layout.regions:
        thin = any((x1 - x0) * w < 1 or (y1 - y0) * h < 1 for x0, y0, x1, y1 in region.instances)
        if thin or (region.mask is not None and rasterise([region.mask], h, w).sum() < 1):
            phrase = shortened(region.phrase)
            yield note(
                "warning", f"{phrase} is thinner than one cell of the {w} x {h} grid that steers it; draw it larger"
            )


def grids(
    pipe: Any, size: tuple[int | None, int | None] = (None, None), names: set[str] | None = None
) -> list[tuple[int, int]]:
    """The attention grids [h, w] of a model, of some modules or of all, from coarse to fine.

    `size` is height and width of the picture in pixels, None for the model's own.
    """
    guide = Guide(pipe)
    factor = cell(pipe)
    *frames, h, w = guide.family.example_size(guide.model)
    h, w = (size[0] // factor if size[0] else h, size[1] // factor if size[1] else w)
    sites = [s for s in sites_of(guide.family, guide.model) if not names or s.name in names]
    found = {guide.family.grid(site, (*frames, h, w)) for site in sites}
    return sorted({(grid[-2], grid[-1]) for grid in found})


def layers(pipe: Any) -> list[dict[str, Any]]:
    """The layers whose heads can be chosen: number, name, block, heads."""
    guide = Guide(pipe)
    found = [s for s in sites_of(guide.family, guide.model) if s.number >= 0]
    return [
        {"number": s.number, "name": s.name, "block": s.block, "heads": s.heads}
        for s in sorted(found, key=lambda s: s.number)
    ]
