"""From nothing to the weights of `shapes-unet`: `python -m diffguide zoo train shapes-unet`.

Four stages, each resumed where it stopped: draw the pictures, train the autoencoder, train text encoder and U-Net on
its latents, sharpen the decoder. Everything a later stage needs lies in the working folder. The learning rate is
held, then falls linearly over the last part of the run, so that a finished run can be carried on from the checkpoint
kept before the fall.
"""

import json
import math
import os
import random
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

from diffguide.zoo.data import pictures, training_scene
from diffguide.zoo.models import assemble, build_scheduler, build_text_encoder, build_unet, build_vae, standardise
from diffguide.zoo.tokenizer import build_tokenizer
from diffguide.zoo.world import SIDE, caption


@dataclass(frozen=True)
class Plan:
    """What a training run is made of."""

    seed: int = 0
    pictures: int = 40_000
    vae_steps: int = 2_000
    vae_batch: int = 8
    vae_rate: float = 2e-3
    steps: int = 6_000
    batch: int = 64
    rate: float = 1e-3
    warmup: int = 200
    fall: float = 0.25  # the last part of the steps, over which the rate falls to zero
    ema: float = 0.998
    unconditional: float = 0.10  # share of empty captions, for classifier-free guidance
    decoder_steps: int = 1_000
    decoder_rate: float = 1e-3
    keep_every: int = 250
    sheet_every: int = 1_000


# luminance, red against the rest, green against blue: hues weigh more than in RGB, where they are learned very late
OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (1.0, -0.5, -0.5), (0.0, 1.0, -1.0))

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


def train(
    work: Path,
    plan: Plan,
    device: str = "cpu",
    *,
    workers: int = 1,
    until: float = math.inf,
    start: Path | None = None,
) -> Path | None:
    """Run every stage that is not done and write the pipeline to `work / "pipeline"`.

    `workers` processes share each batch; on a CPU one of one thread per core is faster than one process with as many
    threads. `until` is a time (seconds since the epoch) at which the run stops at a checkpoint: it then returns None,
    and the next call carries on. `start` is the folder of a trained pipeline: a new run begins with its weights, and
    keeps its autoencoder.
    """
    work.mkdir(parents=True, exist_ok=True)
    (work / "plan.json").write_text(json.dumps(asdict(plan), indent=1))
    pictures(work, plan.seed, plan.pictures)
    if workers == 1:
        _work(0, 1, 0, work, plan, device, until, start)
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_work, (workers, port, work, plan, device, until, start), nprocs=workers)
    pipeline = work / "pipeline"
    return pipeline if pipeline.exists() else None


def _work(
    rank: int, workers: int, port: int, work: Path, plan: Plan, device: str, until: float, start: Path | None
) -> None:
    """One worker's way through the stages."""
    if workers > 1:
        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if device == "cuda":
            device = f"cuda:{rank}"
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", rank=rank, world_size=workers)
    drawn = pictures(work, plan.seed, plan.pictures)
    if start is None or (work / "vae").exists():
        vae = train_vae(work, plan, drawn, device, until)
    else:
        vae = load_vae(start / "vae", device)
        if leads():
            vae.save_pretrained(work / "vae")
        wait()
    if vae is not None:
        latents = encode(work, vae, drawn, device)
        if train_unet(work, plan, vae, latents, device, until, start):
            train_decoder(work, plan, drawn, latents, device, until)
    if workers > 1:
        dist.destroy_process_group()


def train_vae(work: Path, plan: Plan, drawn: np.ndarray, device: str, until: float) -> Any:
    """A deterministic autoencoder, its latents standardised at the end.

    A Kullback-Leibler term, however light, left latent channels as noise that the decoder never learned to read, and
    with them some of the hues; a little noise on the latents is enough to keep the decoder smooth. Crops grow from a
    quarter of the side to all of it: small ones hold more edges and colours a pixel.
    """
    torch.manual_seed(plan.seed)
    vae = build_vae().to(device)
    done = work / "vae"
    if done.exists():
        return load_vae(done, device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=plan.vae_rate, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(work / "vae.pt", work / "vae.jsonl", {"vae": vae, "optimizer": optimizer})
    opponent = torch.tensor(OPPONENT, device=device)
    for step in run.steps(plan.vae_steps, plan.keep_every, until, "autoencoder"):
        share = step / plan.vae_steps
        set_rate(optimizer, plan.vae_rate * min(1, step / 50) * (0.5 + 0.5 * math.cos(math.pi * share)))
        side = SIDE // 4 if share < 0.6 else SIDE // 2 if share < 0.8 else SIDE
        count = round(plan.vae_batch * min(12, (SIDE / side) ** 2))
        x = to_model(crops(drawn, side, mine(range(count)), (plan.seed, step)), device)
        with autocast(device):
            z = vae.encode(x).latent_dist.mean
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(step)).to(z)
            y = vae.decode(z + 0.03 * z.detach().std() * noise).sample
        off = torch.einsum("ij,bjhw->bihw", opponent, y.float() - x)
        # the last term is the error of each latent cell's mean colour
        error = off.abs().mean() + off.square().mean() + 4 * F.avg_pool2d(off, 8).square().mean()
        descend(optimizer, error)
        run.log(step, error=error.item(), absolute=(y.float() - x).abs().mean().item())
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
    optimizer = torch.optim.AdamW(weights, lr=plan.rate, betas=(0.9, 0.99), weight_decay=1e-2)
    average = EMAModel(weights, decay=plan.ema, use_ema_warmup=True, power=0.8)
    alphas = build_scheduler().alphas_cumprod.to(device)
    run = Run(
        work / "unet.pt", work / "unet.jsonl", {"text": text, "unet": unet, "optimizer": optimizer, "ema": average}
    )
    fall = round(plan.steps * (1 - plan.fall))
    for step in run.steps(plan.steps, plan.keep_every, until, "U-Net", milestone=fall):
        set_rate(
            optimizer, plan.rate * min(1, (step + 1) / plan.warmup, (plan.steps - step) / max(1, plan.steps - fall))
        )
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
        descend(optimizer, loss, clip=1.0)
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


