"""The guide on real pipelines: schedulers, offload, compile, the algebra of its terms."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import accelerate
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    UniPCMultistepScheduler,
)
from every import LAYOUT, make
from PIL import Image
from torch import Tensor, nn

from diffguide import stepping
from diffguide.errors import AttachError, FamilyError, ParamError, PromptError, SteeringError
from diffguide.guide import Guide
from diffguide.maps import Maps, Watch
from diffguide.method import Context, Method
from diffguide.processors import PAG, AttendExcite, BackwardGuidance, Bacon, CaptureMaps, build
from diffguide.site import Call, Proceed

SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]
schedulers = pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda c: c.__name__)


@dataclass(frozen=True)
class Push(Method):
    """A method of tests: its gradient is known, it moves every latent by `by` at the model's scale."""

    by: float = 0.1
    at: int | None = None  # the only step to act in

    def watch(self, context: Context) -> dict[str, Watch]:
        return {"cross": Watch("cross", (16,), (1,))}

    def rate(self, context: Context) -> float:
        return float(self.at is None or context.step == self.at)

    def loss(self, maps: Maps, context: Context) -> Tensor:
        return maps.mean("cross")[0].sum((1, 2)) * 0 + 1


@dataclass(frozen=True)
class Constant(Method):
    """A method of tests: adds a constant to the combined prediction."""

    d: float = 0.25

    def shift(self, pred: dict[str, Tensor]) -> Tensor:
        return torch.full_like(pred["cond"], self.d)


@dataclass(frozen=True)
class Halve(Method):
    """A method of tests: halves the output of attention in every row."""

    branch = "every"

    def attend(self, call: Call, proceed: Proceed) -> Tensor:
        return proceed(call) / 2


def scheduler(cls: Any) -> Any:
    options = {"clip_sample": False} if cls in (DDIMScheduler, DDPMScheduler) else {}
    return (
        cls(**tiny.NOISE, **options)
        if "steps_offset" in inspect.signature(cls).parameters
        else cls(**{k: v for k, v in tiny.NOISE.items() if k != "steps_offset"}, **options)
    )


def moves(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Let every gradient be -`by`: the machinery around it is what is tested."""
    monkeypatch.setattr("diffguide.passes.gradient", lambda total, z: torch.full_like(z.float(), -by))


@schedulers
def test_every_scheduler_is_steered_and_handed_back(cls: Any) -> None:
    pipe = tiny.sd(scheduler(cls))
    plain = tiny.call(pipe)
    with Guide(pipe, make(BackwardGuidance), PAG(scale=1.0)) as guide:
        out = tiny.call(pipe)
    assert out.isfinite().all() and not torch.equal(out, plain)
    assert guide.report.backwards > 0
    assert torch.equal(tiny.call(pipe), plain)


@schedulers
def test_the_same_move_at_the_model_scale_is_the_callback_route(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving latents before step k through the hooks is changing them in the official callback of step k - 1."""
    moves(monkeypatch, 0.05)
    pipe = tiny.sd(scheduler(cls))
    k, seen = 1, {}

    class Spy(Push):
        def loss(self, maps: Maps, context: Context) -> Tensor:
            seen["scale"] = stepping.input_scale(pipe.scheduler, seen["t"])
            return super().loss(maps, context)

    def note(model: Any, args: Any, kwargs: Any) -> None:
        seen["t"] = args[1] if len(args) > 1 else kwargs["timestep"]

    handle = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    pipe.scheduler.set_timesteps(4)
    with Guide(pipe, Spy(at=k)) as guide:
        hooked = tiny.call(pipe, num_inference_steps=4)
    handle.remove()
    if not guide.report.steps:  # this step takes a stored sample: nothing to compare
        assert torch.equal(hooked, tiny.call(pipe))
        return

    def callback(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] + 0.05 / seen["scale"]} if step == k - 1 else {}

    official = tiny.call(pipe, callback_on_step_end=callback)
    if cls is UniPCMultistepScheduler:  # the corrector erases the official move; ours is kept
        assert (hooked - tiny.call(pipe)).abs().mean() > (official - tiny.call(pipe)).abs().mean()
    else:
        assert (hooked - official).abs().max() < 1e-4


