"""`shapes-mmdit`: a small Stable Diffusion 3.5, joint attention over text and image, flow matching."""

import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from diffguide.zoo.denoiser import Denoiser
from diffguide.zoo.parts import LATENT_CHANNELS, LATENT_SIDE, TEXT_WIDTH
from diffguide.zoo.plan import Plan

HEADS, HEAD_WIDTH, LAYERS = 6, 24, 6
T5_LENGTH = 256  # of the zeros that the pipeline puts where the T5 encoder is left out, unless a call says otherwise


class ShapesMMDiT(Denoiser):
    """The transformer alone; autoencoder and text encoder are those of `shapes-unet`, frozen."""

    base = "shapes-unet"
    plan = Plan(steps=6_000, fall=0.75)  # slower to learn shapes than a U-Net
    pipeline_class = StableDiffusion3Pipeline
    ends = ("pos_embed", "time_text_embed", "context_embedder", "norm", "proj_out")
    made_of = (
        "twice the text encoder of `shapes-unet`, as `CLIPTextModelWithProjection`, no T5;\n"
        f"`SD3Transformer2DModel` of {LAYERS} layers with {HEADS} heads of {HEAD_WIDTH}, query and key norms,\n"
        "patches of one latent cell; rectified flow"
    )
    remarks = """## Calls
The pipeline puts 256 tokens of zeros where the T5 encoder is left out. The model was trained with 1 to 256 of them; the
scores are those of `max_sequence_length=1`, which is the quickest.
"""

    def __init__(self, device: str, origin: Path | None = None) -> None:
        if origin is None:
            raise ValueError("shapes-mmdit stands on the autoencoder and the text encoder of shapes-unet")
        begun: Any = DiffusionPipeline.from_pretrained(origin, dtype=torch.float32)
        self.tokenizer = begun.tokenizer
        self.text = with_projection(begun.text_encoder).to(device).requires_grad_(False).eval()
        self.transformer = build_mmdit().to(device)
        if isinstance(begun, StableDiffusion3Pipeline):
            self.transformer.load_state_dict(begun.transformer.state_dict())
        self.networks = {"transformer": self.transformer}
        self.transformer.set_attn_processor(Repeated())

    def loss(self, z: Tensor, noise: Tensor, u: Tensor, said: list[str]) -> Tensor:
        """Mean squared error of the velocity, noise levels logit-normal (Esser et al. 2024, arXiv 2403.03206)."""
        sigma = torch.special.ndtri(u.double().clamp(1e-4, 1 - 1e-4)).sigmoid().float()
        mixed = torch.lerp(z, noise, sigma[:, None, None, None])
        states, pooled = self.encode(said, z.device)
        repeats = self.repeats(said)
        velocity = self.transformer(
            mixed, states, pooled, sigma * 1000, joint_attention_kwargs={"repeats": repeats}
        ).sample
        return F.mse_loss(velocity.float(), noise - z)

    @torch.no_grad()
    def encode(self, said: list[str], device: Any) -> tuple[Tensor, Tensor]:
        """What `encode_prompt` makes of captions, [B, 77 + 1, 256] and [B, 256], with one token for all zeros."""
        words = self.tokenizer(said, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        seen = self.text(words, output_hidden_states=True)
        states, pooled = seen.hidden_states[-2].float(), seen.text_embeds.float()
        return F.pad(torch.cat([states, states], -1), (0, 0, 0, 1)), torch.cat([pooled, pooled], -1)

    @staticmethod
    def repeats(said: list[str]) -> int:
        """How often the token of zeros counts: half of the time as often as the pipeline has it, else from 1 on."""
        rng = random.Random("".join(said))
        return T5_LENGTH if rng.random() < 0.5 else round(T5_LENGTH ** rng.random())

    def pipeline(self, vae: Any) -> StableDiffusion3Pipeline:
        vae.register_to_config(shift_factor=0.0)  # the pipeline wants a number
        missing: dict[str, Any] = dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"))
        return StableDiffusion3Pipeline(
            transformer=self.transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=self.text,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text,
            tokenizer_2=self.tokenizer,
            **missing,
        )

    def finish(self) -> None:
        self.transformer.set_attn_processor(JointAttnProcessor2_0())


def build_mmdit() -> Any:
    """Joint attention over 16x16 latent cells and the text; modulations and output begin at zero (Peebles and Xie)."""
    width = HEADS * HEAD_WIDTH
    model = SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=2 * LATENT_SIDE,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ((name.endswith(".linear") and "norm" in name) or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def with_projection(text: Any) -> Any:
    """A CLIP text model as one with a projection, which is the identity."""
    if isinstance(text, CLIPTextModelWithProjection):
        return text
    model = CLIPTextModelWithProjection(text.config)
    model.text_model.load_state_dict(text.state_dict())
    nn.init.eye_(model.text_projection.weight)
    return model


class Repeated:
    """Joint attention in which the last token counts as `repeats` equal ones: its logits are raised by their log.

    Explicit attention: its backward is faster on a CPU than the fused one.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, repeats: int = 1, **_: Any
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor, norm: Any = None) -> Tensor:
            x = x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        image, text = hidden_states, encoder_hidden_states
        q = torch.cat([heads(attn.to_q(image), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], 2)
        k = torch.cat([heads(attn.to_k(image), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], 2)
        v = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(text))], 2)
        q, k = F.pad(q * q.shape[-1] ** -0.5, (0, 8), value=1.0), F.pad(k, (0, 8))  # eight keep a matrix aligned
        k[..., -1, -1] += math.log(repeats)
        out = ((q @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        image, text = out.split([image.shape[1], text.shape[1]], 1)
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)
