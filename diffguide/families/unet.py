"""Stable Diffusion 1, 2 and XL, and AnimateDiff: U-Nets with separate self- and cross-attention."""

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from diffguide import tokens
from diffguide.errors import PromptError
from diffguide.family import Arguments, Batch, Encoding, Family, bare, blank, calls_of, together
from diffguide.site import Grid, Site


class UNet(Family):
    """`UNet2DConditionModel`: attention at several levels, each with half the height and width of the one before."""

    models: ClassVar[tuple[str, ...]] = ("UNet2DConditionModel",)
    kinds: ClassVar[tuple[str, ...]] = ("self", "cross")
    alike = ("prompt_2",)  # both encoders of XL make one state of a column

    def sites(self, model: nn.Module) -> list[Site]:
        """`attn1` modules (self) and `attn2` modules (cross) of the transformer blocks."""
        model = bare(model)
        deepest = len(model.down_blocks) - 1  # type: ignore[arg-type]
        sites = []
        for name, module in model.named_modules():
            block, last = name.partition("_block")[0], name.rpartition(".")[2]
            if last not in ("attn1", "attn2") or not hasattr(module, "processor"):
                continue
            number = int(name.split(".")[1]) if block != "mid" else 0
            level = {"down": number, "mid": deepest, "up": deepest - number}[block]
            # SD2's "only cross-attention" blocks and SDXL's refiner may have an attn1 that reads the text
            reads_text = last == "attn2" or getattr(module, "is_cross_attention", False)
            kind = "cross" if reads_text else "self"
            sites.append(Site(name, kind, block, level, module, calls_of(module)))
        return sites

    def grid(self, site: Site, size: Grid) -> Grid:
        """Each level halves and rounds up."""
        h, w = size
        for _ in range(site.level):
            h, w = -(-h // 2), -(-w // 2)
        return h, w

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        """[text, image, uncond] for InstructPix2Pix."""
        if "InstructPix2Pix" in type(pipe).__name__ and pipe.do_classifier_free_guidance:
            n = batch.rows // 3
            return {"cond": slice(0, n), "image": slice(n, 2 * n), "uncond": slice(2 * n, batch.rows)}
        return together(pipe, batch)

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        width = config.encoder_hid_dim or config.cross_attention_dim  # Kolors projects its words
        width = width[0] if isinstance(width, list | tuple) else width
        kwargs: dict[str, Any] = {"encoder_hidden_states": zeros(1, 77, width)}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            kwargs["added_cond_kwargs"] = {"text_embeds": zeros(1, pooled), "time_ids": zeros(1, 6)}
        return (zeros(1, config.in_channels, *size), zeros()), kwargs

    def texts(self, pipe: Any, prompt: str, encoding: Encoding) -> list[tokens.Text]:
        if "Kolors" in type(pipe).__name__:
            raise PromptError(
                "Kolors' ChatGLM tokenizer does not tell where in the prompt its tokens lie, so that no word can be "
                "found; use Stable Diffusion XL, or methods without words"
            )
        return super().texts(pipe, prompt, encoding)

    def refusals(self, pipe: Any) -> list[str]:
        name = type(pipe).__name__
        reasons = []
        if "PAG" in name:
            plain = name.replace("PAG", "")
            reasons.append(f"{name} perturbs attention itself; use {plain}.from_pipe(pipe) and the method PAG")
        if "AttendAndExcite" in name or "GLIGEN" in name:
            reasons.append(f"{name} replaces attention processors itself; use StableDiffusionPipeline.from_pipe(pipe)")
        return reasons


class AnimateDiff(UNet):
    """`UNetMotionModel`: latents [B, C, frames, h, w]; in attention every frame, or every place, is a row."""

    models = ("UNetMotionModel",)
    kinds = ("self", "cross", "temporal")

    def sites(self, model: nn.Module) -> list[Site]:
        """Those of the U-Net, frames apart; modules between frames are `"temporal"`."""
        found = []
        for site in super().sites(model):
            kind = "temporal" if "motion_modules" in site.name else site.kind
            found.append(replace(site, kind=kind, apart=kind != "temporal"))
        return found

    def grid(self, site: Site, size: Grid) -> Grid:
        frames, h, w = size
        return (frames,) if site.kind == "temporal" else (frames, *super().grid(site, (h, w)))

    def example_size(self, model: nn.Module) -> Grid:
        return 16, *super().example_size(model)

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        states = zeros(size[0], 77, config.cross_attention_dim)  # one for each frame
        return (zeros(1, config.in_channels, *size), zeros()), {"encoder_hidden_states": states}
