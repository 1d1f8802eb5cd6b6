"""What gradient passes may save: the pictures stay the same, to rounding, and the cost goes down as told."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_family_pipelines import STEPS, Pull, call
from test_family_pipelines import case as case
from torch import Tensor

from diffguide import Guide
from diffguide.errors import AttachError
from diffguide.maps import Maps, Watch
from diffguide.method import Context, Method, Mover
from diffguide.params import param
from diffguide.processors import PAG, AttendExcite, CaptureMaps, Conform

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")

SUBJECTS = ("circle", "square")


@dataclass(frozen=True)
class Until(Pull):
    """A pull that leaves pictures alone whose loss is not above a threshold."""

    threshold: float = param(10.0, "loss that is low enough", low=0.0)

    def again(self, history: Tensor, context: Context) -> Tensor:
        return history[-1] > self.threshold


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-5 * b.abs().max())


def reused(pipe: Any, given: dict[str, Any], *methods: Method, **more: Any) -> tuple[Tensor, float, Tensor, float]:
    """What a run gives and its forwards, with reuse and without."""
    found: list[Any] = []
    for reuse in (True, False):
        with Guide(pipe, *methods, reuse=reuse) as guide:
            found += [call(pipe, given, **more), guide.report.forwards]
    return tuple(found)  # type: ignore[return-value]


def test_a_pass_that_moves_nothing_is_the_pipelines_own(case: Any) -> None:
    """The conditional rows are not run twice, where one call of the denoiser has others as well."""
    pipe, given = case
    plain = call(pipe, given)
    out, forwards, without, all_forwards = reused(pipe, given, Until())
    assert torch.equal(without, plain)
    assert close(out, plain)
    assert forwards in (all_forwards - STEPS, all_forwards)
    if forwards == all_forwards:  # one branch for each call, or no guidance
        assert torch.equal(out, plain)


def test_reuse_where_pictures_stop_at_different_passes() -> None:
    """Of two pictures one stays: its own call is made. The other's last pass counts for it."""
    pipe = tiny.sd()
    prompts = [tiny.PROMPT, "a blue square and a red circle on a black background"]
    with Guide(pipe, Until(threshold=0.0)) as guide:
        tiny.call(pipe, prompts, num_inference_steps=1)
    low, high = sorted(next(iter(guide.report.steps[0].losses[0].values())))
    assert low < high
    found = []
    for reuse in (True, False):
        with Guide(pipe, Until(threshold=(low + high) / 2, repeats=100, speed=100.0), reuse=reuse) as guide:
            found.append((tiny.call(pipe, prompts, num_inference_steps=1), guide.report.forwards))
    assert guide.report.backwards < 100, "the picture came below"
    assert close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] - 0.5, "one of four rows is known"


@pytest.mark.parametrize("other", [CaptureMaps(words=("circle",)), PAG(scale=2.0)], ids=["inside", "weak"])
def test_reuse_beside_other_methods(other: Method) -> None:
    """One that looks at the model's own pass must see all of it; a weak pass goes its own way."""
    pipe = tiny.sd()
    found = []
    for reuse in (True, False):
        with Guide(pipe, Until(), other, reuse=reuse) as guide:
            found.append((tiny.call(pipe), guide.report.forwards, guide.maps))
    assert close(found[0][0], found[1][0])
    if isinstance(other, PAG):
        assert found[0][1] < found[1][1]
    else:
        assert found[0][1] == found[1][1] and np.array_equal(found[0][2]["circle"], found[1][2]["circle"])


def test_no_reuse_for_those_who_count_on_the_shape_of_the_call() -> None:
    """A hook of somebody else sees every row."""
    pipe = tiny.sd()
    rows: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda _, args, out: rows.append(len(out[0])))
    with Guide(pipe, Until()):
        tiny.call(pipe)
    handle.remove()
    assert set(rows) == {2}


def test_checkpointing_changes_nothing_and_stays_out_of_the_users_way(case: Any) -> None:
    pipe, given = case
    pull = Pull(window=(0.0, 0.5))
    with Guide(pipe, pull) as guide:
        wanted = call(pipe, given)
        model = guide.model
    before = [dict(vars(m)) for m in model.modules()]
    guide = Guide(pipe, pull, checkpointing=True)
    if guide.family.checkpoints or not model._supports_gradient_checkpointing:
        with pytest.raises(AttachError, match="gradient checkpointing"):
            guide.attach()
        with Guide(pipe, PAG(layers="all"), checkpointing=True):  # takes no gradient
            return
    with guide:
        out = call(pipe, given)
    assert close(out, wanted) and guide.report.backwards > 0
    assert [dict(vars(m)).keys() for m in model.modules()] == [b.keys() for b in before]
    assert not model.is_gradient_checkpointing


