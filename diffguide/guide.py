"""Methods attached to a pipeline, and the way back.

The guide owns the denoising step: when a gradient pass runs and moves the latents, when a weak pass runs, what is added
where. It uses native hooks on the denoiser that the pipeline holds, and wraps two functions of the scheduler;
everything is put back by `detach`.
"""

import contextlib
import functools
import weakref
from typing import Any, Self

import torch
from torch import Tensor

from diffguide import caches, passes, stepping, versions
from diffguide.combination import recombined
from diffguide.descent import Thrift, descend
from diffguide.errors import AttachError
from diffguide.explain import Plan, explain
from diffguide.family import bare
from diffguide.generation import Generation, OnRows
from diffguide.hearing import Hearing
from diffguide.maps import Maps
from diffguide.method import Method
from diffguide.prefix import Prefix
from diffguide.processors.steered import chain
from diffguide.refusals import refusals, unfit
from diffguide.registry import denoisers, of_pipe
from diffguide.report import Report
from diffguide.second_prompt import ROWS, asking, given_states
from diffguide.site import Site
from diffguide.weak import changed, predicted

_guided: "weakref.WeakValueDictionary[int, Guide]" = weakref.WeakValueDictionary()  # by id of the pipeline


class Guide:
    """Methods at work in a diffusers pipeline.

    Use it as a context manager, or call `attach` and `detach`. Between them the pipeline is called as usual.

    Args:
        pipe: a diffusers pipeline of a known family.
        methods: what to do, in this order.
        prompt: the text (or one for each prompt of a batch) that embeddings given to the pipeline were made from.
        early_stop: end gradient passes at the last attention module that a loss looks at; off for comparison only.
        reuse: where a gradient pass finds that no picture need move, take its prediction for the pipeline's own.
        checkpointing: gradient passes that keep less and compute more.
        share: begin weak passes at the first block that they change. None of the four changes the pictures beyond
            rounding.

    Raises:
        FamilyError: nothing is known of this pipeline.
        AttachError: raised by `attach` when pipeline and methods cannot be honoured together.
    """

    def __init__(
        self,
        pipe: Any,
        *methods: Method,
        prompt: str | list[str] | None = None,
        early_stop: bool = True,
        reuse: bool = True,
        checkpointing: bool = False,
        share: bool = True,
    ) -> None:
        for method in methods:
            if not isinstance(method, Method):
                raise AttachError(
                    f"{type(method).__name__} is not a method; Guide(pipe, ...) takes the pipeline first, then "
                    "instances such as diffguide.PAG(scale=3.0)"
                )
        versions.warn_once()
        self.pipe = pipe
        self.methods = methods
        self.family, self.attribute = of_pipe(pipe)
        self.report = Report()
        self.thrift = Thrift(early_stop, reuse, checkpointing, share)
        self._active = [m for m in methods if not m.inert]
        told = [prompt] if isinstance(prompt, str) else prompt
        self._hearing = Hearing(pipe, self.family, told, self._active)
        self._undo = contextlib.ExitStack()
        self._stepper: stepping.Stepper | None = None
        self._run: Generation | None = None

    # Attaching.

    def attach(self) -> Self:
        """Install the hooks; raises AttachError, with the fix, if something cannot be honoured."""
        other = _guided.get(id(self.pipe))
        if other is self:
            return self
        if other is not None:
            raise AttachError("this pipeline is guided already; detach the other guide, or give one guide all methods")
        if self._active:
            reasons = refusals(self.pipe, self.family, self.model, self._active, self.thrift)
            if reasons:
                raise AttachError("; ".join(reasons))
            self._install()
        _guided[id(self.pipe)] = self
        return self

    def detach(self) -> None:
        """Take everything away again; harmless when there is nothing."""
        if _guided.get(id(self.pipe)) is self:
            del _guided[id(self.pipe)]
        self._end()
        self._undo.close()
        if self._stepper is not None:
            self._stepper.remove()
            self._stepper = None

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def model(self) -> Any:
        """The denoiser, as the pipeline holds it."""
        return getattr(self.pipe, self.attribute)

    @property
    def maps(self) -> dict[str, Any]:
        """What was seen in the last run, by word: float32 [pictures, h, w], of video [pictures, frames, h, w]."""
        return {} if self._run is None else self._run.collected()

    def explain(self, *, steps: int = 50, height: int | None = None, width: int | None = None) -> Plan:
        """What a run would do: sites, passes, memory, refusals with their fixes. Runs nothing.

        `height` and `width` are of the picture, in pixels.
        """
        return explain(self.pipe, self.family, self.model, self.methods, steps, height, width, self.thrift)

    def _install(self) -> None:
        disabled: Any = torch.compiler.disable
        for model in denoisers(self.pipe):
            before = model.register_forward_pre_hook(disabled(self._before), with_kwargs=True)
            after = model.register_forward_hook(disabled(self._after), with_kwargs=True, always_call=True)
            self._undo.callback(before.remove)
            self._undo.callback(after.remove)
        self._hearing.listen(self._undo)
        self._wrap_scheduler()

    def _wrap_scheduler(self) -> None:
        """Wrap the scheduler the pipeline holds now; users replace it after attaching."""
        if self._stepper is None or self._stepper.scheduler is not self.pipe.scheduler:
            if self._stepper is not None:
                self._stepper.remove()
            self._stepper = stepping.Stepper(self.pipe.scheduler, self._end, self._move, self._finish)

    # A run.

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Generation":
        """Open a run at its first denoiser call: who is who in the batch, which words are where."""
        self._wrap_scheduler()
        if reasons := unfit(denoisers(self.pipe), self._active, self.thrift):  # it may have changed after attaching
            raise AttachError("; ".join(reasons))
        given, encoded, second = self._hearing.take()
        run = Generation(self.pipe, self.family, model, len(self._active), given, encoded, (args, kwargs))
        run.second = second
        for number, method in enumerate(self._active):
            if method.asks("prepare"):
                method.prepare(run.context(number))
        said = {type(m).__name__: run.memories[n].get("words") for n, m in enumerate(self._active)}
        self.report = Report(words={name: words for name, words in said.items() if words})
        self.report.start(self.model)
        return run

    def _end(self) -> None:
        if self._run is not None and not self._run.ended:
            self._run.ended = True
            self._run.restore()
            for model in denoisers(self.pipe):
                caches.forget(bare(model))
            if self._run.step < self._run.steps:
                self.report.stop()

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the pipeline's own denoiser call: move the latents, put observers in place."""
        if self._run is None or self._run.ended:
            self._run = self._begin(model, args, kwargs)
        run = self._run
        z = self.family.latents(model, args, kwargs)
        if not run.open:
            run.open_step(self.family.timestep(args, kwargs))
        rows = z.shape[0]
        run.kept = None
        if run.enter(model, (args, kwargs)) == 0 and stepping.uses_sample(self.pipe.scheduler):
            descend(run, self._active, self.report, self.thrift, args, kwargs)
        if run.delta is not None:
            args, kwargs = self.family.with_latents(model, args, kwargs, run.moved(z))
        self._observe(run)
        run.call = args, kwargs
        if run.kept is not None:
            rows -= len(run.kept[0])
            args, kwargs = run.without_kept(args, kwargs, z.shape[0])
        self._share(run, z.shape[0])
        args, kwargs, more = self._with_second(run, args, kwargs, z.shape[0])
        self.report.forwards += (rows + more) / run.pictures
        return passes.lent(args), passes.lent(kwargs)

    def _after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """After it: take the observers out, run weak passes, add the terms."""
        run = self._run
        if run is None or run.ended:
            return out
        run.restore()
        if out is None:  # the call failed
            return out
        if run.kept is not None:
            out = run.with_kept(out)
        if (second := run.rows.pop(ROWS, None)) is not None:
            out = self.family.with_prediction(out, self.family.prediction(out)[: second.start])
        for number, method in enumerate(self._active):
            if method.asks("observe") and number in run.seen:
                method.observe(run.seen[number], run.context(number))
        return self._shift(run, *run.call, out)

    def _observe(self, run: "Generation") -> None:
        """Put the methods that act in the pipeline's own pass at their sites, until `restore`."""
        acting = {n: m for n, m in enumerate(self._active) if m.acts(run.context(n))}
        inside = [m for m in acting.values() if m.inside and m.asks("attend")]
        observers = {n: m for n, m in acting.items() if m.asks("observe")}
        run.seen = {}
        if "cond" not in run.rows:
            observers = {}
        if not inside and not observers:
            return
        wishes = run.wishes(observers)
        seen: dict[tuple[int, str], list[Any]] = {key: [] for key in wishes}
        run.seen = {n: Maps({name: seen[m, name] for m, name in wishes if m == n}) for n in observers}
        watched = {site for _, sites in wishes.values() for site in sites}

        def handler(site: Site, chosen: list[Method], *qkv: Any) -> Tensor:
            call = passes.call_at(
                self.family,
                site,
                run.grids[site],
                qkv,
                words=run.words,
                rows=run.rows,
                branch="every",
                progress=run.progress,
            )
            out = None
            for key, wish in wishes.items():
                branch = run.base(self._active[key[0]])
                found = passes.record(call, {key: wish}, seen, of=branch, output=out is None and not chosen)
                out = found if out is None else out
            if out is not None:
                return out
            return chain([OnRows(m) for m in chosen], call)  # type: ignore[list-item]

        at = {}
        for site in run.sites:
            chosen = [m for m in inside if site in m.where(run.sites)]
            if chosen or site in watched:
                at[site] = functools.partial(handler, site, chosen)
        run.swap.enter_context(passes.eager(run.model))
        run.swap.enter_context(passes.steered(at))

    def _with_second(
        self, run: "Generation", args: tuple[Any, ...], kwargs: dict[str, Any], rows: int
    ) -> tuple[tuple[Any, ...], dict[str, Any], int]:
        """A denoiser call with the rows of a second prompt, where a method acts that has one; and how many they are."""
        method = asking([m for n, m in enumerate(self._active) if m.acts(run.context(n))])
        if method is None or "cond" not in run.rows:
            return args, kwargs, 0
        own = slice(*run.rows["cond"].indices(rows))
        second = run.second or given_states(method.second_prompt, kwargs, own, rows)
        (args, kwargs), place = second.join((args, kwargs), self.family, own, rows, type(method).__name__)
        run.rows = {**run.rows, ROWS: place}
        return args, kwargs, place.stop - place.start

    def _share(self, run: "Generation", rows: int) -> None:
        """Record, until `restore`, what weak passes need not compute again."""
        run.prefix = None
        acting = {n: m for n, m in enumerate(self._active) if m.acts(run.context(n))}
        passing = {n: m for n, m in acting.items() if m.branch == "weak" and not m.asks("weaken")}
        weak = {n: changed(run.model, m, run.sites) for n, m in passing.items()}
        altered = any(m.inside and m.asks("attend") for m in acting.values())
        fixed = caches.on(bare(run.model)) or passes.is_compiled(run.model)
        if not weak or altered or fixed or run.kept is not None or run.term is not None or "cond" not in run.rows:
            return
        if self.thrift.share:
            run.prefix = Prefix(run.model, run.sites, weak)
            run.swap.enter_context(run.prefix.recorded(torch.arange(rows)[run.rows["cond"]], rows))

    def _shift(self, run: "Generation", args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Add every method's term to every prediction: the pipeline combines them with weights that sum to one."""
        shifters = {n: m for n, m in enumerate(self._active) if m.asks("shift") and m.acts(run.context(n))}
        y = self.family.prediction(out)
        if any(m.asks("combine") for m in self._active):
            run.pred |= {name: y[rows] for name, rows in run.rows.items() if name not in run.pred}
        if not shifters:
            return out
        if run.term is None:
            run.term = self._term(run, shifters, {name: y[rows] for name, rows in run.rows.items()}, args, kwargs)
        d = run.term
        if self.family.at_scheduler(self.pipe):
            return out
        y = y.clone()
        g = float(getattr(self.pipe, "guidance_scale", 1.0) or 1.0)
        if "uncond" in run.rows and (getattr(self.pipe, "guidance_rescale", 0.0) or 0.0) > 0 and g != 1:
            # the pipeline measures the spread of the conditional prediction: leave that one as it is
            y[run.rows["uncond"]] += d / (1 - g)
        else:
            for rows in run.rows.values():
                y[rows] += d
        return self.family.with_prediction(out, y)

    def _term(
        self,
        run: "Generation",
        shifters: dict[int, Method],
        pred: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The sum of the methods' terms, from the first call of a step."""
        d = torch.zeros_like(pred["cond"])
        for number, method in shifters.items():
            weak = {}
            if method.branch == "weak":
                weak["weak"], passed = predicted(run, number, method, pred, args, kwargs)
                self.report.forwards += passed
            d = d + method.shift(pred | weak).to(d.dtype)
        run.prefix = None
        return self.family.term(run.model, d)

    # The scheduler's turn.

    def _move(self, sample: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        run = self._run
        if run is None or run.ended:
            return sample, output
        if run.delta is not None and sample.shape == run.delta.shape:
            sample = (sample.float() + run.delta / run.scale).to(sample.dtype)
        for number, method in enumerate(self._active):
            if method.asks("combine") and method.acts(run.context(number)):
                output = recombined(output, run.pred, run.term, method, run.context(number))
        sign = self.family.at_scheduler(self.pipe)
        if run.term is not None and sign and output.shape == run.term.shape:
            output = output + sign * run.term.to(output.dtype)
        return sample, output

    def _finish(self, latents: Tensor) -> Tensor:
        run = self._run
        if run is None or run.ended:
            return latents
        for number, method in enumerate(self._active):
            if method.asks("edit") and method.acts(run.context(number)):
                latents = method.edit(latents, run.context(number))
        run.close_step()
        if run.step >= run.steps:
            self.report.stop()
        return latents
