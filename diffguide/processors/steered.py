"""The wrapper around an attention processor: the original does its work, we do the attention inside it.

Projections, norms, rotary embeddings, LoRA and the rest stay the original's business. The one call of
`scaled_dot_product_attention` that it makes is caught by a torch function mode, open only for that call.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffguide import kernels
from diffguide.errors import AttachError, SteeringError
from diffguide.family import Family, bare
from diffguide.method import Method
from diffguide.registry import of_model, sites_of
from diffguide.site import Call, Grid, Site

# what stands between q, k, v and the output of attention: [B, H, N, D], mask and scale in, [B, H, N, D] out
Handler = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]

# processors that do attention by other means than the call we catch, and the way back to one that does not
FOREIGN = {
    "AttnProcessor": "set_default_attn_processor()",
    "AttnAddedKVProcessor": "set_default_attn_processor()",
    "SlicedAttnProcessor": "disable_attention_slicing()",
    "SlicedAttnAddedKVProcessor": "disable_attention_slicing()",
    "XFormersAttnProcessor": "disable_xformers_memory_efficient_attention()",
    "XFormersAttnAddedKVProcessor": "disable_xformers_memory_efficient_attention()",
    "XFormersJointAttnProcessor": "disable_xformers_memory_efficient_attention()",
}


class _Catch(TorchFunctionMode):
    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attend(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The signature of `scaled_dot_product_attention`; dropout is off at inference."""
        if is_causal:
            raise SteeringError("causal attention cannot be steered yet")
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return self.handler(query, key, value, attn_mask, scale)


class SteeredProcessor:
    """An attention processor that lets `handler` do the attention of the processor it wraps.

    It has the call signature of the original, because diffusers drops every argument that a processor does not name.
    """

    def __init__(self, original: Any, handler: Handler, site: Site) -> None:
        if isinstance(self, nn.Module):
            nn.Module.__init__(self)
        self.original, self.handler, self.site = original, handler, site

    def __new__(cls, original: Any, handler: Handler, site: Site) -> "SteeredProcessor":
        return super().__new__(_like(cls, type(original)))

    def steer(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original with its attention handed to the handler; raises SteeringError if there was none."""
        site, caught = self.site, 0

        def choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
            nonlocal caught
            caught += 1
            if caught == site.call + 1:
                return self.handler(q, k, v, mask, scale)
            return kernels.attend(q, k, v, mask=mask, scale=scale)

        with torch_attention(self.original), _Catch(choose):
            out = self.original(*args, **kwargs)
        if caught <= site.call or (site.calls and caught != site.calls):
            raise unseen(self.original, site, caught)
        return out


@contextlib.contextmanager
def torch_attention(*processors: Any) -> Iterator[None]:
    """Torch's own attention in these processors, whatever backend diffusers was told for one or for all of them.

    It is the one that can be caught, differentiated and given any mask: flash and sage take none, and sage has no
    gradient.
    """
    told = [(p, "_attention_backend" in vars(p), p._attention_backend) for p in processors if dispatches(p)]
    try:
        for processor, _, _ in told:
            processor._attention_backend = "native"
        yield
    finally:
        for processor, own, backend in told:
            processor._attention_backend = backend
            if not own:
                del processor._attention_backend


def dispatches(processor: Any) -> bool:
    """Whether diffusers' choice of a backend reaches this processor."""
    return hasattr(processor, "_attention_backend")


@functools.cache
def _like(base: type, original: type) -> type:
    """A subclass whose `__call__` has the signature of `original.__call__`.

    It is a module where the original is one, so that weights in there (an IP-Adapter's) still move with the model.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.steer(*args, **kwargs)

    __call__.__signature__ = inspect.signature(original.__call__)  # type: ignore[attr-defined]
    bases = (base, nn.Module) if issubclass(original, nn.Module) else (base,)
    return type(base.__name__, bases, {"__call__": __call__, "__module__": base.__module__})


def unseen(processor: Any, site: Site, times: int) -> SteeringError:
    """The error for a processor whose attention calls do not pass by as often as they should."""
    kind = type(processor).__name__
    return SteeringError(
        f"{site.name}: {kind} made {times} attention calls that can be steered, expected {site.calls or 'some'}; put a "
        f"standard processor back, for a U-Net with pipe.unet.{FOREIGN.get(kind, 'set_default_attn_processor()')}"
    )


def check_processor(site: Site) -> None:
    """Raise AttachError if the site's processor is known not to make the call we catch."""
    processor = getattr(site.module, "processor", None)
    kind = type(processor).__name__
    if isinstance(processor, SteeredProcessor):
        raise AttachError(f"{site.name} is steered already; detach the other guide, or give one guide all methods")
    if kind in FOREIGN:
        owner = "pipe" if FOREIGN[kind].startswith("disable") else "pipe.unet"
        raise AttachError(f"{site.name}: {kind} hides its attention; call {owner}.{FOREIGN[kind]} first")


def chain(methods: Sequence[Method], call: Call) -> Tensor:
    """Let each method carry out the call, the first one outermost, the model's own attention innermost."""
    if not methods:
        return call.proceed()
    first, *rest = methods
    return first.attend(call, lambda inner: chain(rest, inner))


def build(model: nn.Module, *methods: Method, size: Grid | None = None) -> dict[str, Any]:
    """Processors for `model.set_attn_processor`, without a guide: attention is steered in every row of the batch.

    Args:
        model: a denoiser of a known family.
        methods: methods that act by `attend` alone, in every branch. One that needs a loss, a weak pass or the
            prompt needs a `Guide`.
        size: height and width of the latents in latent cells, `model.config.sample_size` if not given.

    Returns:
        A new dict for all attention modules; `dict(model.attn_processors)` taken before puts everything back.

    Raises:
        AttachError: a method needs a guide, or a processor cannot be steered.
        FamilyError: no family describes the model.
    """
    for method in methods:
        if method.branch != "every" or any(method.asks(verb) for verb in ("loss", "shift", "edit", "prepare")):
            name = type(method).__name__
            raise AttachError(f"{name} works on branches, losses or words; use Guide(pipe, {name}(...))")
    family = of_model(model)
    size = size or family.example_size(model)
    sites = sites_of(family, model)
    known: Any = bare(model).attn_processors
    processors: dict[str, Any] = dict(known)
    for site in sites:
        chosen = [m for m in methods if not m.inert and site in m.where(sites)]
        if chosen:
            check_processor(site)
            handler = functools.partial(_attend_alone, chosen, site, family.grid(site, size), family)
            processors[f"{site.name}.processor"] = SteeredProcessor(site.module.processor, handler, site)
    return processors


def _attend_alone(
    methods: list[Method],
    site: Site,
    grid: Grid,
    family: Family,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scale: Any,
) -> Tensor:
    words = k.shape[2] - math.prod(grid)  # of a joint sequence
    image, text = family.spans(site, grid, words, q.shape[2], k.shape[2])
    if math.prod(grid) != len(range(q.shape[2])[image]):
        raise SteeringError(
            f"{site.name}: {q.shape[2]} image tokens do not fit a grid of {'x'.join(map(str, grid))}; "
            "tell build(..., size=(height, width)) the latent size of the pictures"
        )
    rows = {"every": slice(None)}
    return chain(methods, Call(site, q, k, v, mask, scale, grid, image, text, "every", rows, 0.0))
