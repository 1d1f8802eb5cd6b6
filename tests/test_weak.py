"""Weak passes that change blocks, latents or the model: SkipLayer, TPG, SAG and AutoGuidance."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, StableDiffusionSAGPipeline
from hypothesis import given
from hypothesis import strategies as st
from probes import apart
from test_family_pipelines import call
from tiny_pipes import PIPES, built
from torch import Tensor, nn

from diffguide import stepping
from diffguide.blocks import BlockCall, blocks
from diffguide.errors import AttachError, ParamError, SteeringError
from diffguide.guide import Guide
from diffguide.pipelines.modular import WeakGuidance
from diffguide.processors import PAG, SAG, TPG, AutoGuidance, SkipLayer
from diffguide.registry import of_model, sites_of

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
WHOLE = {"window": (0.0, 1.0)}
WITH_BLOCKS = sorted(set(PIPES) - {"sana"})  # Sana has no attention among image tokens that a map could be had of


@dataclass(frozen=True)
class Skip(SkipLayer):
    """Keeps the predictions."""

    kept: list[dict[str, Tensor]] = field(default_factory=list, compare=False)

    def shift(self, pred: dict[str, Tensor]) -> Tensor:
        self.kept.append(pred)
        return torch.zeros_like(pred["weak"])


def first_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """One block of each class, by path."""
    found: dict[type, tuple[str, nn.Module]] = {}
    for path in blocks([s for s in sites_of(of_model(model), model) if s.number >= 0]):
        block = model.get_submodule(path)
        found.setdefault(type(block), (path, block))
    return dict(found.values())


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_a_skipped_block_passes_on_what_it_was_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Witness: the blocks run, and what they gave is exchanged for what they were given, told apart by shape."""
    pipe, given_, model = built(name)
    if name == "qwen_image":  # as many words as image tokens
        given_ |= {"height": 48, "width": 64}
    seen: list[Tensor] = []
    model.register_forward_hook(lambda *a: seen.append(of_model(model).prediction(a[-1]).clone()))
    chosen = first_blocks(model)
    method = Skip(layers=",".join(f"{path}.*" for path in chosen), **WHOLE)
    with Guide(pipe, method):
        call(pipe, given_, num_inference_steps=1)
    cond, weak = method.kept[0]["cond"], method.kept[0]["weak"]
    (start,) = (i for i in range(len(seen[0]) - len(cond) + 1) if torch.equal(seen[0][i : i + len(cond)], cond))

    told: list[bool] = []
    for block in chosen.values():

        def forward(*args: Any, plain: Any = block.forward, **kwargs: Any) -> Any:
            states = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3]
            out = plain(*args, **kwargs)
            if isinstance(out, Tensor):
                return states[0]
            told.append(states[0].shape != states[1].shape)
            return tuple(states[0] if o is None or o.shape == states[0].shape else states[1] for o in out)

        monkeypatch.setattr(block, "forward", forward)
    seen.clear()
    call(pipe, given_, num_inference_steps=1)
    assert apart(weak, seen[0][start : start + len(cond)]) < 2e-6 < apart(weak, cond)
    assert all(told), "equal shapes tell nothing"


@given(st.integers(0, 99), st.integers(0, 50), st.integers(0, 30), st.integers(0, 9), st.integers(2, 40))
def test_tokens_are_shuffled_alike_in_every_row(seed: int, step: int, number: int, words: int, tokens: int) -> None:
    hidden = torch.arange(3.0 * (words + tokens) * 2).reshape(3, words + tokens, 2)

    def shuffled(seed: int, step: int, number: int) -> Tensor:
        asked = BlockCall("a", number, step, hidden, slice(words, words + tokens), lambda x: x, lambda: hidden)
        return TPG(seed=seed).block(asked)

    out = shuffled(seed, step, number)
    assert torch.equal(out, shuffled(seed, step, number)) and torch.equal(out[:, :words], hidden[:, :words])
    places = [out[0, :, 0].tolist().index(v) for v in hidden[0, :, 0].tolist()]
    assert torch.equal(out[:, places], hidden) and len(set(places)) == words + tokens
    if tokens > 30:
        others = shuffled(seed + 1, step, number), shuffled(seed, step + 1, number), shuffled(seed, step, number + 1)
        assert not any(torch.equal(out, other) for other in others)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "flux2", "chroma", "z_image", "lumina2", "omnigen", "wan"])
def test_only_image_tokens_are_shuffled(name: str) -> None:
    """What the first block is given, and where: its image tokens are those that the picture's noise changes."""
    pipe, given_, model = built(name)
    seen: list[BlockCall] = []

    @dataclass(frozen=True)
    class Look(TPG):
        def block(self, call: BlockCall) -> Any:
            seen.append(call)
            return call.proceed(call.hidden)

    path = next(iter(first_blocks(model)))
    for seed in (1, 2):
        with Guide(pipe, Look(layers=f"{path}.*")):
            call(pipe, given_, num_inference_steps=1, generator=torch.Generator().manual_seed(seed), latents=None)
    first, second = seen
    changed = (first.hidden != second.hidden).any(-1).any(0).nonzero().flatten().tolist()
    own = set(range(first.hidden.shape[1])[first.image])
    assert own <= set(changed)
    # layers before this one have mixed them with others in these two
    assert name in ("lumina2", "z_image") or set(changed) == own


