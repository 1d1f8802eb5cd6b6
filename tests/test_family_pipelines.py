"""The same promises for every family's pipeline: what is added arrives, what is moved arrives, nothing stays."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3PAGPipeline
from tiny_models import mmdit
from tiny_pipes import PIPES
from torch import Tensor

from diffguide import Guide
from diffguide.errors import AttachError
from diffguide.maps import Maps, Watch
from diffguide.method import Context, Method, Mover
from diffguide.params import param
from diffguide.perturbation import image_block
from diffguide.processors import PAG
from diffguide.site import Call, Site

# diffusers' own Chroma imports it the old way
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")

STEPS = 4


@pytest.fixture(params=sorted(PIPES))
def case(request: pytest.FixtureRequest) -> Any:
    pipe, given = PIPES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, given


def call(pipe: Any, given: dict[str, Any], **more: Any) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    settings = {"num_inference_steps": STEPS, "output_type": "latent", "generator": rng, "return_dict": False}
    return pipe(**(given | settings | more))[0]


@dataclass(frozen=True)
class Nudge(Method):
    """The same small term in every step, from the shape of the prediction alone."""

    scale: float = param(0.1, "size of the term", low=0.0)

    def shift(self, pred: dict[str, Tensor]) -> Tensor:
        return self.scale * wave(pred["cond"])


def wave(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x.dtype)


@dataclass(frozen=True)
class Pull(Mover):
    """Attention to two words, raised."""

    speed: float = param(30.0, "step size", low=0.0)
    repeats: int = param(1, "moves in a step", low=1)

    def watch(self, context: Context) -> dict[str, Watch]:
        return {"words": Watch("cross", columns=(1, 2))}

    def rate(self, context: Context) -> float:
        return self.speed

    def most(self, context: Context) -> int:
        return self.repeats

    def loss(self, maps: Maps, context: Context) -> Tensor:
        shares = [seen.values.sum(-1).mean(-1) for seen in maps["words"]]
        return 2 - torch.stack(shares).mean(0)


def test_a_term_added_to_every_prediction_is_added_to_their_combination(case: Any, monkeypatch: Any) -> None:
    pipe, given = case
    with Guide(pipe, Nudge()):
        ours = call(pipe, given)
    plain = call(pipe, given)
    step = type(pipe.scheduler).step

    def nudged(self: Any, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        d = 0.1 * wave(model_output)
        if type(pipe).__name__ in ("PixArtAlphaPipeline", "HunyuanDiTPipeline"):  # their variance half is cut off
            d = 0.1 * wave(torch.cat([model_output, model_output], 1))[:, : model_output.shape[1]]
        if type(pipe).__name__ in ("ZImagePipeline", "Lumina2Pipeline"):  # they turn their predictions round
            d = -d
        return step(self, model_output + d, *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", nudged)
    after = call(pipe, given)
    assert (after - plain).abs().max() > 1e-2
    assert (ours - after).abs().max() < 2e-5 * after.abs().max()


def test_moves_lower_the_loss(case: Any) -> None:
    pipe, given = case
    with Guide(pipe, Pull(window=(0.0, 0.2), repeats=3)) as guide:
        call(pipe, given)
    losses = [next(iter(entry.values()))[0] for entry in guide.report.steps[0].losses]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    assert len(guide.report.steps) == 1 and guide.report.backwards == 3


def test_a_move_in_the_first_step_is_a_run_from_other_latents(case: Any) -> None:
    """Every call of the step and the scheduler are given the moved latents: the rest is as if they had come so."""
    pipe, given = case
    inputs: list[Tensor] = []
    models = [m for m in (getattr(pipe, n, None) for n in ("unet", "transformer", "transformer_2")) if m is not None]
    with Guide(pipe, Pull(window=(0.0, 0.2))) as guide:
        family = guide.family
        hooks = [
            model.register_forward_pre_hook(
                lambda m, args, kwargs: inputs.append(family.latents(m, args, kwargs) / guide._run.scale),
                with_kwargs=True,
            )
            for model in models
        ]
        moved = call(pipe, given)
    for hook in hooks:
        hook.remove()
    start = inputs[0][:1] / getattr(pipe.scheduler, "init_noise_sigma", 1.0)
    if "Flux2" in type(pipe).__name__:  # it packs latents that it is given
        start = start.unflatten(1, (given["height"] // pipe.vae_scale_factor // 2, -1)).movedim(3, 1)
    assert torch.allclose(call(pipe, given, latents=start), moved, atol=1e-4)
    assert (call(pipe, given) - moved).abs().max() > 1e-3


def weak_methods(pipe: Any) -> list[Method]:
    """Sana's self-attention is linear: there is no map to perturb."""
    return [] if "Sana" in type(pipe).__name__ else [PAG(layers="all")]


def test_the_weak_pass_is_one_more_forward_a_step(case: Any) -> None:
    pipe, given = case
    plain = call(pipe, given)
    if not weak_methods(pipe):
        with pytest.raises(AttachError, match="PAG finds no site"):
            Guide(pipe, PAG(layers="all")).attach()
        return
    with Guide(pipe, PAG(layers="all")) as guide:
        weak = call(pipe, given)
    calls = 2 if "negative_prompt_embeds" in given or "OmniGen" in type(pipe).__name__ else 1
    skipping = STEPS - 1 if "skip_guidance_layers" in given else 0  # the pipeline leaves the first step out
    assert guide.report.forwards == STEPS * (calls + 1) + skipping
    assert (weak - plain).abs().max() > 1e-3


