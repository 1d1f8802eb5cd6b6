"""Objectives that are models: the style reader of the zoo, and checkpoints in folders of the real classes."""

import json
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffguide import cli
from diffguide.errors import ModelError, ParamError
from diffguide.search import named
from diffguide.zoo.styles import STYLE_NAMES, style_probabilities
from diffguide.zoo.tokenizer import build_tokenizer
from diffguide.zoo.world import BACKGROUNDS, STYLES, Scene, Thing, render, sample_scene

THINGS = (Thing("red", "circle", 0.3, 0.4, 0.2), Thing("blue", "star", 0.7, 0.6, 0.2))
PROMPTS = ("a red circle", "a blue star on a white background")
SIDE = 16
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Of the model's size, so that nothing is resized."""
    return [render(Scene("white", THINGS[:1]), SIDE), render(Scene("black", THINGS[1:]), SIDE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel of random weights with its tokenizer and image processor."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "clip", build_tokenizer()
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**small, **tokens, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    config = CLIPConfig(
        text_config=text, vision_config={**small, "image_size": SIDE, "patch_size": 8}, projection_dim=6
    )
    model = CLIPModel(config)
    nn.init.constant_(model.logit_scale, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=size, crop_size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, torch.Tensor]], Path]:
    """Makes the folder of an aesthetic predictor with this head."""

    def make(head: dict[str, torch.Tensor]) -> Path:
        made = tmp_path_factory.mktemp("models")
        shutil.copy(folder / "preprocessor_config.json", made)
        torch.manual_seed(0)
        vision = CLIPConfig.from_pretrained(folder).vision_config
        vision.projection_dim = 6
        CLIPVisionModelWithProjection(vision).save_pretrained(made)
        save_file(load_file(made / "model.safetensors") | head, made / "model.safetensors", {"format": "pt"})
        return made

    return make


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """What a CLIP looks at, [B, 3, 16, 16], written a second time."""
    rows = [torch.tensor(list(p.get_flattened_data()), dtype=torch.float32).view(SIDE, SIDE, 3) for p in pictures]
    return ((torch.stack(rows) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def cosines(folder: Path, pictures: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """Of each picture and its text, one at a time and so without padding."""
    model, found = CLIPModel.from_pretrained(folder).eval(), []
    for picture, text in zip(pictures, texts, strict=True):
        ids = torch.tensor([build_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            image = model.visual_projection(model.vision_model(pixels([picture])).pooler_output)
            words = model.text_projection(model.text_model(ids).pooler_output)
        found.append((image @ words.T / image.norm() / words.norm()).item())
    return torch.tensor(found)


# Style.


def test_the_style_of_held_out_scenes_is_read() -> None:
    lot, read = random.Random(2), []
    for style in (None, *STYLES):
        for _ in range(8):
            scene = sample_scene(lot, styled=0.0)
            read.append(style_probabilities(render(replace(scene, style=style), 128)).argmax())
    right = np.array(read).reshape(4, 8) == np.arange(4)[:, None]
    assert right[1:3].all() and right.mean() > 0.9  # a few sketches are drawn as plain pictures are


def test_each_style_is_an_objective_and_their_scores_add_up() -> None:
    drawn = [render(Scene("white", THINGS, style), 128) for style in (None, *STYLES)]
    scores = np.array([list(named(f"style:{name}")(drawn, PROMPTS * 2)) for name in STYLE_NAMES])
    assert scores.argmax(0).tolist() == [0, 1, 2, 3] and scores.min() >= 0
    assert scores.sum(0) == pytest.approx(1)


@pytest.mark.parametrize("style", STYLES[:2])
@pytest.mark.parametrize("ground", BACKGROUNDS)
def test_night_and_fog_are_told_on_every_ground(ground: str, style: str) -> None:
    plain, styled = (render(Scene(ground, THINGS, s), 64) for s in (None, style))
    place = STYLE_NAMES.index(style.split()[-1])
    assert style_probabilities(plain)[place] < 0.5 < style_probabilities(styled)[place]


def test_an_empty_picture_has_a_style_as_well() -> None:
    assert style_probabilities(Image.new("RGB", (32, 32), (86, 86, 86))).argmax() == 1  # white, at night


# Checkpoints.


def test_clip_is_the_cosine_with_what_the_picture_depicts(folder: Path, pictures: list[Image.Image]) -> None:
    wanted = cosines(folder, pictures, [f"A photo depicts {p}" for p in PROMPTS])
    assert named(f"clip:{folder}")(pictures, PROMPTS) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert wanted.abs().min() > 0.01 and (wanted[0] - wanted[1]).abs() > 0.01


def test_hps_and_pickscore_take_the_prompt_itself(folder: Path, pictures: list[Image.Image]) -> None:
    wanted = cosines(folder, pictures, list(PROMPTS))
    assert named(f"hps:{folder}")(pictures, PROMPTS) == pytest.approx(wanted.tolist(), abs=1e-5)
    scaled = (wanted * torch.tensor(1.5).exp()).tolist()
    assert named(f"pickscore:{folder}")(pictures, PROMPTS) == pytest.approx(scaled, abs=1e-5)


def test_a_prompt_that_is_too_long_is_cut_and_scored(folder: Path, pictures: list[Image.Image]) -> None:
    long = ["a red circle and " * 40 + end for end in ("a star", "a ring")]
    first, second = named(f"hps:{folder}")(pictures[:1] * 2, long)
    assert first == pytest.approx(second)


def test_aesthetic_is_a_line_or_several_after_the_image_tower(
    predictor: Callable[[dict[str, torch.Tensor]], Path], pictures: list[Image.Image]
) -> None:
    torch.manual_seed(1)
    one = {"predictor.weight": torch.randn(1, 6), "predictor.bias": torch.randn(1)}
    sizes = {0: (5, 6), 2: (4, 5), 4: (3, 4), 6: (2, 3), 7: (1, 2)}  # between them dropout, which has no weights
    more = {f"layers.{n}.weight": torch.randn(size) for n, size in sizes.items()}
    more |= {f"layers.{n}.bias": torch.randn(size[0]) for n, size in sizes.items()}
    for head in (one, more):
        made = predictor(head)
        with torch.no_grad():
            tower = CLIPVisionModelWithProjection.from_pretrained(made).eval()
            x = tower(pixels(pictures)).image_embeds
            x = (x / x.norm(dim=1, keepdim=True)).T
            for name in [name for name in head if name.endswith("weight")]:
                x = head[name] @ x + head[name.replace("weight", "bias")][:, None]
        assert named(f"aesthetic:{made}")(pictures, PROMPTS) == pytest.approx(x[0].tolist(), abs=1e-4)


def test_open_clip_folders_are_read_as_well(tmp_path: Path, pictures: list[Image.Image]) -> None:
    library = pytest.importorskip("open_clip", reason="needs the extra: pip install 'diffguide[metrics]'")
    config = {
        "embed_dim": 6,
        "vision_cfg": {"width": 8, "layers": 1, "head_width": 4, "image_size": SIDE, "patch_size": 8},
        "text_cfg": {"width": 8, "layers": 1, "heads": 2, "context_length": 77, "vocab_size": 49408},
    }
    torch.manual_seed(0)
    model = library.CLIP(**config).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    told = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    with torch.no_grad():
        image, words = model.encode_image(pixels(pictures)), model.encode_text(library.tokenize(list(PROMPTS)))
    wanted = nn.functional.cosine_similarity(image, words).tolist()
    assert named(f"hps:{tmp_path}")(pictures, PROMPTS) == pytest.approx(wanted, abs=1e-5)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": {"hf_model_name": "a/b"}}}))
    with pytest.raises(ModelError, match="one of the hub, which is not fetched"):
        named(f"hps:{tmp_path}")(pictures, PROMPTS)


def test_without_open_clip_its_folder_is_refused_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no open_clip_model.safetensors; only safetensors are read"):
        named(f"clip:{tmp_path}")
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(ModelError, match=r"pip install 'diffguide\[metrics\]'"):
        named(f"clip:{tmp_path}")


def test_objectives_travel_without_their_weights(folder: Path, pictures: list[Image.Image]) -> None:
    judge: Any = named(f"pickscore:{folder}")
    scores = judge(pictures, PROMPTS)
    data = pickle.dumps(judge)
    assert len(data) < 1000 and pickle.loads(data)(pictures, PROMPTS) == scores  # noqa: S301


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("beauty", r"no objective is called 'beauty' \(known: brightness, .*style:STYLE, clip:FOLDER"),
        ("style", "the objective style wants an argument: style:STYLE"),
        ("clip:", "the objective clip wants an argument: clip:FOLDER"),
        ("style:noon", "no style is called 'noon' .*plain, night, fog, sketch"),
    ],
)
def test_an_unknown_objective_is_refused_with_the_known_ones(name: str, said: str) -> None:
    with pytest.raises(ParamError, match=said):
        named(name)


@pytest.mark.parametrize("kind", ["clip", "hps", "pickscore", "aesthetic"])
def test_a_folder_that_is_no_such_model_is_refused_before_anything_is_drawn(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path, said: str) -> None:
        with pytest.raises(ModelError, match=said):
            named(f"{kind}:{path}")

    refused(tmp_path / "nowhere", "there is no folder .*nowhere")
    refused(tmp_path, "it has no config.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json: Expecting")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused(tmp_path, "its config.json says model_type 'bert'")
    right = "clip_vision_model" if kind == "aesthetic" else "clip"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": right}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    refused(tmp_path, "has no model.safetensors; only safetensors are read")
    assert cli.main(["heads", "search", "--objective", f"{kind}:{tmp_path}", "--out", str(tmp_path / "found")]) == 2
    assert "only safetensors are read" in capsys.readouterr().err and not (tmp_path / "found").exists()


def test_weights_that_are_missing_or_broken_are_told(
    folder: Path,
    predictor: Callable[[dict[str, torch.Tensor]], Path],
    pictures: list[Image.Image],
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"not a whole CLIPModel: text_projection.weight is missing"):
        named(f"clip:{broken}")(pictures, PROMPTS)
    (broken / "model.safetensors").write_bytes(b"cos\nsystem\n" * 9)
    with pytest.raises(ModelError, match="broken cannot be loaded"):
        named(f"clip:{broken}")(pictures, PROMPTS)
    with pytest.raises(ModelError, match="holds no aesthetic predictor"):
        named(f"aesthetic:{predictor({})}")(pictures, PROMPTS)
