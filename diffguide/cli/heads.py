"""Commands about heads: search them, look at what was found, draw with it."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from diffguide.cli.drawing import check_writable, quiet
from diffguide.cli.terminal import print_json, tell
from diffguide.errors import ParamError

if TYPE_CHECKING:
    from diffguide.search import Fleet

PROMPTS = 5  # of the embedded world, unless others are given


def heads_search(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from diffguide.heads import Preset
    from diffguide.search import Hunt, hunt, named
    from diffguide.search.heatmap import heatmap
    from diffguide.search.report import report

    named(options.objective)
    folder = Path(options.out)
    settings = {name: getattr(options, name) for name in ("scale", "blend", "target", "scope")}
    plan = Hunt(
        prompts=tuple(prompts(options)),
        objective=options.objective,
        rounds=options.rounds,
        keep=options.keep,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        layers=options.layers,
        screen_steps=options.screen_steps,
        screen_keep=options.screen_keep,
        **settings,
    )
    ray = fleet(options)
    check_writable(folder / "search.json")
    quiet(options.model)
    from diffguide.pipelines.source import load

    model = Path(options.model).expanduser()
    # workers stand in other folders
    source = partial(load, str(model.resolve() if model.is_dir() else options.model), options.dtype, options.device)
    pipe = source if ray else source()
    with tqdm(unit="trial", disable=None) as bar:

        def said(text: str, done: int, of: int) -> None:
            if bar.total is None:
                bar.initial = bar.n = done  # trials of an earlier run say nothing about the pace of this one
            bar.total = of
            bar.set_description(text)
            bar.update(done - bar.n)

        found = hunt(pipe, plan, folder=folder, tell=said, ray=ray)
    how = (
        f"diffguide heads search, {options.objective}, {len(plan.prompts)} prompts, {plan.rounds} x {plan.keep}, "
        f"layers {plan.layers}, {plan.steps} steps, guidance {plan.guidance_scale:g}: plain {found.plain:.4g}, "
        f"the best trial {max(found.best):.4g}{'' if max(found.best) > found.plain else ', which is no find'}"
    )
    preset = Preset(found.text, options.model, options.objective, how, settings)
    preset.save(folder / "preset.json")
    heatmap(found.rounds[0], found.plain, found.heads).save(folder / "heads.png", optimize=True)
    (folder / "report.md").write_text(report(plan, found), encoding="utf-8")
    if options.json:
        rounds = [{f"L{a}H{b}": v for (a, b), v in each.items()} for each in found.rounds]
        told = {"heads": found.text, "plain": found.plain, "best": found.best, "rounds": rounds}
        print_json(told | {"screens": found.screened})
        return
    for text in found.screened:
        tell(text)
    tell(f"{options.objective}: plain {found.plain:.4g}, the best trial {max(found.best):.4g}")
    if not max(found.best) > found.plain:
        tell(f"note: nothing tried is above the plain pictures; {found.text} is the least bad of it, and no find")
    print(found.text)
    for name in ("preset.json", "heads.png", "report.md"):
        print(folder / name)


def fleet(options: argparse.Namespace) -> "Fleet | None":
    """The workers that were asked for on the command line; None where the search is to stay in this process."""
    from diffguide.search import Fleet

    if not options.ray and options.ray_address is None:
        if options.workers is not None:
            raise ParamError("--workers is of --ray; add it")
        return None
    kind, _, number = (options.device or "").partition(":")
    if number:
        raise ParamError(f"--device {options.device}: each worker has a device of its own; say {kind}")
    return Fleet(options.workers, options.ray_address, gpu=kind == "cuda" if kind else None)


def prompts(options: argparse.Namespace) -> list[str]:
    """Those given on the command line or in a file; else some of the embedded world, for an embedded model."""
    from diffguide import zoo
    from diffguide.files import read_text

    given: list[str] = [*(options.prompt or ())]
    if options.prompts:
        given += [line.strip() for line in read_text(options.prompts, ParamError).splitlines() if line.strip()]
    if given and options.pictures is not None:
        raise ParamError("--pictures is of the embedded world's prompts; leave it out beside --prompt and --prompts")
    if given:
        return given
    if options.model not in zoo.MODELS:
        raise ParamError("give prompts to judge heads by: --prompt TEXT, or --prompts FILE with a line for each")
    from random import Random

    from diffguide.zoo.world import caption, sample_scene

    count = PROMPTS if options.pictures is None else options.pictures
    if count < 1:
        raise ParamError(f"--pictures {count}: give 1 or more")
    lot = Random("heads")
    return [caption(sample_scene(lot, styled=0.0)) for _ in range(count)]


def heads_show(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from diffguide import zoo
    from diffguide.heads import load, presets

    if options.name is None:
        found = dict(sorted(presets().items(), key=lambda item: item[1].model not in zoo.MODELS))  # ours first
    else:
        found = {options.name: load(_source(options.name))}
    if options.json:
        print_json({"presets": [{"name": name, **asdict(preset)} for name, preset in found.items()]})
        return
    for name, preset in found.items():
        settings = ", ".join(f"{key} {value}" for key, value in preset.settings.items())
        print(f"{name}: {preset.purpose}; {preset.heads}; for {preset.model}" + (f"; {settings}" if settings else ""))
        print(f"  {preset.source}")


def _source(name: str) -> str:
    """What `load` takes for the folder of a search, a file, or a preset, which SoftPAG writes with an @."""
    if not Path(name).is_dir():
        return name.removeprefix("@")
    file = Path(name) / "preset.json"
    if not file.is_file():
        raise ParamError(
            f"{name} holds no preset.json: `diffguide heads search --out {name}` writes one when it is done"
        )
    return str(file)


def heads_use(options: argparse.Namespace) -> None:
    from diffguide.cli.drawing import generate
    from diffguide.heads import load

    source = _source(options.name)
    preset = load(source)
    if options.model is None:
        options.model = preset.model
    given = {text.partition("=")[0].strip() for text in options.set}
    own = {"heads": f"@{source}", **preset.settings}
    options.set = [*options.set, *(f"soft-pag.{k}={v}" for k, v in own.items() if f"soft-pag.{k}" not in given)]
    options.method = [*(options.method or ()), "soft-pag"]
    generate(options)
