"""From nothing to the weights of an embedded model: `python -m diffguide zoo train shapes-unet`.

Four stages, each resumed where it stopped: draw the pictures, train the autoencoder, train the denoiser on its latents,
sharpen the decoder. A model that stands on another's autoencoder skips the second and the last. Everything a later
stage needs lies in the working folder. The learning rate is held, then falls linearly over the last part of the run, so
that a finished run can be carried on from the checkpoint kept before the fall.
"""

import json
import math
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffguide import zoo
from diffguide.zoo.autoencoder import encode, load_vae, train_decoder, train_vae
from diffguide.zoo.data import pictures
from diffguide.zoo.denoiser import train_denoiser
from diffguide.zoo.denoisers import DENOISERS
from diffguide.zoo.loop import leads, wait
from diffguide.zoo.plan import Plan


def train(
    work: Path,
    plan: Plan,
    device: str = "cpu",
    name: str = "shapes-unet",
    *,
    workers: int = 1,
    until: float = math.inf,
    start: Path | None = None,
) -> Path | None:
    """Run every stage that is not done and write the pipeline to `work / "pipeline"`.

    `workers` processes share each batch; on a CPU one of one thread per core is faster than one process with as many
    threads. `until` is a time (seconds since the epoch) at which the run stops at a checkpoint: it then returns None,
    and the next call carries on. `start` is the folder of a trained pipeline: a new run begins with its weights, and
    keeps its autoencoder. A model that stands on another begins with that.
    """
    if start is None and (base := DENOISERS[name].base):
        start = zoo.path(base)
    work.mkdir(parents=True, exist_ok=True)
    (work / "plan.json").write_text(json.dumps(asdict(plan), indent=1))
    pictures(work, plan.seed, plan.pictures)
    if workers == 1:
        _work(0, 1, 0, work, plan, device, name, until, start)
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(_work, (workers, port, work, plan, device, name, until, start), nprocs=workers)
    pipeline = work / "pipeline"
    return pipeline if pipeline.exists() else None


def _work(
    rank: int,
    workers: int,
    port: int,
    work: Path,
    plan: Plan,
    device: str,
    name: str,
    until: float,
    start: Path | None,
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
        trained = (work / "denoiser").exists()
        if not trained:
            torch.manual_seed(plan.seed)
            denoiser = DENOISERS[name](device, start)
            trained = train_denoiser(work, denoiser, plan, vae, latents, device, until)
        if trained and DENOISERS[name].base is None:
            trained = train_decoder(work, plan, drawn, latents, device, until)
        if trained and leads() and not (work / "pipeline").exists():
            _finish(work, name)
    if workers > 1:
        dist.destroy_process_group()


def _finish(work: Path, name: str) -> None:
    """The trained denoiser with the sharper decoder, where there is one."""
    parts: dict[str, Any] = zoo.left_out(work / "denoiser")
    if (work / "decoder").exists():
        parts["vae"] = load_vae(work / "decoder", "cpu")
    pipe = DENOISERS[name].pipeline_class.from_pretrained(work / "denoiser", **parts)
    pipe.save_pretrained(work / "pipeline.part")
    (work / "pipeline.part").rename(work / "pipeline")