@dataclass(frozen=True)
class Still(Method):
    """Attention as it is, by way of every site."""

    def attend(self, call: Call, proceed: Any) -> Tensor:
        return proceed(call)


def test_doing_nothing_gives_the_same_bits(case: Any) -> None:
    pipe, given = case
    plain = call(pipe, given)
    for methods in ((), (Still(),)):
        with Guide(pipe, *methods):
            assert torch.equal(call(pipe, given), plain)


def test_sizes_and_pooled_words_of_xl_are_those_of_the_prompt_in_every_pass() -> None:
    pipe, given = PIPES["sdxl"]()
    pipe.set_progress_bar_config(disable=True)
    plain, guided = [], []
    for met, methods in ((plain, ()), (guided, (Pull(window=(0.0, 0.2)), PAG(layers="all")))):
        hook = pipe.unet.add_embedding.register_forward_pre_hook(lambda _, args, met=met: met.append(args[0]))
        with Guide(pipe, *methods):
            call(pipe, given)
        hook.remove()
    uncond, cond = plain[0]
    assert not torch.equal(uncond, cond)
    assert [len(rows) for rows in guided] == [1, 1] + [2, 1] * STEPS or [len(r) for r in guided] == [1] + [2, 1] * STEPS
    for rows in guided:
        assert torch.equal(rows, plain[0] if len(rows) == 2 else cond[None])


def test_nothing_is_left_behind(case: Any) -> None:
    """After a run, and after one that fails in the gradient pass (the first forward) or in the pipeline's own call."""
    pipe, given = case
    plain = call(pipe, given)
    before = {name: (vars(part).keys(), part.training) for name, part in parts(pipe)}
    for broken in (0, 1, 2):
        with Guide(pipe, Pull(), *weak_methods(pipe)) as guide:
            if broken:
                with failing(guide.family.sites(guide.model)[0].module, broken), pytest.raises(ZeroDivisionError):
                    call(pipe, given)
            else:
                call(pipe, given)
        assert torch.equal(call(pipe, given), plain)
        assert {name: (vars(part).keys(), part.training) for name, part in parts(pipe)} == before
        assert not {"step", "set_timesteps"} & vars(pipe.scheduler).keys()
        assert not {"encode_prompt", "check_inputs"} & vars(pipe).keys()


@contextlib.contextmanager
def failing(module: Any, number: int) -> Iterator[None]:
    """A module that fails when it is called for this time."""
    counter = itertools.count(1)

    def fail(*_: Any) -> None:
        if next(counter) == number:
            1 / 0  # noqa: B018

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def parts(pipe: Any) -> list[tuple[str, Any]]:
    models = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    return [
        (f"{i} {name}", m) for i, model in enumerate(models) if model is not None for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("norm", [None, "rms_norm"])
def test_diffusers_own_perturbed_attention_of_sd3_is_a_witness(norm: str | None) -> None:
    """With norms of queries and keys, as in 3.5, it is none: diffusers leaves them out where it perturbs."""
    pipe, given = PIPES["sd3"]()
    if norm:
        weights = pipe.transformer.state_dict()
        pipe.transformer = mmdit(qk_norm=norm).eval()
        pipe.transformer.load_state_dict(weights, strict=False)
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    peer = StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
    for each in (pipe, peer):
        each.set_progress_bar_config(disable=True)
    plain = call(pipe, given)
    theirs = call(peer, given, pag_scale=3.0)
    with Guide(pipe, PAG(scale=3.0, layers="transformer_blocks.1.attn")):
        ours = call(pipe, given)
    assert (theirs - plain).abs().max() > 1e-2
    off = (ours - theirs).abs().max() / theirs.abs().max()
    assert off > 1e-3 if norm else off < 2e-5


def test_the_perturbation_of_joint_attention_is_what_its_equation_says() -> None:
    """Image tokens see themselves and the words: the whole map, in float64, with what they do not see masked out."""
    q, k, v = (
        torch.randn(2, 3, 20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    image, text = slice(0, 14), slice(14, 20)
    site = Site("x", "joint", "mid", 0, torch.nn.Identity())
    for mask in (None, torch.rand(2, 1, 1, 20, generator=torch.Generator().manual_seed(9)) > 0.2):
        logits = q[:, :, image] @ k.mT * 8**-0.5
        seen = torch.ones(14, 20, dtype=torch.bool)
        seen[:, image] = torch.eye(14, dtype=torch.bool)
        if mask is not None:
            words = mask.clone()
            words[..., image] = True  # an image token always sees itself
            logits = logits.masked_fill(~words, float("-inf"))
        wanted = logits.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        found = image_block(Call(site, q, k, v, mask, None, (2, 7), image, text, "weak", {}, 0.0))
        assert torch.allclose(found.double(), wanted, atol=1e-5)
