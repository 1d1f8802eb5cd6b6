"""The embedded models: their tokenizer, their training, and what is shipped."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st

from diffguide import zoo
from diffguide.errors import ModelError
from diffguide.zoo.autoencoder import crops
from diffguide.zoo.data import pictures, training_scene
from diffguide.zoo.denoisers.shapes_mmdit import Repeated, ShapesMMDiT, build_mmdit
from diffguide.zoo.denoisers.shapes_unet import build_unet
from diffguide.zoo.loop import Muon, descend
from diffguide.zoo.parts import build_vae, standardise
from diffguide.zoo.plan import Plan
from diffguide.zoo.tokenizer import SPLIT, build_tokenizer
from diffguide.zoo.train import train
from diffguide.zoo.world import VOCABULARY, caption, sample_scene

TINY = Plan(
    pictures=24, vae_steps=3, vae_batch=2, steps=4, batch=4, decoder_steps=2, keep_every=2, sheet_every=99, warmup=2
)
shipped = pytest.mark.skipif(
    "shapes-unet" not in zoo.names(), reason="shapes-unet has not been trained in this checkout"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


def test_words_of_the_grammar_are_one_token_but_for_those_meant_to_be_two(tokenizer: Any) -> None:
    for word in VOCABULARY:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(word).input_ids)[1:-1]
        assert tuple(p.removesuffix("</w>") for p in pieces) == SPLIT.get(word, (word,))


@given(st.integers(0, 10**6))
def test_captions_fit_and_come_back(seed: int) -> None:
    tokenizer = TOKENIZER
    rng = random.Random(seed)
    text = caption(sample_scene(rng), rng)
    ids = tokenizer(text).input_ids
    assert len(ids) <= 77 and tokenizer.unk_token_id not in ids[1:-1]
    spelled = "".join(tokenizer.convert_ids_to_tokens(ids[1:-1])).replace("</w>", " ")
    assert spelled.split() == text.replace(",", " ,").split()


TOKENIZER = build_tokenizer()


@given(st.text(max_size=60))
def test_unknown_words_do_not_crash(text: str) -> None:
    ids = TOKENIZER(text, truncation=True).input_ids
    assert ids[0] == TOKENIZER.bos_token_id and ids[-1] == TOKENIZER.eos_token_id


def test_the_tokenizer_survives_its_files(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    text = "three purple triangles on a beige background, a zebra"
    assert again(text).input_ids == tokenizer(text).input_ids and again.model_max_length == 77


def test_standardised_latents_decode_to_the_same_picture() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist
        picture = vae.decode(z.mean).sample
        mean, std = z.mean.mean((0, 2, 3)), z.mean.std((0, 2, 3))
        standardise(vae, mean, std)
        new = vae.encode(x).latent_dist
        assert (new.mean.mean((0, 2, 3))).abs().max() < 1e-4 and (new.mean.std((0, 2, 3)) - 1).abs().max() < 1e-3
        assert new.std.max() < 1e-6, "the encoder draws nothing"
        assert (vae.decode(new.mean).sample - picture).abs().max() < 1e-4


def test_training_scenes_are_not_held_out_and_come_from_the_seed() -> None:
    scenes = [training_scene(0, i) for i in range(60)]
    assert not any(s.held_out for s in scenes)
    assert scenes == [training_scene(0, i) for i in range(60)] != [training_scene(1, i) for i in range(60)]


def test_pictures_are_drawn_once(tmp_path: Path) -> None:
    first = np.array(pictures(tmp_path, 0, 3))
    changed = (tmp_path / "pictures-0-3.npy").stat().st_mtime_ns
    assert np.array_equal(first, pictures(tmp_path, 0, 3))
    assert (tmp_path / "pictures-0-3.npy").stat().st_mtime_ns == changed
    found = crops(first, 32, range(4), (0, 1))
    assert found.shape == (4, 32, 32, 3) and np.array_equal(found, crops(first, 32, range(4), (0, 1)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {f"{p.parent.name}.{k}": v for p in sorted(folder.glob("*/*.safetensors")) for k, v in load_file(p).items()}


@pytest.mark.slow
def test_a_stopped_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """Stopped at a checkpoint in every stage, and carried on: bit-identical weights; and a run begun from another's."""
    whole = train(tmp_path / "whole", TINY)
    assert whole is not None
    stops = 0
    while train(tmp_path / "parts", TINY, until=time.time()) is None:  # one step at a time
        stops += 1
        assert stops < 20
    assert stops >= 6
    wanted, found = weights(whole), weights(tmp_path / "parts" / "pipeline")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[k], found[k]) for k in wanted)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "denoiser.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and 0 < lines[0]["loss"] < 3
    warm = train(tmp_path / "warm", Plan(**{**vars(TINY), "steps": 1, "warmup": 10**6}), start=whole)
    assert warm is not None
    close = weights(warm)
    assert all((close[k] - wanted[k]).abs().max() < 1e-3 for k in wanted if k.startswith("unet"))