@pytest.mark.parametrize("flow", [False, True], ids=["epsilon", "flow"])
def test_unipc_keeps_a_move(flow: bool) -> None:
    """Gain of a move on the next sample with the predictions held fixed, at every step."""

    def trajectory(move_at: int | None) -> list[Tensor]:
        extra = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0} if flow else {}
        sched = UniPCMultistepScheduler(num_train_timesteps=1000, **extra)
        sched.set_timesteps(8)
        rng = torch.Generator().manual_seed(0)
        step = {"now": 0}
        wrap = stepping.Stepper(
            sched, lambda: None, lambda z, y: (z + 1.0 if step["now"] == move_at else z, y), lambda z: z
        )
        z, out = torch.randn(1, 4, 4, 4, generator=rng), []
        for step["now"], t in enumerate(sched.timesteps):
            z = sched.step(torch.randn(z.shape, generator=rng), t, z).prev_sample
            out.append(z)
        wrap.remove()
        assert "step" not in vars(sched) and sched.disable_corrector == []
        return out

    plain = trajectory(None)
    for k in range(1, 7):
        gain = float((trajectory(k)[k] - plain[k]).mean())
        assert gain > 0.95, (k, gain)


def test_a_deep_copied_scheduler_steps_itself() -> None:
    pipe = tiny.sd()
    pipe.scheduler.set_timesteps(4)
    original = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = original
    with Guide(pipe, PAG(scale=1.0)):
        original.set_timesteps(4)
        twin = copy.deepcopy(original)
        z = torch.zeros(1, 4, 4, 4)
        twin.scale_model_input(z, twin.timesteps[0])
        twin.step(z, twin.timesteps[0], z)
        assert twin.step_index == 1 and original.step_index is None


def test_the_wrapped_step_keeps_its_signature() -> None:
    pipe = tiny.sd()
    plain = inspect.signature(pipe.scheduler.step)
    with Guide(pipe, PAG(scale=1.0)):
        assert inspect.signature(pipe.scheduler.step) == plain


def test_a_scheduler_replaced_after_attaching_is_steered() -> None:
    pipe = tiny.sd()
    with Guide(pipe, make(BackwardGuidance)) as guide:
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        changed = tiny.call(pipe)
        assert guide.report.backwards > 0
    assert not torch.equal(changed, tiny.call(pipe)) and "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("make_pipe", [tiny.sd, tiny.sdxl])
def test_add_to_all_equals_add_after_combine(make_pipe: Any, guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_pipe()
    with Guide(pipe, Constant(0.25)):
        ours = tiny.call(pipe, guidance_scale=guidance)
    step = type(pipe.scheduler).step
    monkeypatch.setattr(type(pipe.scheduler), "step", lambda self, y, t, z, **k: step(self, y + 0.25, t, z, **k))
    assert (ours - tiny.call(pipe, guidance_scale=guidance)).abs().max() < 2e-5


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_pag_is_the_pag_pipeline_of_diffusers(rescale: float) -> None:
    pipe = tiny.sd()
    peer = StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False, pag_applied_layers="mid")
    peer.set_progress_bar_config(disable=True)
    theirs = tiny.call(peer, pag_scale=3.0, guidance_rescale=rescale)
    with Guide(pipe, PAG(scale=3.0)):
        ours = tiny.call(pipe, guidance_rescale=rescale)
    assert (ours - theirs).abs().max() < 5e-5
    with pytest.raises(AttachError, match="from_pipe"):
        Guide(peer, PAG(scale=3.0)).attach()


def test_moves_are_the_same_at_the_model_scale_on_ddim_and_euler() -> None:
    """One guided step moves the model's input equally, whether the scheduler scales latents by sigma or not."""
    moved = {}
    for name, sched in {
        "ddim": scheduler(DDIMScheduler),
        "euler": EulerDiscreteScheduler(**tiny.NOISE, timestep_spacing="leading"),
    }.items():
        pipe = tiny.sd(sched)
        inputs: list[Tensor] = []
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        pipe.scheduler.set_timesteps(4)
        # the same model input at the first step
        start = noise * (1 if name == "ddim" else (sched.sigmas[0] ** 2 + 1) ** 0.5 / sched.init_noise_sigma)
        with Guide(pipe, AttendExcite(tokens=(2,), iterations=1, window=(0.0, 0.2))):
            handle = pipe.unet.register_forward_pre_hook(
                lambda m, a, k, to=inputs: to.append(a[0].clone()), with_kwargs=True
            )
            tiny.call(pipe, latents=start)
            handle.remove()
        moved[name] = inputs[0][:1] - noise
    assert moved["ddim"].abs().max() > 1e-3
    assert (moved["ddim"] - moved["euler"]).abs().max() < 2e-3 * moved["ddim"].abs().max()


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_a_second_generation_under_offload(offload: str) -> None:
    """Offload re-installs its wrappers after every call; here it takes "cpu" for the accelerator.

    Sequential offload is put on the denoiser alone, as `enable_sequential_cpu_offload` does for each part: with "cpu"
    for the accelerator, accelerate 1.15 cannot offload the text encoder of a plain pipeline either.
    """
    pipe = tiny.sd()
    with Guide(pipe, make(BackwardGuidance), PAG(scale=1.0)):
        wanted = tiny.call(pipe)
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    with Guide(pipe, make(BackwardGuidance), PAG(scale=1.0)) as guide:
        for _ in range(2):
            assert (tiny.call(pipe) - wanted).abs().max() < 1e-5
            assert guide.report.backwards > 0


