"""The command line. Every command imports what it needs when it runs, so that help is shown at once."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffguide import __version__
from diffguide.errors import DiffguideError, ModelError, OutputError, ParamError

if TYPE_CHECKING:
    from diffguide.pipelines.run import Picture
    from diffguide.recipe import Recipe

WRONG, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 wrong input, 130 interrupted."""
    try:
        options = parser().parse_args(argv)
        return options.command(options) or 0
    except SystemExit as stop:  # argparse: help, version or an error that it has told
        return stop.code if isinstance(stop.code, int) else WRONG
    except DiffguideError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _fail("the device is out of memory; draw smaller pictures, use --dtype float16, or --device cpu")


def _fail(message: str) -> int:
    print(f"diffguide: error: {' '.join(message.split())}", file=sys.stderr)
    return WRONG


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see {self.prog} --help)")
        raise SystemExit(WRONG)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = _Parser(prog="diffguide", description="Steer attention in diffusers pipelines, without training anything.")
    top.add_argument("--version", action="version", version=f"diffguide {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Any, help: str, among: Any = commands) -> argparse.ArgumentParser:
        command = among.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(command=run)
        return command

    p = add("demo", demo, "draw one layout on the embedded model, unguided and guided, and let the detector judge")
    p.add_argument("--out", default="demo.png", metavar="FILE", help="the picture (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the noise, the same for both (default: %(default)s)")
    p.add_argument("--steps", type=int, default=30, help="denoising steps (default: %(default)s)")
    _where(p, dtype=False)
    _json(p)

    p = add("generate", generate, "draw pictures from a prompt, a layout and methods")
    _drawing(p)
    p.add_argument(
        "--out", default="picture.png", metavar="PATH", help="a .png, or a folder for SEED.png (default: %(default)s)"
    )
    p.add_argument("--maps", metavar="DIR", help="also write the map of every word into this folder")
    _json(p)

    p = add("maps", maps, "draw a picture and write where each word was looked at")
    _drawing(p)
    p.add_argument("--words", metavar="A,B", help="words or phrases of the prompt (default: every word)")
    p.add_argument(
        "--out", default="maps", metavar="DIR", help="folder of the overlays and arrays (default: %(default)s)"
    )
    _json(p)

    p = add("run", run, "draw again from a recipe.json, or from a picture that carries its recipe")
    p.add_argument("recipe", metavar="FILE", help="a recipe.json (all its pictures) or a .png (that picture)")
    p.add_argument(
        "--out", metavar="PATH", help="a .png, or a folder for SEED.png (default: NAME-again.png in this folder)"
    )
    p.add_argument("--maps", metavar="DIR", help="also write the map of every word into this folder")
    p.add_argument("--model", help="instead of the recipe's")
    _where(p, model=False, default=None)
    _json(p)

    p = add("methods", methods, "list the methods with their parameters")
    p.add_argument("name", nargs="?", metavar="NAME", help="only this one")
    _json(p)

    zoo = commands.add_parser(
        "zoo", help="list, train and describe the embedded models", description="The embedded models."
    )
    among = zoo.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _json(add("list", zoo_list, "list the embedded models", among))
    p = add("train", zoo_train, "train an embedded model from nothing, or carry on where that stopped", among)
    p.add_argument("name", metavar="NAME", help="such as shapes-unet")
    p.add_argument("--work", required=True, metavar="DIR", help="folder of the checkpoints and everything between")
    p.add_argument("--steps", type=int, help="steps of the denoiser (default: the model card's)")
    p.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes that share a batch, on a CPU one a core (default: %(default)s)",
    )
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--minutes", type=float, help="stop at a checkpoint after this long")
    p.add_argument(
        "--start-from", metavar="FOLDER", help="begin with the weights of this pipeline, keep its autoencoder"
    )
    p.add_argument("--seed", type=int, default=0, help="of data and weights (default: %(default)s)")
    p = add("card", zoo_card, "print the card of an embedded model", among)
    p.add_argument("name", nargs="?", default="shapes-unet", metavar="NAME", help="(default: %(default)s)")

    p = add("bench", bench, "measure methods against the plain pipeline")
    p.add_argument("name", metavar="NAME", help="which bench: layout")
    p.add_argument(
        "--methods", metavar="A,B", help="methods to compare, none for the plain run (default: the bench's own)"
    )
    p.add_argument("--limit", type=int, metavar="N", help="only the first N scenes")
    p.add_argument("--seeds", type=int, metavar="N", help="seeds of each scene")
    p.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    p.add_argument("--out", metavar="DIR", help="write a report with pictures into this folder")
    _where(p)

    _json(add("doctor", doctor, "show versions and devices, and what is missing for what"))
    return top


