"""The gradient passes of a step: the latents move down the methods' losses until no method wants to move a picture."""

import contextlib
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffguide import caches, passes
from diffguide.family import bare
from diffguide.generation import Generation
from diffguide.maps import Maps
from diffguide.method import Context, Method
from diffguide.report import Report, StepReport

LARGEST_MOVE = 1.0  # of the latents' norm, in one pass


@dataclass(frozen=True)
class Thrift:
    """What a guide may save in its passes; the pictures stay the same, to rounding.

    Attributes:
        early_stop: end the forward at the last watched site.
        reuse: where no picture moves, let the forward go on, and take its prediction for the pipeline's own.
        checkpointing: keep only the inputs of blocks, and run them once more in the backward pass.
        share: take the blocks before a weak pass's first changed one from the pipeline's own call.
    """

    early_stop: bool = True
    reuse: bool = True
    checkpointing: bool = False
    share: bool = True

    def checkpoints(self, model: nn.Module) -> bool:
        """Whether a backward pass through this denoiser runs blocks once more: asked for here, or by its owner."""
        return self.checkpointing or bool(getattr(bare(model), "is_gradient_checkpointing", False))


PLAIN = Thrift()


def descend(
    run: Generation,
    methods: list[Method],
    report: Report,
    thrift: Thrift,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Sets `run.delta`, the move of each picture, or leaves it None; and `run.kept` if a prediction can be reused."""
    movers = {n: m for n, m in enumerate(methods) if m.asks("loss") and moves(m, run.context(n))}
    todo = torch.tensor([b for b in range(run.pictures) if any(b not in run.resting[n] for n in movers)])
    if not len(todo):
        return
    began = time.perf_counter()
    step = StepReport(run.step)
    report.steps.append(step)
    # the loss inside of a checkpointed block would have to be computed again with it
    reuse = thrift.reuse and not thrift.checkpoints(run.model) and reusable(run, methods)
    descent = Descent(run, movers, step, report, thrift, reuse, args, kwargs)
    for _ in range(max(m.most(run.context(n)) for n, m in movers.items())):
        if not len(todo := descent.move(todo)):
            break
    if descent.moved:
        run.delta = descent.delta
    step.seconds = time.perf_counter() - began


def moves(method: Method, context: Context) -> bool:
    return method.acts(context) and method.rate(context) > 0


class Descent:
    """One step's way down, for the pictures of a batch."""

    def __init__(
        self,
        run: Generation,
        movers: dict[int, Method],
        step: StepReport,
        report: Report,
        thrift: Thrift,
        reuse: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.run, self.movers, self.step, self.report, self.thrift = run, movers, step, report, thrift
        self.reuse = reuse
        self.args, self.kwargs = args, kwargs
        self.wishes = run.wishes(movers)
        self.x = run.family.latents(run.model, args, kwargs)
        self.start = self.x[run.rows["cond"]]
        self.delta = torch.zeros_like(self.start, dtype=torch.float32)
        self.moved = False
        self.going = {n: torch.tensor([b not in run.resting[n] for b in range(run.pictures)]) for n in movers}
        self.history: dict[int, list[Tensor]] = {n: [] for n in movers}

    def move(self, todo: Tensor) -> Tensor:
        """One pass over the pictures `todo`; gives those that moved."""
        run, family, model = self.run, self.run.family, self.run.model
        total: Tensor | None = None
        moving = torch.zeros(len(todo), dtype=torch.bool)

        def judge(maps: dict[int, Maps]) -> bool:
            nonlocal total, moving
            total, moving = self.losses(maps, todo)
            if self.reuse and not moving.any():
                torch.set_grad_enabled(False)  # until `differentiable` ends: the rest is a plain forward
                return False
            return self.thrift.early_stop

        thrifty = passes.checkpointed(model) if self.thrift.checkpointing else contextlib.nullcontext()
        with passes.differentiable(model), thrifty:
            z = (self.start[todo].float() + self.delta[todo]).to(self.x.dtype).clone().detach().requires_grad_()
            own = self.rows(todo)
            cut = family.take(passes.usable(self.args), passes.usable(self.kwargs), own, self.x.shape[0])
            cut = family.with_latents(model, *cut, z)
            early = judge if self.reuse else self.thrift.early_stop
            with passes.looking(model, family, *cut, self.wishes, run.grids, words=run.words, early=early) as sight:
                if total is None:
                    judge(sight.maps)
                assert total is not None
                self.report.forwards += len(todo) / run.pictures
                if not moving.any():
                    if self.reuse and sight.out is not None:
                        run.kept = own, family.prediction(sight.out).detach()
                    return todo[moving]
                g = passes.gradient(total, z)
                self.report.backwards += len(todo) / run.pictures
        if g is None:
            self.step.skipped += 1
            warnings.warn(f"step {run.step}: the gradient is not finite; the latents stay", stacklevel=2)
            return todo[:0]
        self.moved = True
        self.delta[todo] -= capped(g, self.start[todo])
        return todo[moving]

    def rows(self, todo: Tensor) -> Tensor:
        return range(self.x.shape[0])[self.run.rows["cond"]].start + todo

    def losses(self, maps: dict[int, Maps], todo: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses, each times its step size, of those pictures that move; and which [len(todo)] do."""
        run = self.run
        total = torch.zeros((), device=self.x.device)
        for n, method in self.movers.items():
            context = run.context(n, todo.tolist())
            losses = method.loss(maps[n], context).unflatten(0, (-1, run.frames)).mean(1)
            now = losses.detach().float().cpu()
            full = torch.full((run.pictures,), torch.nan)
            full[todo] = now
            history = self.history[n]
            history.append(full)
            again = method.again(torch.stack(history)[:, todo], context)
            going = self.going[n] = self.going[n].clone()  # it may come from inference mode
            going[todo] &= again & (len(history) <= method.most(context))
            rests = method.rests(now)
            going[todo] &= ~rests
            run.resting[n].update(todo[rests].tolist())
            total = total + (method.rate(context) * losses * going[todo].to(losses.device)).sum()
        self.step.losses.append({type(m).__name__: self.history[n][-1].tolist() for n, m in self.movers.items()})
        return total, torch.stack([self.going[n][todo] for n in self.movers]).any(0)


def reusable(run: Generation, methods: list[Method]) -> bool:
    """Whether the pipeline's own call can do without some of its conditional rows.

    It must have other rows as well, nobody may look at it or act in it, and neither a cache nor compiled code may have
    been made for its shape.
    """
    model = run.model
    alone = len(model._forward_hooks) == 1  # ours
    shaped = caches.on(bare(model)) or passes.is_compiled(model)
    inside = any(m.inside and m.acts(run.context(n)) for n, m in enumerate(methods))
    return len(run.rows) > 1 and alone and not shaped and not inside


def capped(g: Tensor, z: Tensor) -> Tensor:
    """The gradient, each picture's shortened to at most `LARGEST_MOVE` times the norm of its latents."""
    axes = list(range(1, g.ndim))
    norm = g.square().sum(axes, keepdim=True).sqrt()
    limit = LARGEST_MOVE * z.float().square().sum(axes, keepdim=True).sqrt()
    return g * (limit / norm.clamp_min(1e-12)).clamp_max(1.0)