def test_gradient_checkpointing_changes_nothing() -> None:
    pipe = tiny.sd()
    with Guide(pipe, make(Bacon)):
        wanted = tiny.call(pipe)
    pipe.unet.enable_gradient_checkpointing()
    with Guide(pipe, make(Bacon)):
        assert (tiny.call(pipe) - wanted).abs().max() < 1e-5


def test_inference_mode_around_the_call() -> None:
    pipe = tiny.sd()
    with Guide(pipe, make(Bacon)):
        wanted = tiny.call(pipe)
        with torch.inference_mode():
            inside = tiny.call(pipe)
    assert torch.equal(inside, wanted)


def compile_denoiser(pipe: Any, how: str) -> None:
    if how == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    elif how == "in place":
        pipe.unet.compile(backend="eager")
    else:
        for module in pipe.unet.modules():
            if type(module).__name__ == "BasicTransformerBlock":
                module.compile(backend="eager", fullgraph=True)


@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])
def test_compiled_denoisers(how: str) -> None:
    pipe = tiny.sd()
    with Guide(pipe, make(BackwardGuidance), PAG(scale=1.0)):
        wanted = tiny.call(pipe, num_inference_steps=12)
    torch._dynamo.reset()
    compile_denoiser(pipe, how)
    with Guide(pipe, make(BackwardGuidance), PAG(scale=1.0)) as guide:
        assert (tiny.call(pipe, num_inference_steps=12) - wanted).abs().max() < 1e-4
        assert guide.report.backwards > 0


@pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])
def test_maps_of_compiled_denoisers(how: str) -> None:
    """Twelve steps: more than the recompilations that PyTorch allows."""
    pipe = tiny.sd()
    with Guide(pipe, CaptureMaps(words=("circle",))) as guide:
        wanted, maps = tiny.call(pipe, num_inference_steps=12), guide.maps["circle"]
    torch._dynamo.reset()
    compile_denoiser(pipe, how)
    with Guide(pipe, CaptureMaps(words=("circle",))) as guide:
        assert (tiny.call(pipe, num_inference_steps=12) - wanted).abs().max() < 1e-4
        assert "without torch.compile" in guide.explain().notes[0]
    assert abs(guide.maps["circle"] - maps).max() < 1e-6


def test_half_precision_moves_latents() -> None:
    """bfloat16 here: float16 convolutions do not run on every CPU."""
    pipe = tiny.sd().to(torch.bfloat16)
    with Guide(pipe, make(BackwardGuidance)) as guide:
        out = tiny.call(pipe)
    assert out.dtype == torch.bfloat16 and out.isfinite().all() and guide.report.backwards > 0


def test_small_gradients_survive_float16() -> None:
    z = torch.ones(1, 64, dtype=torch.float16, requires_grad=True)
    from diffguide.passes import gradient

    total = ((z * 1e-3).sum().half() * torch.tensor(1e-4, dtype=torch.float16)).float()
    naive = torch.autograd.grad(total, z, retain_graph=True)[0]
    ours = gradient(total, z)
    assert ours is not None and ours.dtype == torch.float32
    exact = 1e-3 * 1e-4
    assert abs(float(ours.mean()) - exact) < 0.05 * exact
    assert abs(float(naive.float().mean()) - exact) > 0.05 * exact
    assert gradient((z * float("inf")).sum(), z) is None


def test_the_early_stop_gives_the_same_gradient() -> None:
    pipe = tiny.sd()
    pictures, passes_seen = [], []
    for early in (True, False):
        guide = Guide(pipe, make(Bacon), early_stop=early)
        blocks: list[int] = []
        handle = pipe.unet.conv_out.register_forward_hook(lambda *_, blocks=blocks: blocks.append(1))
        with guide:
            pictures.append(tiny.call(pipe))
        handle.remove()
        passes_seen.append(len(blocks))
    assert torch.equal(pictures[0], pictures[1])
    assert passes_seen[0] == 4 < passes_seen[1], "the stopped passes never reach the last layer"


