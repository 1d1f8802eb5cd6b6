"""What is put beside or into a denoiser: LoRA, ControlNet, T2I-Adapter, IP-Adapter. The extra passes get it, too."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from probes import Again, Through, apart
from test_family_pipelines import Pull, call
from tiny_models import MODELS
from tiny_pipes import PIPES, noise
from torch import Tensor

from diffguide import Guide
from diffguide.processors import PAG

SIZE = {"height": 16, "width": 24}


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline and its arguments; Stable Diffusion 1 with words, which its scale of a LoRA needs."""
    pipe, given = (tiny.sd(), {"prompt": tiny.PROMPT, **SIZE}) if name == "sd15" else PIPES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, given


def guided(pipe: Any, given: dict[str, Any], **more: Any) -> Tensor:
    """A short run with both extra passes: one that moves the latents, one with attention of its own."""
    with Guide(pipe, Pull(window=(0.0, 0.5)), PAG(scale=2.0, layers="all")) as guide:
        out = call(pipe, given, **more)
    assert guide.report.backwards == 2
    return out


# LoRA.


def lora(name: str) -> dict[str, Tensor]:
    """The weights of a LoRA on every attention of a small denoiser, as a file would have them."""
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    model = MODELS[name]()
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    part = "unet" if name == "sd15" else "transformer"
    return {f"{part}.{key}": weight for key, weight in peft.get_peft_model_state_dict(model).items()}


lora_families = pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])


@lora_families
def test_a_lora_loaded_under_an_attached_guide_acts_as_one_loaded_before(name: str) -> None:
    weights = lora(name)
    pipe, given = built(name)
    without = guided(pipe, given)
    with Guide(pipe, Pull(window=(0.0, 0.5)), PAG(scale=2.0, layers="all")):
        assert torch.equal(call(pipe, given), without)
        pipe.load_lora_weights(weights, adapter_name="x")
        during = call(pipe, given)
    before = guided(pipe, given)
    assert torch.equal(during, before) and apart(before, without) > 1e-2
    pipe.unload_lora_weights()
    assert torch.equal(guided(pipe, given), without)


@lora_families
def test_a_scaled_lora_is_scaled_in_every_pass_and_no_longer(name: str) -> None:
    """Half its scale for one call is half of it merged into the weights; a pass given up early leaves no scale."""
    weights = lora(name)
    pipe, given = built(name)
    pipe.load_lora_weights(weights, adapter_name="x")
    whole = guided(pipe, given)
    kwargs = {"cross_attention_kwargs" if name == "sd15" else "joint_attention_kwargs": {"scale": 0.5}}
    half = guided(pipe, given, **kwargs)
    assert apart(half, whole) > 1e-2
    assert torch.equal(guided(pipe, given), whole)
    pipe.fuse_lora(lora_scale=0.5)
    assert apart(guided(pipe, given), half) < 2e-5


# Features and residuals of a control picture: each row gets its own.


def two(value: Any, row: int | None = None) -> Any:
    """Arguments of two pictures, or of one of them; a text state of its own for the second."""
    if isinstance(value, dict):
        return {k: two(v, row) for k, v in value.items()}
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    both = torch.cat([value, -0.7 * value])
    return both if row is None else both[row : row + 1]


def spread(model: Any) -> Any:
    """A control model that has been trained: its last layers are zero at first."""
    rng = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=rng))
    return model.eval()


def with_controlnet() -> tuple[Any, str]:
    pipe = PIPES["sd15"]()[0]
    parts = pipe.components | {"controlnet": spread(tiny.controlnet())}
    return StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False), "image"


