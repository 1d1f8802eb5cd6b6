"""The autoencoder of the embedded models: its training, the latents it makes, and the decoder once more."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from diffguide.zoo.loop import Run, autocast, descend, leads, mine, save, set_rate, wait
from diffguide.zoo.parts import build_vae, standardise
from diffguide.zoo.plan import Plan
from diffguide.zoo.world import SIDE

# luminance, red against the rest, green against blue: hues weigh more than in RGB, where they are learned very late
OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (1.0, -0.5, -0.5), (0.0, 1.0, -1.0))


def train_vae(work: Path, plan: Plan, drawn: np.ndarray, device: str, until: float) -> Any:
    """A deterministic autoencoder, its latents standardised at the end.

    The first three latent channels are drawn towards the mean colour of each cell's pixels, the fourth is free. Without
    that the group norms, which divide by what little contrast a flat picture has, made latents of whatever they found
    at the borders, and a denoiser learned those instead of the shapes (decision 10). A Kullback-Leibler term left
    channels as noise that the decoder never learned to read. Noise on the latents keeps the decoder smooth. Crops grow
    from half the side to all of it: small ones hold more edges and colours a pixel.
    """
    torch.manual_seed(plan.seed)
    vae = build_vae().to(device)
    done = work / "vae"
    if done.exists():
        return load_vae(done, device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=plan.vae_rate, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(work / "vae.pt", work / "vae.jsonl", {"vae": vae, "optimizer": optimizer})
    colours = cell_colours(to_model(drawn[:1000], device))
    mean, std = colours.mean((0, 2, 3), keepdim=True), colours.std((0, 2, 3), keepdim=True)
    for step in run.steps(plan.vae_steps, plan.keep_every, until, "autoencoder"):
        share = step / plan.vae_steps
        set_rate(optimizer, plan.vae_rate * min(1, step / 50) * (0.5 + 0.5 * math.cos(math.pi * share)))
        side = SIDE // 2 if share < 0.6 else SIDE
        count = plan.vae_batch * (SIDE // side) ** 2
        x = to_model(crops(drawn, side, mine(range(count)), (plan.seed, step)), device)
        with autocast(device):
            z = vae.encode(x).latent_dist.mean.float()
            y = vae.decode(z + latent_noise(z, step, most=0.3)).sample.float()
        away = (z[:, :3] - (cell_colours(x) - mean) / std).square().mean()
        error = picture_error(x, y)
        descend(error + (1 - 0.9 * share) * away + 0.002 * z[:, 3].square().mean(), optimizer)
        run.log(step, error=error.item(), away=away.item(), absolute=(y - x).abs().mean().item())
    if run.stopped:
        return None
    vae.eval()
    z = torch.cat([latents_of(vae, drawn[i : i + 100], device) for i in range(0, min(2000, len(drawn)), 100)]).float()
    standardise(vae, z.mean((0, 2, 3)), z.std((0, 2, 3)))
    if leads():
        vae.save_pretrained(work / "vae.part")
        (work / "vae.part").rename(done)
    with torch.no_grad():
        seen = vae(to_model(drawn[:16], device)).sample
    pairs = zip(to_model(drawn[:16], device), seen, strict=True)
    sheet([to_picture(x) for pair in pairs for x in pair], 8).save(work / "vae.png")
    return vae


def cell_colours(x: torch.Tensor) -> torch.Tensor:
    """Mean opponent colours of the 8x8 pixels of each latent cell: [B, 3, h, w] to [B, 3, h / 8, w / 8]."""
    return torch.einsum("ij,bjhw->bihw", torch.tensor(OPPONENT, device=x.device), F.avg_pool2d(x, 8))


def latent_noise(z: torch.Tensor, step: int, most: float) -> torch.Tensor:
    """Noise for the decoder's input, of a standard deviation drawn from 0..`most` for each picture."""
    rng = torch.Generator().manual_seed(step)
    level = most * torch.rand(len(z), 1, 1, 1, generator=rng)
    return (level * torch.randn(z.shape, generator=rng)).to(z)


def picture_error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How far pictures [B, 3, h, w] are from the truth `x`, in opponent colours, pictures of little contrast counted as
    much as others; the last term is the error of each latent cell's mean colour."""
    off = torch.einsum("ij,bjhw->bihw", torch.tensor(OPPONENT, device=x.device), y - x)
    weight = 1 / x.std((1, 2, 3), keepdim=True).clamp(min=0.15)
    each = off.abs() + off.square() + 4 * F.interpolate(F.avg_pool2d(off, 8).square(), scale_factor=8)
    return (weight / weight.mean() * each).mean()


def encode(work: Path, vae: Any, drawn: np.ndarray, device: str) -> torch.Tensor:
    """Latent means of all pictures, fp16 [count, 4, 16, 16], kept in the working folder."""
    chunks = range(0, len(drawn), 100)
    paths = {start: work / "latents" / f"{start}.pt" for start in chunks}
    (work / "latents").mkdir(exist_ok=True)
    for start in tqdm(mine(chunks), "latents", unit="x100", disable=not leads()):
        if not paths[start].exists():
            save(latents_of(vae, drawn[start : start + 100], device).half(), paths[start])
    wait()
    return torch.cat([torch.load(path, weights_only=True) for path in paths.values()])


