"""Every family against a small model of its real class: where tokens are, who is who, what arrives."""

import math
from typing import Any

import pytest
import torch
from tiny_calls import KEPT, SIZES, built, seen
from tiny_models import MODELS

from diffguide import passes
from diffguide.errors import FamilyError
from diffguide.family import Family
from diffguide.registry import of_model, register_family

# diffusers' own Chroma imports it the old way
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")


@pytest.fixture(params=sorted(MODELS))
def case(request: pytest.FixtureRequest) -> Any:
    return built(request.param)


def run(model: Any, family: Any, args: Any, kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return family.prediction(model(*args, **kwargs))


def test_the_size_is_read_off_the_call(case: Any) -> None:
    model, family, args, kwargs = case
    size = family.size(args, kwargs)
    assert size == SIZES[len(size)]
    for site in family.sites(model):
        grid = family.grid(site, size)
        assert grid == size[:1] or math.prod(grid) == math.prod(size) // 4**site.level


def test_steering_that_changes_nothing_gives_the_same_bits(case: Any) -> None:
    model, family, args, kwargs = case
    plain = run(model, family, args, kwargs)
    size, words = family.size(args, kwargs), family.words(args, kwargs)
    met = []

    def at(site: Any) -> Any:
        def handle(*qkv: Any) -> torch.Tensor:
            grid = family.grid(site, size)
            call = passes.call_at(family, site, grid, qkv, words=words, rows={}, branch="every")
            met.append(site.name)
            return call.proceed()

        return handle

    sites = family.sites(model)
    processors = [site.module.processor for site in sites]
    with passes.steered({site: at(site) for site in sites}):
        assert torch.equal(run(model, family, args, kwargs), plain)
    assert sorted(met) == sorted(site.name for site in sites), "every site is reached once"
    assert all(site.module.processor is p for site, p in zip(sites, processors, strict=True))


def test_image_tokens_attend_to_words_and_to_each_other_with_shares_of_one(case: Any) -> None:
    model, family, args, kwargs = case
    words, images = (seen(model, family, args, kwargs, kind) for kind in ("cross", "self"))
    assert words or images
    for name in words.keys() | images.keys():
        total = sum(maps[name].sum(-1) for maps in (words, images) if name in maps)
        if "omnigen" in type(family).__module__:  # the rest goes to the time token
            assert (total > 0.9).all() and (total < 1).all()
        elif "z_image" in type(family).__module__:  # the rest goes to 29 tokens of padding behind 35 of the image
            assert (total > 0.3).all() and (total < 1 - 1e-4).all()
        else:
            assert torch.allclose(total, torch.ones_like(total), atol=1e-4), name
    for name, maps in words.items():
        assert maps.shape[-1] == family.words(args, kwargs), name


def test_words_are_where_the_text_states_are(case: Any) -> None:
    """Another text state in one column changes the map of that column in the first block by far the most."""
    model, family, args, kwargs = case
    before = seen(model, family, args, kwargs, "cross")
    if "hunyuan_video" in type(family).__module__ or not before:
        return  # its text refiner mixes the words before the first block
    column = 3
    if "encoder_hidden_states" in kwargs:
        kwargs = kwargs | {"encoder_hidden_states": other(kwargs["encoder_hidden_states"], (slice(None), column))}
    elif "input_ids" in kwargs:
        kwargs = kwargs | {"input_ids": kwargs["input_ids"].index_fill(1, torch.tensor(column), 7)}
    else:
        args = (*args[:2], [other(args[2][0], (column,))])
    after = seen(model, family, args, kwargs, "cross")
    name = next(iter(before))
    change = (after[name].clamp_min(1e-12).log() - before[name].clamp_min(1e-12).log()).abs().mean((0, 1))
    assert int(change.argmax()) == column


def other(states: torch.Tensor, at: Any) -> torch.Tensor:
    states = states.clone()
    states[at] = -3 * states[at]
    return states


def test_a_latent_cell_is_where_its_token_is(case: Any) -> None:
    """A change in one cell changes, in the first block, the queries' maps of its own token most."""
    model, family, args, kwargs = case
    if hasattr(model, "conv_in"):
        return  # a U-Net's convolutions and norms have spread the change by then
    size = family.size(args, kwargs)
    kind = "cross" if seen(model, family, args, kwargs, "cross") else "self"
    before = seen(model, family, args, kwargs, kind)
    name = next(iter(before))
    site = next(s for s in family.sites(model) if s.name == name)
    z = family.latents(model, args, kwargs)
    place = torch.zeros(size)
    place[..., 2:4, 6:8] = 1  # one token of 2x2 cells
    place[:-1] = place[:-1] if len(size) == 2 else 0
    changed = z + 5 * tokens_of(place, z, family)
    after = seen(model, family, *family.with_latents(model, args, kwargs, changed), kind)
    moved = (after[name] - before[name]).abs().mean((0, 2)).reshape(family.grid(site, size))
    found = tuple(int(i) for i in torch.unravel_index(moved.argmax(), moved.shape))
    assert found[-2:] in {(y >> site.level, x >> site.level) for y in (2, 3) for x in (6, 7)}
    if len(size) == 3:
        assert found[0] == size[0] - 1


def tokens_of(place: torch.Tensor, z: torch.Tensor, family: Any) -> torch.Tensor:
    """A mask of latent cells in the shape of the latents."""
    if z.ndim == 3:  # packed
        if math.prod(place.shape) == z.shape[1]:
            return place.reshape(1, -1, 1)
        return place[..., ::2, ::2].reshape(1, -1, 1)
    shape = [1] * z.ndim
    mask = place
    if z.ndim == 5:
        mask = place[:, None] if family.channels_at == 2 else place[None]
    return mask.reshape([*shape[: z.ndim - mask.ndim], *mask.shape])


def test_rows_are_cut_as_the_call_means_them(case: Any) -> None:
    """Two pictures in a batch, and each alone: the same predictions."""
    model, family, args, kwargs = case
    cut = {name: value if name in family.shared else double(value, name in KEPT) for name, value in kwargs.items()}
    two = double(args), cut
    both = run(model, family, *two)
    rows = family.latents(model, *two).shape[0]
    assert rows == 2
    for row in range(2):
        alone = run(model, family, *family.take(*two, torch.tensor([row]), rows))
        assert torch.allclose(alone, both[row : row + 1], atol=1e-5)


def double(value: Any, same: bool = False) -> Any:
    """Two rows for one: noise of its own for the second, where it is not the `same`."""
    if isinstance(value, torch.Tensor) and value.ndim:
        noise = value.is_floating_point() and value.ndim > 2 and not same
        other = torch.randn(value.shape, generator=torch.Generator().manual_seed(9)) if noise else value
        return torch.cat([value, other])
    if isinstance(value, dict):
        return {k: double(v, same) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(double(v, same) for v in value)
    if isinstance(value, list):
        return value + [torch.randn(v.shape, generator=torch.Generator().manual_seed(9)) for v in value]
    return value


def test_what_cannot_be_steered_is_refused_by_name() -> None:
    class LTX2VideoTransformer3DModel(torch.nn.Module):
        pass

    with pytest.raises(FamilyError, match=r"LTX2VideoTransformer3DModel cannot be steered: .* use LTX-Video"):
        of_model(LTX2VideoTransformer3DModel())
    with pytest.raises(FamilyError, match=r"no family describes Linear .*register_family"):
        of_model(torch.nn.Linear(1, 1))


def test_a_family_of_ones_own_is_known_after_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Denoiser(torch.nn.Module):
        pass

    class Own(Family):
        models = ("Denoiser",)

    with pytest.raises(FamilyError, match="Own lacks branches, example, sites"):
        register_family(Own)
    with pytest.raises(FamilyError, match="must subclass Family"):
        register_family(Denoiser)  # type: ignore[arg-type]

    monkeypatch.setattr("diffguide.registry._registered", [])

    @register_family
    class Whole(Own):
        def sites(self, model: Any) -> list[Any]:
            return []

        def branches(self, pipe: Any, batch: Any) -> dict[str, slice]:
            return {"cond": slice(0, batch.rows)}

        def example(self, model: Any, size: Any) -> Any:
            return (), {}

    assert type(of_model(Denoiser())) is Whole
