"""Released configurations on the meta device: where attention is found, and what a gradient pass would keep.

The figures of memory were counted apart from this package, with hooks on what autograd saves: the whole forward, frozen
weights, fused attention, one picture.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import diffusers
import meta_models
import pytest
import torch
from meta_models import without_memory

from diffguide import AttendExcite, CaptureMaps, Guide
from diffguide.footprint import gradient_memory
from diffguide.registry import of_model, sites_of

HALF, BRAIN = torch.float16, torch.bfloat16


def made(name: str, dtype: torch.dtype) -> Any:
    return without_memory(getattr(meta_models, name), dtype)


SITES = {
    # parameters in 1e9, and sites by kind
    "sdxl": (2.567, {"self": 70, "cross": 70}),
    "sd35_large": (8.06, {"joint": 38}),
    "sd35_medium": (2.24, {"joint": 24, "self": 13}),
    "flux_dev": (11.90, {"joint": 19 + 38}),
    "wan_14b": (14.29, {"self": 40, "cross": 40}),
}


@pytest.mark.parametrize("name", SITES)
def test_every_attention_module_of_a_released_model_is_found(name: str) -> None:
    model = made(name, BRAIN)
    size, kinds = SITES[name]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(size, rel=5e-3)
    sites = sites_of(of_model(model), model)
    assert Counter(site.kind for site in sites) == kinds
    assert len({site.name for site in sites}) == len(sites)
    assert all(model.get_submodule(site.name) is site.module for site in sites)


def test_the_blocks_of_sdxl_are_where_they_are_said_to_be() -> None:
    model = made("sdxl", HALF)
    family = of_model(model)
    words = [s for s in sites_of(family, model) if s.kind == "cross"]
    parts = Counter(".".join(s.name.split(".")[:2]) if s.block != "mid" else "mid" for s in words)
    assert parts == {"down_blocks.1": 4, "down_blocks.2": 20, "mid": 10, "up_blocks.0": 30, "up_blocks.1": 6}
    grids = {s.name.split(".")[1] if s.block != "mid" else "mid": family.grid(s, (96, 168)) for s in words}
    assert grids == {"1": (48, 84), "2": (24, 42), "mid": (24, 42), "0": (24, 42)}


KEPT = [
    # latent cells, and GiB
    ("sd15", HALF, (64, 64), 0.72),
    ("sd15", HALF, (96, 96), 1.62),
    ("sdxl", HALF, (128, 128), 4.97),
    ("sd3_medium", HALF, (128, 128), 3.06),
    ("pixart", HALF, (128, 128), 3.01),
    ("flux_dev", BRAIN, (128, 128), 20.1),
    ("wan_1b", BRAIN, (21, 60, 104), 67.5),
]


@pytest.mark.parametrize(("name", "dtype", "size", "gib"), KEPT, ids=[f"{k[0]}-{k[2][-1]}" for k in KEPT])
def test_the_estimate_of_a_whole_forward_is_what_was_counted(
    name: str, dtype: torch.dtype, size: tuple[int, ...], gib: float
) -> None:
    model = made(name, dtype)
    assert gradient_memory(of_model(model), model, size, {}, {}) / 1024 == pytest.approx(gib, rel=0.02)


def test_a_model_without_weights_can_be_explained() -> None:
    """FLUX.1-dev: what words alone would keep, up to the last double or single block that is watched."""
    pipe = SimpleNamespace(
        transformer=made("flux_dev", BRAIN),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae_scale_factor=8,
    )
    plan = Guide(pipe, AttendExcite(words=("fox",)), CaptureMaps(words=("owl",))).explain(height=1024, width=1024)
    assert not plan.refusals and len(plan.sites["attend-excite"]) == 57
    assert "57 attention modules (57 joint), latents 128x128" in plan.lines[0]
    assert plan.memory is not None and plan.memory > 20 * 1024  # and the maps
