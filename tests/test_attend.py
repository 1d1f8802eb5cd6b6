"""The door to attention: every route gives what dense attention in float64 gives, and says when it cannot."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffguide.errors import KernelError
from diffguide.kernels import Blend, Blocks, Capture, Regions, Window, attend, door, explain, lse, observe, prefer
from diffguide.site import Call, Site

# rounding of norms of errors, with room; half precision after H. Grads
BARS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float64: 1e-12}
HERE = ("lse-columns", "sdpa", "side-values", "recompute", "reference")  # take almost everything everywhere


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(B=2, H=3, N=33, M=33, D=8, *, dtype=torch.float32, seed=0):
    return tuple(rand(B, H, n, D, seed=3 * seed + i, dtype=dtype) for i, n in enumerate((N, M, M)))


def distance(x, r):
    """Norm of the error over the norm of what is right."""
    return float((x.double() - r).norm() / r.norm().clamp_min(1e-30))


def visible(N, M, regions, window, blocks):
    """Who sees whom, written down element by element."""
    seen = torch.ones(1, 1, N, M, dtype=torch.bool)
    if regions is not None:
        seen = seen & ((regions.query_bits[:, None, :, None] & regions.key_bits[:, None, None, :]) != 0)
    if window is not None:
        seen = seen & window.visible(range(N), M)
    if blocks is not None:
        whole = torch.kron(blocks.chosen.int(), torch.ones(blocks.queries, blocks.keys, dtype=torch.int)).bool()
        seen = seen & whole[..., :N, :M]
    return seen


def dense(q, k, v, *, mask=None, scale=None, capture=None, regions=None, window=None, blocks=None, blend=None):
    """Softmax in float64, with a loop for every option."""
    q, k, v = (x.double() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x[:, h // groups] for h in range(q.shape[1])], 1) for x in (k, v))
    N, M = q.shape[2], k.shape[2]
    s = torch.einsum("bhnd,bhmd->bhnm", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        s = torch.where(mask, s, -torch.inf) if mask.dtype == torch.bool else s + mask.double()
    if regions is not None and regions.bias is not None:
        for bit, row in enumerate(regions.bias.double()):
            s = s + (regions.query_bits >> bit & 1)[:, None, :, None] * row
    s = s.masked_fill(~visible(N, M, regions, window, blocks), -torch.inf)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    e = (s - torch.where(empty, 0.0, s.detach().amax(-1, keepdim=True))).exp()
    A = torch.where(empty, 0.0, e / torch.where(empty, 1.0, e.sum(-1, keepdim=True)))
    o = A @ v
    if blend is not None:
        for h, w in enumerate(blend.weights(q.shape[1])):
            o = o.clone()
            o[:, h, blend.rows] = (1 - w) * o[:, h, blend.rows] + w * v[:, h, blend.rows]
    if capture is None:
        return o
    seen = A[:, :, capture.rows]
    if capture.columns is not None:
        maps = seen[..., list(capture.columns)]
    else:
        G = capture.weights.double()
        maps = torch.einsum("bhnm,bmr->bhnr", seen, G.expand(q.shape[0], *G.shape[-2:]))
    return o, maps.mean(1) if capture.heads == "mean" else maps


@st.composite
def problems(draw, *, capture=None):
    """Tensors of odd sizes and a choice of options."""
    B, H, D = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 8, 40]))
    grid = draw(st.sampled_from([(5,), (4, 3), (2, 3, 4)]))
    first = draw(st.integers(0, 2))
    N = first + math.prod(grid) + draw(st.integers(0, 2))
    alike = draw(st.booleans())
    M = N if alike else draw(st.sampled_from([1, 3, 12]))
    seed = draw(st.integers(0, 99))
    q, k, v = qkv(B, H, N, M, D, seed=seed)
    options = {"scale": draw(st.sampled_from([None, 0.7]))}
    rng = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(N, M), (1, 1, 1, M), (B, 1, N, M), (B, H, N, M)]))
        mask = rand(*shape, seed=seed)
        options["mask"] = mask > -1 if draw(st.booleans()) else mask
    if draw(st.booleans()):
        bits = [torch.randint(0, 8, (draw(st.sampled_from([1, B])), n), generator=rng) for n in (N, M)]
        options["regions"] = Regions(*bits, bias=rand(3, M, seed=seed) if draw(st.booleans()) else None)
    if alike and draw(st.booleans()):
        options["window"] = Window(grid, 2, stride=draw(st.integers(1, 2)), first=first)
    if draw(st.booleans()):
        c, r = draw(st.sampled_from([3, 4])), draw(st.sampled_from([1, 2]))
        shape = (draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H])), -(-N // r), -(-M // c))
        options["blocks"] = Blocks(torch.rand(shape, generator=rng) < 0.6, keys=c, queries=r)
    if alike and draw(st.booleans()):
        options["blend"] = Blend([[0.0, 0.4, 1.0][(h + seed) % 3] for h in range(H)], rows=slice(first, None))
    if draw(st.booleans()) if capture is None else capture:
        rows = slice(0, draw(st.integers(1, N)))
        heads = draw(st.sampled_from(["mean", "none"]))
        if draw(st.booleans()):
            columns = draw(st.lists(st.integers(0, M - 1), min_size=1, max_size=4))
            options["capture"] = Capture(columns, rows=rows, heads=heads)
        else:
            G = rand(*draw(st.sampled_from([(M, 2), (1, M, 2), (B, M, 2)])), seed=seed).abs()
            G[..., ::2, :] = 0
            options["capture"] = Capture(weights=G, rows=rows, heads=heads)
    return (q, k, v), options


def both(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("route", HERE)
@given(problems())
@settings(max_examples=40)
def test_every_route_gives_what_dense_attention_gives(route, problem):
    tensors, options = problem
    try:
        found = both(attend(*tensors, **options, backend=route))
    except KernelError:
        assume(False)
    for x, r in zip(found, both(dense(*tensors, **options)), strict=True):
        assert x.shape == r.shape and x.dtype == torch.float32
        assert float((x - r).abs().max()) < 2e-5 * max(1.0, float(r.abs().max()))


@pytest.mark.parametrize("route", HERE)
@given(problems())
@settings(max_examples=20)
def test_gradients_are_those_of_dense_attention(route, problem):
    tensors, options = problem
    asked = [x.double().requires_grad_() for x in tensors]
    options = {name: x.double() if torch.is_tensor(x) and x.dtype != torch.bool else x for name, x in options.items()}
    try:
        found = both(attend(*asked, **options, backend=route))
    except KernelError:
        assume(False)
    cotangents = [rand(*x.shape, seed=i, dtype=torch.float64) for i, x in enumerate(found)]
    gs = torch.autograd.grad(found, asked, cotangents, allow_unused=True, materialize_grads=True)
    gr = torch.autograd.grad(both(dense(*asked, **options)), asked, cotangents)
    for x, r in zip(gs, gr, strict=True):
        assert not x.isnan().any() and float((x - r).abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("route", ["lse-columns", "side-values", "recompute", "reference"])
def test_low_precision_keeps_to_its_bar(route, dtype):
    tensors = qkv(1, 2, 130, 97, 40, dtype=dtype)
    found = attend(*tensors, capture=Capture([0, 5, 96]), backend=route)
    for x, r in zip(found, dense(*tensors, capture=Capture([0, 5, 96])), strict=True):
        assert distance(x, r) < BARS[dtype]
    assert found[0].dtype == dtype and found[1].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_columns_are_as_exact_as_float32_whatever_the_tensors_are(dtype):
    tensors = qkv(1, 2, 130, 97, 64, dtype=dtype)
    _, maps = attend(*tensors, capture=Capture([0, 5]), backend="lse-columns")
    assert distance(maps, dense(*tensors, capture=Capture([0, 5]))[1]) < 1e-4


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
def test_small_cotangents_of_maps_do_not_underflow_in_float16(size):
    tensors = qkv(1, 2, 97, 97, 40, dtype=torch.float16)
    asked = [x.clone().requires_grad_() for x in tensors]
    _, maps = attend(*asked, capture=Capture([1, 4]), backend="lse-columns")
    cotangent = rand(*maps.shape) * size
    exact = [x.double().requires_grad_() for x in tensors]
    right = torch.autograd.grad(dense(*exact, capture=Capture([1, 4]))[1], exact[:2], cotangent.double())
    for x, r in zip(torch.autograd.grad(maps, asked[:2], cotangent), right, strict=True):
        # float16 itself rounds to steps of 6e-8
        assert float((x - r).norm()) < 3e-3 * float(r.norm()) + 3e-8 * x.numel() ** 0.5


@given(st.sampled_from([(1, 1), (64, 77), (5, 130)]), st.booleans())
@settings(max_examples=6)
def test_without_options_it_is_torchs_attention_bit_for_bit(sizes, masked):
    q, k, v = qkv(2, 2, *sizes, 16)
    mask = rand(2, 1, *sizes) if masked else None
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(attend(q, k, v, mask=mask), plain)
    for m in (mask, None if mask is None else mask > 0):
        out, _ = attend(q, k, v, mask=m, capture=Capture([0]), backend="lse-columns")
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, attn_mask=m))


@given(problems(capture=False), st.integers(1, 4))
@settings(max_examples=20)
def test_maps_over_parts_of_the_keys_sum_to_one(problem, parts):
    (q, k, v), options = problem
    G = F.one_hot(torch.arange(k.shape[2]) % parts, parts).float()
    _, maps = attend(q, k, v, **options, capture=Capture(weights=G))
    ones = torch.ones(k.shape[2], 1)
    lives = dense(q, k, v, **options, capture=Capture(weights=ones))[1]  # 1, or less for heads that see nothing
    assert torch.allclose(maps.sum(-1, keepdim=True).double(), lives, atol=2e-6)


@given(st.integers(0, 99))
@settings(max_examples=10)
def test_order_of_the_tokens_does_not_matter(seed):
    q, k, v = qkv(1, 2, 20, 30, 8, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    i, j = torch.randperm(20, generator=rng), torch.randperm(30, generator=rng)
    regions = Regions(torch.randint(1, 4, (20,), generator=rng), torch.randint(1, 4, (30,), generator=rng))
    moved = Regions(regions.query_bits[:, i], regions.key_bits[:, j])
    out, maps = attend(q, k, v, regions=regions, capture=Capture(range(30)))
    there, seen = attend(q[:, :, i], k[:, :, j], v[:, :, j], regions=moved, capture=Capture(range(30)))
    assert torch.allclose(there, out[:, :, i], atol=1e-6) and torch.allclose(seen, maps[:, i][..., j], atol=1e-6)


@given(st.integers(1, 29), st.integers(0, 99))
@settings(max_examples=10)
def test_halves_merged_by_their_normalisers_are_the_whole(cut, seed):
    q, k, v = qkv(1, 2, 20, 30, 8, seed=seed)
    halves = [lse.attention(q, k[:, :, own], v[:, :, own]) for own in (slice(cut), slice(cut, None))]
    out, total = lse.merge(halves)
    whole, right = lse.attention(q, k, v)
    assert torch.allclose(out, whole, atol=1e-6) and torch.allclose(total, right, atol=1e-5)
    nothing = (torch.zeros_like(out), torch.full_like(total, -torch.inf))
    assert torch.allclose(lse.merge([nothing, *halves])[0], whole, atol=1e-6)
    assert torch.equal(lse.merge([nothing, nothing])[0], torch.zeros_like(out))


def test_one_region_for_all_is_none():
    q, k, v = qkv()
    one = torch.ones(33, dtype=torch.int32)
    assert torch.allclose(attend(q, k, v, regions=Regions(one, one)), attend(q, k, v), atol=1e-6)


def test_a_region_of_weight_two_counts_its_keys_twice():
    q, k, v = qkv()
    one = torch.ones(33, dtype=torch.int32)
    bias = torch.zeros(1, 33)
    bias[0, 4] = math.log(2)
    twice = attend(q, torch.cat([k, k[:, :, 4:5]], 2), torch.cat([v, v[:, :, 4:5]], 2))
    assert torch.allclose(attend(q, k, v, regions=Regions(one, one, bias)), twice, atol=1e-6)


@pytest.mark.parametrize("route", HERE)
def test_queries_that_see_nothing_give_nothing(route):
    q, k, v = (x.requires_grad_() for x in qkv())
    bits = torch.ones(33, dtype=torch.int32)
    bits[5] = 0
    options = {} if route == "sdpa" else {"capture": Capture([1, 2], heads="none")}
    found = both(attend(q, k, v, regions=Regions(bits, torch.ones_like(bits)), backend=route, **options))
    assert not any(x[:, :, 5].any() or x.isnan().any() for x in found)
    assert not any(g.isnan().any() for g in torch.autograd.grad(sum(x.sum() for x in found), (q, k, v)))


@pytest.mark.parametrize("route", HERE)
def test_steep_logits_stay_finite(route):
    q, k, v = qkv(1, 1, 9, 9, 8)
    q = q * 1e4
    found = both(attend(q, k, v, backend=route, **({} if route == "sdpa" else {"capture": Capture(range(9))})))
    right = both(dense(q, k, v, capture=Capture(range(9))))
    bar = 2 * torch.finfo(torch.float32).eps * float((q @ k.mT).abs().max() / 8**0.5)  # logits round, and their lse
    assert all(distance(x, r) < max(2e-6, 2 * bar) for x, r in zip(found, right, strict=False))


@pytest.mark.parametrize("route", ["lse-columns", "side-values", "recompute"])
def test_views_with_any_strides_are_taken(route):
    """Joint sequences are sliced, keys shared by a batch have stride 0, and BNHD tensors are seen transposed."""
    x = rand(2, 40, 3, 24)
    q, k, v = (part.transpose(1, 2)[:, :, 3:] for part in x.split(8, -1))
    k = k[:1].expand(2, -1, -1, -1)
    found = attend(q, k, v, capture=Capture([0, 3]), backend=route)
    right = dense(q, k, v, capture=Capture([0, 3]))
    assert all(distance(x, r) < 2e-6 for x, r in zip(found, right, strict=True))
    assert all(
        torch.equal(x, y) for x, y in zip(found, attend(q, k, v, capture=Capture([0, 3]), backend=route), strict=True)
    )


@pytest.mark.parametrize("route", HERE)
def test_heads_of_keys_are_shared(route):
    q, (k, v) = qkv(1, 6)[0], qkv(1, 2)[1:]
    options = {} if route == "sdpa" else {"capture": Capture([2])}
    found = both(attend(q, k, v, backend=route, blend=Blend(0.3), **options))
    assert all(
        distance(x, r) < 2e-6 for x, r in zip(found, both(dense(q, k, v, blend=Blend(0.3), **options)), strict=True)
    )


def test_a_blend_of_nothing_is_nothing_and_of_one_the_values():
    q, k, v = qkv()
    assert torch.equal(attend(q, k, v, blend=Blend(0.0)), attend(q, k, v))
    assert torch.equal(attend(q, k, v, blend=Blend(1)), v)
    out = attend(q, k, v, blend=Blend(1.0, rows=slice(4, 9)))
    assert torch.equal(out[:, :, 4:9], v[:, :, 4:9]) and torch.equal(out[:, :, 9:], attend(q, k, v)[:, :, 9:])


def test_heads_that_give_their_values_do_not_attend(monkeypatch):
    seen = []
    monkeypatch.setattr(
        door.sdpa.F,
        "scaled_dot_product_attention",
        lambda q, k, v, plain=F.scaled_dot_product_attention, **kw: seen.append(q.shape[1]) or plain(q, k, v, **kw),
    )
    attend(*qkv(), blend=Blend([1.0, 0.0, 1.0]))
    assert seen == [1]


def test_maps_alone_are_those_beside_the_output():
    q, k, v = qkv()
    for capture in (Capture([1, 2]), Capture(range(33), heads="none"), Capture(weights=rand(33, 3).abs())):
        for route in ("auto", "lse-columns", "side-values", "recompute", "reference"):
            maps = observe(q, k, capture, backend=route)
            assert torch.allclose(maps, attend(q, k, v, capture=capture)[1], atol=1e-6)
    assert explain(q, k, None, capture=Capture(range(33))).route == "recompute"
    assert explain(q, k, None, capture=Capture([1])).route == "lse-columns"
    assert explain(q.requires_grad_(), k, None, capture=Capture([1])).route == "recompute"
    assert explain(q, k, v, capture=Capture([1])).route == "side-values"
    assert observe(q, k, Capture(())).shape == (2, 33, 0)


@pytest.mark.parametrize("kind", ["cross", "self", "joint"])
@pytest.mark.parametrize("columns", [None, [0, 3]])
def test_a_call_that_looks_gives_what_it_gives_and_what_it_shows(kind, columns):
    q, (k, v) = qkv(2, 3, 20, 20)[0], qkv(2, 3, 20, 20 if kind != "cross" else 7)[1:]
    image, text = (slice(4, 20), slice(0, 4)) if kind == "joint" else (slice(0, 20), slice(0, 7 * (kind == "cross")))
    for mask in (None, rand(2, 1, 20, k.shape[2]), rand(2, 1, 1, k.shape[2]) > -1):
        site = Site("a", kind, "mid", 0, torch.nn.Identity())
        call = Call(site, q, k, v, mask, None, (4, 4), image, text, "cond", {"cond": slice(None)}, 0.0)
        for among in ("cross", "self") if kind == "joint" else (None,):
            out, maps = call.look(columns, kind=among)
            assert torch.equal(out, call.proceed())
            assert torch.allclose(maps, call.probabilities(columns, kind=among), atol=1e-6)
            start = 4 if kind == "joint" and among == "self" else 0
            n = {"cross": 4, "self": 16}.get(among, k.shape[2])
            right = dense(q, k, v, mask=mask, capture=Capture([start + c for c in columns or range(n)], rows=image))[1]
            assert torch.allclose(maps.double(), right, atol=1e-6)


def test_large_masks_come_in_pieces(monkeypatch):
    tensors = qkv(1, 2, 40, 40)
    options = {"window": Window((8, 5), 3), "blocks": Blocks(rand(1, 2, 40, 4) > -1, keys=10)}
    monkeypatch.setattr(door.sdpa.problems, "ROOM", 4 * 40 * 8)
    out = attend(*tensors, **options, backend="sdpa")
    again, maps = attend(*tensors, **options, capture=Capture([3], rows=slice(7, 33)), backend="recompute")
    right, seen = dense(*tensors, **options, capture=Capture([3], rows=slice(7, 33)))
    assert distance(out, right) < 2e-6 and distance(again, right) < 2e-6 and distance(maps, seen) < 2e-6
    with pytest.raises(KernelError, match="side-values: its mask would take"):
        attend(*tensors, **options, capture=Capture([3]), backend="side-values")


# What is told.


def test_what_is_explained_is_what_is_done(monkeypatch):
    q, k, v = qkv()
    for options in ({}, {"capture": Capture([1])}, {"window": Window((33,), 3)}):
        told = explain(q, k, v, **options)
        assert set(told.rejected) == set(door.ROUTES) - {told.route} and all(told.rejected.values())
        assert str(told).startswith(f"{told.route}: ") and "not reference: only by name" in str(told)
    assert explain(q, k, v, backend="recompute", capture=Capture([1])).why.startswith("it was asked for by name")
    assert explain(q, k, v).rejected["side-values"] == "no maps are asked for"


def test_a_preferred_route_is_taken_where_it_can():
    q, k, v = qkv()
    with prefer("recompute"):
        assert explain(q, k, v, capture=Capture([1])).route == "recompute"
        assert explain(q, k, v).route == "sdpa"
    assert explain(q, k, v, capture=Capture([1])).route == "lse-columns"


T = torch.tensor


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda q: Capture(), "either columns .* or weights"),
        (lambda q: Capture([1], weights=torch.ones(3, 1)), "not both"),
        (lambda q: Capture([-1]), "counted from 0"),
        (lambda q: Capture([True]), "numbers of keys"),
        (lambda q: Capture(weights=torch.ones(3)), r"expected real numbers \[M, R\]"),
        (lambda q: Capture([1], heads="sum"), "'sum' is neither"),
        (lambda q: Capture([1], rows=slice(0, 4, 2)), "without a step"),
        (lambda q: Regions(torch.ones(3), torch.ones(3)), "expected int32"),
        (lambda q: Regions(T([1]), T([1]), torch.ones(40, 1)), "1 to 31 bits"),
        (lambda q: Blocks(torch.ones(2, 2), 4), "expected booleans"),
        (lambda q: Blocks(torch.ones(2, 2) > 0, 0), "Blocks.keys = 0"),
        (lambda q: Blend(1.5), "1.5; expected numbers in"),
        (lambda q: Blend([0.5, True]), "Blend.weight has True"),
        (lambda q: attend(q, q[:, :, :5], q), "v is .* expected the same B"),
        (lambda q: attend(q, q[..., :4], q), "the same B and D"),
        (lambda q: attend(q[0], q, q), r"q is .* expected real numbers \[B, H, tokens, D\]"),
        (lambda q: attend(q, q.double(), q, backend="sdpa"), "differ in dtype"),
        (lambda q: attend(q, q, q, mask=torch.zeros(5), capture=Capture([1])), "mask is .* broadcasts"),
        (lambda q: attend(q, q, q, capture=Capture([33])), "there are 33 keys, 0 to 32"),
        (lambda q: attend(q, q, q, capture=Capture([3], rows=slice(40, 50))), "rows = 40:50 are not among"),
        (lambda q: attend(q, q, q, capture=Capture(weights=torch.ones(4, 1))), "33 keys and 2 rows need"),
        (lambda q: attend(q, q, q, regions=Regions(T([1, 1]), T([1, 1]))), "query_bits is .* expected"),
        (lambda q: attend(q, q, q, window=Window((6, 6), 3)), "does not fit 33 queries"),
        (lambda q: attend(q, q, q, blocks=Blocks(torch.ones(2, 2) > 0, 4)), "need .*33, 9"),
        (lambda q: attend(q, q[:, :, :9], q[:, :, :9], blend=Blend(0.5)), "33 queries and 9 keys are no such pairs"),
        (lambda q: attend(q, q, q, blend=Blend([0.5])), "there are 3 heads"),
        (lambda q: attend(q, q, q, backend="cudnn"), "no route is called 'cudnn' .known: auto, fused"),
        (lambda q: attend(q, q, q, capture=Capture([1]), backend="sdpa"), "attention by sdpa: gives no maps; leave"),
        (lambda q: prefer("cudnn").__enter__(), "no route is called 'cudnn'"),
        (lambda q: attend(q, q, q, window=(6, 6)), r"window is \(6, 6\); expected diffguide.kernels.Window"),
        (lambda q: attend(q, q, q, capture=[1]), r"capture is \[1\]; expected diffguide.kernels.Capture"),
        (lambda q: attend(q.numpy(), q, q), "q is ndarray; expected a tensor"),
        (lambda q: attend(q, q, q, scale="1"), "scale = '1' is not a number"),
        (lambda q: attend(q, q, q, scale=float("nan")), "scale = nan is not a number"),
        (lambda q: attend(q, q, q, mask=torch.ones(33, 33, dtype=torch.int64)), "mask is torch.int64; expected"),
        (lambda q: attend(q, q, q, blend=Blend(torch.ones(2))), "2 numbers, but there are 3 heads"),
    ],
)
def test_what_does_not_fit_is_named_before_any_work(make, message):
    with pytest.raises(KernelError, match=message):
        make(qkv()[0])


def test_autocast_goes_through_torchs_public_attention():
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        told = explain(q, k, v, capture=Capture([1]))
        assert told.route == "side-values" and told.rejected["lse-columns"].startswith("autocast")


def test_plain_calls_are_compiled_without_a_break():
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, mask=None), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), attend(q, k, v))