def train_decoder(work: Path, plan: Plan, drawn: np.ndarray, latents: torch.Tensor, device: str, until: float) -> None:
    """The decoder once more, on the latents as they are: the U-Net's are kept, small shapes become sharper.

    Afterwards the whole pipeline is in `work / "pipeline"`.
    """
    torch.manual_seed(plan.seed)
    vae = load_vae(work / "vae", device)
    weights = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=plan.decoder_rate, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(work / "decoder.pt", work / "decoder.jsonl", {"vae": vae, "optimizer": optimizer})
    opponent = torch.tensor(OPPONENT, device=device)
    for step in run.steps(plan.decoder_steps, plan.keep_every, until, "decoder"):
        set_rate(
            optimizer,
            plan.decoder_rate * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / plan.decoder_steps)),
        )
        rng = random.Random(plan.seed * 1_000_003 + step)
        chosen = mine(rng.sample(range(len(latents)), plan.vae_batch))
        x, z = to_model(drawn[chosen], device), latents[chosen].float().to(device)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(step)).to(device)
        with autocast(device):
            y = vae.decode(z + 0.03 * noise).sample
        off = torch.einsum("ij,bjhw->bihw", opponent, y.float() - x)
        descend(optimizer, off.abs().mean() + off.square().mean())
        run.log(step, absolute=(y.float() - x).abs().mean().item())
    if not run.stopped and leads():
        pipe = StableDiffusionPipeline.from_pretrained(work / "denoiser", vae=vae.eval())
        pipe.save_pretrained(work / "pipeline.part")
        (work / "pipeline.part").rename(work / "pipeline")


class Run:
    """A loop of steps with a progress bar, a log of losses in JSON lines, and checkpoints that survive a kill."""

    def __init__(self, checkpoint: Path, log: Path, parts: dict[str, Any]) -> None:
        self.checkpoint, self.path, self.parts = checkpoint, log, parts
        self.first, self.spent, self.stopped = 0, 0.0, False
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.first, self.spent = state["step"], state["seconds"]

    def steps(
        self, count: int, keep_every: int, until: float, name: str, milestone: int | None = None
    ) -> Iterator[int]:
        """Step numbers from the checkpoint on; a checkpoint every `keep_every` steps, another kept at `milestone`."""
        started = time.time() - self.spent
        numbers = range(self.first, count)
        with tqdm(numbers, name, count, initial=self.first, unit="step", disable=not leads()) as self.bar:
            for step in self.bar:
                yield step
                self.spent = time.time() - started
                self.stopped = agree(time.time() > until)
                if self.stopped or (step + 1) % keep_every == 0 or step + 1 == count:
                    self.keep(self.checkpoint, step + 1)
                if step + 1 == milestone:
                    self.keep(self.checkpoint.with_suffix(".before-fall.pt"), step + 1)
                if self.stopped:
                    return

    def keep(self, path: Path, step: int) -> None:
        if leads():
            save(
                {name: part.state_dict() for name, part in self.parts.items()} | {"step": step, "seconds": self.spent},
                path,
            )

    def log(self, step: int, **values: float) -> None:
        if leads() and step % 10 == 0:
            self.bar.set_postfix({k: f"{v:.4f}" for k, v in values.items()})
            with self.path.open("a") as lines:
                lines.write(json.dumps({"step": step, "seconds": round(self.spent, 1), **values}) + "\n")


def leads() -> bool:
    """Whether this worker writes the files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def mine(batch: Any) -> Any:
    """This worker's share of a batch: every n-th item."""
    return batch[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else batch


def agree(flag: bool) -> bool:
    """Whether any worker says so."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor([float(flag)])
    dist.all_reduce(votes)
    return votes.item() > 0


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def average_gradients(weights: Iterable[torch.nn.Parameter]) -> None:
    """Make every worker's gradients the mean over the workers."""
    if dist.is_initialized():
        gradients = [w.grad for w in weights if w.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients]) / dist.get_world_size()
        dist.all_reduce(flat)
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))


def save(value: Any, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor, clip: float = 1.0) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(optimizer.param_groups[0]["params"])
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()


def autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def load_vae(folder: Path, device: str) -> Any:
    vae: Any = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
    return vae.to(device)


def crops(drawn: np.ndarray, side: int, numbers: Iterable[int], seed: tuple[int, int]) -> np.ndarray:
    """Square crops [B, side, side, 3] with something on them, at multiples of 8 pixels, one for each number."""
    found = []
    for number in numbers:
        rng = np.random.default_rng((*seed, number))
        picture = drawn[rng.integers(len(drawn))]
        corners = rng.integers(0, (SIDE - side) // 8 + 1, (4, 2)) * 8
        tried = [picture[y : y + side, x : x + side] for y, x in corners]
        found.append(next((c for c in tried if c[::4, ::4].std((0, 1)).sum() > 15), tried[-1]))
    return np.stack(found)


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


def sample_sheet(vae: Any, text: Any, tokenizer: Any, unet: Any) -> Image.Image:
    """Two pictures for each prompt of `SHEET`, 25 steps, guidance 4."""
    pipe = assemble(vae, text, tokenizer, unet)
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    out: Any = pipe([*SHEET, *SHEET], num_inference_steps=25, guidance_scale=4.0, generator=rng)
    return sheet(out.images, len(SHEET))
