"""The functions behind the page: drawing, looking before it, filling the form, showing what was drawn."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from diffguide import describe, planning
from diffguide.app import knobs, problems, sweep
from diffguide.app.canvas import drawing_of, value_of
from diffguide.app.form import NAMES, Form, fields_of, guidance_of, served
from diffguide.app.results import Result, keep, python_of, shell_of
from diffguide.app.run import Drawn, Progress, Runner
from diffguide.errors import DiffguideError
from diffguide.pipelines.run import own_size
from diffguide.recipe import Recipe

LAST = 24  # pictures of a session's history


class Desk:
    """The functions behind the page."""

    def __init__(self, parts: dict[str, Any], runner: Runner, folder: Path, heat: dict[str, Any] | None) -> None:
        self.parts, self.runner, self.folder, self.heat = parts, runner, folder, heat

    # Drawing.

    def draw_form(self, *given: Any) -> Iterator[dict[Any, Any]]:
        """Draw what the form says; with `compare`, first without its methods."""
        *values, compare, history = given
        history = list(history or [])
        parts = self.parts
        try:
            recipe = Form(*values).recipe(self.runner.device, self.runner.dtype)
            jobs = [recipe]
            if compare and recipe.methods:
                jobs.insert(0, recipe.model_copy(update={"methods": (), "layout": None}))
            plain: dict[int, str] = {}
            for job in jobs:
                title = "without methods: " if job is not recipe else ""
                with closing(self.runner.draw(job)) as told:
                    for message in told:
                        if isinstance(message, Progress):
                            yield {parts["progress"]: running(message, title)}
                            continue
                        result = keep(message, self.folder, plain.get(message.picture.seed))
                        if job is not recipe:
                            plain[message.picture.seed] = result.path
                        history = [*history, result][-LAST:]
                        yield self.shown(result) | self.remembered(history)
            yield {parts["progress"]: {"kind": "done", "text": f"Done: {history[-1].caption}."}}
        except DiffguideError as error:
            yield {parts["progress"]: {"kind": "error", "text": str(error)}}

    def grid(self, *given: Any) -> Iterator[dict[Any, Any]]:
        """Draw the form's picture at several values of one parameter."""
        *values, knob, texts, history = given
        history, parts, sheet = list(history or []), self.parts, []
        try:
            recipe = Form(*values).recipe(self.runner.device, self.runner.dtype)
            jobs = sweep.recipes(recipe, knob or "", texts or "")
            yield {parts["sheet"]: []}
            for number, (title, job) in enumerate(jobs, 1):
                with closing(self.runner.draw(job)) as told:
                    for message in told:
                        if isinstance(message, Progress):
                            yield {parts["progress"]: running(message, f"{number} of {len(jobs)}, {title}: ")}
                            continue
                        result = keep(message, self.folder)
                        history = [*history, result][-LAST:]
                        sheet.append((result.path, title))
                        yield {parts["sheet"]: list(sheet)} | self.remembered(history)
            yield {parts["progress"]: {"kind": "done", "text": f"Done: {len(jobs)} pictures."}}
        except DiffguideError as error:
            yield {parts["progress"]: {"kind": "error", "text": str(error)}}

    def draw(self, recipe: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        """Draw a recipe (see docs/recipe.md): tells its steps, then gives the PNG with the recipe inside and its cost.

        Cancelling the call ends the drawing at its next step.
        """
        try:
            wanted = self.recipe_of(recipe)
            with closing(self.runner.draw(wanted, maps=False)) as told:
                for message in told:
                    if isinstance(message, Drawn):
                        result = keep(message, self.folder)
                        yield result.path, {"recipe": result.recipe.to_dict(), "cost": result.curves["cost"]}
                    else:
                        yield gr.skip(), {"text": message.text, "step": message.step, "steps": message.steps}
        except DiffguideError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def recipe_of(self, given: Any) -> Recipe:
        """A stranger's recipe as it will be drawn here."""
        recipe = Recipe.from_json(given)
        self.runner.check(recipe.model)
        return served(recipe, self.runner.device, self.runner.dtype)

    # Before drawing.

    def look(self, *values: Any) -> tuple[Any, Any, Any]:
        """Problems, the draft that the browser keeps, and the parameters that a grid can be over."""
        form = Form(*values)
        draft = dict(zip(NAMES, values, strict=True))
        draft["drawing"] = drawing_of(form.drawing).model_dump(mode="json", exclude_none=True)
        draft["methods"] = {"methods": [spec.model_dump(mode="json") for spec in form.methods]}
        names = sweep.names([spec.name for spec in form.methods])
        return {"notes": problems.examine(form, self.runner)}, draft, gr.update(choices=names)

    def start(self, draft: Any) -> dict[Any, Any]:
        """The draft that the browser kept, if it is sound, and the first look."""
        parts, known = self.parts, {}
        if isinstance(draft, dict) and set(draft) == set(NAMES):
            try:
                drawing_of(draft["drawing"])
                knobs.specs_of(draft["methods"])
                self.runner.check(draft["model"])
                known = draft
            except DiffguideError:
                known = {}
        if not known:
            return {parts["notes"]: {"notes": []}}
        filled = {parts[name]: value for name, value in known.items()}
        filled[parts["methods"]] = gr.update(value=known["methods"], mode=known["mode"])
        return filled | self.of_model(known["model"], known)

    def explain(self, recipe: dict) -> dict:
        """What drawing a recipe would do and what is wrong with it, without drawing: a list of notes with a level."""
        try:
            wanted = self.recipe_of(recipe)
            fields: dict[str, Any] = fields_of(wanted, (512, 512)) | {"methods": wanted.methods}
            form = Form(**fields)
            return {"notes": problems.examine(form, self.runner)}
        except DiffguideError as error:
            return {"notes": [problems.note("problem", str(error))]}

    # Filling the form.

    def switch(self, mode: str, specs: Any) -> tuple[Any, Any]:
        """Offer the methods of another mode; its only one is taken at once."""
        given = [spec.model_dump(mode="json") for spec in specs]
        name = knobs.only(mode)
        if name and all(spec.name != name for spec in specs):
            given.append({"name": name, "params": {}})
        tab = gr.update(selected="maps") if mode == "maps" else gr.update(selected="picture")
        return gr.update(mode=mode, value={"methods": given}), tab

    def of_model(self, model: str, fields: dict[str, Any] | None = None) -> dict[Any, Any]:
        """What the page knows of a model: its layers, grids and size."""
        fields = fields or {}
        pipe = self.runner.peek(model)
        layers, own = problems.layers(pipe), own_size(pipe)
        heat = self.heat if self.heat and self.heat["model"] in ("", model) else None
        size = [int(fields.get("width") or own[0]), int(fields.get("height") or own[1])]
        drawing = {"size": size, "grids": [list(g) for g in problems.grids(pipe, (size[1], size[0]))]}
        methods: dict[str, Any] = {"layers": layers, "heat": heat}
        if "drawing" in fields:
            drawing["value"] = fields["drawing"]
        if "methods" in fields:
            methods |= {"value": fields["methods"], "mode": fields["mode"]}
        return {self.parts["drawing"]: gr.update(**drawing), self.parts["methods"]: gr.update(**methods)}

    def change_model(self, model: str, drawing: Any) -> dict[Any, Any]:
        """Another model: its layers, grids and size, and the guidance it is drawn with."""
        return self.of_model(model) | {self.parts["guidance"]: guidance_of(model)}

    def resize(self, model: str, width: float | None, height: float | None) -> Any:
        """The canvas in the shape of the picture."""
        return self.of_model(model, {"width": width, "height": height})[self.parts["drawing"]]

    def boxes(self, prompt: str, seed: float, drawing: Any) -> Any:
        """Boxes from the prompt."""
        size = drawing_of(drawing).size
        try:
            layout = planning.plan(prompt or "", seed=int(seed or 0), aspect=size[0] / size[1])
        except DiffguideError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return gr.update(value=value_of(layout, size))

    def plan(self, prompt: str, seed: int = 0, aspect: float = 1.0) -> dict:
        """A layout from a prompt alone: a box for each thing it counts, on the side it says (see docs/layout.md)."""
        try:
            return planning.plan(prompt, seed=seed, aspect=aspect).to_dict()
        except DiffguideError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def methods(self) -> dict:
        """Every method with every parameter: type, default, range and meaning."""
        return {"methods": describe.table()}

    def below(self, history: list[Result]) -> Any:
        """The last picture under the boxes."""
        return gr.update(under=history[-1].maps.get("picture", "")) if history else gr.update(under="")

    def fill(self, recipe: Recipe) -> dict[Any, Any]:
        """The form of a recipe; a model that is not served is an error."""
        self.runner.check(recipe.model)
        own = own_size(self.runner.peek(recipe.model))
        fields = fields_of(recipe, own)
        return {self.parts[n]: v for n, v in fields.items()} | self.of_model(recipe.model, fields)

    def restore(self, path: str | None) -> dict[Any, Any]:
        """The form of the recipe in an uploaded file."""
        if not path:
            return {self.parts["restored"]: ""}
        try:
            recipe = served(Recipe.load(path), self.runner.device, self.runner.dtype)
            return self.fill(recipe) | {self.parts["restored"]: "Restored: everything is as the picture was drawn."}
        except DiffguideError as error:
            return {self.parts["restored"]: str(error).replace(path, Path(path).name)}

    def recall(self, history: list[Result], picked: int) -> dict[Any, Any]:
        """The form of a picture of the history."""
        if not 0 <= picked < len(history):
            raise gr.Error("choose a picture of the history first", print_exception=False)
        return self.fill(history[picked].recipe)

    # Showing.

    def pick(self, history: list[Result], event: gr.SelectData) -> dict[Any, Any]:
        """Show a picture of the history; the newest comes first."""
        at = len(history) - 1 - int(event.index)
        return self.shown(history[at]) | {self.parts["picked"]: at} if 0 <= at < len(history) else {}

    def shown(self, result: Result) -> dict[Any, Any]:
        """All that the page says of a picture."""
        parts, recipe = self.parts, result.recipe
        return {
            parts["picture"]: result.path,
            parts["caption"]: result.caption,
            parts["slider"]: (result.before, result.path) if result.before else None,
            parts["maps"]: result.maps or None,
            parts["curves"]: result.curves,
            parts["file"]: result.path,
            parts["json"]: recipe.to_json(),
            parts["python"]: python_of(recipe),
            parts["shell"]: shell_of(recipe),
            parts["now"]: result,
        }

    def remembered(self, history: list[Result]) -> dict[Any, Any]:
        """The history, newest first."""
        pictures = [(result.path, result.caption) for result in reversed(history)]
        return {self.parts["state"]: history, self.parts["gallery"]: pictures}


def running(message: Progress, title: str = "") -> dict[str, Any]:
    """The value of the progress part."""
    text = f"{title}{message.text}, {message.seconds:.0f} s"
    told = {"kind": "running", "text": text, "step": message.step, "steps": message.steps}
    return told | ({"preview": message.preview} if message.preview else {})
