"""Our Attend-and-Excite beside the pipeline that diffusers has for it: the same pictures, for how much less?

One picture at a time, since that pipeline takes no more; the same prompts, noise, subjects, steps and step sizes.
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from diffguide.bench import pictures
from diffguide.bench.contenders import PLAIN, Contender, contenders
from diffguide.bench.drawing import Job, Painted, guided
from diffguide.bench.prompts import Prompt, load_prompts
from diffguide.bench.semantics import SemanticsBench
from diffguide.errors import ParamError
from diffguide.processors import AttendExcite
from diffguide.registry import of_pipe
from diffguide.zoo import GUIDANCE_SCALE

__all__ = ["BENCH", "OPTIONS", "check", "run"]

OPTIONS = tuple(option for option in pictures.OPTIONS if option not in ("batch", "guidance_scale"))
PEER = "diffusers"
SORTS = ("two", "three")  # of prompts: subjects whose shapes differ have a token each
LIMIT = 40


class PeersBench(SemanticsBench):
    """Success and cost of one method in two implementations."""

    methods = (PLAIN, PEER, "attend-excite")
    batch, seeds = 1, 1
    losses = True

    def tasks(self, limit: int | None) -> list[Prompt]:
        sorts = [prompt for prompt in load_prompts() if prompt.sort in SORTS and one_token_each(prompt)]
        return sorts[: limit or LIMIT]

    def show(self, chosen: Sequence[Prompt]) -> Sequence[Prompt]:
        return chosen[: pictures.ON_SHEET]

    def contenders(self, methods: Sequence[str] | None = None) -> list[Contender]:
        found = []
        for contender in contenders([m for m in methods or self.methods if m != PEER], layouts=False):
            if contender.method not in (None, AttendExcite):
                raise ParamError(f"{contender.label}: this bench compares attend-excite with its peer, nothing else")
            found.append(contender if contender.method is None else ours(contender))
        return [found[0], Contender(PEER, None, {}, peer=theirs), *found[1:]]


def one_token_each(prompt: Prompt) -> bool:
    return len({shape for _, shape, _ in prompt.kinds}) == len(prompt.kinds)


def ours(contender: Contender) -> Contender:
    return Contender(contender.label, contender.method, contender.settings, peer=by_guide)


def by_guide(pipe: Any, jobs: Sequence[Job], contender: Contender, steps: int) -> Painted:
    (job,) = jobs
    return guided(pipe, jobs, contender, steps, tokens=tuple(subjects(pipe, job.task)))


def theirs(pipe: Any, jobs: Sequence[Job], contender: Contender, steps: int) -> Painted:
    """By diffusers' own pipeline, with the settings that `AttendExcite` has by default."""
    from diffusers import StableDiffusionAttendAndExcitePipeline

    (job,) = jobs
    default = AttendExcite()
    takes = inspect.signature(StableDiffusionAttendAndExcitePipeline.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in takes}
    peer = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    with as_it_was(pipe.unet), counted(peer) as counts, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid")  # from within that pipeline
        drawn: Any = peer(
            job.task.caption,
            token_indices=subjects(pipe, job.task),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=job.noise(),
            max_iter_to_alter=round(default.window[1] * steps),
            thresholds={round(at * steps): t for at, t in zip(default.refine, default.targets, strict=True)},
            scale_factor=int(default.scale),
            attn_res=(default.side, default.side),  # type: ignore[arg-type]
        )
    return Painted(drawn.images, counts["forwards"], counts["backwards"], counts["loss"])


def subjects(pipe: Any, prompt: Prompt) -> list[int]:
    """The column of the last token of each thing: its shape."""
    family, _ = of_pipe(pipe)
    return [family.columns(pipe, prompt.caption, f"{color} {shape}", None)[-1] for color, shape, _ in prompt.kinds]


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """That pipeline leaves its processors in the model."""
    processors = dict(model.attn_processors)  # type: ignore[call-overload]
    try:
        yield
    finally:
        model.set_attn_processor(processors)  # type: ignore[operator]


@contextlib.contextmanager
def counted(peer: Any) -> Iterator[dict[str, float]]:
    """Rows that its denoiser evaluates, its backward passes, and the loss of the last."""
    counts = {"forwards": 0.0, "backwards": 0.0, "loss": float("nan")}

    def forward(_: nn.Module, args: tuple[Any, ...]) -> None:
        counts["forwards"] += len(args[0])

    def update(latents: torch.Tensor, loss: torch.Tensor, step_size: float) -> torch.Tensor:
        counts["backwards"] += 1
        counts["loss"] = loss.item()
        return type(peer)._update_latent(latents, loss, step_size)

    handle = peer.unet.register_forward_pre_hook(forward)
    peer._update_latent = update
    try:
        yield counts
    finally:
        handle.remove()
        del peer._update_latent


BENCH = PeersBench()
run = partial(pictures.run, BENCH)


def check(*, methods: Sequence[str] | None = None, against: str | None = None, **_: Any) -> None:
    """Raise ParamError where `run` would, before a model is loaded."""
    pictures.check(BENCH, methods, against)
