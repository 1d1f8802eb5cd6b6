"""What a gradient pass saves by each switch of a guide: the early stop, reuse, checkpointing."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from diffguide import passes
from diffguide.bench.statistics import Interval, quartiles
from diffguide.descent import Thrift
from diffguide.errors import ParamError, SteeringError
from diffguide.family import Family
from diffguide.footprint import gradient_memory
from diffguide.layout import Layout, Region
from diffguide.maps import Maps
from diffguide.method import Context, Method
from diffguide.processors import named
from diffguide.registry import of_model, of_pipe
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
        wishes = {
            (0, name): (watch, method.watched(watch, sites, grids)) for name, watch in method.watch(context).items()
        }
        rng = torch.Generator("cpu").manual_seed(seed)
        args, kwargs = _noise(family.example(model, size), rng)
        return cls(model, family, method, context, wishes, args, kwargs)

    @property
    def watched(self) -> list[Site]:
        return [site for _, sites in self.wishes.values() for site in sites]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def run(self, *, early: bool = True, checkpointing: bool = False) -> tuple[float, Tensor]:
        """Seconds of the forward, the loss and the backward; and the gradient [1, C, h, w] in float32."""
        began = self.now()
        blocks = passes.checkpointed(self.model) if checkpointing else contextlib.nullcontext()
        with passes.differentiable(self.model), blocks:
            z, args, kwargs = self.leaf()
            with self.looking(args, kwargs, early) as sight:
                g = passes.gradient(self.method.loss(sight.maps[0], self.context).sum(), z)
        seconds = self.now() - began
        if g is None:
            raise SteeringError(f"{type(self.method).__name__}: the gradient is not finite; use float32")
        return seconds, g

    def observe(self) -> tuple[float, Tensor]:
        """Seconds of a whole forward without a gradient, its maps recorded; and all of them in one row of numbers."""
        began = self.now()
        with torch.no_grad(), self.looking(self.args, self.kwargs, False) as sight:
            seen = [s.values.flatten() for maps in sight.maps.values() for name in maps for s in maps[name]]
        return self.now() - began, torch.cat(seen)

    def unmoved(self, *, reuse: bool) -> float:
        """Seconds of a pass that finds nothing to move, and of the pipeline's call with guidance after it."""

        def judge(maps: dict[int, Maps]) -> bool:
            self.method.loss(maps[0], self.context)
            torch.set_grad_enabled(not reuse)
            return not reuse

        began = self.now()
        with passes.differentiable(self.model):
            _, args, kwargs = self.leaf()
            with self.looking(args, kwargs, judge):
                pass
        rows = torch.zeros(1 if reuse else 2, dtype=torch.long)
        with torch.no_grad():
            passes.evaluate(self.model, *twice(self.args, self.kwargs, rows))
        return self.now() - began

    def leaf(self) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Latents to differentiate for, and the arguments with them."""
        z = self.family.latents(self.model, self.args, self.kwargs).clone().requires_grad_()
        return z, *self.family.with_latents(self.model, self.args, self.kwargs, z)

    def looking(self, args: tuple[Any, ...], kwargs: dict[str, Any], early: Any) -> Any:
        words = self.family.words(args, kwargs)
        grids = self.context.grids
        return passes.looking(self.model, self.family, args, kwargs, self.wishes, grids, words=words, early=early)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self, *, checkpointing: bool) -> float:
        """MiB that a pass keeps for its backward, counted on tensors without memory."""
        watched = {name: wish for (_, name), wish in self.wishes.items()}
        thrift = Thrift(checkpointing=checkpointing)
        size = self.context.size
        return gradient_memory(self.family, self.model, size, watched, self.context.grids, thrift)


def twice(args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of one row, for as many as `rows` has zeros."""
    widen = _each(lambda t: t[rows.to(t.device)] if t.ndim and len(t) == 1 else t)
    return widen(args), widen(kwargs)


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
    """Time passes with and without each switch `limit` times, in turns.

    On the pipeline's denoiser and on a random one shaped like SD 1.5.
    """
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
                gradient_pass = Pass.prepare(model, method, side(model))
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
    """Each switch against the pass without it: seconds in turns, memory, and how far gradients are apart."""
    each: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "early_stop": (lambda: gradient_pass.run(early=False), lambda: gradient_pass.run(early=True)),
        "reuse": (
            lambda: (gradient_pass.unmoved(reuse=False), None),
            lambda: (gradient_pass.unmoved(reuse=True), None),
        ),
        "checkpointing": (lambda: gradient_pass.run(), lambda: gradient_pass.run(checkpointing=True)),
    }
    ratios: dict[str, list[float]] = {name: [] for name in each}
    apart: dict[str, list[float]] = {name: [] for name in each}
    for pair in each.values():  # once each, to warm up
        for run_one in pair:
            run_one()
    for repeat in range(repeats):
        for name, pair in each.items():
            order = (0, 1) if repeat % 2 == 0 else (1, 0)
            found = {which: pair[which]() for which in order}
            ratios[name].append(found[1][0] / found[0][0])
            if found[0][1] is not None:
                apart[name].append(float((found[1][1] - found[0][1]).abs().max() / found[0][1].abs().max()))
        if bar is not None:
            bar.update()
    usual, less = (gradient_pass.memory(checkpointing=c) for c in (False, True))
    return {
        **{f"{name}_seconds_ratio": quartiles(ratios[name]) for name in each},
        "early_stop_gradient_error": quartiles(apart["early_stop"]),
        "checkpointing_gradient_error": quartiles(apart["checkpointing"]),
        "checkpointing_memory_ratio": quartiles([less / usual]),
        "memory": quartiles([usual]),
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


def side(model: nn.Module) -> Grid:
    """Height and width of its latents."""
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
    draw = _each(lambda t: torch.full_like(t, TIMESTEP) if t.ndim == 0 else torch.randn(t.shape, generator=rng).to(t))
    return draw(value)


def _each(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """A function that changes every tensor of a structure."""

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return tuple(walk(v) for v in value)
        return value

    return walk
