"""What happens when: each button and field of the page with what it starts."""

from pathlib import Path
from typing import Any

import gradio as gr

from diffguide.app import masks
from diffguide.app.desk import Desk
from diffguide.app.form import NAMES
from diffguide.app.run import Runner

DEVICE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device"}
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def connect(demo: gr.Blocks, parts: dict[str, Any], runner: Runner, folder: Path, heat: dict[str, Any] | None) -> None:
    """Tie the page together; to be called inside its context."""
    desk = Desk(parts, runner, folder, heat)
    form = [parts[name] for name in NAMES]
    shown = [parts[name] for name in ("progress", "picture", "caption", "slider", "maps", "curves", "gallery", "state")]
    shown += [parts[name] for name in ("file", "json", "python", "shell", "now")]

    # what programs call comes first, or names of the page's own functions would be in its way
    parts["ask"].click(
        desk.draw, parts["asked"], [parts["answer"], parts["told"]], api_name="draw", show_progress="hidden", **DEVICE
    )
    gr.api(desk.explain, api_name="explain")
    gr.api(desk.plan, api_name="plan")
    gr.api(desk.methods, api_name="methods")

    go = parts["go"].click(
        desk.draw_form, [*form, parts["compare"], parts["state"]], shown, trigger_mode="once", **DEVICE, **QUIET
    )
    grid = parts["sweep"].click(
        desk.grid,
        [*form, parts["knob"], parts["values"], parts["state"]],
        [parts[n] for n in ("progress", "sheet", "gallery", "state")],
        trigger_mode="once",
        **DEVICE,
        **QUIET,
    )
    parts["stop"].click(
        lambda: {"kind": "", "text": "Stopped."}, None, parts["progress"], cancels=[go, grid], queue=False, **QUIET
    )

    of_model = [parts[n] for n in ("drawing", "methods", "guidance")]
    changed = parts["model"].input(desk.change_model, [parts["model"], parts["drawing"]], of_model, **DEVICE, **QUIET)

    looks = [parts[n].change for n in NAMES if n != "mode"]
    seen = [parts["notes"], parts["draft"], parts["knob"]]
    gr.on(looks, desk.look, form, seen, trigger_mode="always_last", concurrency_limit=2, **QUIET)
    for job in (go, grid, changed):  # while the device was drawing or loading, it could not be asked
        job.then(desk.look, form, seen, concurrency_limit=2, **QUIET)
    demo.load(desk.start, parts["draft"], [*form, parts["notes"], parts["knob"]], **QUIET)

    parts["mode"].input(
        desk.switch, [parts["mode"], parts["methods"]], [parts["methods"], parts["tabs"]], queue=False, **QUIET
    )
    for side in ("width", "height"):
        parts[side].change(
            desk.resize, [parts["model"], parts["width"], parts["height"]], parts["drawing"], **DEVICE, **QUIET
        )
    parts["plan"].click(desk.boxes, [parts["prompt"], parts["seed"], parts["drawing"]], parts["drawing"], **QUIET)
    parts["below"].click(desk.below, parts["state"], parts["drawing"], **QUIET)
    parts["mask"].click(masks.painted, [parts["paint"], parts["which"], parts["drawing"]], parts["drawing"], **QUIET)
    parts["unmask"].click(masks.boxed, [parts["which"], parts["drawing"]], parts["drawing"], **QUIET)

    for part in ("maps", "curves"):  # a tab is made when it is opened, and has not heard of what came before
        tab = parts["maps tab" if part == "maps" else "losses tab"]
        tab.select(lambda now, part=part: getattr(now, part, None), parts["now"], parts[part], queue=False, **QUIET)
    parts["gallery"].select(desk.pick, parts["state"], [*shown[1:6], *shown[8:], parts["picked"]], **QUIET)
    parts["recall"].click(desk.recall, [parts["state"], parts["picked"]], form, **QUIET)
    parts["drop"].upload(desk.restore, parts["drop"], [*form, parts["restored"]], **QUIET)
