"""What a search of heads is to do."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffguide.errors import ParamError
from diffguide.params import Param
from diffguide.processors import SoftPAG
from diffguide.search.ranking import going_on
from diffguide.search.state import Unit


@dataclass(frozen=True)
class Hunt:
    """What is searched.

    Attributes:
        prompts: one for each picture that a head is judged by.
        seeds: of the noise, one for each prompt.
        objective: the name of an objective, or what stands for one in the state's file.
        rounds: R, how often the best heads are chosen.
        keep: k, how many at a time.
        scale: w of SoftPAG.
        blend: u; 1 makes each head's effect plain, lower it afterwards.
        target, scope: of SoftPAG.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 is none, as in the paper's search.
        layers: heads of these layers alone (names as SoftPAG takes them); all by default.
        screen_steps: denoising steps, fewer than `steps`, of screens that heads pass before the full pass, from few to
            many; none by default. A head whose worth shows only in the full steps is lost there.
        screen_keep: the share of heads, above 0, that each screen lets through, never fewer than `keep`; at 1 none is
            dropped, and the report tells what a lower share would have lost.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    objective: str = "sharpness"
    rounds: int = 1
    keep: int = 3
    scale: float = 3.0
    blend: float = 1.0
    target: str = "identity"
    scope: str = "joint"
    steps: int = 20
    guidance_scale: float = 1.0
    layers: str = "all"
    screen_steps: tuple[int, ...] = ()
    screen_keep: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "seeds", tuple(self.seeds) or tuple(range(len(self.prompts))))
        if not self.prompts:
            raise ParamError("Hunt.prompts is empty; give one prompt or more")
        if len(self.seeds) != len(self.prompts):
            raise ParamError(f"Hunt.seeds: {len(self.seeds)} of them for {len(self.prompts)} prompts; give one each")
        for name in ("rounds", "keep", "steps"):
            Param(name, int, 1, "whole and at least 1", 1, None).check("Hunt", getattr(self, name))
        Param("guidance_scale", float, 1.0, "of classifier-free guidance", 0, 100).check("Hunt", self.guidance_scale)
        object.__setattr__(self, "screen_steps", tuple(self.screen_steps))
        few = Param("screen_steps", tuple[int, ...], (), f"fewer than the {self.steps} steps", 1, self.steps - 1)
        few.check("Hunt", self.screen_steps)
        if list(self.screen_steps) != sorted(set(self.screen_steps)):
            raise ParamError(f"Hunt.screen_steps = {self.screen_steps} do not grow; give each once, from few to many")
        Param("screen_keep", float, 0.5, "share of heads that go on", 1e-6, 1).check("Hunt", self.screen_keep)
        if not self.screen_steps and self.screen_keep != 0.5:
            raise ParamError(f"Hunt.screen_keep = {self.screen_keep} without a screen; give screen_steps as well")
        self.method([])  # checks its own

    def record(self) -> dict[str, Any]:
        """As it is kept in the state's file; without screens as in files from before there were any."""
        return {k: v for k, v in asdict(self).items() if self.screen_steps or not k.startswith("screen_")}

    def trials(self, heads: int) -> int:
        """How many trials a search of so many heads takes."""
        total = 1
        for number in range(self.rounds):
            left = heads - number * self.keep
            for _ in self.screen_steps:
                total += left
                left = going_on(left, self.screen_keep, self.keep)
            total += left
        return total

    def method(self, heads: Sequence[Unit]) -> SoftPAG:
        """The perturbation of these heads."""
        return SoftPAG(scale=self.scale, heads=heads, blend=self.blend, target=self.target, scope=self.scope)  # type: ignore[arg-type]
