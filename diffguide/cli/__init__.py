"""The command line. Every command imports what it needs when it runs, so that help is shown at once."""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from diffguide import __version__, zoo
from diffguide import bench as benches
from diffguide.cli.drawing import check_writable, demo, generate, maps, picture_paths, plan, quiet, recipe_of, run
from diffguide.cli.editor import app, serving
from diffguide.cli.heads import heads_search, heads_show, heads_use
from diffguide.cli.looking import bench, families, methods, zoo_card, zoo_list, zoo_train
from diffguide.cli.machine import EXTRAS, LIBRARIES, doctor, examine
from diffguide.errors import DiffguideError
from diffguide.zoo.place import locate

__all__ = [
    "EXTRAS",
    "LIBRARIES",
    "app",
    "bench",
    "check_writable",
    "demo",
    "doctor",
    "examine",
    "families",
    "generate",
    "heads_search",
    "heads_show",
    "heads_use",
    "main",
    "maps",
    "methods",
    "parser",
    "picture_paths",
    "plan",
    "quiet",
    "recipe_of",
    "run",
    "zoo_card",
    "zoo_list",
    "zoo_train",
]

WRONG, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 wrong input, 130 interrupted."""
    try:
        options = parser().parse_args(argv)
        named = getattr(options, "model", None) or ()
        for model in (named,) if isinstance(named, str) else named:
            if model not in zoo.MODELS:
                locate(model)  # a wrong name is told before the libraries are loaded, which takes a while
        return options.command(options) or 0
    except SystemExit as stop:  # argparse: help, version or an error that it has told
        return stop.code if isinstance(stop.code, int) else WRONG
    except DiffguideError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("diffguide: interrupted; what was finished is kept", file=sys.stderr)
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


@functools.cache
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

    p = add("plan", plan, "make a layout from a prompt alone: a box for each thing it counts, on the side it says")
    p.add_argument("prompt", metavar="PROMPT")
    p.add_argument("--seed", type=int, default=0, help="another arrangement for each number (default: %(default)s)")
    p.add_argument("--aspect", type=float, default=1.0, help="width of the picture over its height (default: 1)")
    p.add_argument("--out", metavar="FILE", help="write the layout.json there (default: print it)")

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

    p = add("families", families, "list the kinds of models, what can be done with each, and what is refused")
    p.add_argument("name", nargs="?", metavar="NAME", help="only this one, or the class of a denoiser")
    p.add_argument("--page", metavar="FILE", help="write the table between its marks in this page of Markdown")
    _json(p)

    heads = commands.add_parser(
        "heads", help="search the heads that matter, show and use what was found", description="Attention heads."
    )
    _heads(heads.add_subparsers(title="commands", metavar="COMMAND", required=True), add)

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

    p = add("app", app, "open the editor in a browser: draw a layout, steer, look at maps, take the recipe home")
    serving(p)
    _where(p, model=False)

    p = add("bench", bench, "measure methods against the plain pipeline")
    p.add_argument("name", metavar="NAME", help=f"which bench: {', '.join(benches.names())}")
    p.add_argument(
        "--methods", metavar="A,B", help="methods to compare, none for the plain run (default: the bench's own)"
    )
    p.add_argument(
        "--against", metavar="A", help="the one of them that gains are told against (default: the plain run)"
    )
    p.add_argument("--limit", type=int, metavar="N", help="only the first N scenes")
    p.add_argument("--seeds", type=int, metavar="N", help="seeds of each scene")
    p.add_argument(
        "--workers", type=int, metavar="N", help="processes of one thread that share the batches, on a CPU one a core"
    )
    p.add_argument(
        "--guidance-scale", type=float, metavar="G", help="of classifier-free guidance, 1 is none (default: 4)"
    )
    p.add_argument("--case", metavar="A,B", help="which calls of attention (attention)")
    p.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    p.add_argument("--out", metavar="DIR", help="write a report with pictures into this folder")
    _where(p)

    _json(add("doctor", doctor, "show versions and devices, and what is missing for what"))
    return top


def _heads(among: Any, add: Any) -> None:
    p = add("search", heads_search, "find the heads whose perturbation raises an objective most", among)
    p.add_argument(
        "--objective",
        default="sharpness",
        metavar="NAME",
        help="what is raised: a name, style:night, clip:FOLDER, ... (default: %(default)s)",
    )
    p.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt to judge by; may be repeated")
    p.add_argument("--prompts", metavar="FILE", help="a file with a prompt a line (default: of the embedded world)")
    p.add_argument("--pictures", type=int, metavar="N", help="so many prompts of the embedded world (default: 5)")
    p.add_argument("--rounds", type=int, default=1, help="how often the best are chosen (default: %(default)s)")
    p.add_argument("--keep", type=int, default=3, help="how many at a time (default: %(default)s)")
    p.add_argument("--layers", default="all", help="heads of these layers alone: down, mid, up, names (default: all)")
    p.add_argument("--scale", type=float, default=3.0, help="guidance strength w (default: %(default)s)")
    p.add_argument("--blend", type=float, default=1.0, help="u, the part of the map replaced (default: %(default)s)")
    p.add_argument("--target", default="identity", help="what maps are blended with (default: %(default)s)")
    p.add_argument("--scope", default="joint", help="of joint attention (default: %(default)s)")
    p.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    p.add_argument("--guidance-scale", type=float, default=1.0, help="1 is no classifier-free guidance (default: 1)")
    p.add_argument(
        "--screen-steps",
        type=numbers,
        default=(),
        metavar="N,M",
        help="screen heads with fewer steps first, once or in stages; the best may be lost (default: no screen)",
    )
    p.add_argument(
        "--screen-keep",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of the heads a screen lets through; 1 drops none, and tells what less would lose (default: %(default)s)",
    )
    p.add_argument("--ray", action="store_true", help="share the trials among Ray workers, each with its own pipeline")
    p.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a running cluster, such as auto (default: one on this machine)"
    )
    p.add_argument("--workers", type=int, metavar="N", help="of --ray (default: one on each GPU, else one)")
    p.add_argument(
        "--out",
        default="heads",
        metavar="DIR",
        help="its folder; the same command goes on there (default: %(default)s)",
    )
    _where(p)
    _json(p)
    p = add("show", heads_show, "show presets of heads, or what a search found", among)
    p.add_argument(
        "name", nargs="?", metavar="NAME", help="a preset, a .json file, or a search's folder (default: all)"
    )
    _json(p)
    p = add("use", heads_use, "draw with a preset of heads: generate with soft-pag and its settings", among)
    p.add_argument("name", metavar="NAME", help="a preset, its .json file, or a search's folder")
    _drawing(p, whose="the preset's own")
    p.add_argument(
        "--out", default="picture.png", metavar="PATH", help="a .png, or a folder for SEED.png (default: %(default)s)"
    )
    p.add_argument("--maps", metavar="DIR", help="also write the map of every word into this folder")
    _json(p)


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    return tuple(int(part) for part in text.split(","))


def _drawing(p: argparse.ArgumentParser, whose: str | None = None) -> None:
    p.add_argument("prompt", metavar="PROMPT")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to keep out")
    given = p.add_mutually_exclusive_group()
    given.add_argument("--layout", metavar="FILE", help="a layout.json: phrases of the prompt and their boxes")
    given.add_argument(
        "--plan",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="a layout from the prompt itself, its N-th arrangement",
    )
    p.add_argument(
        "--method", action="append", metavar="NAME", help="a method, or none; may be repeated (with a layout: bacon)"
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
    _where(p, whose=whose)


def _where(
    p: argparse.ArgumentParser,
    *,
    model: bool = True,
    dtype: bool = True,
    default: str | None = "shapes-unet",
    whose: str | None = None,  # model is the default
) -> None:
    if model:
        told = f"embedded model, folder, or hub id (default: {whose or default})"
        p.add_argument("--model", default=None if whose else default, help=told)
    p.add_argument("--device", help="such as cpu or cuda:0 (default: the best there is)")
    if dtype:
        choices = ("float32", "float16", "bfloat16")
        p.add_argument("--dtype", default="float32" if default else None, choices=choices, help="of the weights")


def _json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
