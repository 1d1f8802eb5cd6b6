"""NAG: a negative prompt in attention, whose rows ride along with the conditional ones."""

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from probes import apart
from test_family_pipelines import call
from tiny_pipes import PIPES, built
from torch import Tensor

from diffguide.errors import AttachError, ParamError, SteeringError
from diffguide.guide import Guide
from diffguide.processors import NAG, PAG, CaptureMaps

NEGATIVE = "a red circle"


def attended(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 99), st.floats(1, 20), st.floats(1, 5), st.floats(0, 1), st.sampled_from([1, 2]))
def test_it_is_its_equation(seed: int, scale: float, tau: float, alpha: float, p: int) -> None:
    positive, negative = attended(seed, 2, 2, 3, 5, 4)
    found = NAG(negative=NEGATIVE, scale=scale, tau=tau, alpha=alpha, norm=p).guide(positive, negative)
    for b in range(2):
        for n in range(5):
            plus, minus = positive[b, :, n].flatten(), negative[b, :, n].flatten()
            z = scale * plus - (scale - 1) * minus
            r = float(z.norm(p=p) / plus.norm(p=p))
            z = z * min(r, tau) / r
            assert torch.allclose(found[b, :, n].flatten(), alpha * z + (1 - alpha) * plus, atol=1e-9)
            if p == 2:
                assert found[b, :, n].norm() <= (alpha * tau + 1 - alpha) * plus.norm() * (1 + 1e-9)


@given(st.integers(0, 99), st.floats(1, 20))
def test_the_same_words_change_nothing(seed: int, scale: float) -> None:
    z = attended(seed, 2, 3, 5, 4)
    assert torch.allclose(NAG(negative=NEGATIVE, scale=scale).guide(z, z), z, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
@pytest.mark.parametrize("name", sorted(set(PIPES) - {"omnigen", "z_image", "z_image_normalised"}))
def test_every_kind_of_pipeline(name: str) -> None:
    """The prompt's own states change nothing: the picture is one; others do."""
    pipe, given_, _ = built(name)
    plain: Any = call(pipe, given_)
    states = given_["prompt_embeds"]
    with Guide(pipe, NAG(embeds=states)):
        assert apart(call(pipe, given_), plain) < 2e-6
    with Guide(pipe, NAG(embeds=1.5 * states.flip(1))):
        assert apart(call(pipe, given_), plain) > 1e-4
    assert torch.equal(call(pipe, given_), plain)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.sd3])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_words_are_encoded_as_the_prompt_is(make: Any, guidance: float) -> None:
    pipe = make()
    prompts = [tiny.PROMPT, "a green star"]
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    options = {"latents": noise, "num_images_per_prompt": 2, "guidance_scale": guidance}
    plain = tiny.call(pipe, prompts, **options)
    with Guide(pipe, NAG(negative=NEGATIVE)) as guide:
        by_words = tiny.call(pipe, prompts, **options)
    assert guide.report.forwards == 4 * (3 if guidance > 1 else 2)
    assert apart(by_words, plain) > 1e-4
    states = pipe.encode_prompt(NEGATIVE, **ENCODING[make])[0]
    with Guide(pipe, NAG(embeds=states)):
        assert apart(tiny.call(pipe, prompts, **options), by_words) < 2e-6


ENCODING: dict[Any, dict[str, Any]] = {
    tiny.sd: {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False},
    tiny.sdxl: {},
    tiny.sd3: {"prompt_2": None, "prompt_3": None},
}


def test_in_company_and_in_its_window() -> None:
    pipe = tiny.sd3()
    with Guide(pipe, PAG(layers="all")):
        weak = tiny.call(pipe)
    with Guide(pipe, PAG(layers="all"), NAG(negative=NEGATIVE), CaptureMaps()) as guide:
        both = tiny.call(pipe)
    assert apart(both, weak) > 1e-4 and guide.maps["circle"].shape == (1, 16, 16)
    with Guide(pipe, NAG(negative=NEGATIVE, window=(0.0, 0.5))) as guide:
        tiny.call(pipe)
    assert guide.report.forwards == 4 * 2 + 2


def test_what_cannot_be_is_refused_by_name() -> None:
    pipe, given_, _ = built("z_image")
    with pytest.raises(AttachError, match="NAG has a second prompt, which ZImage has no place for"):
        Guide(pipe, NAG(negative=NEGATIVE)).attach()
    pipe, given_, _ = built("sd15")  # is given states
    with (
        pytest.raises(SteeringError, match="NAG: the words of the prompt are not found"),
        Guide(pipe, NAG(negative="a")),
    ):
        call(pipe, given_)
    short = given_["prompt_embeds"][:, :3]
    with pytest.raises(SteeringError, match="3 text states, the picture's 6"), Guide(pipe, NAG(embeds=short)):
        call(pipe, given_)
    with pytest.raises(AttachError, match="NAG and NAG both have a second prompt"):
        Guide(pipe, NAG(negative="a"), NAG(negative="b")).attach()
    with pytest.raises(ParamError, match=r"NAG\.embeds is not a tensor"):
        NAG(embeds=torch.zeros(3))
