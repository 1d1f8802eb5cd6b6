"""Maps of every family, on grids of odd sides, against what the plain model's own attention is given; their slopes."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_calls import built, seen
from tiny_models import MODELS
from torch import Tensor

from diffguide import passes
from diffguide.maps import Watch

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")

# where image tokens and words are in a joint sequence, from diffusers' source and independent of the families
WORDS_FIRST = {"flux", "chroma", "flux2", "flux2_klein", "qwen_image", "lumina2", "omnigen", "cogvideox"}
IMAGE_FIRST = {"sd3", "sd35", "hunyuan_video", "z_image"}
ONE_CELL = {"sd15", "sd2", "sdxl", "animatediff", "sana", "ltx"}  # a token is a cell at the finest level
VIDEOS = {"wan", "skyreels", "wan_from_a_picture", "ltx", "hunyuan_video", "cogvideox", "animatediff"}
PADDED = {"z_image": 32}  # the image's part is filled to a multiple of this


def odd(name: str) -> tuple[int, ...]:
    """Latent cells whose tokens have odd sides, not square; frames are odd, too."""
    size = (9, 13) if name in ONE_CELL else (10, 14)
    return (3, *size) if name in VIDEOS else size


@contextlib.contextmanager
def listening(model: Any, names: list[str]) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """What torch's attention is given in each of these modules of the plain model, with nothing of ours in between."""
    heard: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    within: list[str] = []
    plain = F.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        if within:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
            heard[within[-1]].append(dict(zip(names, args, strict=False)) | kwargs)
        return plain(*args, **kwargs)

    hooks = []
    for name in names:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: within.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: within.pop() and None))
    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield heard
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
        for hook in hooks:
            hook.remove()


def softmax(heard: dict[str, Any]) -> Tensor:
    """The whole map [B, H, N, M], in float64."""
    q, k, mask = heard["query"].double(), heard["key"].double(), heard.get("attn_mask")
    assert not heard.get("is_causal") and not heard.get("dropout_p")
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) if heard.get("enable_gqa") else k
    logits = q @ k.mT * (heard.get("scale") or q.shape[-1] ** -0.5)
    if mask is not None:
        logits = torch.where(mask, logits, -math.inf) if mask.dtype == torch.bool else logits + mask.double()
    return logits.softmax(-1)


def part(name: str, kind: str, whole: Tensor, tokens: int, words: int, joint: bool) -> Tensor:
    """Image tokens to words or to image tokens, out of a map of everything to everything."""
    if not joint:
        return whole
    rows, columns = whole.shape[-2:]
    assert rows == columns
    if name in WORDS_FIRST:
        image, text = range(rows - tokens, rows), range(words)
    else:
        start = -(-tokens // PADDED.get(name, 1)) * PADDED.get(name, 1)
        image, text = range(tokens), range(start, start + words)
    keys = text if kind == "cross" else image
    return whole[..., image.start : image.stop, keys.start : keys.stop]


@pytest.mark.parametrize("kind", ["cross", "self"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_map_is_the_softmax_of_what_the_plain_model_attends_with(name: str, kind: str) -> None:
    model, family, args, kwargs = built(name, odd(name))
    size = family.size(args, kwargs)
    assert size == odd(name)
    sites = {s.name: s for s in family.sites(model) if s.kind in (kind, "joint")}
    ours = seen(model, family, args, kwargs, kind)
    assert ours.keys() == sites.keys()
    with torch.no_grad(), listening(model, list(sites)) as heard:
        model(*args, **kwargs)
    words = family.words(args, kwargs)
    for site in sites.values():
        grid = family.grid(site, size)
        assert all(n % 2 for n in grid) and grid[-2] != grid[-1], grid
        tokens = math.prod(grid[-2:] if site.apart else grid)
        calls = heard[site.name]
        if kind == "cross" and site.kind == "cross":
            calls = [call for call in calls if call["key"].shape[-2] == words]
        (call,) = calls
        wanted = part(name, kind, softmax(call), tokens, words, site.kind == "joint")
        assert wanted.shape[-2] == tokens
        assert wanted.shape[-1] == (words if kind == "cross" else tokens)
        wanted = wanted.transpose(0, 1).flatten(1, 2)  # frames that are rows, one after the other
        assert ours[site.name].shape == wanted.shape
        assert (ours[site.name] - wanted).abs().max() < 2e-6


def test_every_joint_family_has_a_stated_order() -> None:
    for name in MODELS:
        model, family, *_ = built(name)
        joint = any(site.kind == "joint" for site in family.sites(model))
        assert joint == (name in WORDS_FIRST | IMAGE_FIRST), name


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_slope_of_a_loss_of_maps_is_that_of_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64; models that compute a norm or a rotation in float32 on purpose are kept from it."""
    to = Tensor.to

    def exactly(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *(torch.float64 if a is torch.float32 else a for a in args), **kwargs)

    monkeypatch.setattr(Tensor, "to", exactly)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    model, family, args, kwargs = built(name, odd(name), torch.float64)
    size, words = family.size(args, kwargs), family.words(args, kwargs)
    sites = [s for s in family.sites(model) if s.kind in ("cross", "joint")]
    grids = {site: family.grid(site, size) for site in sites}
    wishes: Any = {(0, "x"): (Watch("cross", columns=(0, 2, 3)), sites)}

    def loss(z: Tensor) -> Tensor:
        given = family.with_latents(model, args, kwargs, z)
        with passes.looking(model, family, *given, wishes, grids, words=words) as sight:
            values = [seen.values for seen in sight.maps[0]["x"]]
        assert all(v.dtype == torch.float64 for v in values)
        return torch.stack([(wave(v) * v.log()).sum() for v in values]).sum()

    z = family.latents(model, args, kwargs).detach().clone()
    with passes.differentiable(model):
        leaf = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf)
    assert slope.abs().max() > 0
    for seed in range(3):
        way = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)
        step = 1e-5
        with torch.no_grad():
            difference = float(loss(z + step * way) - loss(z - step * way)) / (2 * step)
        along = float((slope * way).sum())
        size = float(slope.norm() * way.norm()) / z.numel() ** 0.5
        assert abs(along - difference) < 1e-6 * size + 1e-9, (along, difference)


def wave(x: Tensor) -> Tensor:
    return torch.sin(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)


def test_this_module_leaves_torch_as_it_was() -> None:
    assert torch.nn.functional.scaled_dot_product_attention is F.scaled_dot_product_attention
    assert F.scaled_dot_product_attention.__module__ != __name__
