"""`diffguide maps` with pipelines of several families: where each word was looked at, from a prompt alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_pipes
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from tiny_models import MODELS
from transformers import T5Config, T5EncoderModel

from diffguide import cli
from diffguide.zoo.tokenizer import build_tokenizer


def flux() -> Any:
    """FLUX.1 with both of its encoders; T5 reads with the world's tokenizer."""
    tokenizer = build_tokenizer()
    encoder = tiny.text_encoder(tokenizer)
    model = MODELS["flux"]()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    pipe = FluxPipeline(
        vae=tiny_pipes.vae(1),
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval(),  # type: ignore[arg-type]
        tokenizer_2=build_tokenizer(),
    )
    # pooled states as wide as the encoder's
    pipe.transformer = type(model)(**{**model.config, "pooled_projection_dim": encoder.config.hidden_size}).eval()
    return pipe


@pytest.mark.parametrize(
    ("build", "sides"), [(tiny.sdxl, (16, 24)), (tiny.sd3, (16, 24)), (flux, (16, 24))], ids=["sdxl", "sd3", "flux"]
)
def test_words_of_a_prompt_are_seen(
    build: Any, sides: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pipe = build()
    pipe.vae.register_to_config(shift_factor=0.0)
    monkeypatch.setattr("diffguide.pipelines.run.load", lambda *_, **__: pipe)
    (tmp_path / "model_index.json").touch()
    monkeypatch.chdir(tmp_path)
    high, wide = (side * getattr(pipe, "vae_scale_factor", 8) for side in sides)
    options = ["--model", str(tmp_path), "--steps", "2", "--height", str(high), "--width", str(wide)]
    options += ["--device", "cpu", "--words", "red circle,blue", "--json"]
    assert cli.main(["maps", "a red circle and a blue square", *options]) == 0
    assert len(json.loads(capsys.readouterr().out)["pictures"]) == 1
    with np.load("maps/maps.npz") as arrays:
        maps = arrays["maps"]
    h, w = maps.shape[1:]
    assert len(maps) == 2 and h / w == pytest.approx(high / wide) and h > 1
    assert np.isfinite(maps).all() and (maps > 0).all() and (maps < 1).all()


def test_a_video_is_refused_before_it_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pipe, _ = tiny_pipes.PIPES["wan"]()
    monkeypatch.setattr("diffguide.pipelines.run.load", lambda *_, **__: pipe)
    (tmp_path / "model_index.json").touch()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["maps", "a red circle", "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert "WanPipeline draws videos; a recipe draws pictures" in capsys.readouterr().err
