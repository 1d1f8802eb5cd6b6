"""Where a model lies that somebody names. Nothing here imports torch, so that a wrong name is told at once."""

import re
from pathlib import Path

from diffguide import zoo
from diffguide.errors import ModelError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(model: str | Path) -> str:
    """The folder or hub id of a model; raises ModelError where it can be told at once that there is none."""
    text = str(model)
    if text in zoo.MODELS:
        return str(zoo.path(text))
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"{text} is not a pipeline of diffusers: it has no model_index.json; name the folder that holds one"
            )
        return str(folder)
    if folder.exists():
        raise ModelError(f"{text} is a file; expected a folder that DiffusionPipeline.save_pretrained has written")
    if isinstance(model, str) and HUB_ID.fullmatch(text) and not text.startswith("."):
        return text
    raise ModelError(
        f"no model is called {text!r}: expected an embedded model ({', '.join(zoo.MODELS)}), a folder, "
        "or a hub id owner/name"
    )
