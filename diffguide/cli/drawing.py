"""Commands that draw: from options to a recipe, from a recipe to files."""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffguide.cli.terminal import print_json, tell
from diffguide.errors import OutputError, ParamError

if TYPE_CHECKING:
    from diffguide.layout import Layout
    from diffguide.pipelines.run import Picture
    from diffguide.recipe import Recipe


def generate(options: argparse.Namespace) -> None:
    words = bool(options.maps)
    _draw(recipe_of(options), Path(options.out), options, maps=options.maps, words=words)


def maps(options: argparse.Namespace) -> None:
    words = [w.strip() for w in options.words.split(",") if w.strip()] if options.words else True
    folder = Path(options.out)
    _draw(recipe_of(options), folder / "picture.png", options, maps=folder, words=words)


def run(options: argparse.Namespace) -> None:
    from diffguide.recipe import Recipe

    source = Path(options.recipe)
    recipe = Recipe.load(source)
    whole = source.suffix.lower() == ".json"
    given = {
        name: getattr(options, name) for name in ("model", "device", "dtype") if getattr(options, name) is not None
    }
    if given:
        recipe = Recipe.from_json(recipe.to_dict() | given)
    out = Path(options.out) if options.out else Path(f"{source.stem}-again.png")
    if out.exists() and source.exists() and out.samefile(source):
        raise OutputError(f"{out} is the recipe itself; name another file with --out")
    _draw(recipe, out, options, index=None if whole else recipe.index, maps=options.maps, words=bool(options.maps))


def plan(options: argparse.Namespace) -> None:
    if options.out:
        check_writable(Path(options.out))
    layout = planned(options.prompt, options.seed, options.aspect)
    if options.out:
        layout.save(options.out)
        print(options.out)
    else:
        print(layout.to_json())


def planned(prompt: str, seed: int, aspect: float) -> "Layout":
    """A layout from the prompt, and a line that tells of it."""
    from diffguide.planning import plan

    layout = plan(prompt, seed=seed, aspect=aspect)
    tell("planned: " + ", ".join(f"{len(r.instances)} x {r.phrase!r}" for r in layout.regions))
    return layout


def recipe_of(options: argparse.Namespace) -> "Recipe":
    """The recipe that the options of `generate` and `maps` describe."""
    from diffguide import describe, heads, zoo
    from diffguide.layout import Layout
    from diffguide.recipe import MethodSpec, Recipe

    layout = Layout.load(options.layout) if options.layout else None
    if options.plan is not None:
        layout = planned(options.prompt, options.plan, (options.width or 1) / (options.height or options.width or 1))
    given = [name.strip() for text in options.method or () for name in text.split(",")]
    names = [name for name in given or (["bacon"] if layout else []) if name != "none"]
    if len(set(names)) < len(names):
        raise ParamError(
            f"--method names {', '.join(n for n in dict.fromkeys(names) if names.count(n) > 1)} more than once"
        )
    params = describe.assignments(options.set, names)
    for name in (name for given in params.values() for name in heads.mentioned(str(given.get("heads", "")))):
        if (model := heads.load(name).model) != options.model:
            tell(f"note: @{name} was found for {model}; unless it is that, its heads mean nothing on {options.model}")
    made = [describe.make(name, params[name], layout) for name in names]
    if layout is not None and not any(hasattr(method, "layout") for method in made):
        tell(f"note: nothing uses the layout ({', '.join(names) or 'no method'})")
    for name in (name for name, method in zip(names, made, strict=True) if method.inert):
        tell(f"note: {name} changes nothing at these settings; diffguide methods {name} tells what each knob does")
    scale = options.guidance_scale
    if scale is None:
        scale = zoo.GUIDANCE_SCALE if options.model in zoo.MODELS else 7.5
    return Recipe(
        model=options.model,
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        layout=layout,
        methods=[MethodSpec(name=m.name(), params=describe.to_recipe_params(m)) for m in made],
        scheduler=options.scheduler,
        steps=options.steps,
        guidance_scale=scale,
        seed=options.seed,
        num_images=options.num_images,
        width=options.width,
        height=options.height,
        dtype=options.dtype,
        device=options.device,
    )