def _drawing(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", metavar="PROMPT")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to keep out")
    p.add_argument("--layout", metavar="FILE", help="a layout.json: phrases of the prompt and their boxes")
    p.add_argument(
        "--method", action="append", metavar="NAME", help="a method, or none; may be repeated (with --layout: bacon)"
    )
    p.add_argument(
        "--set", action="append", default=[], metavar="NAME.param=VALUE", help="a parameter; may be repeated"
    )
    p.add_argument("--steps", type=int, default=30, help="denoising steps (default: %(default)s)")
    p.add_argument("--guidance-scale", type=float, help="of classifier-free guidance (default: 4 embedded, else 7.5)")
    p.add_argument(
        "--seed", type=int, default=0, help="of the first picture; each next one adds 1 (default: %(default)s)"
    )
    p.add_argument("--num-images", type=int, default=1, metavar="N", help="how many pictures (default: %(default)s)")
    p.add_argument("--width", type=int, help="pixels, a multiple of 8 (default: the model's)")
    p.add_argument("--height", type=int, help="pixels, a multiple of 8 (default: the model's)")
    p.add_argument("--scheduler", metavar="NAME", help="such as ddim, euler, dpm++, unipc (default: the model's)")
    _where(p)


def _where(
    p: argparse.ArgumentParser, *, model: bool = True, dtype: bool = True, default: str | None = "shapes-unet"
) -> None:
    if model:
        p.add_argument("--model", default=default, help="embedded model, folder, or hub id (default: %(default)s)")
    p.add_argument("--device", help="such as cpu or cuda:0 (default: the best there is)")
    if dtype:
        choices = ("float32", "float16", "bfloat16")
        p.add_argument("--dtype", default="float32" if default else None, choices=choices, help="of the weights")


def _json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")


# --- drawing ---------------------------------------------------------------------------------------------------------


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


def recipe_of(options: argparse.Namespace) -> "Recipe":
    """The recipe that the options of `generate` and `maps` describe."""
    from diffguide import describe, zoo
    from diffguide.layout import Layout
    from diffguide.recipe import MethodSpec, Recipe

    layout = Layout.load(options.layout) if options.layout else None
    given = [name.strip() for text in options.method or () for name in text.split(",")]
    names = [name for name in given or (["bacon"] if layout else []) if name != "none"]
    if len(set(names)) < len(names):
        raise ParamError(
            f"--method names {', '.join(n for n in dict.fromkeys(names) if names.count(n) > 1)} more than once"
        )
    params = describe.assignments(options.set, names)
    made = [describe.make(name, params[name], layout) for name in names]
    if layout is not None and not any(hasattr(method, "layout") for method in made):
        _tell(f"note: nothing uses the layout ({', '.join(names) or 'no method'})")
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
        _tell(f"note: drawn with {'; '.join(changed)}: pixels may differ")
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
        _tell(
            f"{path}: seed {picture.seed}, {picture.seconds:.1f} s"
            + (f", {picture.report}" if picture.recipe.methods else "")
        )
    if options.json:
        _print_json({"pictures": told, "recipe": recipe.to_dict()})


