"""One call of every small denoiser, and the shortest pipeline around it: a loop, a scheduler and a tokenizer."""

import types
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import MODELS

from diffguide import passes
from diffguide.maps import Watch
from diffguide.registry import of_model, sites_of
from diffguide.zoo.tokenizer import build_tokenizer

SIZES = {2: (10, 14), 3: (3, 10, 14)}  # latent cells: 5x7 tokens of 2x2, so that no square root can be right
KEPT = ("img_ids", "txt_ids", "encoder_attention_mask", "attention_mask", "timestep", "guidance", "img_shapes")
PROMPT = "a red circle and a purple triangle"


def filled(value: Any, seed: int = 0) -> Any:
    """Noise in place of zeros, where zeros mean nothing."""
    if isinstance(value, dict):
        more = {"image_rotary_emb": turns(*value["image_rotary_emb"])} if "image_rotary_emb" in value else {}
        return {k: v if k in KEPT else filled(v, seed + i) for i, (k, v) in enumerate(value.items())} | more
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=value.dtype)
    if isinstance(value, tuple | list):
        return type(value)(filled(v, seed + i) for i, v in enumerate(value))
    return value


def turns(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotations of pairs by any angles, in these shapes: [tokens, width]."""
    angles = torch.randn(cos.shape[0], cos.shape[1] // 2, generator=torch.Generator().manual_seed(8), dtype=cos.dtype)
    angles = angles.repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def built(name: str, size: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A small denoiser, its family, and the arguments of a call of noise at this size in latent cells."""
    model = MODELS[name]().to(dtype)
    family = of_model(model)
    args, kwargs = family.example(model, size or SIZES[len(family.example_size(model))])
    return model, family, filled(args), filled(kwargs)


def seen(model: Any, family: Any, args: Any, kwargs: Any, kind: str) -> dict[str, torch.Tensor]:
    """Maps of all sites of a kind, by name, [H, N, K], N of all frames."""
    size = family.size(args, kwargs)
    sites = sites_of(family, model)
    grids = {site: family.grid(site, size) for site in sites}
    chosen = [s for s in sites if s.kind in (kind, "joint")]
    if not chosen:
        return {}
    wishes = {(0, "x"): (Watch(kind, head_mean=False), chosen)}  # type: ignore[arg-type]
    words = family.words(args, kwargs)
    with torch.no_grad(), passes.looking(model, family, args, kwargs, wishes, grids, words=words) as sight:
        return {s.site.name: s.values.transpose(0, 1).flatten(1, 2) for s in sight.maps[0]["x"]}


# what the families ask of the pipelines about their words

DEFAULT_PROMPT_TEMPLATE = {"template": "a photo of {} at night", "crop_start": 3}


class Chat:
    """The world's tokenizer with a chat template."""

    tokenizer = build_tokenizer()
    model_max_length = tokenizer.model_max_length

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.tokenizer(*args, **options)

    def encode(self, text: str) -> Any:
        return self.tokenizer.encode(text)

    def apply_chat_template(self, turns: Any, **_: Any) -> str:
        return f"a photo of {turns[0]['content']} at night"


class Loop:
    """A pipeline of nothing but its loop: some steps from the noise of the call, without classifier-free guidance.

    It holds what the families read off their pipelines. OmniGen always has a second branch: the same row again.
    """

    do_classifier_free_guidance = False
    guidance_scale = 1.0
    prompt_template_encode, prompt_template_encode_start_idx = "a photo of {} at night", 4
    tokenizer_max_length = 77
    system_prompt = "two circles:"
    multimodal_processor = types.SimpleNamespace(add_prefix_instruction="a photo of {} at night".format)

    def __init__(self, name: str, size: tuple[int, ...] | None = None) -> None:
        model, self.family, args, kwargs = built(name, size)
        self.unet, self.transformer = (model, None) if hasattr(model, "conv_in") else (None, model)
        self.model = model
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.tokenizer = self.tokenizer_2 = Chat()
        if "omnigen" in type(self.family).__module__:
            args, kwargs = self.family.take(args, kwargs, torch.tensor([0, 0]), 1)
            kwargs = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        self.call = args, kwargs

    def __call__(self, steps: int = 2, complex_human_instruction: tuple[str, ...] = ("two circles:", "")) -> Any:
        """Latents after these steps; the denoiser is told the same timestep in each."""
        family, (args, kwargs) = self.family, self.call
        self.scheduler.set_timesteps(steps)
        z = family.latents(self.model, args, kwargs)
        for t in self.scheduler.timesteps:
            args, kwargs = family.with_latents(self.model, args, kwargs, z)
            with torch.no_grad():
                y = family.prediction(self.model(*args, **kwargs))
            mean = y.narrow(1, 0, z.shape[1])  # without the variance of some
            z = self.scheduler.step(mean, t, z, return_dict=False)[0]
        return z