def image(side: int = 32) -> Image.Image:
    return Image.effect_noise((side, side), 60).convert("RGB")


def test_image_to_image_uses_the_truncated_schedule() -> None:
    pipe = tiny.sd(cls=StableDiffusionImg2ImgPipeline)
    plain = tiny.call(pipe, image=image(), strength=0.5, num_inference_steps=8)
    with Guide(pipe, make(BackwardGuidance, window=(0.0, 0.25)), PAG(scale=1.0)) as guide:
        out = tiny.call(pipe, image=image(), strength=0.5, num_inference_steps=8)
    assert not torch.equal(out, plain)
    assert [s.step for s in guide.report.steps] == [0], "a quarter of the four steps that are left"


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(channels: int) -> None:
    pipe = tiny.sd(cls=StableDiffusionInpaintPipeline, in_channels=channels)
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    options = {"image": image(), "mask_image": mask, "height": 32, "width": 32}
    plain = tiny.call(pipe, **options)
    with Guide(pipe, make(BackwardGuidance)) as guide:
        out = tiny.call(pipe, **options)
        notes = guide.explain(steps=4).notes
    assert out.shape == plain.shape and not torch.equal(out, plain)
    outside = torch.ones_like(out, dtype=torch.bool)
    outside[..., 4:12, 4:12] = False
    if channels == 4:
        assert torch.equal(out[outside], plain[outside]) and "mask" in notes[0]


def test_controlnet() -> None:
    pipe = tiny.sd()
    pipe = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=tiny.controlnet(), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for p in pipe.controlnet.parameters():
            p.add_(0.01)
    options = {"image": image(), "height": 32, "width": 32, "num_images_per_prompt": 2}
    plain = tiny.call(pipe, **options)
    with Guide(pipe, make(Bacon), PAG(scale=1.0)) as guide:
        out = tiny.call(pipe, **options)
    assert not torch.equal(out, plain) and guide.report.backwards > 0


def test_sdxl() -> None:
    pipe = tiny.sdxl()
    plain = tiny.call(pipe)
    with Guide(pipe, make(AttendExcite), PAG(scale=1.0)) as guide:
        assert not torch.equal(tiny.call(pipe), plain)
    assert guide.explain().memory


@pytest.mark.parametrize("size", [(32, 48), (40, 24), (40, 56)])
def test_sizes_that_are_not_square(size: tuple[int, int]) -> None:
    pipe = tiny.sd()
    h, w = size[0] // 2, size[1] // 2
    with Guide(pipe, make(Bacon), CaptureMaps(words=("circle",), side=32)) as guide:
        out = tiny.call(pipe, height=size[0], width=size[1])
    assert out.shape[2:] == (h, w)
    assert guide.maps["circle"].shape[1:] == (h, w)


def test_maps_are_shares_of_attention() -> None:
    pipe = tiny.sd()
    with Guide(pipe, CaptureMaps(words=("red circle", "square"))) as guide:
        tiny.call(pipe, num_images_per_prompt=3)
    for maps in guide.maps.values():
        assert maps.shape == (3, 16, 16) and (maps >= 0).all() and (maps <= 1).all()


def test_prompts_given_as_embeddings_need_to_be_told() -> None:
    pipe = tiny.sd()
    embeds, negative = pipe.encode_prompt(tiny.PROMPT, "cpu", 1, True)
    options = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with Guide(pipe, make(AttendExcite)), pytest.raises(PromptError, match=r"Guide\(\.\.\., prompt="):
        tiny.call(pipe, None, **options)
    with Guide(pipe, make(AttendExcite), prompt=tiny.PROMPT) as guide:
        told = tiny.call(pipe, None, **options)
    with Guide(pipe, make(AttendExcite)):
        assert torch.equal(told, tiny.call(pipe))
    with Guide(pipe, AttendExcite(tokens=(2, 3), iterations=1)) as guide:
        tiny.call(pipe, None, **options)
    assert guide.report.backwards > 0


def test_a_phrase_that_is_not_in_the_prompt() -> None:
    pipe = tiny.sd()
    with Guide(pipe, Bacon(LAYOUT)), pytest.raises(PromptError, match="red circle"):
        tiny.call(pipe, "a green star")


