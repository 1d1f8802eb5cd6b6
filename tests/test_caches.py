"""The caches of diffusers: extra passes leave them as they were, or the combination is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks.hooks import StateManager
from probes import Again, Sight, Through
from test_family_pipelines import Pull, call
from tiny_pipes import PIPES
from torch import Tensor

from diffguide import Guide
from diffguide.errors import AttachError
from diffguide.processors import PAG, CaptureMaps

STEPS = 6


class Halved(Again):
    """A weak pass with another attention, whose prediction is thrown away."""

    def attend(self, call: Any, proceed: Any) -> Tensor:
        return proceed(call) / 2


CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.8),
    "mag": lambda: MagCacheConfig(
        num_inference_steps=STEPS, retention_ratio=0.2, threshold=5.0, mag_ratios=torch.ones(STEPS)
    ),
    "taylor": lambda: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, max_order=1, cache_identifiers=[".*attn1?"]
    ),
}
cached = pytest.mark.parametrize("cache", sorted(CACHES))
families = pytest.mark.parametrize("name", ["flux_with_true_guidance", "wan"])


def built(name: str) -> tuple[Any, dict[str, Any]]:
    pipe, given = PIPES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, given | {"num_inference_steps": STEPS}


def draw(pipe: Any, given: dict[str, Any]) -> Tensor:
    return call(pipe, given, num_inference_steps=STEPS)


def kept(model: Any) -> set[str]:
    """Names of the contexts that something is kept for, between two calls of a run."""
    registries = [m._diffusers_hook for m in model.modules() if hasattr(m, "_diffusers_hook")]
    hooks = [hook for registry in registries for hook in registry.hooks.values()]
    return {k for hook in hooks for v in vars(hook).values() if isinstance(v, StateManager) for k in v._state_cache}


def full_passes(model: Any) -> list[int]:
    """Counts how often the queries of the last block are made."""
    count: list[int] = []
    blocks = [m for m in model.modules() if type(m).__name__.endswith("TransformerBlock")]
    attention = getattr(blocks[-1], "attn", None) or blocks[-1].attn1
    attention.to_q.register_forward_hook(lambda *_: count.append(1))
    return count


@families
@cached
def test_extra_passes_that_change_nothing_leave_a_cached_run_as_it_is(name: str, cache: str) -> None:
    pipe, given = built(name)
    exact = draw(pipe, given)
    pipe.transformer.enable_cache(CACHES[cache]())
    count = full_passes(pipe.transformer)
    plain = draw(pipe, given)
    assert len(count) < 2 * STEPS and not torch.equal(plain, exact), "the cache leaves something out"
    with Guide(pipe, Again(), Halved()):
        assert torch.equal(draw(pipe, given), plain)
    assert torch.equal(draw(pipe, given), plain)
    assert not any(context.startswith("diffguide") for context in kept(pipe.transformer))


@cached
def test_a_gradient_is_taken_through_all_blocks_and_not_through_a_cache(cache: str) -> None:
    """At the first step nothing is cached yet: the move is that of a model without one."""
    pipe, given = built("flux")
    with Guide(pipe, Pull(window=(0.0, 0.1), repeats=2)) as guide:
        draw(pipe, given)
        wanted = guide.report.steps[0].losses
    pipe.transformer.enable_cache(CACHES[cache]())
    with Guide(pipe, Pull(window=(0.0, 1.0))) as guide:
        draw(pipe, given)
        assert guide.report.backwards == STEPS
    with Guide(pipe, Pull(window=(0.0, 0.1), repeats=2)) as guide:
        draw(pipe, given)
        assert guide.report.steps[0].losses == wanted


@cached
def test_a_weak_pass_keeps_what_it_needs_until_the_run_ends(cache: str) -> None:
    """Its calls are cached as the pipeline's are, apart from them, and forgotten after the last."""
    pipe, given = built("flux")
    pipe.transformer.enable_cache(CACHES[cache]())
    seen: set[str] = set()
    pipe.transformer.register_forward_hook(lambda *_: seen.update(kept(pipe.transformer)))
    count = full_passes(pipe.transformer)
    with Guide(pipe, PAG(layers="all")) as guide:
        draw(pipe, given)
        assert guide.report.forwards == 2 * STEPS
    assert {c for c in seen if c.startswith("diffguide")} == {"diffguide weak 0"}
    assert len(count) < 2 * STEPS
    assert not kept(pipe.transformer)


def test_what_reads_or_edits_the_own_pass_is_refused_beside_a_cache() -> None:
    pipe, given = built("flux")
    for method in (CaptureMaps(), Through(), Sight()):
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        said = (
            rf"{type(method).__name__} acts inside the model's own pass, .* FirstBlockCacheConfig .*disable_cache\(\)"
        )
        assert len(Guide(pipe, method).explain().refusals) == 1
        with pytest.raises(AttachError, match=said):
            Guide(pipe, method).attach()
        pipe.transformer.disable_cache()
    with Guide(pipe, Through()):
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(AttachError, match="Through acts inside"):
            draw(pipe, given)


@pytest.mark.parametrize("config", [PyramidAttentionBroadcastConfig, FasterCacheConfig])
def test_caches_that_count_calls_are_refused(config: Any) -> None:
    pipe, _ = built("flux")
    options = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: 500}
    pipe.transformer.enable_cache(config(**options))
    with pytest.raises(AttachError, match=rf"{config.__name__} counts every call .*disable_cache\(\)"):
        Guide(pipe, PAG(layers="all")).attach()


def test_a_cache_that_nobody_tried_is_refused() -> None:
    pipe, _ = built("flux")
    pipe.transformer._cache_config = type("NewCacheConfig", (), {})()
    with pytest.raises(AttachError, match=r"NewCacheConfig has not been tried .*disable_cache\(\)"):
        Guide(pipe, PAG(layers="all")).attach()


def test_a_cache_and_checkpointing_are_refused_for_gradients() -> None:
    """A block that is run again finds what it kept the first time, and leaves the rest out."""
    pipe, _ = built("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    pipe.transformer.enable_gradient_checkpointing()
    with pytest.raises(AttachError, match="Pull needs gradients, which FirstBlockCacheConfig and gradient checkpoint"):
        Guide(pipe, Pull()).attach()


def test_the_cache_of_a_second_denoiser_counts() -> None:
    pipe, _ = built("wan_with_two_denoisers")
    pipe.transformer_2.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(AttachError, match="Through acts inside"):
        Guide(pipe, Through()).attach()