def _draw(
    recipe: "Recipe",
    out: Path,
    options: argparse.Namespace,
    *,
    index: int | None = None,
    maps: str | Path | None = None,
    words: bool | Sequence[str] = False,
) -> None:
    """Draw, write each picture as it is done, and tell what was written."""
    numbers = list(range(recipe.num_images)) if index is None else [index]
    paths = picture_paths(out, recipe.seed, numbers)
    for path in paths:
        check_writable(path)
    if maps is not None:
        check_writable(Path(maps) / "maps.npz")

    quiet(recipe.model)
    from diffguide.pipelines import pictures
    from diffguide.pipelines.run import draw, versions
    from diffguide.recipe import save_png

    here = versions()
    changed = [f"{k} {v}, here {here[k]}" for k, v in recipe.versions.items() if here.get(k, v) != v]
    if changed:
        tell(f"note: drawn with {'; '.join(changed)}: pixels may differ")
    told = []
    for path, picture in zip(paths, draw(recipe, index=index, capture_maps=words), strict=True):
        save_png(picture.image, path, picture.recipe)
        written: list[Path] = []
        if maps is not None:
            start = f"{picture.seed}-" if len(paths) > 1 else ""
            written = pictures.save_maps(picture.maps, picture.image, picture.recipe, Path(maps), start)
        told.append(_of_picture(path, picture, written))
        if not options.json:
            print(path, *written, sep="\n", flush=True)
        tell(
            f"{path}: seed {picture.seed}, {picture.seconds:.1f} s"
            + (f", {picture.report}" if picture.recipe.methods else "")
        )
    if options.json:
        print_json({"pictures": told, "recipe": recipe.to_dict()})


def _of_picture(path: Path, picture: "Picture", written: Iterable[Path]) -> dict[str, Any]:
    report = picture.report
    return {
        "path": str(path),
        "index": picture.recipe.index,
        "seed": picture.seed,
        "seconds": round(picture.seconds, 3),
        "report": {
            "words": {name: words[0] for name, words in report.words.items()},
            "forwards": report.forwards,
            "backwards": report.backwards,
            "seconds": round(report.seconds, 3),
            "peak_memory": round(report.peak_memory, 1),
            "steps": [{"step": s.step, "losses": s.losses, "skipped": s.skipped} for s in report.steps],
        },
        "maps": [str(p) for p in written],
    }


def picture_paths(out: Path, seed: int, numbers: Sequence[int]) -> list[Path]:
    """A file for each picture: `out` itself, `NAME-SEED.png` beside it for several, `SEED.png` where it is a folder."""
    if out.is_dir() or not out.suffix:
        return [out / f"{seed + n}.png" for n in numbers]
    if out.suffix.lower() != ".png":
        raise OutputError(f"cannot write {out}: only a .png keeps its recipe; name the file so")
    return [out] if len(numbers) == 1 else [out.with_name(f"{out.stem}-{seed + n}{out.suffix}") for n in numbers]


def check_writable(path: Path) -> None:
    """Make the folder of a file and see that it can be written; raises OutputError before any time is spent."""
    if path.parent.exists() and not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: {path.parent} is a file, not a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as fault:
        raise OutputError(f"cannot write {path}: {fault.strerror or fault}") from None
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")


def quiet(model: str) -> None:
    """Keep hints of the libraries off the terminal, and their bars of a moment; downloads keep theirs."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from diffguide import zoo

    if model in zoo.MODELS:
        few_threads()
    if model in zoo.MODELS or Path(model).is_dir():
        import diffusers.utils.logging
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def few_threads() -> None:
    """One thread for models so small that threads mostly wait for each other; OMP_NUM_THREADS says otherwise."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def demo(options: argparse.Namespace) -> None:
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise OutputError(f"cannot write {out}: only a .png keeps its recipe; name the file so")
    check_writable(out)

    quiet(options.model)
    from diffguide.pipelines.demo import run_demo
    from diffguide.recipe import save_png

    image, verdicts = run_demo(options.seed, options.model, options.device, options.steps)
    guided = verdicts[-1].picture.recipe
    save_png(image, out, guided)
    if options.json:
        print_json({"path": str(out), "verdicts": [v.to_dict() for v in verdicts], "recipe": guided.to_dict()})
        return
    print(f'"{guided.prompt}", seed {options.seed}; the detector, which does not know the prompt, says')
    for verdict in verdicts:
        title, *lines = verdict.lines
        print(f"\n{title} ({verdict.picture.seconds:.1f} s)")
        for line in lines:
            print(f"  {line}")
    here = "diffguide" if shutil.which("diffguide") else f"{os.path.relpath(sys.executable)} -m diffguide"
    print(f"\nwrote {out}. What to do next:")
    print(f"  {here} run {out} --out again.png      draw the guided picture again from the recipe in this file")
    print(f'  {here} maps "{guided.prompt}" --out maps      see where each word looks')
    print(f"  {here} methods      every method with every knob")