def test_the_report_tells_the_words_that_were_found() -> None:
    """Those of the prompt, picture by picture."""
    pipe = tiny.sd()
    prompts = [tiny.PROMPT, "three green stars and a white cross on a black background"]
    with Guide(pipe, AttendExcite(window=(0.0, 0.1), refine=(), targets=())) as guide:
        tiny.call(pipe, [*prompts, prompts[0]], num_inference_steps=2)
    first, second = ["red circle", "blue square"], ["green stars", "white cross"]
    assert guide.report.words == {"AttendExcite": [first, second, first]}
    assert str(guide.report).count("AttendExcite works on: red circle | blue square") == 1


def test_attaching_twice() -> None:
    pipe = tiny.sd()
    with Guide(pipe, PAG()) as guide:
        assert guide.attach() is guide
        with pytest.raises(AttachError, match="guided already"):
            Guide(pipe, PAG()).attach()
    guide.detach()
    with Guide(pipe, PAG()):
        tiny.call(pipe)


@pytest.mark.parametrize(
    ("spoil", "fix"),
    [
        (lambda pipe: pipe.enable_attention_slicing(), "disable_attention_slicing"),
        (
            lambda pipe: pipe.unet.set_attn_processor(
                __import__("diffusers").models.attention_processor.AttnProcessor()
            ),
            "set_default_attn_processor",
        ),
    ],
)
def test_processors_that_hide_their_attention_are_refused(spoil: Any, fix: str) -> None:
    pipe = tiny.sd()
    spoil(pipe)
    guide = Guide(pipe, PAG())
    assert fix in guide.explain().refusals[0]
    with pytest.raises(AttachError, match=fix):
        guide.attach()


def test_a_processor_that_makes_no_attention_call_is_an_error() -> None:
    class Silent:
        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Any = None,
            attention_mask: Any = None,
            temb: Any = None,
        ) -> Tensor:
            return hidden_states

    pipe = tiny.sd()
    pipe.unet.set_attn_processor(Silent())
    with Guide(pipe, PAG()), pytest.raises(SteeringError, match="Silent made 0 attention calls"):
        tiny.call(pipe)


def test_layers_that_match_nothing_are_refused() -> None:
    with pytest.raises(AttachError, match="PAG finds no site"):
        Guide(tiny.sd(), PAG(layers="nowhere")).attach()


def test_unknown_models_and_objects_are_refused() -> None:
    class Pipe:
        unet = nn.Linear(1, 1)

    with pytest.raises(FamilyError, match=r"no family describes Linear \(known: .*unet"):
        Guide(Pipe(), PAG())
    with pytest.raises(FamilyError, match="has no denoiser"):
        Guide(object(), PAG())
    with pytest.raises(AttachError, match="is not a method"):
        Guide(tiny.sd(), "pag")  # type: ignore[arg-type]
    with pytest.raises(ParamError, match=r"PAG.scale = -1 is outside \[0, 20\]: guidance strength s"):
        PAG(scale=-1)


def test_built_processors_steer_without_a_guide() -> None:
    pipe = tiny.sd()
    plain = tiny.call(pipe)
    before = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(build(pipe.unet))
    assert torch.equal(tiny.call(pipe), plain), "no method, no change"
    pipe.unet.set_attn_processor(build(pipe.unet, Halve()))
    halved = tiny.call(pipe)
    assert not torch.equal(halved, plain)
    with pytest.raises(SteeringError, match="size="):
        tiny.call(pipe, height=64, width=32)
    pipe.unet.set_attn_processor(before)
    assert torch.equal(tiny.call(pipe), plain)
    with Guide(pipe, Halve()):
        assert torch.equal(tiny.call(pipe), halved)
    with pytest.raises(AttachError, match=r"Guide\(pipe, PAG"):
        build(pipe.unet, PAG())


def test_the_memory_estimate_is_what_is_saved() -> None:
    """Counted on tensors without memory, against the storages that one real gradient pass saves.

    A little above: before a run it is not known how few columns of the maps are wanted, and all are counted.
    """
    pipe = tiny.sd()
    guide = Guide(pipe, make(BackwardGuidance, iterations=1))
    estimate = guide.explain(steps=4).memory
    saved: dict[int, int] = {}
    keep_alive = []

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            keep_alive.append(t)
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    own = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
    with guide, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tiny.call(pipe, num_inference_steps=1, guidance_scale=1.0)
    measured = sum(n for ptr, n in saved.items() if ptr not in own) / 2**20
    assert estimate is not None and guide.report.backwards == 1
    assert 1 <= estimate / measured < 1.3
