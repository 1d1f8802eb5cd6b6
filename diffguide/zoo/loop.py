"""What every stage of training shares: steps that survive a kill, workers that share a batch."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm


class Run:
    """A loop of steps with a progress bar, a log of losses in JSON lines, and checkpoints that survive a kill."""

    def __init__(self, checkpoint: Path, log: Path, parts: dict[str, Any]) -> None:
        self.checkpoint, self.path, self.parts = checkpoint, log, parts
        self.first, self.spent, self.stopped = 0, 0.0, False
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.first, self.spent = state["step"], state["seconds"]

    def steps(
        self, count: int, keep_every: int, until: float, name: str, milestone: int | None = None
    ) -> Iterator[int]:
        """Step numbers from the checkpoint on; a checkpoint every `keep_every` steps, another kept at `milestone`."""
        started = time.time() - self.spent
        numbers = range(self.first, count)
        with tqdm(numbers, name, count, initial=self.first, unit="step", disable=not leads()) as self.bar:
            for step in self.bar:
                yield step
                self.spent = time.time() - started
                self.stopped = agree(time.time() > until)
                if self.stopped or (step + 1) % keep_every == 0 or step + 1 == count:
                    self.keep(self.checkpoint, step + 1)
                if step + 1 == milestone:
                    self.keep(self.checkpoint.with_suffix(".before-fall.pt"), step + 1)
                if self.stopped:
                    return

    def keep(self, path: Path, step: int) -> None:
        if leads():
            save(
                {name: part.state_dict() for name, part in self.parts.items()} | {"step": step, "seconds": self.spent},
                path,
            )

    def log(self, step: int, **values: float) -> None:
        if leads() and step % 10 == 0:
            self.bar.set_postfix({k: f"{v:.4f}" for k, v in values.items()})
            with self.path.open("a") as lines:
                lines.write(json.dumps({"step": step, "seconds": round(self.spent, 1), **values}) + "\n")


def leads() -> bool:
    """Whether this worker writes the files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def mine(batch: Any) -> Any:
    """This worker's share of a batch: every n-th item."""
    return batch[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else batch


def agree(flag: bool) -> bool:
    """Whether any worker says so."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor([float(flag)])
    dist.all_reduce(votes)
    return votes.item() > 0


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def average_gradients(weights: Iterable[torch.nn.Parameter]) -> None:
    """Make every worker's gradients the mean over the workers."""
    if dist.is_initialized():
        gradients = [w.grad for w in weights if w.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients]) / dist.get_world_size()
        dist.all_reduce(flat)
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))


def save(value: Any, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class Muon(torch.optim.Muon):
    """torch's Muon, for convolutions too: a kernel [out, in, h, w] counts as a matrix of `out` rows.

    Orthogonalised momentum (Jordan et al. 2024), its length matched to AdamW's: decision 11.
    """

    def __init__(self, weights: Iterable[torch.nn.Parameter], rate: float) -> None:
        self.weights = list(weights)
        self.views = [torch.nn.Parameter(as_matrix(w.detach())) for w in self.weights]  # the same memory
        if any(v.data_ptr() != w.data_ptr() for v, w in zip(self.views, self.weights, strict=True)):
            raise ValueError("a weight cannot be seen as a matrix without a copy; is a convolution not channels-last?")
        super().__init__(self.views, lr=rate, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.weights:
            weight.grad = None

    def step(self, closure: Any = None) -> Any:
        for weight, view in zip(self.weights, self.views, strict=True):
            view.grad = None if weight.grad is None else as_matrix(weight.grad)
        return super().step(closure)


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x


def descend(loss: torch.Tensor, *optimizers: torch.optim.Optimizer, clip: float = 1.0) -> None:
    """One step down the loss, all workers together, the gradient's length held to `clip`."""
    weights = [
        weight for o in optimizers for weight in (o.weights if isinstance(o, Muon) else o.param_groups[0]["params"])
    ]
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(weights)
    torch.nn.utils.clip_grad_norm_(weights, clip)
    for optimizer in optimizers:
        optimizer.step()


def autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(torch.device(device).type, torch.bfloat16)