@given(st.sampled_from(["epsilon", "v_prediction", "sample", "flow"]), st.floats(0.01, 80), st.integers(0, 99))
def test_latents_are_their_parts(kind: str, sigma: float, seed: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler() if kind == "flow" else DDIMScheduler(prediction_type=kind)
    clean, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a, b = stepping.shares(scheduler, sigma)
    assert (a + b if kind == "flow" else a**2 + b**2) == pytest.approx(1) and b / a == pytest.approx(sigma)
    z = a * clean + b * noise
    y = {"epsilon": noise, "v_prediction": a * noise - b * clean, "sample": clean, "flow": noise - clean}[kind]
    found = stepping.parts(scheduler, sigma, z, y)
    assert all(torch.allclose(f, w, atol=1e-9) for f, w in zip(found, (clean, noise), strict=True))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sag_is_the_pipeline_of_diffusers(guidance: float, kind: str) -> None:
    """Witness: its processor keeps one map, of the first attention of the mid block."""
    schedule = DDIMScheduler(**tiny.NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type=kind)
    options = {"mid_block_type": "UNetMidBlock2DCrossAttn", "attention_head_dim": 2}
    theirs = tiny.sd(schedule, StableDiffusionSAGPipeline, **options)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    wanted = tiny.call(theirs, latents=noise[:1], guidance_scale=guidance, sag_scale=0.9)
    ours = tiny.sd(schedule, **options)
    plain = tiny.call(ours, latents=noise[:1], guidance_scale=guidance)
    with Guide(ours, SAG(scale=0.9)):
        found = tiny.call(ours, latents=noise[:1], guidance_scale=guidance)
    assert apart(found, wanted) < 1e-4 < apart(found, plain)


@dataclass(frozen=True)
class Kept(AutoGuidance):
    """Keeps the predictions."""

    kept: list[dict[str, Tensor]] = field(default_factory=list, compare=False)

    def shift(self, pred: dict[str, Tensor]) -> Tensor:
        self.kept.append(pred)
        return super().shift(pred)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_weak_model_is_asked_what_the_model_is_asked(guidance: float) -> None:
    pipe, other = tiny.sd(), tiny.unet(layers_per_block=2)
    plain = tiny.call(pipe, guidance_scale=guidance)
    with Guide(pipe, AutoGuidance(weak=pipe.unet)):  # as good as itself
        assert (tiny.call(pipe, guidance_scale=guidance) - plain).abs().max() < 1e-5
    asked: list[Any] = []
    handle = pipe.unet.register_forward_pre_hook(lambda *a: asked.append(a[1:]), with_kwargs=True)
    method = Kept(weak=other, scale=1.5)
    with Guide(pipe, method) as guide:
        assert (tiny.call(pipe, guidance_scale=guidance) - plain).abs().max() > 1e-2
    handle.remove()
    assert guide.report.forwards == (12 if guidance > 1 else 8)
    for (args, kwargs), pred in zip(asked, method.kept, strict=True):
        with torch.no_grad():
            assert apart(pred["weak"], other(*args, **kwargs)[0][-1:]) < 2e-6


def test_without_guidance_it_is_the_paper_s_formula() -> None:
    pipe, other, method = tiny.sd(), tiny.unet(layers_per_block=2), Kept
    seen: list[Tensor] = []
    own = method(weak=other, scale=1.5)
    with Guide(pipe, own):
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *a, **k: (seen.append(a[0]), step(*a, **k))[1]
        tiny.call(pipe, guidance_scale=1.0)
        del pipe.scheduler.step
    for output, pred in zip(seen, own.kept, strict=True):
        assert torch.allclose(output, pred["weak"] + 2.5 * (pred["cond"] - pred["weak"]), atol=1e-6)


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ParamError, match=r"AutoGuidance.weak is not a denoiser: load .*from_pretrained"):
        Guide(tiny.sd(), AutoGuidance()).attach()
    pipe, _, _ = built("flux")
    with pytest.raises(AttachError, match="SAG finds no site"), Guide(pipe, SAG()):
        pass
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(AttachError, match=r"SkipLayer, TPG changes whole blocks, .* disable_cache"):
        Guide(pipe, SkipLayer(), TPG(), PAG()).attach()
    for name in ("skip-layer", "tpg", "sag"):
        with pytest.raises(AttachError, match=r"needs words, maps, blocks or latents, .* use Guide"):
            WeakGuidance(name)
    wide = tiny.unet(in_channels=4, out_channels=8)
    with (
        pytest.raises(SteeringError, match="give one with the same latents"),
        Guide(tiny.sd(), AutoGuidance(weak=wide)) as guide,
    ):
        tiny.call(guide.pipe)


def test_layers_by_number() -> None:
    pipe = tiny.sd()
    names = [s.name for s in sorted(sites_of(of_model(pipe.unet), pipe.unet), key=lambda s: s.number) if s.number >= 0]
    for number, name in enumerate(names):
        assert Guide(pipe, SkipLayer(layers=f"L{number}")).explain(steps=4).sites["skip-layer"] == [name]
    assert Guide(pipe, PAG(layers="L0,L2")).explain(steps=4).sites["pag"] == [names[0], names[2]]