def with_t2i_adapter() -> tuple[Any, str]:
    pipe = PIPES["sd15"]()[0]
    torch.manual_seed(3)
    adapter = T2IAdapter(3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"} | {"adapter": spread(adapter)}
    return StableDiffusionAdapterPipeline(**parts, requires_safety_checker=False), "image"


def with_sd3_controlnet() -> tuple[Any, str]:
    pipe = PIPES["sd3"]()[0]
    control = spread(
        SD3ControlNetModel.from_transformer(
            pipe.transformer, num_layers=2, num_extra_conditioning_channels=0, load_weights_from_transformer=False
        )
    )
    pipe.vae.register_to_config(shift_factor=0.0)
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    return StableDiffusion3ControlNetPipeline(**parts, controlnet=control), "control_image"


def with_flux_controlnet() -> tuple[Any, str]:
    pipe = PIPES["flux"]()[0]
    control = spread(FluxControlNetModel.from_config(pipe.transformer.config, num_layers=1, num_single_layers=1))
    pipe.vae.register_to_config(shift_factor=0.0)
    return FluxControlNetPipeline(**pipe.components, controlnet=control), "control_image"


CONTROLLED: dict[str, Callable[[], tuple[Any, str]]] = {
    "sd15": with_controlnet,
    "sd15 adapter": with_t2i_adapter,
    "sd3": with_sd3_controlnet,
    "flux": with_flux_controlnet,
}


@pytest.mark.parametrize("name", sorted(CONTROLLED))
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # diffusers' own control model imports it so
def test_every_row_gets_the_residuals_of_its_own_control_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures with two controls in one batch are what each is alone; without its control each is another."""
    # two pipelines draw the code of a control picture at random
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe, argument = CONTROLLED[name]()
    pipe.set_progress_bar_config(disable=True)
    given = {k: v for k, v in PIPES[name.split()[0]]()[1].items() if isinstance(v, Tensor)}
    pictures = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(4))
    start = noise(2, 4, 8, 12) if name != "flux" else noise(2, 24, 4)
    plain = {**SIZE, "guidance_scale": 5.0 if name != "flux" else 3.5}

    def draw(row: int | None, pictures: Tensor = pictures) -> Tensor:
        rows = slice(None) if row is None else slice(row, row + 1)
        more = {argument: pictures[rows], "latents": start[rows].clone()}
        return guided(pipe, two(given, row) | plain, **more)

    both = draw(None)
    for row in range(2):
        assert apart(draw(row), both[row : row + 1]) < 2e-4
        assert apart(draw(row, pictures.flip(0)), both[row : row + 1]) > 1e-3


def test_the_weak_pass_gets_the_features_of_a_t2i_adapter() -> None:
    """The U-Net empties the list it is given; a weak pass that perturbs nothing must still predict the same."""

    pipe, argument = with_t2i_adapter()
    pipe.set_progress_bar_config(disable=True)
    given = PIPES["sd15"]()[1]
    probe = Again()
    with Guide(pipe, probe):
        call(pipe, given, **{argument: torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(4))})
    assert len(probe.differences) == 4 and max(probe.differences) < 1e-5


# IP-Adapters; those of U-Nets are in test_ip_adapter.py.


def with_pictures_in_sd3() -> tuple[Any, dict[str, Any]]:
    pipe, given = PIPES["sd3"]()
    model = pipe.transformer
    torch.manual_seed(5)
    model.set_attn_processor({n: SD3IPAdapterJointAttnProcessor2_0(16, 8, 8, 16) for n in model.attn_processors})
    options = {"embed_dim": 8, "output_dim": 8, "hidden_dim": 16, "depth": 1, "dim_head": 8, "heads": 2}
    model.image_proj = IPAdapterTimeImageProjection(**options, num_queries=2, timestep_in_dim=16)
    return pipe, given | {"ip_adapter_image_embeds": noise(2, 3, 8, seed=7)}


def with_pictures_in_flux() -> tuple[Any, dict[str, Any]]:
    pipe, given = PIPES["flux_with_true_guidance"]()
    model = pipe.transformer
    torch.manual_seed(5)
    processors = dict(model.attn_processors)
    for name in processors:
        if name.startswith("transformer_blocks"):
            processors[name] = FluxIPAdapterAttnProcessor(32, 32, num_tokens=(2,))
    model.set_attn_processor(processors)
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=32, num_image_text_embeds=2)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    pictures = {f"{which}ip_adapter_image_embeds": [noise(1, 1, 8, seed=7 + len(which))] for which in ("", "negative_")}
    return pipe, given | pictures


PICTURED = {"sd3": with_pictures_in_sd3, "flux": with_pictures_in_flux}


@pytest.mark.parametrize("name", sorted(PICTURED))
def test_ip_adapters_of_transformers_stay_beside_the_methods(name: str) -> None:
    pipe, given = PICTURED[name]()
    pipe.set_progress_bar_config(disable=True)
    plain = call(pipe, given)
    before, keys = dict(pipe.transformer.attn_processors), pipe.transformer.state_dict().keys()
    probe = Again()
    with Guide(pipe, Through(), probe):
        assert torch.equal(call(pipe, given), plain)
    assert max(probe.differences) < 1e-5
    assert apart(guided(pipe, given), plain) > 1e-2
    assert torch.equal(call(pipe, given), plain)
    assert pipe.transformer.state_dict().keys() == keys
    assert all(pipe.transformer.attn_processors[n] is p for n, p in before.items())
