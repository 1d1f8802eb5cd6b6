"""Commands about methods, embedded models and benches."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffguide.cli.drawing import check_writable, quiet
from diffguide.cli.terminal import print_json, tell
from diffguide.errors import ModelError, ParamError

NEEDS = {"needed": "needs a layout", "taken": "takes a layout"}


def methods(options: argparse.Namespace) -> None:
    from diffguide import describe
    from diffguide.processors import named

    rows = [describe.describe(named(options.name))] if options.name else describe.table()
    if options.json:
        print_json({"methods": rows})
        return
    for number, row in enumerate(rows):
        needs = f"; {NEEDS[row['layout']]}" if row["layout"] else ""
        paper = f" [{row['paper']}]" if row["paper"] else ""
        print(("\n" if number else "") + f"{row['name']}: {row['help']}{paper}{needs}")
        cells = [
            [f"  {p['name']}", p["type"], _text(p["default"], p["type"]), p["range"], p["help"]] for p in row["params"]
        ]
        for line in _columns(cells):
            print(line)


def families(options: argparse.Namespace) -> None:
    from diffguide import abilities
    from diffguide.registry import refused

    if options.page:
        changed = abilities.write(Path(options.page))
        tell(f"{options.page}: {'written' if changed else 'as it was'}")
        return
    rows = abilities.named(options.name) if options.name else abilities.table()
    lost = {} if options.name else dict(sorted(refused().items()))
    if options.json:
        print_json({"families": rows, "refused": lost})
        return
    for row in rows:
        can = [ability for ability, reason in row["abilities"].items() if not reason]
        print(f"{row['name']}: {', '.join(row['models'])}; {', '.join(row['kinds'])} attention; {', '.join(can)}")
        for ability, reason in row["abilities"].items():
            if reason:
                print(f"  no {ability}: {reason}")
    for model, reason in lost.items():
        print(f"refused: {model}: {reason}")


def _text(value: Any, kind: str) -> str:
    """A default as it would be written behind --set."""
    if isinstance(value, list):
        return (":" if kind == "start:stop" else ",").join(map(str, value)) or "()"
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of texts in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def zoo_list(options: argparse.Namespace) -> None:
    from diffguide import zoo

    rows = []
    for name in zoo.MODELS:
        folder = zoo.path(name) if name in zoo.names() else None
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20 if folder else 0.0
        rows.append({"name": name, "path": str(folder) if folder else None, "mib": round(size, 1)})
    if options.json:
        print_json({"models": rows})
        return
    for row in rows:
        print(f"{row['name']}: {row['mib']} MiB in {row['path']}" if row["path"] else f"{row['name']}: not trained yet")


def zoo_card(options: argparse.Namespace) -> None:
    from diffguide import zoo

    card = zoo.path(options.name) / "README.md"
    if not card.is_file():
        raise ModelError(f"{options.name} has no card: {card} is missing; install diffguide again")
    print(card.read_text(encoding="utf-8").rstrip())


def zoo_train(options: argparse.Namespace) -> None:
    import dataclasses
    import math
    import time

    from diffguide import zoo

    if options.name not in zoo.MODELS:
        raise ParamError(f"no embedded model is called {options.name!r} (known: {', '.join(zoo.MODELS)})")
    for name in ("steps", "workers", "minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ParamError(f"--{name} = {value} is not above 0")
    work = Path(options.work)
    check_writable(work / "plan.json")

    from diffguide.pipelines.source import usable
    from diffguide.zoo.denoisers import DENOISERS
    from diffguide.zoo.train import train

    usable(options.device)
    plan = dataclasses.replace(DENOISERS[options.name].plan, seed=options.seed)
    if options.steps is not None:
        plan = dataclasses.replace(plan, steps=options.steps)
    until = math.inf if options.minutes is None else time.time() + 60 * options.minutes
    start = Path(options.start_from) if options.start_from else None
    if start is not None and not (start / "model_index.json").is_file():
        raise ModelError(f"--start-from {start} is not the folder of a pipeline: it has no model_index.json")
    finished = train(work, plan, options.device, options.name, workers=options.workers, until=until, start=start)
    if finished is None:
        tell(f"stopped at a checkpoint in {work}; the same command carries on")
        return
    from diffguide.zoo.export import export

    export(work, name=options.name)
    tell(f"{options.name} is trained; it lies, with its card, in {work / options.name}")


def bench(options: argparse.Namespace) -> None:
    for name in ("limit", "seeds", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ParamError(f"--{name} = {value} is below 1")
    if options.json:
        check_writable(Path(options.json))
    if options.out:
        check_writable(Path(options.out) / "report.md")

    quiet(options.model)
    from diffguide import bench as benches

    if options.name not in benches.names():
        raise ParamError(f"no bench is called {options.name!r} (known: {', '.join(benches.names())})")
    benches.run_bench(
        options.name,
        model=options.model,
        methods=listed(options.methods) if options.methods else None,
        limit=options.limit,
        seeds=options.seeds,
        workers=options.workers,
        guidance_scale=options.guidance_scale,
        against=options.against,
        cases=options.case.split(",") if options.case else None,
        json=options.json,
        out=options.out,
        device=options.device,
        dtype=options.dtype,
    )


def listed(text: str) -> list[str]:
    """The methods of `--methods`, parted by commas; a setting may hold some: `bacon+sides=8,16,pag+layers=L1,L2`."""
    found: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        if found and "+" in found[-1] and re.match(r"\d|L\d", part):  # a number, a layer or a head
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found
