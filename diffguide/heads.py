"""Sets of heads that somebody found: a JSON file each, with what they were found for, on which model, and how.

Those that come with diffguide lie in the folder `presets`. `SoftPAG(heads="@NAME")` takes one by name, `"@FILE.json"`
from a file.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffguide.errors import ParamError
from diffguide.files import check_version, read_text, write_atomically

FOLDER = Path(__file__).parent / "presets"
VERSION = 1
UNITS = re.compile(r"L\d+H\d+(,L\d+H\d+)*")


@dataclass(frozen=True)
class Preset:
    """A set of heads.

    Attributes:
        heads: as SoftPAG takes them, "L11H15,L13H17".
        model: the model they belong to; on another one they mean nothing.
        purpose: what they do.
        source: where they are from: a paper and its figure, or the search that found them.
        settings: of SoftPAG, those they were found or shown with.
    """

    heads: str
    model: str
    purpose: str
    source: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("heads", "model", "purpose", "source"):
            if not isinstance(getattr(self, name), str):
                raise ParamError(f"{name}: expected a text, got {getattr(self, name)!r:.60}")
        if not UNITS.fullmatch(self.heads):
            raise ParamError(f"heads: {self.heads!r:.60} is not of the form L11H15,L13H17")
        if not isinstance(self.settings, dict):
            raise ParamError(f"settings: expected an object, got {self.settings!r:.60}")

    def save(self, path: str | Path) -> None:
        """Write the JSON file that `load` reads."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))


def presets() -> dict[str, Preset]:
    """Those that come with diffguide, by name."""
    return {file.stem: load(file) for file in sorted(FOLDER.glob("*.json"))}


def mentioned(text: str) -> list[str]:
    """The presets that a text of heads names, "L3,@dark" for example: without their @."""
    return [part.strip()[1:] for part in text.split(",") if part.strip().startswith("@")]


def load(source: str | Path) -> Preset:
    """The preset of this name, or in this `.json` file.

    Raises:
        ParamError: there is none of this name, or the file is not a preset.
    """
    path = Path(source)
    if path.suffix != ".json":
        path = FOLDER / f"{source}.json"
        if not re.fullmatch(r"[\w.-]+", str(source)) or not path.exists():
            known = ", ".join(file.stem for file in sorted(FOLDER.glob("*.json")))
            raise ParamError(f"no preset of heads is called {str(source)!r:.60} (known: {known}); a file ends in .json")
    try:
        data = json.loads(read_text(path, ParamError))
        if not isinstance(data, dict):
            raise ParamError("expected an object")
        check_version(data.pop("version", None), VERSION)
        return Preset(**data)
    except (ValueError, TypeError, ParamError) as error:
        text = str(error).removeprefix("Preset.__init__() ")
        raise ParamError(text if str(path) in text else f"{path} is no preset of heads: {text}") from None
