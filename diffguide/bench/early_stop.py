"""What is saved by ending a gradient pass at the last attention module that the loss looks at."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from diffguide import passes
from diffguide.bench.statistics import Interval, quartiles
from diffguide.errors import ParamError, SteeringError
from diffguide.family import Family, of_model, of_pipe
from diffguide.layout import Layout, Region
from diffguide.method import Context, Method
from diffguide.processors import named
from diffguide.site import Grid, Site

OPTIONS = ("methods", "limit")
METHODS = ("backward-guidance", "bacon")
REPEATS = 10
SIGMA = 10.0  # noise over signal, early in a run
TIMESTEP = 900.0
COLUMNS = {"red circle": [2, 3], "blue square": [6, 7]}  # of the text states, which are noise here
LAYOUT = Layout(Region("red circle", box=(0.1, 0.2, 0.45, 0.6)), Region("blue square", box=(0.55, 0.4, 0.9, 0.85)))


@dataclass(frozen=True)
class Pass:
    """All that one gradient pass needs."""

    model: nn.Module
    family: Family
    method: Method
    context: Context
    wishes: passes.Wishes
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def prepare(cls, model: nn.Module, method: Method, size: Grid, seed: int = 0) -> "Pass":
        """A pass over noise of this latent size, with random text states."""
        family = of_model(model)
        sites = family.sites(model)
        grids = {site: family.grid(site, size) for site in sites}
        context = _context(sites, grids, size)
        method.prepare(context)
        wishes = {(0, name): (watch, watch.choose(sites, grids)) for name, watch in method.watch(context).items()}
        rng = torch.Generator("cpu").manual_seed(seed)
        args, kwargs = _noise(family.example(model, size), rng)
        return cls(model, family, method, context, wishes, args, kwargs)

    @property
    def watched(self) -> list[Site]:
        return [site for _, sites in self.wishes.values() for site in sites]

    def run(self, *, early: bool) -> tuple[float, Tensor]:
        """Seconds of the forward, the loss and the backward; and the gradient [1, C, h, w] in float32."""
        cuda = next(self.model.parameters()).is_cuda
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        with passes.differentiable(self.model):
            family, model = self.family, self.model
            z = family.latents(model, self.args, self.kwargs).clone().requires_grad_()
            args, kwargs = family.with_latents(model, self.args, self.kwargs, z)
            words = family.words(args, kwargs)
            with passes.looking(
                model, family, args, kwargs, self.wishes, self.context.grids, words=words, early=early
            ) as sight:
                g = passes.gradient(self.method.loss(sight.maps[0], self.context).sum(), z)
        if cuda:
            torch.cuda.synchronize()
        if g is None:
            raise SteeringError(f"{type(self.method).__name__}: the gradient is not finite; use float32")
        return time.perf_counter() - began, g


def check(*, methods: Sequence[str] = METHODS, **_: int) -> None:
    """Raise ParamError where `run` would, before a model is loaded."""
    unknown = [name for name in methods if name not in METHODS]
    if unknown or isinstance(methods, str):
        raise ParamError(f"methods = {methods!r}: this bench times {', '.join(METHODS)}; name one or both in a list")


def run(
    pipe: Any,
    frame: dict[str, Any],
    *,
    methods: Sequence[str] = METHODS,
    limit: int = REPEATS,
    part: Path | None = None,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Time both passes `limit` times, in turns, on the pipeline's denoiser and on a random one shaped like SD 1.5."""
    check(methods=methods)
    _, attribute = of_pipe(pipe)
    own: nn.Module = getattr(pipe, attribute)
    weight = next(own.parameters())
    other = sd15_shaped()
    other.to(device=weight.device, dtype=weight.dtype)  # type: ignore[call-overload]
    rows = []
    cases = [(str(frame["model"]), own), ("random, SD 1.5 blocks", other)]
    with tqdm(total=len(cases) * len(methods) * limit, unit="pair", disable=not progress, file=sys.stderr) as bar:
        for label, model in cases:
            for name in methods:
                bar.set_description(f"{name}, {label}")
                method = named(name)(layout=LAYOUT)  # type: ignore[call-arg]
                gradient_pass = Pass.prepare(model, method, _side(model))
                sites = [site.name for site in gradient_pass.watched]
                rows.append(
                    {
                        "method": name,
                        "denoiser": label,
                        "n": limit,
                        **compare(gradient_pass, limit, bar),
                        "sites": sites,
                    }
                )
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
    settings = {
        "repeats": limit,
        "device": device,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    return {
        "rows": rows,
        "settings": settings,
        "intervals": "lower and upper quartile around the median of the repeats",
    }


def compare(gradient_pass: Pass, repeats: int, bar: Any = None) -> dict[str, Interval]:
    """Seconds with and without the early stop, their ratio, and the share of repeats with bit-identical gradients."""
    full, early, same = [], [], []
    for early_first in (False, True):  # once each, to warm up
        gradient_pass.run(early=early_first)
    for repeat in range(repeats):
        order = (False, True) if repeat % 2 == 0 else (True, False)
        found = {stops: gradient_pass.run(early=stops) for stops in order}
        full.append(found[False][0])
        early.append(found[True][0])
        same.append(float(torch.equal(found[False][1], found[True][1])))
        if bar is not None:
            bar.update()
    identical = sum(same) / len(same)
    return {
        "seconds_full": quartiles(full),
        "seconds_early": quartiles(early),
        "seconds_ratio": quartiles([e / f for e, f in zip(early, full, strict=True)]),
        "gradient_identical": {"value": identical, "low": min(same), "high": max(same)},
    }


def sd15_shaped(widths: tuple[int, ...] = (32, 64, 128, 128), side: int = 64, seed: int = 0) -> UNet2DConditionModel:
    """A U-Net with the blocks of Stable Diffusion 1.5 at `side` x `side` latents, narrow and with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet2DConditionModel(
            sample_size=side,
            block_out_channels=widths,
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=8,
            cross_attention_dim=64,
            norm_num_groups=min(32, widths[0]),
        )
    return model.eval().requires_grad_(False)


def _side(model: nn.Module) -> Grid:
    side: Any = model.config.sample_size  # type: ignore[union-attr]
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _context(sites: list[Site], grids: dict[Site, Grid], size: Grid) -> Context:
    return Context(
        prompts=["a red circle and a blue square"],
        find=lambda b, phrase, occurrence: COLUMNS[phrase],
        content=lambda b: list(range(1, 8)),
        step=0,
        steps=30,
        sigma=SIGMA,
        sites=sites,
        grids=grids,
        size=size,
        pictures=[0],
    )


def _noise(value: Any, rng: torch.Generator) -> Any:
    """The same structure with noise in every tensor; single numbers are timesteps."""
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return torch.full_like(value, TIMESTEP)
        return torch.randn(value.shape, generator=rng).to(value)
    if isinstance(value, dict):
        return {k: _noise(v, rng) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_noise(v, rng) for v in value)
    return value
