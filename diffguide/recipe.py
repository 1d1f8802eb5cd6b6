"""How a picture was made, kept beside it or inside its PNG, so that it can be reopened, drawn again and shared."""

import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    ValidationError,
    model_validator,
)

from diffguide.errors import LayoutError, OutputError, RecipeError
from diffguide.files import TEXT_LIMIT, check_version, explain, is_text, read_text, write_atomically
from diffguide.layout import Layout

__all__ = ["MethodSpec", "Recipe", "save_json", "save_png", "write_atomically"]

VERSION = 1
KEY = "diffguide"  # of the PNG's text
PIXELS = 8192 * 8192  # of a picture whose text is looked for
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _version(value: Any) -> Any:
    check_version(value, VERSION)
    return value


def _layout(value: Any) -> Layout:
    if isinstance(value, Layout):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with version and regions, got {value!r:.60}")
    try:
        return Layout.from_json(value)
    except LayoutError as fault:
        raise ValueError(str(fault)) from None


def _param(value: Any) -> Any:
    """What JSON can hold at one level; tuples become lists, so that a recipe equals itself read back."""
    if isinstance(value, list | tuple) and len(value) <= 4096 and not any(isinstance(v, list | tuple) for v in value):
        return [_param(v) for v in value]
    number = isinstance(value, bool | int | float) and -(2**63) <= value < 2**63
    if value is None or number or is_text(value, 10_000):
        return value
    raise ValueError(f"expected a finite number, a text, true, false, null or a flat list of these, got {value!r:.60}")


def _installed() -> str:
    try:
        return importlib.metadata.version("diffguide")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Prompt = Annotated[str, StringConstraints(max_length=10_000)]
Side = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]  # pixels
Param = Annotated[Any, PlainValidator(_param)]


class MethodSpec(BaseModel):
    """A method by name, with the parameters that were set; what is not set has the method's default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    params: Annotated[dict[Name, Param], Field(max_length=100)] = {}


class Recipe(BaseModel):
    """All that is needed to draw a picture again. Unknown fields are refused, at making and at reading.

    width, height: pixels, multiples of 8; None is the model's own size. device: None is the best one there is.
    index: which picture of the batch this is, 0 to num_images - 1. versions: of the libraries it was drawn with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Annotated[Literal[1], BeforeValidator(_version)] = VERSION
    diffguide: Name = Field(default_factory=_installed)
    model: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    prompt: Prompt
    negative_prompt: Prompt | None = None
    layout: Annotated[Layout, PlainValidator(_layout), PlainSerializer(Layout.to_dict)] | None = None
    methods: Annotated[tuple[MethodSpec, ...], Field(max_length=16, strict=False)] = ()
    scheduler: Name | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] = 30
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 7.5
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_images: Annotated[int, Field(ge=1, le=64)] = 1
    width: Side | None = None
    height: Side | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,20}(:[0-9]{1,3})?$")] | None = None
    index: Annotated[int, Field(ge=0)] = 0
    versions: Annotated[dict[Name, Name], Field(max_length=100)] = {}

    def __init__(self, /, **fields: Any):
        try:
            super().__init__(**fields)
        except ValidationError as fault:
            raise RecipeError(explain(fault)) from None

    @model_validator(mode="after")
    def _in_the_batch(self) -> Self:
        if self.index >= self.num_images:
            raise ValueError(f"index: {self.index} is not below num_images = {self.num_images}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """The text `from_json` reads; RecipeError above 16 MiB."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        if (size := len(text.encode())) > TEXT_LIMIT:
            raise RecipeError(f"takes {size / 2**20:.1f} MiB, at most {TEXT_LIMIT >> 20} fit; use smaller masks")
        return text

    @classmethod
    def from_json(cls, source: str | dict[str, Any]) -> Self:
        """The recipe in a JSON text or its dict; RecipeError names the field that is wrong."""
        try:
            data = json.loads(source) if isinstance(source, str) else source
        except (ValueError, RecursionError) as fault:
            raise RecipeError(f"not JSON: {fault}"[:200]) from None
        if not isinstance(data, dict):
            raise RecipeError(f"expected an object with model, prompt and more, got {data!r:.60}")
        if "regions" in data and "prompt" not in data:
            raise RecipeError("this is a layout, not a recipe: draw it by diffguide generate PROMPT --layout FILE")
        if "version" not in data:
            raise RecipeError(f'version: missing; write "version": {VERSION}')
        return cls(**{str(name): value for name, value in data.items()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The recipe in a JSON file of at most 16 MiB, or in a PNG that `save_png` wrote."""
        try:
            with open(path, "rb") as file:
                head = file.read(len(SIGNATURE))
        except (OSError, ValueError):
            head = b""  # read_text says why
        if head.startswith((b"\xff\xd8", b"RIFF", b"GIF8")):
            raise RecipeError(f"{path}: this picture is no PNG; only a PNG carries a recipe")
        if Path(path).suffix.lower() == ".png" and head != SIGNATURE and Path(path).is_file():
            raise RecipeError(f"{path}: not a PNG, whatever its name says")
        text = _text_of(Path(path)) if head == SIGNATURE else read_text(path, RecipeError)
        try:
            return cls.from_json(text)
        except RecipeError as fault:
            raise RecipeError(f"{path}: {fault}") from None


def _text_of(path: Path) -> str:
    """The recipe's text in a PNG; pixels are decoded only where other programs moved the text behind them."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=["PNG"]) as picture:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            if KEY not in picture.info:
                if picture.width * picture.height > PIXELS:
                    raise RecipeError(f"{path}: {picture.width} x {picture.height} pixels are too many to search")
                picture.load()
            text = picture.info.get(KEY)
    except UnidentifiedImageError:
        raise RecipeError(f"{path}: not a sound PNG: it ends too early or is damaged") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise RecipeError(f"{path}: not a sound PNG: {fault}"[:300]) from None
    if text is None:
        raise RecipeError(f"{path}: this PNG carries no recipe; `diffguide generate` writes one into its pictures")
    if len(text) > TEXT_LIMIT:
        raise RecipeError(f"{path}: its recipe is larger than {TEXT_LIMIT >> 20} MiB")
    return str(text)


def save_png(image: Image.Image, path: str | Path, recipe: Recipe) -> None:
    """Write a picture with its recipe inside (iTXt, key "diffguide"), whole or not at all."""
    if Path(path).suffix.lower() != ".png":
        raise OutputError(f"cannot write {path}: only a .png keeps its recipe; name the file so")
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt(KEY, recipe.to_json())
    write_atomically(path, lambda file: image.save(file, format="PNG", pnginfo=notes))


def save_json(path: str | Path, recipe: Recipe) -> None:
    """Write a recipe's JSON file, whole or not at all."""
    text = recipe.to_json()
    write_atomically(path, lambda file: file.write(text.encode()))
