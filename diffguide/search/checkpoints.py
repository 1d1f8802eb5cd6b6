"""Scores by models that lie in a folder: CLIP, preferences and aesthetics. Safetensors only, and nothing is fetched.

The folder of `clip`, `hps` and `pickscore` is what `CLIPModel.save_pretrained` writes beside tokenizer and image
processor, or, with `open_clip_config.json`, what open_clip keeps. It is looked at when the objective is named; the
weights are read when the first picture is scored, on the best device there is.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from diffguide.errors import ModelError
from diffguide.files import read_text
from diffguide.pipelines.source import usable

OPEN_CLIP = "open_clip_config.json"
WEIGHTS = "model.safetensors"
LAYER = re.compile(r"(?:predictor|layers\.(\d+))\.weight")  # of the aesthetic predictors


def clip(folder: str) -> "Likeness":
    """Cosine of the picture and "A photo depicts PROMPT", -1 to 1.

    CLIPScore of J. Hessel et al., EMNLP 2021, arXiv 2104.08718, without its factor of 2.5 and its end at 0.
    """
    return Likeness(folder, before="A photo depicts ")


def hps(folder: str) -> "Likeness":
    """Cosine of picture and prompt, -1 to 1, as HPS v2 scores: X. Wu et al. 2023, arXiv 2306.09341."""
    return Likeness(folder)


def pickscore(folder: str) -> "Likeness":
    """Cosine of picture and prompt times the model's scale, as PickScore: Y. Kirstain et al. 2023, arXiv 2305.01569."""
    return Likeness(folder, scaled=True)


def aesthetic(folder: str) -> "Aesthetic":
    """What a LAION aesthetic predictor makes of the picture, about 1 to 10; the prompt is not looked at."""
    return Aesthetic(folder)


