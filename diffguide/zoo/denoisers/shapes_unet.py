"""`shapes-unet`: a small Stable Diffusion 1, a U-Net with self- and cross-attention."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from diffguide.zoo.denoiser import Denoiser
from diffguide.zoo.parts import LATENT_CHANNELS, LATENT_SIDE, TEXT_WIDTH, build_text_encoder
from diffguide.zoo.plan import Plan
from diffguide.zoo.tokenizer import build_tokenizer


class ShapesUNet(Denoiser):
    """Text encoder and U-Net, trained together, velocity prediction."""

    plan = Plan()
    pipeline_class = StableDiffusionPipeline
    ends = ("conv_in", "conv_out", "embed")
    made_of = (
        "`CLIPTokenizer` of the grammar; `CLIPTextModel` of 3 layers x 128; `UNet2DConditionModel` of widths 96 and\n"
        "160 with self- and cross-attention at 16x16 (3 heads) and 8x8 (5 heads); velocity prediction on Stable\n"
        "Diffusion's noise schedule"
    )

    def __init__(self, device: str, origin: Path | None = None) -> None:
        self.tokenizer = build_tokenizer()
        self.text, self.unet = build_text_encoder(self.tokenizer), build_unet()
        self.alphas = build_scheduler().alphas_cumprod.to(device)
        self.text, self.unet = self.text.to(device), self.unet.to(device, memory_format=torch.channels_last)
        self.networks = {"text": self.text, "unet": self.unet}
        if origin is not None:
            self.load(origin)
        if device == "cpu":
            self.unet.set_attn_processor(AttnProcessor())  # explicit attention: its backward is faster here

    def load(self, folder: Path) -> None:
        begun = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        self.text.load_state_dict(begun.text_encoder.state_dict())
        self.unet.load_state_dict(begun.unet.state_dict())

    def loss(self, z: Tensor, noise: Tensor, u: Tensor, said: list[str]) -> Tensor:
        words = self.tokenizer(said, padding="max_length", truncation=True, return_tensors="pt").input_ids
        t = (u * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        a, s = self.alphas[t].sqrt()[:, None, None, None], (1 - self.alphas[t]).sqrt()[:, None, None, None]
        states = self.text(words.to(z.device)).last_hidden_state
        velocity = self.unet(a * z + s * noise, t, states).sample
        return F.mse_loss(velocity.float(), a * noise - s * z)

    def pipeline(self, vae: Any) -> StableDiffusionPipeline:
        return assemble(vae, self.text, self.tokenizer, self.unet)

    def finish(self) -> None:
        self.unet.set_default_attn_processor()


def build_unet() -> Any:
    """Self- and cross-attention at 16x16 (3 heads) and 8x8 (5 heads, middle block included)."""
    heads: Any = (3, 5)
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=heads,  # diffusers takes the number of heads under this name
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def build_scheduler() -> Any:
    """The noise schedule of Stable Diffusion, with velocity prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble(vae: Any, text_encoder: Any, tokenizer: Any, unet: Any) -> StableDiffusionPipeline:
    """The parts as an ordinary pipeline."""
    parts: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        requires_safety_checker=False,
        **parts,
    )
