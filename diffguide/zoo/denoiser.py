"""Text encoder and U-Net, trained together on the latents of the autoencoder."""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from PIL import Image

from diffguide.zoo.autoencoder import sheet
from diffguide.zoo.data import training_scene
from diffguide.zoo.loop import Muon, Run, autocast, descend, leads, mine, set_rate, wait
from diffguide.zoo.models import assemble, build_scheduler, build_text_encoder, build_unet
from diffguide.zoo.plan import Plan
from diffguide.zoo.tokenizer import build_tokenizer
from diffguide.zoo.world import caption

ENDS = ("conv_in", "conv_out", "embed")  # what meets data and words: not for Muon

SHEET = (
    "a red circle on a white background",
    "a big purple triangle on a black background",
    "a yellow star and a blue square on a gray background",
    "a green heart to the left of a pink ring on a white background",
    "three cyan crosses on a beige background",
    "two orange squares and a blue circle on a black background",
    "a pink star above a green circle",
    "a red ring and a blue heart, at night",
)


def train_unet(
    work: Path,
    plan: Plan,
    vae: Any,
    latents: torch.Tensor,
    device: str,
    until: float,
    start: Path | None = None,
) -> bool:
    """Text encoder and U-Net on velocity prediction, with captions drawn anew each time a picture comes by.

    Returns whether they are finished; their averaged weights are then in `work / "denoiser"`, a pipeline.
    """
    if (work / "denoiser").exists():
        return True
    torch.manual_seed(plan.seed)
    tokenizer = build_tokenizer()
    text, unet = build_text_encoder(tokenizer), build_unet()
    if start is not None:
        begun = StableDiffusionPipeline.from_pretrained(start, dtype=torch.float32)
        text.load_state_dict(begun.text_encoder.state_dict())
        unet.load_state_dict(begun.unet.state_dict())
    text, unet = text.to(device), unet.to(device, memory_format=torch.channels_last)
    if device == "cpu":
        unet.set_attn_processor(AttnProcessor())  # explicit attention: its backward is faster here than the fused one
    unet.train()
    text.train()
    scenes = [training_scene(plan.seed, i) for i in range(len(latents))]
    weights = [*text.parameters(), *unet.parameters()]
    named = [*text.named_parameters(), *unet.named_parameters()]
    hidden = [w for name, w in named if w.ndim >= 2 and not any(part in name for part in ENDS)]
    others = [w for _, w in named if not any(w is h for h in hidden)]
    matrices = Muon(hidden, plan.matrix_rate)
    vectors = torch.optim.AdamW(others, lr=plan.rate, betas=(0.9, 0.99), weight_decay=1e-2)
    average = EMAModel(weights, decay=plan.ema, use_ema_warmup=True, power=0.8)
    alphas = build_scheduler().alphas_cumprod.to(device)
    parts = {"text": text, "unet": unet, "matrices": matrices, "vectors": vectors, "ema": average}
    run = Run(work / "unet.pt", work / "unet.jsonl", parts)
    fall = round(plan.steps * (1 - plan.fall))
    for step in run.steps(plan.steps, plan.keep_every, until, "U-Net", milestone=fall):
        share = min(1, (step + 1) / plan.warmup, (plan.steps - step) / max(1, plan.steps - fall))
        set_rate(matrices, plan.matrix_rate * share)
        set_rate(vectors, plan.rate * share)
        rng = random.Random(plan.seed * 1_000_003 + step)
        chosen = rng.sample(range(len(latents)), plan.batch)
        said = ["" if rng.random() < plan.unconditional else caption(scenes[i], rng) for i in chosen]
        noise_rng = torch.Generator().manual_seed(rng.randrange(2**62))
        # one timestep from each of `batch` equal strata: less variance than independent draws
        t = ((torch.rand(plan.batch, generator=noise_rng) + torch.arange(plan.batch)) * len(alphas) / plan.batch).long()
        noise = torch.randn(plan.batch, *latents.shape[1:], generator=noise_rng)
        t, noise, z = (mine(x).to(device) for x in (t, noise, latents[chosen].float()))
        words = tokenizer(mine(said), padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        with autocast(device):
            states = text(words).last_hidden_state
            velocity = unet(a * z + s * noise, t, states).sample
        loss = F.mse_loss(velocity.float(), a * noise - s * z)
        descend(loss, matrices, vectors)
        average.step(weights)
        run.log(step, loss=loss.item())
        if leads() and (step + 1) % plan.sheet_every == 0:
            average.store(weights)
            average.copy_to(weights)
            sample_sheet(vae, text, tokenizer, unet).save(work / f"samples-{step + 1}.png")
            average.restore(weights)
            unet.train()
            text.train()
    if run.stopped:
        return False
    average.copy_to(weights)
    unet.set_default_attn_processor()
    if leads():
        assemble(vae, text, tokenizer, unet).save_pretrained(work / "denoiser.part")
        (work / "denoiser.part").rename(work / "denoiser")
    wait()
    return True


def sample_sheet(vae: Any, text: Any, tokenizer: Any, unet: Any) -> Image.Image:
    """Two pictures for each prompt of `SHEET`, 25 steps, guidance 4."""
    pipe = assemble(vae, text, tokenizer, unet)
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    out: Any = pipe([*SHEET, *SHEET], num_inference_steps=25, guidance_scale=4.0, generator=rng)
    return sheet(out.images, len(SHEET))
