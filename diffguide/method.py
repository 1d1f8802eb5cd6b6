"""What a method is: a paper as a frozen dataclass of its symbols, and a few verbs."""

import dataclasses
import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffguide.params import Param, Window, param
from diffguide.site import Branch, Call, Grid, Proceed, Site

if typing.TYPE_CHECKING:
    from diffguide.blocks import BlockCall
    from diffguide.maps import Maps, Watch
    from diffguide.weak import WeakPass


@dataclass
class Context:
    """What a method may know about the run and the step it acts in.

    Attributes:
        prompts: the prompt of each picture of the batch.
        find: columns of a phrase in the text states of picture `b`: `find(b, phrase, occurrence)`.
        content: columns of all words of the prompt of picture `b`.
        step: number of this step, from 0.
        steps: how many there are.
        sigma: noise over signal of the latents, so that z / sqrt(1 + sigma²) has the model's scale.
        sites: the attention modules of the denoiser.
        grids: their token grids at this picture size.
        size: height and width of the latents, in latent cells.
        pictures: numbers, in the batch, of the pictures that the maps at hand belong to, row by row.
        flow: whether the model predicts the velocity of a flow rather than noise.
        guidance: scale of the pipeline's classifier-free guidance, told to `combine` alone.
        memory: the method's own, kept from `prepare` to the end of the run.
    """

    prompts: list[str | None]
    find: Callable[[int, str, int | None], list[int]]
    content: Callable[[int], list[int]]
    step: int
    steps: int
    sigma: float
    sites: list[Site]
    grids: dict[Site, Grid]
    size: Grid
    pictures: list[int]
    flow: bool = False
    guidance: float = 1.0
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        return self.step / max(1, self.steps)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method. Subclasses are frozen dataclasses whose knobs are made by `param`.

    A verb that a subclass leaves alone is never called. `branch` says in which pass `attend` is asked: `"weak"` for
    an extra perturbed pass, `"cond"` or `"every"` for the model's own. `base` says whose rows a weak pass is made of
    and `observe` is shown, `"uncond"` where the same call has them. `neutral` names settings at which the method
    does nothing at all; the guide then leaves the pipeline alone. `mode` is the job for which the editor offers it:
    `"generate"`, `"regions"`, `"edit"`, `"compose"`, `"high resolution"`, `"maps"`.
    """

    window: Window = param(
        (0.0, 1.0),
        "part of the run in which the method acts: start and stop of progress",
        low=0.0,
        high=1.0,
    )
    interval: int = param(1, "act in every n-th step of the window only: 1 is every step", low=1, high=100)

    branch: ClassVar[Branch | None] = None
    base: ClassVar[Branch] = "cond"
    kinds: ClassVar[tuple[str, ...]] = ("self", "cross", "joint")
    neutral: ClassVar[dict[str, Any]] = {}
    paper: ClassVar[str] = ""
    mode: ClassVar[str] = "generate"

    def __post_init__(self) -> None:
        for knob in self.params():
            knob.check(type(self).__name__, getattr(self, knob.name))

    @classmethod
    def name(cls) -> str:
        """The class name in kebab case: `attend-excite`, `a-star`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()

    @classmethod
    def params(cls) -> list[Param]:
        """The knobs, in order; fields without `param` (a layout, say) are data, not knobs."""
        hints = typing.get_type_hints(cls)
        knobs = [f for f in dataclasses.fields(cls) if "help" in f.metadata]
        return [Param(f.name, hints[f.name], f.default, **f.metadata) for f in knobs]

    @property
    def inert(self) -> bool:
        """Whether these settings change nothing."""
        return any(getattr(self, name) == value for name, value in self.neutral.items())

    def acts(self, context: Context) -> bool:
        """Whether this step lies in the window, and is its turn."""
        return self.acts_at(context.step, context.steps)

    def acts_at(self, step: int, steps: int) -> bool:
        """Whether the method acts in a step, counted from 0, of so many. A window that ends at 1 includes the last."""
        return self.within(step, steps) and (step - math.ceil(self.window[0] * steps - 1e-9)) % self.interval == 0

    def within(self, step: int, steps: int) -> bool:
        """Whether a step lies in the window."""
        return self.window[0] <= step / max(1, steps) < self.window[1]

    @property
    def second_prompt(self) -> Any:
        """Words, or their states [1, T, C], that go through the model beside the prompt, if there are any."""
        return None

    @property
    def inside(self) -> bool:
        """Whether the method has a part in the model's own pass."""
        return self.asks("observe") or (self.asks("attend") and self.branch != "weak")

    def asks(self, verb: str) -> bool:
        """Whether the method defines a verb."""
        return getattr(type(self), verb) is not getattr(Method, verb)

    # The verbs.

    def prepare(self, context: Context) -> None:
        """Resolve words and regions before the first step; raise if they cannot be."""

    def attend(self, call: Call, proceed: Proceed) -> Tensor:  # -> [B, H, N, D]
        """Carry out one evaluation of attention; `proceed(call)` is what would have been done."""
        raise TypeError("not asked")

    def block(self, call: "BlockCall") -> Any:
        """Carry out one block of the weak pass: `call.proceed(call.hidden)` is what would have been done."""
        raise TypeError("not asked")

    def weaken(self, weak: "WeakPass") -> Tensor:
        """Carry out the weak pass as a whole: what `weak.predict` makes of other latents, or another model."""
        return weak.predict()

    def loss(self, maps: "Maps", context: Context) -> Tensor:  # -> [B]
        """A loss for each picture, whose gradient moves the latents."""
        raise TypeError("not asked")

    def shift(self, pred: dict[str, Tensor]) -> Tensor:
        """What to add to every prediction, from the predictions of the branches."""
        raise TypeError("not asked")

    def combine(self, pred: dict[str, Tensor], context: Context) -> Tensor:
        """What takes the place of classifier-free guidance: from `"cond"` and `"uncond"` at `context.guidance`."""
        raise TypeError("not asked")

    def observe(self, maps: "Maps", context: Context) -> None:
        """See the maps of the model's own pass in the rows of `base`; the user is shown `context.memory["maps"]`."""
        raise TypeError("not asked")

    def edit(self, latents: Tensor, context: Context) -> Tensor:
        """The latents after a step, changed."""
        raise TypeError("not asked")

    # What goes with `loss`.

    def watch(self, context: Context) -> "dict[str, Watch]":
        """The maps that `loss` wants to see, by name."""
        return {}

    def watched(self, watch: "Watch", sites: list[Site], grids: dict[Site, Grid]) -> list[Site]:
        """The sites at which a wish is granted."""
        return watch.choose(sites, grids)

    def rate(self, context: Context) -> float:
        """Step size: latents at the model's scale move by `-rate * gradient`. 0 skips the gradient pass."""
        return 0.0

    def most(self, context: Context) -> int:
        """How many gradient passes a picture may take in this step."""
        return 1

    def again(self, history: Tensor, context: Context) -> Tensor:
        """Which pictures [B] move, after the losses `history` [K, B] of K passes in this step. Default: all."""
        return history[-1] > 0

    def rests(self, losses: Tensor) -> Tensor:
        """Which pictures [B], by their losses, need no more of this method until the run ends. Default: none."""
        return torch.zeros(losses.shape, dtype=torch.bool)

    def where(self, sites: list[Site]) -> list[Site]:
        """The sites at which `attend` is asked, and those whose blocks `block` is asked for."""
        return [s for s in sites if s.kind in self.kinds]


@dataclass(frozen=True, kw_only=True)
class Mover(Method):
    """A method whose loss moves the latents."""

    enough: float = param(0.0, "loss at which a picture is left alone until the run ends; 0: never", low=0.0, high=10.0)

    layers: str = param(
        "",
        'where maps are watched: "down", "mid", "up", "all" or patterns of module names; empty: as the method has it',
    )

    def watched(self, watch: "Watch", sites: list[Site], grids: dict[Site, Grid]) -> list[Site]:
        return watch.choose(sites, grids, self.layers)

    def rests(self, losses: Tensor) -> Tensor:
        return losses <= self.enough if self.enough > 0 else super().rests(losses)
