"""The methods and their knobs, drawn from what the methods say of themselves.

The value is `{"methods": [{"name", "params"}]}`, the parameters only where they are not the defaults: what a recipe
keeps of its methods.
"""

import json
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import ValidationError

from diffguide import describe, heads
from diffguide.app.part import Part
from diffguide.errors import DiffguideError, ParamError
from diffguide.files import explain
from diffguide.recipe import MethodSpec
from diffguide.search.state import read

MODES = ("generate", "regions", "edit", "compose", "high resolution", "maps")  # in the order of the page
MOST = 16  # methods of a recipe


class Knobs(Part):
    """Choose methods, turn their knobs.

    Properties: `methods` (rows of `describe.table`), `mode` (those of it are offered), `layers` (of the model: number,
    name, block, heads), `presets` of heads, `heat` (scores of heads found by a search: plain, scores by "L3H1").
    """

    name = "knobs"
    empty = {"methods": []}

    def __init__(self, value: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(
            value, **{"methods": [], "mode": "generate", "layers": [], "presets": [], "heat": None, **options}
        )

    @classmethod
    def check(cls, payload: Any) -> tuple[MethodSpec, ...]:
        try:
            return specs_of(payload)
        except DiffguideError as error:
            raise gr.Error(str(error), print_exception=False) from None


def specs_of(payload: Any) -> tuple[MethodSpec, ...]:
    """The methods that were chosen; raises ParamError for what no script of ours sends, values are checked later."""
    rows = payload.get("methods") if isinstance(payload, dict) else payload
    if not isinstance(rows, list | tuple) or len(rows) > MOST:
        raise ParamError(f"methods: expected a list of at most {MOST}, got {rows!r:.60}")
    try:
        specs = tuple(row if isinstance(row, MethodSpec) else MethodSpec(**row) for row in rows)
    except ValidationError as fault:
        raise ParamError(explain(fault, "methods")) from None
    except TypeError:
        raise ParamError(f"methods: expected objects with name and params, got {rows!r:.60}") from None
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ParamError("a method is chosen twice; remove one of the two")
    return specs


def modes() -> list[str]:
    """The modes that some method is of."""
    there = {row["mode"] for row in describe.table()}
    return [mode for mode in MODES if mode in there] + sorted(there - set(MODES))


def only(mode: str) -> str | None:
    """The method of a mode, where it has one alone."""
    names = [row["name"] for row in describe.table() if row["mode"] == mode]
    return names[0] if len(names) == 1 else None


def presets() -> list[dict[str, Any]]:
    """The presets of heads that come with diffguide."""
    return [
        {"name": name, "heads": p.heads, "model": p.model, "purpose": p.purpose, "settings": p.settings}
        for name, p in heads.presets().items()
    ]


def heat_of(folder: Path | None) -> dict[str, Any] | None:
    """Scores of single heads found by the search in a folder: its plain score and those by "L3H1"; None if none."""
    try:
        jobs = read(folder) if folder is not None else []
        model = _model(folder) if folder is not None else ""
    except OSError:
        return None
    first = [job for job in jobs if job.round == 0 and job.unit and job.steps is None and job.scores]
    plain = [job for job in jobs if job.unit is None and job.scores]
    if not first or not plain:
        return None
    scores = {f"L{job.unit[0]}H{job.unit[1]}": job.score for job in first if job.unit and job.score == job.score}
    return {"plain": plain[0].score, "scores": scores, "model": model}


def _model(folder: Path) -> str:
    """The model of a search, as its preset says; empty while it is not finished."""
    try:
        return str(json.loads((folder / "preset.json").read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
