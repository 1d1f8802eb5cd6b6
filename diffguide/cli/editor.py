"""The command that serves the editor."""

import argparse
import importlib.util
import os
from pathlib import Path

from diffguide import zoo
from diffguide.cli.drawing import quiet
from diffguide.cli.terminal import tell
from diffguide.errors import ModelError

SEARCH = "heads"  # where `heads search` puts what it finds


def app(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ModelError("the editor needs Gradio: pip install 'diffguide[app]'")
    models = options.model or zoo.names()
    if not models:
        raise ModelError("no embedded model is in this installation; name one with --model")
    if all(model in zoo.MODELS or Path(model).is_dir() for model in models):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be looked up
    from diffguide.app import safety

    heads = options.heads or (SEARCH if (Path(SEARCH) / "trials.jsonl").is_file() else None)
    auth = [*(options.auth or ()), *filter(None, [os.environ.get("DIFFGUIDE_AUTH")])]
    # `serve` asks as well, but after its libraries, which take a while
    safety.admit(options.host, options.port, auth, options.no_auth, options.output_dir)
    quiet(models[0])
    from diffguide.app import serve

    tell(f"serving {', '.join(models)}; pictures go to {options.output_dir}; Ctrl+C ends it")
    serve(
        models,
        host=options.host,
        port=options.port,
        auth=auth,
        anyone=options.no_auth,
        output=options.output_dir,
        heads=heads,
        device=options.device,
        dtype=options.dtype,
        browser=options.open,
        mcp=options.mcp,
    )


def serving(p: argparse.ArgumentParser) -> None:
    """The options of `app`, without device and dtype."""
    p.add_argument(
        "--model",
        action="append",
        help="embedded model, folder, or hub id; may be repeated (default: every embedded one)",
    )
    p.add_argument("--host", default="127.0.0.1", help="address to serve at (default: %(default)s, this machine alone)")
    p.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    p.add_argument(
        "--auth",
        action="append",
        metavar="NAME:PASSWORD",
        help="ask for it; may be repeated (default: $DIFFGUIDE_AUTH, which other users of this machine cannot see)",
    )
    p.add_argument("--no-auth", action="store_true", help="let in everyone who reaches --host")
    p.add_argument(
        "--output-dir",
        default="outputs/editor",
        metavar="DIR",
        help="of the pictures, and nothing else (default: %(default)s)",
    )
    p.add_argument(
        "--heads", metavar="DIR", help="of a heads search, whose heat map is shown (default: heads, where it is one)"
    )
    p.add_argument("--open", action="store_true", help="open the page in the browser")
    p.add_argument("--mcp", action="store_true", help="also serve the functions as tools for language models")
