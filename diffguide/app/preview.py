"""Small pictures of latents on the way: they may take a share of the time, and no more memory than a thumbnail."""

import base64
import io
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SHARE = 0.2  # of the time since the start
CELLS = 32  # largest side of what is decoded, in latent cells
PIXELS = 256  # least size of a preview, so that small ones can be seen


class Previews:
    """The previews of one run."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.began, self.spent = time.monotonic(), 0.0

    def of(self, latents: Tensor) -> str | None:
        """A data URL of the first picture, or None where previews would take too long, or none can be made."""
        now = time.monotonic()
        if latents.ndim != 4 or self.spent > SHARE * (now - self.began):
            return None
        image = thumbnail(self.pipe, latents[:1])
        self.spent += time.monotonic() - now
        return data_url(image)


@torch.no_grad()
def thumbnail(pipe: Any, latents: Tensor) -> Image.Image:
    """Latents [1, C, h, w] decoded at no more than 32 cells a side; three of their channels where that is not safe.

    An autoencoder that moves between devices, or that overflows in half precision, is left alone.
    """
    latents = latents.detach()
    if (side := max(latents.shape[-2:])) > CELLS:
        size = [max(1, round(n * CELLS / side)) for n in latents.shape[-2:]]
        latents = F.interpolate(latents.float(), size=size, mode="area").to(latents.dtype)
    vae = getattr(pipe, "vae", None)
    fragile = vae is not None and vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if vae is None or hasattr(vae, "_hf_hook") or fragile:
        pixels = latents[0, :3].float()
        low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
        pixels = (pixels - low) / (high - low).clamp_min(1e-6)
    else:
        spread = latents.float().std().clamp_min(1.0).to(latents.dtype)  # some schedulers keep latents at noise's scale
        scaled = latents / spread / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        pixels = (vae.decode(scaled.to(vae.dtype), return_dict=False)[0][0].float() / 2 + 0.5).clamp(0, 1)
    array = (pixels.nan_to_num(0.0).movedim(0, -1).cpu().numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(array[..., :3] if array.shape[-1] >= 3 else array[..., 0])


def data_url(image: Image.Image) -> str:
    """A JPEG, enlarged by a whole number to be seen."""
    times = max(1, -(-PIXELS // max(image.size)))
    image = image.convert("RGB").resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
