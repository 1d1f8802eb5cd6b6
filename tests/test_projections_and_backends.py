"""Fused projections and attention backends: what a method is given, and that extra passes have gradients."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from probes import Again, Sight, Through, apart
from test_family_pipelines import Pull, call
from tiny_models import MODELS
from tiny_pipes import built
from torch import Tensor

from diffguide import Guide, processors
from diffguide.maps import Watch
from diffguide.processors import PAG

FUSING = ["sd15", "sd3", "flux", "pixart", "wan"]


class Late(Pull):
    """Looks at the last blocks alone: the gradient goes through the others as the model has them."""

    def watch(self, context: Any) -> dict[str, Watch]:
        return {"words": Watch("cross", columns=(1, 2), blocks=("mid", "up"))}


def guided(pipe: Any, given: dict[str, Any]) -> Tensor:
    with Guide(pipe, Late(window=(0.0, 0.5)), PAG(scale=2.0, layers="all")) as guide:
        out = call(pipe, given)
    assert guide.report.backwards == 2
    return out


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


# Backends. Those for GPUs are stood in for by one that takes no mask, has no gradient, and counts its calls.


@pytest.fixture
def sage(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A backend in the place of sage attention: [B, N, H, D], no mask, no gradient."""
    counted: list[int] = []
    name = AttentionBackendName.SAGE

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is not None:
            raise ValueError("`attn_mask` is not supported for sage attention")
        counted.append(1)
        with torch.no_grad():
            q, k, v = (x.detach().transpose(1, 2) for x in (query, key, value))
            return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, attend)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value", "attn_mask"})
    monkeypatch.setattr("diffusers.models.attention_dispatch._check_attention_backend_requirements", lambda _: None)
    active = _AttentionBackendRegistry._active_backend
    yield counted
    _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("how", ["model", "context"])
def test_a_backend_is_left_where_attention_is_steered_or_differentiated(name: str, how: str, sage: list[int]) -> None:
    """The moves, weak passes and maps are those of torch's own attention; the pipeline's calls are the backend's."""
    pipe, given, model = built(name)
    sight = Sight()
    with Guide(pipe, sight):
        call(pipe, given)
    wanted = guided(pipe, given)
    assert not sage
    if how == "model":
        model.set_attention_backend("sage")
        told = [getattr(m.processor, "_attention_backend", None) for m in model.modules() if hasattr(m, "processor")]
        assert apart(guided(pipe, given), wanted) < 1e-4
        again = Sight()
        with Guide(pipe, again):
            call(pipe, given)
        now = [getattr(m.processor, "_attention_backend", None) for m in model.modules() if hasattr(m, "processor")]
        assert now == told
    else:
        with attention_backend("sage"):
            assert apart(guided(pipe, given), wanted) < 1e-4
            again = Sight()
            with Guide(pipe, again):
                call(pipe, given)
    assert sage, "the pipeline's own calls are not steered and keep their backend"
    for mine, theirs in zip(again.own[0] + again.of_gradient[0], sight.own[0] + sight.of_gradient[0], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_a_built_processor_compiles_in_one_graph_under_a_backend(sage: list[int]) -> None:
    model = MODELS["flux"]()
    block = model.transformer_blocks[0]
    states = [torch.randn(1, n, 32, generator=torch.Generator().manual_seed(n)) for n in (8, 6)]
    ids = torch.zeros(14, 3)
    inputs = {"temb": torch.ones(1, 32), "image_rotary_emb": model.pos_embed(ids)}
    with torch.no_grad():
        wanted = block(states[0], states[1], **inputs)
        model.set_attention_backend("sage")
        model.set_attn_processor(processors.build(model, Through(), size=(4, 8)))
        torch._dynamo.reset()
        found = torch.compile(block, backend="eager", fullgraph=True)(states[0], states[1], **inputs)
    assert not sage
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
