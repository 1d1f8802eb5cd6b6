"""Where did each word look? Maps of every word of a prompt, printed as shares and kept as an array."""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

import diffguide as dg

pipe = StableDiffusionPipeline.from_pretrained(dg.zoo.path("shapes-unet"))
with dg.Guide(pipe, dg.CaptureMaps()) as guide:
    pipe(
        "a red circle and a blue square on a white background",
        num_inference_steps=30,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
    )
for word, maps in guide.maps.items():  # float32 [pictures, h, w]
    y, x = np.unravel_index(maps[0].argmax(), maps[0].shape)
    print(f"{word:12s} share {maps[0].mean():.4f}, strongest at row {y}, column {x}")
np.savez_compressed("word_maps.npz", **guide.maps)
