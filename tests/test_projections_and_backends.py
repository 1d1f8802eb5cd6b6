"""Fused projections and attention backends: what a method is given, and that extra passes have gradients."""

from typing import Any

import pytest
import torch
from probes import Again, Sight, Through
from test_family_pipelines import Pull, call
from tiny_pipes import PIPES
from torch import Tensor

from diffguide import Guide
from diffguide.processors import PAG

FUSING = ["sd15", "sd3", "flux", "pixart", "wan"]


def built(name: str) -> tuple[Any, dict[str, Any], Any]:
    pipe, given = PIPES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, given, pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def guided(pipe: Any, given: dict[str, Any]) -> Tensor:
    with Guide(pipe, Pull(window=(0.0, 0.5)), PAG(scale=2.0, layers="all")) as guide:
        out = call(pipe, given)
    assert guide.report.backwards == 2
    return out


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", FUSING)
def test_fused_projections_are_seen_as_the_separate_ones(name: str) -> None:
    """The same maps, moves and weak passes from one projection as from three."""
    pipe, given, model = built(name)
    separate, wanted = Sight(), guided(pipe, given)
    with Guide(pipe, separate):
        call(pipe, given)
    model.fuse_qkv_projections()
    assert any(hasattr(m, "to_qkv") or hasattr(m, "to_kv") for m in model.modules())
    plain = call(pipe, given)
    fused, again = Sight(), Again()
    with Guide(pipe, Through(), again):
        assert torch.equal(call(pipe, given), plain)
    with Guide(pipe, fused):
        call(pipe, given)
    for mine, theirs in zip(
        fused.own[0] + fused.of_gradient[0], separate.own[0] + separate.of_gradient[0], strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert max(again.differences) < 1e-5 * plain.abs().max()
    assert apart(guided(pipe, given), wanted) < 1e-4
    assert torch.equal(call(pipe, given), plain)
