"""A denoiser trained on the latents of the autoencoder; each embedded model says what it is and what it minimises."""

import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from diffguide.zoo import GUIDANCE_SCALE
from diffguide.zoo.autoencoder import sheet
from diffguide.zoo.data import training_scene
from diffguide.zoo.loop import Muon, Run, autocast, descend, leads, mine, set_rate, wait
from diffguide.zoo.plan import Plan
from diffguide.zoo.world import caption

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


class Denoiser(ABC):
    """The networks of an embedded model while they are trained.

    Made with a device and, where one is given or needed, the folder of a pipeline whose weights it begins with.
    """

    base: ClassVar[str | None] = None  # the embedded model whose autoencoder and text encoder it stands on
    plan: ClassVar[Plan]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    ends: ClassVar[tuple[str, ...]]  # in the names of weights that meet data, words and time: AdamW's, not Muon's
    made_of: ClassVar[str]  # for the card, after the autoencoder
    remarks: ClassVar[str] = ""  # for the card: a section, or nothing
    networks: dict[str, nn.Module]  # what is trained

    @abstractmethod
    def __init__(self, device: str, origin: Path | None = None) -> None: ...

    @abstractmethod
    def loss(self, z: Tensor, noise: Tensor, u: Tensor, said: list[str]) -> Tensor:
        """Of latents and noise [B, 4, 16, 16] mixed at levels `u` [B] in 0..1, uniform, with these captions."""

    @abstractmethod
    def pipeline(self, vae: Any) -> Any:
        """The networks as they are, in an ordinary pipeline."""

    @abstractmethod
    def finish(self) -> None:
        """Take away what served training alone."""


def train_denoiser(
    work: Path, denoiser: Denoiser, plan: Plan, vae: Any, latents: Tensor, device: str, until: float
) -> bool:
    """Train the networks, with captions drawn anew each time a picture comes by.

    Returns whether they are finished; their averaged weights are then in `work / "denoiser"`, a pipeline.
    """
    networks = denoiser.networks.values()
    for network in networks:
        network.train()
    scenes = [training_scene(plan.seed, i) for i in range(len(latents))]
    named = [pair for network in networks for pair in network.named_parameters()]
    weights = [w for _, w in named]
    hidden = [w for name, w in named if w.ndim >= 2 and not any(part in name for part in denoiser.ends)]
    others = [w for w in weights if not any(w is h for h in hidden)]
    matrices = Muon(hidden, plan.matrix_rate)
    vectors = torch.optim.AdamW(others, lr=plan.rate, betas=(0.9, 0.99), weight_decay=1e-2)
    average = EMAModel(weights, decay=plan.ema, use_ema_warmup=True, power=0.8)
    parts = {**denoiser.networks, "matrices": matrices, "vectors": vectors, "ema": average}
    run = Run(work / "denoiser.pt", work / "denoiser.jsonl", parts)
    fall = round(plan.steps * (1 - plan.fall))
    for step in run.steps(plan.steps, plan.keep_every, until, "denoiser", milestone=fall):
        share = min(1, (step + 1) / plan.warmup, (plan.steps - step) / max(1, plan.steps - fall))
        set_rate(matrices, plan.matrix_rate * share)
        set_rate(vectors, plan.rate * share)
        rng = random.Random(plan.seed * 1_000_003 + step)
        chosen = rng.sample(range(len(latents)), plan.batch)
        said = ["" if rng.random() < plan.unconditional else caption(scenes[i], rng) for i in chosen]
        noise_rng = torch.Generator().manual_seed(rng.randrange(2**62))
        # one level from each of `batch` equal strata: less variance than independent draws
        u = (torch.rand(plan.batch, generator=noise_rng) + torch.arange(plan.batch)) / plan.batch
        noise = torch.randn(plan.batch, *latents.shape[1:], generator=noise_rng)
        u, noise, z = (mine(x).to(device) for x in (u, noise, latents[chosen].float()))
        with autocast(device):
            loss = denoiser.loss(z, noise, u, mine(said))
        descend(loss, matrices, vectors)
        average.step(weights)
        run.log(step, loss=loss.item())
        if leads() and (step + 1) % plan.sheet_every == 0:
            average.store(weights)
            average.copy_to(weights)
            sample_sheet(denoiser.pipeline(vae)).save(work / f"samples-{step + 1}.png")
            average.restore(weights)
            for network in networks:
                network.train()
    if run.stopped:
        return False
    average.copy_to(weights)
    denoiser.finish()
    if leads():
        denoiser.pipeline(vae).save_pretrained(work / "denoiser.part")
        (work / "denoiser.part").rename(work / "denoiser")
    wait()
    return True


def sample_sheet(pipe: Any) -> Image.Image:
    """Two pictures for each prompt of `SHEET`, 25 steps."""
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    out: Any = pipe([*SHEET, *SHEET], num_inference_steps=25, guidance_scale=GUIDANCE_SCALE, generator=rng)
    return sheet(out.images, len(SHEET))
