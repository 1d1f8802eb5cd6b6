"""A U-Net with an IP-Adapter: its words are steered, its pictures are not, its weights stay where they were."""

from typing import Any

import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from diffguide import Guide, Layout, Region
from diffguide.processors import PAG, BackwardGuidance, CaptureMaps


@pytest.fixture
def pipe() -> Any:
    pipe = tiny.sd()
    unet = pipe.unet
    torch.manual_seed(5)
    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        cross = name.endswith("attn2.processor")
        processors[name] = IPAdapterAttnProcessor2_0(width, 8, num_tokens=(2,)) if cross else AttnProcessor2_0()
    unet.set_attn_processor(processors)
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=8, num_image_text_embeds=2)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return pipe


def draw(pipe: Any) -> torch.Tensor:
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(7))
    return tiny.call(pipe, ip_adapter_image_embeds=[embeds])


def test_methods_act_beside_it_and_leave_it_as_it_was(pipe: Any) -> None:
    plain, keys = draw(pipe), pipe.unet.state_dict().keys()
    before = pipe.unet.attn_processors
    layout = Layout(Region("red circle", box=(0.1, 0.1, 0.5, 0.6)))
    with Guide(pipe, CaptureMaps()) as guide:
        assert torch.equal(draw(pipe), plain)
    assert guide.maps["circle"].shape == (1, 16, 16)
    for method in (BackwardGuidance(layout), PAG()):
        with Guide(pipe, method):
            assert not torch.equal(draw(pipe), plain)
    assert torch.equal(draw(pipe), plain)
    assert pipe.unet.state_dict().keys() == keys
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


def test_a_picture_of_no_weight_is_not_attended_to(pipe: Any) -> None:
    plain = draw(pipe)
    for processor in pipe.unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.0]
    without = draw(pipe)
    assert not torch.equal(without, plain)
    with Guide(pipe, CaptureMaps()):
        assert torch.equal(draw(pipe), without)


def test_its_weights_move_with_the_model_while_it_is_steered(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    plain = draw(pipe)
    inside: list[int] = []

    def count(model: Any, *_: Any) -> None:
        inside.append(sum(p.numel() for p in model.parameters()))

    with Guide(pipe, CaptureMaps()):
        pipe.unet.conv_out.register_forward_hook(lambda *_: count(pipe.unet))
        assert torch.equal(draw(pipe), plain)
    assert set(inside) == {sum(p.numel() for p in pipe.unet.parameters())}
