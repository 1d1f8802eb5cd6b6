"""A method in a few lines: what image tokens attend to, sharpened or softened by one knob. No list to edit."""

from dataclasses import dataclass, replace

import torch
from diffusers import StableDiffusionPipeline

import diffguide as dg


@dataclass(frozen=True)
class Temperature(dg.Method):
    r"""Self-attention with $softmax(q k^T / (\tau \sqrt d))$ in the conditional branch."""

    tau: float = dg.param(
        1.0, "temperature: 1 changes nothing, lower looks at less, higher at more", low=0.1, high=10.0
    )

    branch = "cond"
    kinds = ("self",)
    neutral = {"tau": 1.0}

    def attend(self, call, proceed):
        return proceed(replace(call, q=call.q / self.tau))


if __name__ == "__main__":
    pipe = StableDiffusionPipeline.from_pretrained(dg.zoo.path("shapes-unet"))
    for tau in (0.5, 1.0, 2.0):
        with dg.Guide(pipe, Temperature(tau=tau)):
            noise = torch.Generator().manual_seed(0)
            image = pipe(
                "a yellow star and a green ring", num_inference_steps=30, guidance_scale=4.0, generator=noise
            ).images[0]
        image.save(f"temperature-{tau:g}.png")
