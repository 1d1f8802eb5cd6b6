"""The page: what stands where, and what happens when."""

from pathlib import Path
from typing import Any

import gradio as gr

from diffguide import describe
from diffguide.app import events, knobs, problems
from diffguide.app.canvas import Canvas
from diffguide.app.form import NAMES, STEPS, guidance_of
from diffguide.app.knobs import Knobs
from diffguide.app.run import Runner
from diffguide.app.shown import Curves, MapView, Notes, ProgressView
from diffguide.pipelines.run import own_size
from diffguide.pipelines.source import SCHEDULERS

PROMPT = "a red circle, a blue square and a yellow star on a white background"
CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; }
#title h1 { font-size: 22px; margin: 4px 0 0; }
#title p { margin: 2px 0 6px; }
footer { opacity: 1 !important; color: var(--body-text-color) !important; }
footer * { color: var(--body-text-color) !important; }
#results, #results > * { min-width: 0; }
footer .divider { display: none !important; }
#go, #stop { min-height: 46px; }
#gallery, #gallery .gallery-container, #gallery .grid-wrap { height: auto !important; min-height: 0 !important; }
#gallery .grid-wrap { max-height: 420px !important; }
#picture .image-container, #picture .image-frame { width: 100% !important; }
#picture img { width: min(100%, 60vh) !important; height: auto !important; }
#picture img { max-height: none !important; object-fit: contain !important; }
#results button[role="tab"] { padding: 0 9px; }
#results button[aria-selected="true"] { color: var(--button-primary-background-fill); }
.dark #results button[aria-selected="true"] { color: var(--primary-400); }
"""
RECIPE = {"type": "object", "description": "a recipe: version 1, model, prompt, and more (docs/recipe.md)"}
DRAFT = "diffguide-draft"  # key in the browser, which keeps it for this address alone; the other word is no secret


def build(runner: Runner, folder: Path, heads: Path | None = None) -> gr.Blocks:
    """All of it, not yet served. Pictures go to `folder`; `heads` is the folder of a search, if there is one."""
    model = runner.models[0]
    with runner.lock:
        pipe = runner.pipe(model)
        size, grids, layers = list(own_size(pipe)), problems.grids(pipe), problems.layers(pipe)
    heat = knobs.heat_of(heads)
    with gr.Blocks(title="diffguide", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        parts: dict[str, Any] = {
            "state": gr.State([], time_to_live=3600),
            "draft": gr.BrowserState(None, storage_key=DRAFT, secret=DRAFT),
        }
        gr.Markdown(
            f"# diffguide\nDraw where things belong, choose methods, press Draw. On {runner.device}, nothing leaves "
            "this machine.",
            elem_id="title",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                _words(parts, runner, model)
                parts["drawing"] = Canvas(size=size, grids=[list(g) for g in grids], label="Layout")
                _layout_tools(parts)
            with gr.Column(scale=4, min_width=300):
                _methods(parts, layers, heat)
                _numbers(parts, size, model)
                parts["notes"] = Notes()
            with gr.Column(scale=5, min_width=300):
                _going(parts)
                _results(parts)
        _for_programs(parts)
        assert not [name for name in NAMES if name not in parts]
        events.connect(demo, parts, runner, folder, heat)
    return demo


def _words(parts: dict[str, Any], runner: Runner, model: str) -> None:
    parts["prompt"] = gr.Textbox(PROMPT, label="Prompt", lines=2, max_length=10_000, elem_id="prompt")
    with gr.Accordion("Open a picture or a recipe", open=False, elem_id="opening"):
        parts["drop"] = gr.File(
            label="A PNG of diffguide, or a recipe.json",
            file_types=[".png", ".json"],
            type="filepath",
            height=120,
            elem_id="drop",
        )
        parts["restored"] = gr.Textbox(
            show_label=False,
            container=False,
            interactive=False,
            placeholder="It fills the whole form.",
            elem_id="restored",
        )
    with gr.Accordion("Negative prompt, model", open=False):
        parts["negative"] = gr.Textbox("", label="Negative prompt", max_length=10_000, elem_id="negative")
        parts["model"] = gr.Dropdown(list(runner.models), value=model, label="Model", elem_id="model")


def _layout_tools(parts: dict[str, Any]) -> None:
    with gr.Row():
        parts["plan"] = gr.Button("Boxes from the prompt", size="sm", min_width=120, elem_id="plan")
        parts["below"] = gr.Button("Last picture below", size="sm", min_width=120, elem_id="below")
    with gr.Accordion("Paint a mask for a region", open=False, elem_id="painting") as accordion:
        parts["painting"] = accordion
        parts["which"] = gr.Number(1, label="Number of the region", precision=0, minimum=1, elem_id="which")
        parts["paint"] = gr.ImageEditor(
            label="Choose the brush, paint where it belongs",
            type="numpy",
            image_mode="RGBA",
            sources=(),
            transforms=(),
            canvas_size=(512, 512),
            fixed_canvas=True,
            layers=False,
            brush=gr.Brush(colors=["#b45309"], default_size=40, color_mode="fixed"),
            buttons=[],
            elem_id="paint",
        )
        with gr.Row():
            parts["mask"] = gr.Button("Use as the region's place", size="sm", elem_id="mask")
            parts["unmask"] = gr.Button("Box again", size="sm", elem_id="unmask")


def _methods(parts: dict[str, Any], layers: list[dict[str, Any]], heat: dict[str, Any] | None) -> None:
    there = knobs.modes()
    parts["mode"] = gr.Radio([(m.capitalize(), m) for m in there], value=there[0], label="Mode", elem_id="mode")
    parts["methods"] = Knobs(
        methods=describe.table(), mode=there[0], layers=layers, presets=knobs.presets(), heat=heat, label="Methods"
    )


def _numbers(parts: dict[str, Any], size: list[int], model: str) -> None:
    with gr.Row():
        parts["steps"] = gr.Number(
            STEPS, label="Steps", precision=0, minimum=1, maximum=200, min_width=90, elem_id="steps"
        )
        parts["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90, elem_id="seed")
        parts["pictures"] = gr.Number(
            1, label="Pictures", precision=0, minimum=1, maximum=8, min_width=90, elem_id="pictures"
        )
    with gr.Accordion("Guidance scale, scheduler, size", open=False):
        parts["guidance"] = gr.Number(
            guidance_of(model), label="Guidance scale", minimum=0, maximum=100, elem_id="guidance"
        )
        parts["scheduler"] = gr.Dropdown(
            [("the model's own", ""), *((name, name) for name in SCHEDULERS)],
            value="",
            label="Scheduler",
            elem_id="scheduler",
        )
        with gr.Row():
            own = f"0 is the model's own, {size[0]} x {size[1]}"
            parts["width"] = gr.Number(
                0, label="Width, pixels", info=own, precision=0, minimum=0, min_width=110, elem_id="width"
            )
            parts["height"] = gr.Number(
                0, label="Height, pixels", info=own, precision=0, minimum=0, min_width=110, elem_id="height"
            )


def _going(parts: dict[str, Any]) -> None:
    with gr.Row():
        parts["go"] = gr.Button("Draw", variant="primary", min_width=140, elem_id="go")
        parts["stop"] = gr.Button("Stop", min_width=80, elem_id="stop")
    parts["compare"] = gr.Checkbox(False, label="Also without methods, to compare", elem_id="compare")
    parts["progress"] = ProgressView()


def _for_programs(parts: dict[str, Any]) -> None:
    """What `/draw` takes and gives; people use the buttons."""
    with gr.Row(visible=False):
        parts["asked"] = gr.JSON(label="Recipe")
        # gr.JSON tells a type that tools for language models do not take; a class of ours browsers would look for
        parts["asked"].api_info = lambda: RECIPE
        parts["answer"] = gr.Image(label="Picture", type="filepath", format="png")
        parts["told"] = gr.JSON(label="Told")
        parts["ask"] = gr.Button("Draw a recipe")


def _results(parts: dict[str, Any]) -> None:
    with gr.Tabs(elem_id="results") as tabs:
        parts["tabs"] = tabs
        with gr.Tab("Picture", id="picture"):
            parts["picture"] = gr.Image(
                label="Picture",
                type="filepath",
                format="png",
                buttons=["download", "fullscreen"],
                interactive=False,
                elem_id="picture",
            )
            parts["caption"] = gr.Textbox(
                label="What was drawn",
                show_label=False,
                container=False,
                interactive=False,
                placeholder="Nothing drawn yet.",
                elem_id="caption",
            )
        with gr.Tab("Compare", id="compared"):
            parts["slider"] = gr.ImageSlider(
                label="Without and with methods, same seed",
                type="filepath",
                format="png",
                buttons=["fullscreen"],
                interactive=False,
                elem_id="slider",
            )
        with gr.Tab("Maps", id="maps") as parts["maps tab"]:
            parts["maps"] = MapView()
        with gr.Tab("Losses", id="losses") as parts["losses tab"]:
            parts["curves"] = Curves()
        with gr.Tab("Grid", id="grid"):
            parts["knob"] = gr.Dropdown([], label="Parameter", elem_id="knob", allow_custom_value=True)
            parts["values"] = gr.Textbox(
                "", label="Values, by commas", placeholder="both ends and the default", elem_id="values"
            )
            parts["sweep"] = gr.Button("Draw the grid", elem_id="sweep")
            parts["sheet"] = gr.Gallery(
                label="Grid",
                columns=3,
                object_fit="contain",
                format="png",
                buttons=["download", "fullscreen"],
                interactive=False,
                elem_id="sheet",
            )
        with gr.Tab("Recipe", id="recipe"):
            parts["file"] = gr.DownloadButton("Picture with its recipe inside (PNG)", elem_id="file")
            parts["json"] = gr.Code(
                language="json",
                label="Recipe",
                buttons=["copy", "download"],
                interactive=False,
                wrap_lines=True,
                elem_id="json",
            )
            parts["python"] = gr.Code(
                language="python",
                label="Python",
                buttons=["copy", "download"],
                interactive=False,
                wrap_lines=True,
                elem_id="python",
            )
            parts["shell"] = gr.Code(
                language="shell",
                label="Shell",
                buttons=["copy", "download"],
                interactive=False,
                wrap_lines=True,
                elem_id="shell",
            )
    parts["gallery"] = gr.Gallery(
        label="This session",
        columns=4,
        object_fit="contain",
        format="png",
        buttons=["download"],
        interactive=False,
        elem_id="gallery",
    )
    parts["recall"] = gr.Button("Put the chosen picture's recipe back", size="sm", elem_id="recall")
    parts["picked"] = gr.State(-1)
    parts["now"] = gr.State(None, time_to_live=3600)