class Likeness:
    """How near pictures and their prompts are in CLIP's space.

    Raises ModelError where the folder is not there or does not hold such a model.
    """

    def __init__(self, folder: str, *, before: str = "", scaled: bool = False) -> None:
        self.folder, self.before, self.scaled = _folder(folder), before, scaled
        self.open = (self.folder / OPEN_CLIP).is_file()
        if self.open:
            _one_of(self.folder, "open_clip_model.safetensors", WEIGHTS)
            _open_clip()
        else:
            _check(self.folder, "clip", "a CLIPModel")

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """A score for each picture [B] and its prompt."""
        texts = [self.before + prompt for prompt in prompts]
        with torch.inference_mode():
            image, text, scale = self._embed([picture.convert("RGB") for picture in pictures], texts)
        cosines = (_unit(image) * _unit(text)).sum(1)
        return (cosines * scale if self.scaled else cosines).tolist()

    @cached_property
    def _embed(self) -> Callable[[list[Image.Image], list[str]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Pictures and texts -> [B, C], [B, C] and the scale of the logits, float64 on the CPU."""
        return _with_open_clip(self.folder) if self.open else _with_transformers(self.folder)

    def __reduce__(self) -> Any:
        """Without the weights: a worker reads its own."""
        return _likeness, (str(self.folder), self.before, self.scaled)


class Aesthetic:
    """C. Schuhmann's aesthetic predictors, linear maps after the image tower of a CLIP.

    The folder is that of a `CLIPVisionModelWithProjection` whose safetensors also hold `predictor.weight` and `.bias`
    (version 1) or `layers.N.weight` and `.bias` (version 2, nothing between its maps), as public conversions do.

    Raises ModelError where the folder is not there or does not hold such a model.
    """

    def __init__(self, folder: str) -> None:
        self.folder = _folder(folder)
        _check(self.folder, "clip_vision_model", "an aesthetic predictor")

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """A score for each picture [B]."""
        tower, head, prepare = self._parts
        with torch.inference_mode():
            embedded = tower(prepare([picture.convert("RGB") for picture in pictures])).image_embeds
            return head(nn.functional.normalize(embedded.float(), dim=1))[:, 0].tolist()

    @cached_property
    def _parts(self) -> tuple[Any, nn.Module, Callable[[list[Image.Image]], torch.Tensor]]:
        from transformers import CLIPVisionModelWithProjection

        try:
            weights = load_file(self.folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.folder, error) from None
        found = sorted((int(m[1] or 0), m[0]) for m in map(LAYER.fullmatch, weights) if m)
        if not found:
            raise ModelError(
                f"{self.folder} holds no aesthetic predictor: neither predictor.weight nor layers.0.weight"
            )
        head = nn.Sequential()
        for _, name in found:
            weight, bias = weights[name].float(), weights[name.removesuffix("weight") + "bias"].float()
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            head.append(layer)
        tower = _load(CLIPVisionModelWithProjection, self.folder)
        return tower, head.to(tower.device), _preparation(self.folder, tower)

    def __reduce__(self) -> Any:
        """Without the weights: a worker reads its own."""
        return Aesthetic, (str(self.folder),)


def _likeness(folder: str, before: str, scaled: bool) -> Likeness:
    return Likeness(folder, before=before, scaled=scaled)


def _with_transformers(folder: Path) -> Callable[..., Any]:
    from transformers import CLIPModel, CLIPTokenizer

    model = _load(CLIPModel, folder)
    prepare = _preparation(folder, model)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a broken file of a tokenizer can cause
        raise _unreadable(folder, error) from None
    longest = model.config.text_config.max_position_embeddings

    def embed(pictures: list[Image.Image], texts: list[str]) -> tuple[torch.Tensor, ...]:
        rows = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        out = model(pixel_values=prepare(pictures), **rows.to(model.device))
        return out.image_embeds, out.text_embeds, model.logit_scale.exp().double().cpu()

    return embed


def _with_open_clip(folder: Path) -> Callable[..., Any]:
    library, place = _open_clip(), usable(None)
    name = f"local-dir:{folder}"
    weights = _one_of(folder, "open_clip_model.safetensors", WEIGHTS)
    if "hf_model_name" in read_text(folder / OPEN_CLIP, ModelError):
        raise ModelError(f"{folder}: its text model is one of the hub, which is not fetched; name another model")
    try:
        # the weights by themselves: left to itself open_clip takes whichever file it likes, pickles too
        model, _, prepare = library.create_model_and_transforms(
            name, load_weights=False, pretrained_text=False, device=place
        )
        model.load_state_dict(load_file(weights))
        tokenize = library.get_tokenizer(name)
    except Exception as error:  # whatever a wrong config or weights that do not fit can cause
        raise _unreadable(folder, error) from None
    model.eval()

    def embed(pictures: list[Image.Image], texts: list[str]) -> tuple[torch.Tensor, ...]:
        x = torch.stack([prepare(picture) for picture in pictures]).to(place)
        return (
            model.encode_image(x),
            model.encode_text(tokenize(texts).to(place)),
            model.logit_scale.exp().double().cpu(),
        )

    return embed


def _load(kind: Any, folder: Path) -> Any:
    """A model of transformers with every weight read from the folder."""
    try:
        model, report = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # whatever a wrong config or broken weights can cause
        raise _unreadable(folder, error) from None
    if lost := sorted(report["missing_keys"]):
        more = f" and {len(lost) - 1} more weights are" if len(lost) > 1 else " is"
        raise ModelError(f"{folder} is not a whole {kind.__name__}: {lost[0]}{more} missing")
    return model.eval().to(usable(None))


def _preparation(folder: Path, model: Any) -> Callable[[list[Image.Image]], torch.Tensor]:
    """Pictures -> pixels [B, 3, h, w] as the model wants them."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    try:
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a broken file can cause
        raise _unreadable(folder, error) from None
    return lambda pictures: processor(pictures, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)


def _folder(name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise ModelError(
            f"there is no folder {name}; download the model and name the folder that holds its config.json"
        )
    return folder


def _check(folder: Path, kind: str, what: str) -> None:
    """Raise ModelError unless the folder looks like such a model of transformers, in safetensors."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} is not {what}: it has no config.json")
    try:
        told = json.loads(read_text(file, ModelError))
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from None
    if not isinstance(told, dict) or told.get("model_type") != kind:
        found = told.get("model_type") if isinstance(told, dict) else None
        raise ModelError(f"{folder} is not {what}: its config.json says model_type {found!r:.40}, expected {kind!r}")
    _one_of(folder, WEIGHTS, f"{WEIGHTS}.index.json")


def _one_of(folder: Path, *files: str) -> Path:
    for name in files:
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"{folder} has no {files[0]}; only safetensors are read, so convert other weights first")


def _open_clip() -> Any:
    try:
        import open_clip  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        raise ModelError("open_clip is not installed: pip install 'diffguide[metrics]'") from None
    return open_clip


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(rows.double().cpu(), dim=1)


def _unreadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300] or type(error).__name__}")