def _of_picture(path: Path, picture: "Picture", written: Iterable[Path]) -> dict[str, Any]:
    report = picture.report
    return {
        "path": str(path),
        "index": picture.recipe.index,
        "seed": picture.seed,
        "seconds": round(picture.seconds, 3),
        "report": {
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

    if model in zoo.MODELS or Path(model).is_dir():
        import diffusers.utils.logging
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


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
        _print_json({"path": str(out), "verdicts": [v.to_dict() for v in verdicts], "recipe": guided.to_dict()})
        return
    print(f'"{guided.prompt}", seed {options.seed}; the detector, which does not know the prompt, says')
    for verdict in verdicts:
        title, *lines = verdict.lines
        print(f"\n{title} ({verdict.picture.seconds:.1f} s)")
        for line in lines:
            print(f"  {line}")
    print(f"\nwrote {out}. What to do next:")
    print(f"  diffguide run {out} --out again.png      draw the guided picture again from the recipe in this file")
    print(f'  diffguide maps "{guided.prompt}" --out maps      see where each word looks')
    print("  diffguide methods      every method with every knob")


# --- looking ---------------------------------------------------------------------------------------------------------


def methods(options: argparse.Namespace) -> None:
    from diffguide import describe
    from diffguide.processors import named

    rows = [describe.describe(named(options.name))] if options.name else describe.table()
    if options.json:
        _print_json({"methods": rows})
        return
    for number, row in enumerate(rows):
        needs = "; needs a layout" if row["layout"] else ""
        paper = f" [{row['paper']}]" if row["paper"] else ""
        print(("\n" if number else "") + f"{row['name']}: {row['help']}{paper}{needs}")
        cells = [
            [f"  {p['name']}", p["type"], _text(p["default"], p["type"]), p["range"], p["help"]] for p in row["params"]
        ]
        for line in _columns(cells):
            print(line)


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
        _print_json({"models": rows})
        return
    for row in rows:
        print(f"{row['name']}: {row['mib']} MiB in {row['path']}" if row["path"] else f"{row['name']}: not trained yet")


def zoo_card(options: argparse.Namespace) -> None:
    from diffguide import zoo
    from diffguide.errors import ModelError

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
    from diffguide.zoo.train import Plan, train

    usable(options.device)
    plan = Plan(seed=options.seed)
    if options.steps is not None:
        plan = dataclasses.replace(plan, steps=options.steps)
    until = math.inf if options.minutes is None else time.time() + 60 * options.minutes
    start = Path(options.start_from) if options.start_from else None
    if start is not None and not (start / "model_index.json").is_file():
        raise ModelError(f"--start-from {start} is not the folder of a pipeline: it has no model_index.json")
    finished = train(work, plan, options.device, workers=options.workers, until=until, start=start)
    if finished is None:
        _tell(f"stopped at a checkpoint in {work}; the same command carries on")
        return
    from diffguide.zoo.export import export

    export(work)
    _tell(f"{options.name} is trained; it lies, with its card, in {work / options.name}")


def bench(options: argparse.Namespace) -> None:
    for name in ("limit", "seeds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ParamError(f"--{name} = {value} is below 1")
    if options.json:
        check_writable(Path(options.json))
    if options.out:
        check_writable(Path(options.out) / "report.md")

    from diffguide import bench as benches

    if options.name not in benches.names():
        raise ParamError(f"no bench is called {options.name!r} (known: {', '.join(benches.names())})")
    benches.run_bench(
        options.name,
        model=options.model,
        methods=[m.strip() for m in options.methods.split(",")] if options.methods else None,
        limit=options.limit,
        seeds=options.seeds,
        json=options.json,
        out=options.out,
        device=options.device,
        dtype=options.dtype,
    )


# --- the machine -----------------------------------------------------------------------------------------------------

# what each extra of the package adds: module, and what does not work without it
EXTRAS = {
    "app": ("gradio", "the editor"),
    "metrics": ("open_clip", "CLIP scores"),
    "ray": ("ray", "sweeps over several machines"),
    "xformers": ("xformers", "xformers attention"),
    "natten": ("natten", "neighborhood attention kernels"),
    "mcp": ("mcp", "the editor as a tool server"),
    "dev": ("pytest", "tests and lint"),
}
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow", "pydantic", "tqdm")


def doctor(options: argparse.Namespace) -> int:
    """Look at the machine; returns 1 if a library that nothing works without is missing."""
    found = examine()
    if options.json:
        _print_json(found)
    else:
        print("versions: " + ", ".join(f"{k} {v or 'MISSING'}" for k, v in found["versions"].items()))
        for device in found["devices"]:
            print(f"device {device['name']}: {device['about']}; dtypes {', '.join(device['dtypes'])}")
        print("attention: " + ", ".join(found["attention"]))
        for extra in found["extras"]:
            state = (
                "there"
                if extra["there"]
                else f"not installed, needed for {extra['for']}: pip install 'diffguide[{extra['name']}]'"
            )
            print(f"extra {extra['name']}: {state}")
        for model, folder in found["models"].items():
            print(f"model {model}: {folder or f'not trained: diffguide zoo train {model} --work FOLDER'}")
    return int(any(v is None for v in found["versions"].values()))


def examine() -> dict[str, Any]:
    """Versions, devices, attention backends, extras and embedded models, as plain JSON values."""
    import importlib.metadata
    import importlib.util
    import platform

    from diffguide import zoo

    versions: dict[str, str | None] = {"diffguide": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    there = {name: importlib.util.find_spec(module) is not None for name, (module, _) in EXTRAS.items()}
    return {
        "versions": versions,
        "devices": _devices() if versions["torch"] else [],
        "attention": _attention() if versions["torch"] else [],
        "extras": [{"name": name, "there": there[name], "for": use} for name, (_, use) in EXTRAS.items()],
        "models": {name: str(zoo.path(name)) if name in zoo.names() else None for name in zoo.MODELS},
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    rows = [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used")]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        kind = f"compute capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{number}", f"{about.name}, {kind}"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "Apple GPU"))
    return [{"name": name, "about": about, "dtypes": _dtypes(name)} for name, about in rows]


def _dtypes(device: str) -> list[str]:
    """The dtypes in which a convolution and attention, which everything here is made of, run on a device."""
    import torch
    import torch.nn.functional as F

    works = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        try:
            x = torch.zeros(1, 1, 8, 8, device=device, dtype=dtype)
            F.scaled_dot_product_attention(F.conv2d(x, x[..., :3, :3], padding=1), x, x)
            works.append(str(dtype).removeprefix("torch."))
        except RuntimeError:
            continue
    return works


def _attention() -> list[str]:
    """Torch's own routes of attention, and packages that diffusers can use where nothing is steered."""
    import importlib.util

    import torch

    routes = {
        "math": torch.backends.cuda.math_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.cuda.is_available() and torch.backends.cuda.cudnn_sdp_enabled(),
    }
    names = [f"torch {name}" for name, on in routes.items() if on]
    return names + [m for m in ("flash_attn", "sageattention", "xformers") if importlib.util.find_spec(m) is not None]


# --- telling ---------------------------------------------------------------------------------------------------------


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    """NaN and infinities are no JSON: null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not -sys.float_info.max <= value <= sys.float_info.max else value
