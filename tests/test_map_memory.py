"""Maps come out the same a few heads at a time, and at a large model's size they need the room that was promised."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffguide.kernels import reference

# eight words of FLUX.1 at 1024x1024: 24 heads of 128, 512 text states and 4096 image tokens, in bfloat16
LARGE = """
import torch
from diffguide import kernels
from diffguide.report import peak

torch.set_num_threads(1)
q, k = (torch.randn(1, 24, 4608, 128).bfloat16() for _ in range(2))
kernels.observe(q[:, :, :8], k[:, :, :8], kernels.Capture([1]))
before = peak()  # of this process alone: what getrusage tells begins with the peak of its parent
with torch.no_grad():
    A = kernels.observe(q[:, :, 512:], k, kernels.Capture(range(1, 13)))
assert A.shape == (1, 4096, 12), A.shape
print(peak() - before)
"""


@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.booleans(), st.integers(0, 4))
def test_some_heads_at_a_time_are_the_same_map(B: int, H: int, N: int, M: int, mean: bool, masked: int) -> None:
    rng = torch.Generator().manual_seed(B + 2 * H + 3 * N + 5 * M)
    q, k = torch.randn(B, H, N, 4, generator=rng), torch.randn(B, H, M, 4, generator=rng)
    shapes = [None, (B, 1, 1, M), (B, H, 1, M), (1, H, N, M), (H, N, M)]
    shape = shapes[masked]
    mask = None if shape is None else torch.randn(shape, generator=rng)
    columns = list(range(0, M, 2))
    whole = reference.probabilities(q, k, mask=mask, columns=columns, head_mean=mean)
    room, reference.ROOM = reference.ROOM, 4 * B * N * M * 2  # two heads
    try:
        parts = reference.probabilities(q, k, mask=mask, columns=columns, head_mean=mean)
    finally:
        reference.ROOM = room
    assert parts.shape == whole.shape and torch.allclose(parts, whole, atol=1e-6)
    logits = q @ k.mT / 2 + (0 if mask is None else mask)
    wanted = logits.softmax(-1)[..., columns]
    assert torch.allclose(parts, wanted.mean(1) if mean else wanted, atol=1e-6)


@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.booleans())
def test_some_heads_at_a_time_have_the_same_gradient(B: int, H: int, N: int, M: int, mean: bool) -> None:
    rng = torch.Generator().manual_seed(B + 2 * H + 3 * N + 5 * M)
    q, k = (torch.randn(B, H, n, 4, generator=rng, requires_grad=True) for n in (N, M))
    columns = list(range(0, M, 2))
    found = []
    room = reference.ROOM
    for reference.ROOM in (room, 1):  # one head
        A = reference.probabilities(q, k, columns=columns, head_mean=mean)
        found.append(torch.autograd.grad((A * torch.arange(A.numel()).reshape(A.shape)).sum(), (q, k)))
    reference.ROOM = room
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(parts, whole, atol=1e-5 * max(1.0, float(whole.abs().max())))


def test_a_gradient_goes_through_all_heads() -> None:
    q, k = torch.randn(1, 3, 4, 2, requires_grad=True), torch.randn(1, 3, 5, 2)
    (g,) = torch.autograd.grad(reference.probabilities(q, k, columns=[1]).sum(), q)
    assert g.shape == q.shape and g.abs().sum((0, 2, 3)).min() > 0


def test_a_gradient_keeps_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved for the backward pass of a large map: its parts, the queries and the keys."""
    q, k = torch.randn(1, 8, 64, 4, requires_grad=True), torch.randn(1, 8, 256, 4)
    saved = []
    for room in (reference.ROOM, 4 * 64 * 256 * 2):
        monkeypatch.setattr(reference, "ROOM", room)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            reference.probabilities(q, k, columns=[1, 2])
        saved.append(sum(t.nbytes for t in kept))
    logits = 4 * 8 * 64 * 256
    assert saved[0] > logits > 10 * saved[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is counted in KiB on Linux alone")
def test_words_of_a_large_model_need_little_room() -> None:
    """All logits at once would be 1728 MiB in float32, and as much again for their exponentials."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 400