def test_muon_takes_a_convolution_for_a_matrix_and_makes_its_step_orthogonal() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
    line = torch.nn.Parameter(conv.weight.detach().permute(0, 2, 3, 1).flatten(1).clone())
    optimizer, plain = Muon([conv.weight], 0.1), torch.optim.Muon([line], 0.1, 1e-2, adjust_lr_fn="match_rms_adamw")
    before, x = conv.weight.detach().clone(), torch.randn(4, 6, 5, 5)
    descend(conv(x).square().mean(), optimizer, clip=1e9)
    grown = (conv.weight - 0.999 * before).detach().permute(0, 2, 3, 1).flatten(1)  # without the decay of 0.1 * 1e-2
    values = torch.linalg.svdvals(grown)
    assert values.max() / values.min() < 2, "all directions alike, as far as five iterations go"
    F.conv2d(x, line.reshape(8, 3, 3, 6).permute(0, 3, 1, 2), conv.bias.detach()).square().mean().backward()
    plain.step()
    assert torch.allclose(conv.weight.permute(0, 2, 3, 1).flatten(1), line, atol=1e-5)
    with pytest.raises(ValueError, match="channels-last"):
        Muon([torch.nn.Conv2d(6, 8, 3).weight], 0.1)


@pytest.mark.slow
@shipped
def test_a_stopped_run_of_the_transformer_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """On the shipped autoencoder and text encoder, which stay as they are."""
    plan = Plan(**{**vars(TINY), "steps": 3})
    whole = train(tmp_path / "whole", plan, name="shapes-mmdit")
    while train(tmp_path / "parts", plan, name="shapes-mmdit", until=time.time()) is None:
        assert not (tmp_path / "parts" / "decoder").exists()
    assert whole is not None
    wanted, found = weights(whole), weights(tmp_path / "parts" / "pipeline")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[k], found[k]) for k in wanted)
    base = weights(zoo.path())
    assert all(torch.equal(wanted[k], base[k].float()) for k in base if k.startswith("vae."))
    text = {k.split(".", 1)[1]: base[k].float() for k in base if k.startswith("text_encoder.")}
    for part in ("text_encoder", "text_encoder_2"):
        assert all(torch.equal(wanted[f"{part}.text_model.{k}"], text[k]) for k in text)


@shipped
@pytest.mark.parametrize("length", [1, 256])
def test_the_transformer_is_trained_on_what_the_pipeline_gives_it(length: int) -> None:
    """One token counted `length` times is the pipeline's `length` zeros where T5 would be."""
    denoiser = ShapesMMDiT("cpu", zoo.path())
    for weight in denoiser.transformer.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    pipe = denoiser.pipeline(AutoencoderKL.from_pretrained(zoo.path() / "vae"))
    said = ["a red circle", ""]
    z, t = torch.randn(2, 4, 16, 16), torch.tensor([300.0, 900.0])
    with torch.no_grad():
        states, pooled = denoiser.encode(said, "cpu")
        short = denoiser.transformer(z, states, pooled, t, joint_attention_kwargs={"repeats": length}).sample
        denoiser.finish()
        states, _, pooled, _ = pipe.encode_prompt(
            said, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        whole = denoiser.transformer(z, states, pooled, t).sample
    assert states.shape[1] == 77 + length and (short - whole).abs().max() < 1e-4 * whole.abs().max()
    assert not any(isinstance(p, Repeated) for p in denoiser.transformer.attn_processors.values())


@pytest.mark.parametrize(("build", "limit"), [(build_unet, 16), (build_mmdit, 9)])
def test_the_denoisers_are_small_enough(build: Any, limit: int) -> None:
    bytes_in_half = 2 * sum(p.numel() for p in build().parameters())
    assert bytes_in_half < limit * 2**20


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no embedded model is called 'dalle' \(known: shapes-unet, shapes-mmdit\)"):
        zoo.path("dalle")


@shipped
def test_the_shipped_folder_is_small_and_safe() -> None:
    files = [p for p in zoo.path().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 20 * 2**20
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt", ".md", ".png"}
    card = (zoo.path() / "README.md").read_text()
    scores = json.loads((zoo.path() / "scores.json").read_text())
    assert "## Known failures" in card and f"{scores['reconstruction_found']:.1%}" in card


@pytest.mark.skipif("shapes-mmdit" not in zoo.names(), reason="shapes-mmdit has not been trained in this checkout")
def test_the_transformer_that_ships() -> None:
    """Small, six layers of six heads, loaded by plain diffusers without its T5; autoencoder and text encoder shared."""
    folder = zoo.path("shapes-mmdit")
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 14 * 2**20
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt", ".md", ".png"}
    assert zoo.left_out(folder).keys() >= {"text_encoder_3", "tokenizer_3"}
    code = f"""
import sys, torch
torch.set_num_threads(1)
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained({str(folder)!r}, text_encoder_3=None, tokenizer_3=None)
config = pipe.transformer.config
assert config.num_layers >= 6 and config.num_attention_heads >= 6
image = pipe("a red circle", num_inference_steps=2).images[0]
assert image.size == (128, 128) and not any(m.startswith("diffguide") for m in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    mine, base = weights(folder), weights(zoo.path())
    assert all(torch.equal(mine[k], base[k]) for k in base if k.startswith("vae."))
    shared = [k for k in mine if k.startswith("text_encoder.text_model.")]
    assert shared and all(torch.equal(mine[k], base[k.replace("text_model.", "")]) for k in shared)
    scores = json.loads((folder / "scores.json").read_text())
    assert f"| 2 | {scores['complete']['2']:.0%}" in (folder / "README.md").read_text()


@shipped
def test_it_loads_with_nothing_of_ours() -> None:
    """In a fresh interpreter, by plain diffusers, in float32; two steps give a finite picture."""
    code = f"""
import sys, torch
torch.set_num_threads(1)
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(zoo.path())!r})
dtypes = {{p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()}}
assert dtypes == {{torch.float32}}, dtypes
image = pipe("a red circle", num_inference_steps=2).images[0]
assert image.size == (128, 128) and not any(m.startswith("diffguide") for m in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
