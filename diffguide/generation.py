"""One generation under a guide: what is known of its batch, and the step that is open."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from diffguide import stepping
from diffguide.errors import AttachError, PromptError
from diffguide.family import LARGE, Arguments, Batch, Encoding, Family, in_turn, is_modular
from diffguide.maps import Maps
from diffguide.method import Context, Method
from diffguide.passes import Wishes
from diffguide.prefix import Prefix
from diffguide.processors.steered import check_processor
from diffguide.registry import sites_of
from diffguide.second_prompt import SecondPrompt
from diffguide.site import Call


def steps_of(pipe: Any) -> int:
    """How many steps the run has; one from a picture begins within the schedule."""
    scheduler = pipe.scheduler
    return getattr(pipe, "_num_timesteps", None) or len(scheduler.timesteps) - (
        getattr(scheduler, "begin_index", None) or 0
    )


class Generation:
    """The batch of one pipeline call and its open step.

    Args:
        pipe: the pipeline.
        family: of its denoiser.
        model: the denoiser as the pipeline holds it.
        methods: how many methods will keep a memory.
        given: the prompts, if they are known.
        encoded: arguments of the pipeline's function that encodes the prompt.
        call: the arguments of the first denoiser call.

    Raises:
        SteeringError, AttachError: a processor cannot be steered.
        PromptError: the prompts do not divide the batch.
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        model: Any,
        methods: int,
        given: list[str] | None,
        encoded: dict[str, Any],
        call: Arguments,
    ) -> None:
        self.pipe, self.family, self.encoded = pipe, family, encoded
        self.size, self.calls, self.pictures = family.size(*call), 0, 0
        self.frames = self.size[0] if len(self.size) == 3 else 1
        self.use(model, call)
        rows, of = self.branches(model, call, 0)
        self.pictures = len(range(rows)[of["cond"]])
        self.steps = steps_of(pipe)
        self.prompts = self._prompts(given)
        self.memories: dict[int, dict[str, Any]] = {n: {} for n in range(methods)}
        self.step, self.open, self.ended = 0, False, False
        self.scale, self.sigma = 1.0, 0.0
        self.call: Arguments = ((), {})  # of the denoiser, as the weak pass gets them
        self.delta: Tensor | None = None
        self.term: Tensor | None = None
        self.pred: dict[str, Tensor] = {}  # the predictions of the open step by branch, without the term
        self.seen: dict[int, Maps] = {}
        self.kept: tuple[Tensor, Tensor] | None = None  # rows of the pipeline's call, and their prediction
        self.resting: list[set[int]] = [set() for _ in range(methods)]  # pictures that a method moves no more
        self.second: SecondPrompt | None = None
        self.prefix: Prefix | None = None  # what weak passes of this call need not compute again
        self.swap = contextlib.ExitStack()

    def use(self, model: Any, call: Arguments) -> None:
        """Work with this denoiser: a pipeline may have one for the first steps and one for the last."""
        if getattr(self, "model", None) is not model:
            self.model = model
            self.sites = sites_of(self.family, model)
            for site in self.sites:
                check_processor(site)
            self.grids = {site: self.family.grid(site, self.size) for site in self.sites}
        self.words = self.family.words(*call)

    def enter(self, model: Any, call: Arguments) -> int:
        """A denoiser call begins: who is who in its batch; returns its number in the step."""
        self.use(model, call)
        _, self.rows = self.branches(model, call, self.calls)
        self.calls += 1
        return self.calls - 1

    def branches(self, model: Any, call: Arguments, number: int) -> tuple[int, dict[str, slice]]:
        """How many rows a call has, and which are whose."""
        rows = self.family.latents(model, *call).shape[0]
        batch = Batch(rows, number, self.pictures, self.encoded, call[1])
        return rows, in_turn(batch) if is_modular(self.pipe) else self.family.branches(self.pipe, batch)

    def _prompts(self, given: list[str] | None) -> list[str | None]:
        """The prompt of each picture: pictures of one prompt follow each other."""
        if not given:
            return [None] * self.pictures
        if self.pictures % len(given):
            raise PromptError(f"{len(given)} prompts do not divide a batch of {self.pictures} pictures")
        return [given[i * len(given) // self.pictures] for i in range(self.pictures)]

    def base(self, method: Method) -> str:
        """Whose rows of the call a method looks at."""
        return method.base if method.base in self.rows else "cond"

    @property
    def progress(self) -> float:
        return self.step / max(1, self.steps)

    def context(self, number: int, pictures: list[int] | None = None) -> Context:
        """What a method may know; every frame of a video counts as a row of its picture."""
        family, pipe = self.family, self.pipe
        pictures = list(range(self.pictures)) if pictures is None else pictures
        return Context(
            prompts=self.prompts,
            find=self.find,
            content=lambda b: family.content(pipe, self.prompts[b], self.encoding),
            step=self.step,
            steps=self.steps,
            sigma=self.sigma,
            sites=self.sites,
            grids=self.grids,
            size=self.size,
            pictures=[b for b in pictures for _ in range(self.frames)],
            flow=stepping.is_flow(pipe.scheduler),
            memory=self.memories[number],
        )

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.words, self.encoded)

    def find(self, b: int, phrase: str, occurrence: int | None = None) -> list[int]:
        """Columns of a phrase in picture `b`, all among those that the denoiser is given."""
        columns = self.family.columns(self.pipe, self.prompts[b], phrase, occurrence, self.encoding)
        if max(columns) >= self.words:
            raise PromptError(
                f"phrase {phrase!r:.60} lies at token {max(columns)}, but the denoiser is given {self.words} text "
                "states; shorten the prompt or raise max_sequence_length"
            )
        return columns

    def wishes(self, methods: dict[int, Method]) -> Wishes:
        """What the methods want to see, and at which sites; a wish that no site can grant is an error."""
        found: Wishes = {}
        for number, method in methods.items():
            for name, watch in method.watch(self.context(number)).items():
                sites = method.watched(watch, self.sites, self.grids)
                if watch.kind == "self" and any(len(self.grids[s]) == 3 and not s.apart for s in sites):
                    raise AttachError(
                        f"{type(method).__name__} wants self-attention maps of a video: {LARGE}; choose settings "
                        "without them (Bacon: align=0) or a method of words alone"
                    )
                if not sites:
                    raise AttachError(
                        f"{type(method).__name__} wants {watch.kind}-attention maps in {', '.join(watch.blocks)}: this "
                        "denoiser has none"
                    )
                found[number, name] = (watch, sites)
        return found

    def open_step(self, timestep: Any) -> None:
        self.open, self.calls, self.delta, self.term, self.kept, self.pred = True, 0, None, None, None, {}
        self.scale = stepping.input_scale(self.pipe.scheduler, timestep)
        self.sigma = stepping.noise_level(self.pipe.scheduler, timestep)

    def close_step(self) -> None:
        self.open, self.delta, self.term = False, None, None
        self.step += 1

    def moved(self, z: Tensor) -> Tensor:
        """The latents of a denoiser call with the move in every branch."""
        assert self.delta is not None
        z = z.clone()
        for rows in self.rows.values():
            z[rows] = (z[rows].float() + self.delta).to(z.dtype)
        return z

    def without_kept(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Arguments:
        """A denoiser call for those of its `rows` whose prediction is not known yet."""
        assert self.kept is not None
        return self.family.take(args, kwargs, left(rows, self.kept[0]), rows)

    def with_kept(self, out: Any) -> Any:
        """What the denoiser would have given for all rows."""
        assert self.kept is not None
        known, kept = self.kept
        y = self.family.prediction(out)
        rows = len(y) + len(known)
        whole = y.new_empty(rows, *y.shape[1:])
        whole[known.to(y.device)] = kept.to(y)
        whole[left(rows, known).to(y.device)] = y
        return self.family.with_prediction(out, whole)

    def restore(self) -> None:
        self.swap.close()

    def collected(self) -> dict[str, Any]:
        maps: dict[str, Any] = {}
        for memory in self.memories.values():
            maps |= memory.get("maps", {})
        if self.frames > 1:
            maps = {word: rows.reshape(-1, self.frames, *rows.shape[1:]) for word, rows in maps.items()}
        return maps


def left(rows: int, known: Tensor) -> Tensor:
    """The numbers below `rows` that are not among the known ones."""
    mask = torch.ones(rows, dtype=torch.bool)
    mask[known] = False
    return torch.arange(rows)[mask]


class OnRows:
    """A method of one branch inside a batch of several: the other rows go on as they would."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def attend(self, call: Call, proceed: Any) -> Tensor:
        branch = self.method.branch or "every"
        if branch == "every":
            return self.method.attend(call, proceed)
        out = proceed(call)
        if branch in call.rows:
            out = out.clone()
            out[call.rows[branch]] = self.method.attend(call.of(branch), proceed)
        return out