def test_the_estimate_knows_of_checkpointing() -> None:
    pipe = tiny.sd()
    usual, less = (Guide(pipe, make_excite(), checkpointing=c).explain().memory for c in (False, True))
    assert usual is not None and less is not None and less < 0.8 * usual
    pipe.unet.enable_gradient_checkpointing()
    assert Guide(pipe, make_excite()).explain().memory == less


def make_excite(**options: Any) -> AttendExcite:
    return AttendExcite(words=SUBJECTS, **options)


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_an_interval_leaves_out_steps(interval: int) -> None:
    pipe = tiny.sd()
    with Guide(pipe, Pull(window=(0.25, 1.0), interval=interval)) as guide:
        tiny.call(pipe, num_inference_steps=8)
    assert [s.step for s in guide.report.steps] == list(range(2, 8, interval))


def test_an_interval_of_a_weak_pass() -> None:
    pipe = tiny.sd()
    forwards = []
    for interval in (1, 2):
        with Guide(pipe, PAG(scale=1.0, interval=interval)) as guide:
            tiny.call(pipe, num_inference_steps=8)
        forwards.append(guide.report.forwards)
    assert forwards == [24, 20]


def test_refining_steps_are_kept_whatever_the_interval() -> None:
    method = Conform(words=SUBJECTS, interval=4, refine=(0.0, 0.2, 0.4), iterations=1)
    assert [i for i in range(30) if method.acts_at(i, 30)] == [0, 4, 6, 8, 12]


def test_a_picture_whose_loss_is_low_is_left_alone_for_good() -> None:
    """The other one goes on; when both rest, no pass is made at all."""
    pipe = tiny.sd()
    prompts = [tiny.PROMPT, "a blue square and a red circle on a black background"]
    asked: list[tuple[int, list[int]]] = []

    @dataclass(frozen=True)
    class Listed(Mover):
        """Losses from a list: picture 0 is done in step 1, picture 1 in step 3."""

        calls: list[Any] = field(default_factory=list)

        def watch(self, context: Context) -> dict[str, Watch]:
            return {"words": Watch("cross", columns=(1,))}

        def rate(self, context: Context) -> float:
            return 1.0

        def loss(self, maps: Maps, context: Context) -> Tensor:
            asked.append((context.step, list(context.pictures)))
            value = maps.mean("words")[0].flatten(1).sum(1)
            done = torch.tensor([context.step >= (1, 3)[b] for b in context.pictures])
            return value * 0 + torch.where(done, 0.05, 1.0)

    with Guide(pipe, Listed(enough=0.1)) as guide:
        tiny.call(pipe, prompts, num_inference_steps=6)
    assert asked == [(0, [0, 1]), (1, [0, 1]), (2, [1]), (3, [1])]
    assert len(guide.report.steps) == 4
    asked.clear()
    with Guide(pipe, Listed()):
        tiny.call(pipe, prompts, num_inference_steps=6)
    assert [step for step, _ in asked] == list(range(6)), "0 is never"


@pytest.mark.parametrize("layers", ["down", "mid", "down,mid", "all", "up_blocks.1.*"])
def test_layers_choose_what_is_watched(layers: str) -> None:
    pipe = tiny.sd()
    method = make_excite(layers=layers, window=(0.0, 0.3), refine=(), targets=())
    with Guide(pipe, method) as guide:
        seen = guide.explain().sites["attend-excite"]
        tiny.call(pipe)
    assert guide.report.backwards > 0
    places = ("down", "mid", "up") if layers == "all" else tuple(layers.replace("_blocks.1.*", "").split(","))
    assert seen and all(name.startswith(places) for name in seen)


def test_earlier_layers_stop_earlier() -> None:
    """Nothing behind the last watched module runs in a gradient pass."""
    pipe = tiny.sd()
    ran = []
    handle = pipe.unet.up_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    for layers in ("", "down"):
        ran.clear()
        with Guide(pipe, Pull(layers=layers)):
            tiny.call(pipe, num_inference_steps=2)
        assert len(ran) == (2 if layers else 4)
    handle.remove()


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(AttachError, match=r"AttendExcite finds no site .*'middle' matches none: use down, mid"):
        Guide(tiny.sd(), make_excite(layers="middle")).attach()