def train_decoder(work: Path, plan: Plan, drawn: np.ndarray, latents: torch.Tensor, device: str, until: float) -> bool:
    """The decoder once more, on the latents as they are: the denoiser's are kept, small shapes become sharper.

    Returns whether it is finished; the autoencoder is then in `work / "decoder"`.
    """
    if (done := work / "decoder").exists():
        return True
    torch.manual_seed(plan.seed)
    vae = load_vae(work / "vae", device)
    weights = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=plan.decoder_rate, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(work / "decoder.pt", work / "decoder.jsonl", {"vae": vae, "optimizer": optimizer})
    for step in run.steps(plan.decoder_steps, plan.keep_every, until, "decoder"):
        set_rate(
            optimizer,
            plan.decoder_rate * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / plan.decoder_steps)),
        )
        side = SIDE // 2 if step < 0.6 * plan.decoder_steps else SIDE
        count = plan.vae_batch * (SIDE // side) ** 2
        pixels, cells = matching_crops(drawn, latents, side, mine(range(count)), (plan.seed, step))
        x, z = to_model(pixels, device), cells.float().to(device)
        with autocast(device):
            y = vae.decode(z + latent_noise(z, step, most=0.05)).sample.float()
        inner = slice(8, -8) if side < SIDE else slice(None)  # what lies beyond a crop's border is not there to see
        x, y = x[..., inner, inner], y[..., inner, inner]
        descend(edge_error(x, y), optimizer)
        run.log(step, absolute=(y - x).abs().mean().item())
    if not run.stopped and leads():
        vae.eval().save_pretrained(work / "decoder.part")
        (work / "decoder.part").rename(done)
    return not run.stopped


def load_vae(folder: Path, device: str) -> Any:
    vae: Any = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
    return vae.to(device)


def edge_error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How far pictures [B, 3, h, w] are from the truth `x`, edges and their surroundings up to five times as much."""
    change = (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)).abs().amax(1, keepdim=True)
    edges = F.max_pool2d(change, 5, 1, 2)
    edges = edges / edges.amax((1, 2, 3), keepdim=True).clamp(min=0.02)
    off = torch.einsum("ij,bjhw->bihw", torch.tensor(OPPONENT, device=x.device), y - x)
    weight = 1 / x.std((1, 2, 3), keepdim=True).clamp(min=0.15)
    return (weight / weight.mean() * (1 + 4 * edges) * (off.abs() + off.square())).mean()


def crops(drawn: np.ndarray, side: int, numbers: Iterable[int], seed: tuple[int, int]) -> np.ndarray:
    """Square crops [B, side, side, 3] with something on them, at multiples of 8 pixels, one for each number."""
    return np.stack([drawn[i, y : y + side, x : x + side] for i, y, x in corners(drawn, side, numbers, seed)])


def matching_crops(
    drawn: np.ndarray, latents: torch.Tensor, side: int, numbers: Iterable[int], seed: tuple[int, int]
) -> tuple[np.ndarray, torch.Tensor]:
    """Crops of pictures [B, side, side, 3] and of their latents [B, 4, side / 8, side / 8]."""
    found = corners(drawn, side, numbers, seed)
    cells = [latents[i, :, y // 8 : (y + side) // 8, x // 8 : (x + side) // 8] for i, y, x in found]
    return np.stack([drawn[i, y : y + side, x : x + side] for i, y, x in found]), torch.stack(cells)


def corners(drawn: np.ndarray, side: int, numbers: Iterable[int], seed: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Picture, top and left of a crop for each number: the first of four tries that has something on it."""
    found = []
    for number in numbers:
        rng = np.random.default_rng((*seed, number))
        i = int(rng.integers(len(drawn)))
        tries = [(int(y), int(x)) for y, x in rng.integers(0, (SIDE - side) // 8 + 1, (4, 2)) * 8]
        full = (c for c in tries if drawn[i, c[0] : c[0] + side : 4, c[1] : c[1] + side : 4].std((0, 1)).sum() > 15)
        found.append((i, *next(full, tries[-1])))
    return found


def to_model(drawn: np.ndarray, device: str) -> torch.Tensor:
    """uint8 [B, h, w, 3] to float [B, 3, h, w] in -1..1."""
    return torch.from_numpy(drawn.copy()).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1


def to_picture(x: torch.Tensor) -> Image.Image:
    """[3, h, w] in -1..1 to a picture."""
    return Image.fromarray(((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


@torch.no_grad()
def latents_of(vae: Any, drawn: np.ndarray, device: str) -> torch.Tensor:
    with autocast(device):
        return vae.encode(to_model(drawn, device)).latent_dist.mean.float()


def sheet(images: list[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Pictures of one size in rows."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        page.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return page
