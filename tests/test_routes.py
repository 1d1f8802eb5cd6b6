"""Routes with a shape of their own: tiles, merged blocks, flex, and libraries that are not here, by stand-ins."""

import itertools
import math
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_attend import dense, distance, qkv, rand

from diffguide.errors import KernelError
from diffguide.kernels import Blend, Blocks, Capture, Regions, Window, attend, door, explain, tiling
from diffguide.kernels.problem import Problem
from diffguide.kernels.routes import flex, fused, merged, natten, xformers
from diffguide.kernels.windows import BORDERS, tile_order


def same(found, right, bar=3e-6):
    found, right = (x if isinstance(x, tuple) else (x,) for x in (found, right))
    assert all(distance(x, r) < bar and x.shape == r.shape for x, r in zip(found, right, strict=True))


@st.composite
def windows(draw):
    shape = draw(st.sampled_from([(9,), (5, 6), (6, 4), (2, 3, 4)]))
    borders = draw(st.sampled_from(BORDERS))
    size = tuple(draw(st.integers(1, n)) for n in shape)
    options = {}
    if borders in ("inward", "cut"):
        options["stride"] = tuple(draw(st.integers(1, k)) for k in size)
        options["dilation"] = tuple(draw(st.integers(1, n // k)) for n, k in zip(shape, size, strict=True))
    else:
        assume(borders == "short" or all(n % k == 0 for n, k in zip(shape, size, strict=True)))
        options["shift"] = tuple(draw(st.integers(0, k - 1)) for k in size)
    if draw(st.booleans()):
        options["order"] = tuple(draw(st.integers(1, n)) for n in shape)
    return Window(shape, size, borders=borders, first=draw(st.integers(0, 2)), **options)


@given(windows(), st.integers(0, 2), st.booleans(), st.integers(0, 99))
@settings(max_examples=50)
def test_tiles_give_what_dense_attention_gives(window, after, captured, seed):
    tensors = qkv(2, 2, window.place.stop + after, window.place.stop + after, 8, seed=seed)
    capture = Capture([0, window.place.stop - 1], heads=["mean", "none"][seed % 2], rows=slice(1, None))
    options = {"capture": capture} if captured else {}
    same(attend(*tensors, window=window, **options, backend="tiles"), dense(*tensors, window=window, **options))


@pytest.mark.parametrize("borders", BORDERS)
def test_gradients_go_through_tiles(borders):
    window = Window((6, 4), 2, borders=borders, first=1)
    asked = [x.double().requires_grad_() for x in qkv(1, 2, 26, 26, 4)]
    options = {"window": window, "capture": Capture([0, 9])}
    cotangents = rand(1, 2, 26, 4).double(), rand(1, 26, 2).double()
    found = torch.autograd.grad(attend(*asked, **options, backend="tiles"), asked, cotangents)
    right = torch.autograd.grad(dense(*asked, **options), asked, cotangents)
    assert all(float((x - r).abs().max()) < 1e-12 for x, r in zip(found, right, strict=True))


@pytest.mark.parametrize("route", ["lse-columns", "side-values", "recompute", "reference", "tiles"])
def test_gradients_are_those_of_finite_differences(route):
    asked = [x.double().requires_grad_() for x in qkv(1, 2, 9, 9, 4)]
    options = {"window": Window((3, 3), 2)} if route == "tiles" else {"mask": rand(9, 9).double()}

    def call(q, k, v):
        return attend(q, k, v, **options, capture=Capture([1, 4], rows=slice(2, 7)), backend=route)

    assert torch.autograd.gradcheck(call, asked, fast_mode=True)


@given(windows(), st.integers(1, 3))
@settings(max_examples=40)
def test_every_token_is_in_one_tile_that_holds_all_it_sees(window, size):
    sizes = tuple(min(size, n) for n in window.shape)
    for plan in (tiling.plan(window, torch.device("cpu")), tiling._plan(window, sizes, torch.device("cpu"))):
        flat = plan.queries.flatten()[plan.back]
        assert torch.equal(flat, torch.arange(window.first, window.place.stop))
        M = window.place.stop
        seen = torch.zeros(M, M, dtype=torch.bool)
        hidden = plan.hidden(slice(None)).expand(len(plan.queries), -1, -1)
        own = torch.zeros(plan.queries.numel(), dtype=torch.bool)
        own[plan.back] = True
        for queries, keys, closed, real in zip(
            plan.queries, plan.keys, hidden, own.reshape(plan.queries.shape), strict=True
        ):
            for i, row, is_own in zip(queries, closed, real, strict=True):
                if is_own:
                    seen[i, keys[~row]] = True
        grid = slice(window.first, None)
        assert torch.equal(seen[grid, grid], window.visible(range(M), M)[grid, grid])


def test_tiles_are_taken_where_they_pay():
    q, k, v = qkv(1, 1, 4096, 4096, 8)
    assert explain(q, k, v, window=Window((64, 64), 16)).route == "tiles"
    told = explain(q, k, v, window=Window((64, 64), 60))
    assert told.route == "sdpa" and "do not pay" in told.rejected["tiles"]
    small = qkv(1, 1, 1024, 1024, 8)
    assert "too small" in explain(*small, window=Window((32, 32), 8)).rejected["tiles"]
    assert explain(q, k, v, window=Window((64, 64), 16), mask=torch.zeros(4096)).route == "sdpa"


@given(st.integers(0, 99), st.booleans())
@settings(max_examples=20)
def test_a_window_over_everything_is_full_attention(seed, captured):
    q, k, v = qkv(1, 2, 24, 24, 8, seed=seed)
    options = {"capture": Capture([1, 2])} if captured else {}
    for route in ("tiles", "auto", "reference"):
        found = attend(q, k, v, window=Window((4, 6), 9), **options, backend=route)
        same(found, dense(q, k, v, **options))


def test_a_window_of_tokens_that_come_tile_by_tile_is_the_same_window():
    q, k, v = qkv(1, 2, 30, 30, 8)
    order = tile_order((5, 6), (2, 3))
    plain = attend(q, k, v, window=Window((5, 6), 3), backend="tiles")
    tiled = attend(*(x[:, :, order] for x in (q, k, v)), window=Window((5, 6), 3, order=(2, 3)), backend="tiles")
    assert torch.allclose(tiled, plain[:, :, order], atol=1e-6)


# Merged blocks.


@st.composite
def chosen(draw):
    B, H, N, M = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    keys, queries = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 99))
    shape = (draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H])), -(-N // queries), -(-M // keys))
    sees = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0.2, 0.6, 1.1]))
    return qkv(B, H, N, M, 8, seed=seed), Blocks(sees, keys, queries)


@given(chosen())
@settings(max_examples=60)
def test_merged_blocks_give_what_dense_attention_gives(problem):
    tensors, blocks = problem
    right = dense(*tensors, blocks=blocks)
    found = attend(*tensors, blocks=blocks, backend="merged")
    assert float((found - right).abs().max()) < 1e-5 * max(1.0, float(right.abs().max()))


@given(chosen())
@settings(max_examples=30)
def test_sequences_hold_each_chosen_pair_once(problem):
    (q, k, _), blocks = problem
    B, H, N, M = (*q.shape[:3], k.shape[2])
    pack = merged.packed(blocks, B, H, N, M)
    seen = torch.zeros(B * H * N, M, dtype=torch.int)
    for i in range(len(pack.queries) - 1):
        own = pack.query[pack.queries[i] : pack.queries[i + 1]]
        keys = torch.arange(int(pack.keys[i]), int(pack.keys[i + 1]))
        assert (own // N == int(keys[0]) // M).all()
        seen[own[:, None], keys % M] += 1
    assert torch.equal(seen.reshape(B, H, N, M), blocks.visible(range(N), M).expand(B, H, N, M).int())


def test_merged_blocks_are_taken_where_they_pay():
    q, k, v = qkv(1, 1, 2048, 2048, 8)
    few = Blocks(torch.eye(32, dtype=torch.bool), 64, 64)
    assert explain(q, k, v, blocks=few).route == "merged"
    assert "100% of the blocks" in explain(q, k, v, blocks=Blocks(~few.chosen | few.chosen, 64, 64)).rejected["merged"]
    q.requires_grad_()
    assert explain(q, k, v, blocks=few).route == "sdpa"


# flex_attention: uncompiled here, which is right where a mask function says who sees whom, and slow.


@pytest.fixture
def uncompiled(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "attention", lambda: flex_attention)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize(
    "options",
    [
        {"regions": Regions(torch.arange(160)[None].repeat(2, 1) % 5, torch.arange(160) % 3)},
        {"capture": Capture([0, 7, 159])},
        pytest.param({"window": Window((10, 15), 5, first=3, order=(2, 5))}, marks=pytest.mark.slow),
        pytest.param(
            {"blocks": Blocks(rand(2, 3, 160, 16) > 0, 10), "window": Window((160,), 70)}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"capture": Capture([0, 159], heads="none"), "window": Window((8, 20), (3, 4), borders="short")},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_flex_gives_what_dense_attention_gives(uncompiled, options):
    tensors = qkv(2, 3, 160, 160, 16)
    same(attend(*tensors, **options, backend="flex"), dense(*tensors, **options))


@given(windows(), st.integers(0, 2))
@settings(max_examples=30)
def test_the_mask_function_of_flex_is_the_window(window, after):
    N = window.place.stop + after
    sees = flex.predicate(Problem(*qkv(1, 1, N, N, 4), window=window))
    i = torch.arange(N)
    at = torch.zeros(1, dtype=torch.long)
    assert torch.equal(sees(at, at, i[:, None], i).expand(N, N), window.visible(range(N), N))


def test_blocks_of_flex_hold_all_that_is_seen():
    window = Window((16, 24), (5, 24), stride=(4, 1))
    problem = Problem(*qkv(1, 2, 384, 384, 4), window=window)
    mask = flex.block_mask(problem, flex.predicate(problem))
    seen = window.visible(range(384), 384).reshape(3, 128, 3, 128)
    assert torch.equal(mask.to_dense()[0, 0].bool(), seen.any(3).any(1))
    full = torch.zeros(3, 3, dtype=torch.bool)
    for row, (count, numbers) in enumerate(zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)):
        full[row, numbers[:count].long()] = True
    assert torch.equal(full, seen.all(3).all(1))


@pytest.mark.slow
def test_flex_compiled_leaves_out_what_is_hidden():
    tensors = qkv(1, 2, 384, 384, 16)
    window = Window((16, 24), (5, 24), stride=(4, 1))
    same(attend(*tensors, window=window, backend="flex"), dense(*tensors, window=window))


def test_flex_is_refused_where_it_has_no_way():
    q, k, v = qkv(1, 1, 9, 9, 8)
    window = Window((9,), 3)
    for tensors, options, message in (
        ((q, k, v), {}, "nothing is asked for"),
        ((q, k, v), {"mask": torch.zeros(9), "window": window}, "not masks or biases"),
        ((q.double(), k.double(), v.double()), {"window": window}, "no float64"),
        ((q.clone().requires_grad_(), k, v), {"window": window}, "no backward on a CPU"),
    ):
        with pytest.raises(KernelError, match=f"attention by flex: .*{message}"):
            attend(*tensors, **options, backend="flex")
    assert explain(q, k, v, window=window).rejected["flex"].startswith("compiles for")


# Libraries that are not here.


def stand_in(monkeypatch, name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    module.__spec__ = types.SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def dense_windows(q, k, v, kernel_size, *, stride, dilation, scale, additional_keys=None, additional_values=None):
    """NATTEN's signature: [B, *grid, H, D], and further keys [B, n, H, D] that all see."""
    shape = tuple(q.shape[1:-2])
    rows = [x.flatten(1, len(shape)).transpose(1, 2) for x in (q, k, v)]
    mask = Window(shape, kernel_size, stride=stride, dilation=dilation).visible(
        range(math.prod(shape)), math.prod(shape)
    )
    if additional_keys is not None:
        more = [x.transpose(1, 2) for x in (additional_keys, additional_values)]
        rows[1:] = [torch.cat([x, y], 2) for x, y in zip(rows[1:], more, strict=True)]
        mask = F.pad(mask, (0, more[0].shape[2]), value=True)
    out = F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).unflatten(1, shape)


@pytest.mark.parametrize(
    "window",
    [
        Window((8,), 3),
        Window((4, 6), (3, 4), stride=(2, 1), first=2),
        Window((4, 6), 2, dilation=(2, 3)),
        Window((2, 3, 4), 2, first=1),
    ],
)
def test_natten_is_given_the_grid_and_the_text_apart(monkeypatch, window):
    stand_in(monkeypatch, "natten", na1d=dense_windows, na2d=dense_windows, na3d=dense_windows)
    N = window.place.stop + (2 if window.first else 0)
    tensors = qkv(2, 3, N, N, 8)
    same(attend(*tensors, window=window, scale=0.3, backend="natten"), dense(*tensors, window=window, scale=0.3))


def test_natten_says_why_it_cannot(monkeypatch):
    q, k, v = qkv(1, 1, 24, 24, 8)
    window = Window((4, 6), 2)
    monkeypatch.setattr(natten.importlib.util, "find_spec", lambda name: None)
    assert explain(q, k, v, window=window).rejected["natten"] == "natten is not installed: pip install natten"
    monkeypatch.undo()

    def broken(name):
        raise ImportError("undefined symbol")

    stand_in(monkeypatch, "natten")
    for tensors, options, message in (
        ((q, k, v), {}, "no window"),
        ((q, k, v), {"window": Window((4, 6), 2, borders="short")}, "move inward"),
        ((q, k, v), {"window": Window((4, 6), (1, 2))}, "at least 2"),
        ((q, k, v), {"window": window, "capture": Capture([1])}, "does not take capture"),
        (qkv(1, 1, 24, 24, 40), {"window": window}, "8, 16, 32"),
        ((q.double(), k.double(), v.double()), {"window": window}, "float32 and less"),
    ):
        with pytest.raises(KernelError, match=f"natten: .*{message}"):
            attend(*tensors, **options, backend="natten")
    assert "makes the whole map" in explain(q, k, v, window=window).rejected["natten"]
    monkeypatch.setattr(natten.importlib, "import_module", broken)
    assert "does not load: ImportError: undefined symbol" in natten.reason(Problem(q, k, v, window=window))


def test_xformers_is_given_an_aligned_bias_and_columns_come_from_its_normaliser(monkeypatch):
    def bhnd(q, k, v, bias, scale):
        assert bias is None or (bias.stride(-2) % 8 == 0 and bias.shape == (2, 3, 33, 33))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        s = q @ k.mT * scale + (0 if bias is None else bias)
        return (s.softmax(-1) @ v).transpose(1, 2), F.pad(s.logsumexp(-1), (0, 31))

    ops = types.SimpleNamespace(
        memory_efficient_attention=lambda q, k, v, attn_bias, scale: bhnd(q, k, v, attn_bias, scale)[0],
        fmha=types.SimpleNamespace(
            memory_efficient_attention_forward_requires_grad=lambda q, k, v, bias, scale: bhnd(q, k, v, bias, scale)
        ),
    )
    tensors = qkv()
    assert xformers.reason(Problem(*tensors)) == "xformers has no kernels for cpu"
    monkeypatch.setattr(xformers.importlib, "import_module", lambda name: ops)
    bits = torch.arange(33) % 3 + 1
    for options in ({}, {"regions": Regions(bits, bits)}, {"capture": Capture([0, 5])}, {"mask": rand(33, 33)}):
        options = {"capture": Capture([3, 32], heads="none", rows=slice(2, 9)), **options}
        same(xformers.run(Problem(*tensors, **options)), dense(*tensors, **options))
        options.pop("capture")
        same(xformers.run(Problem(*tensors, **options))[0], dense(*tensors, **options))


@pytest.fixture
def kernels(monkeypatch):
    """The fused kernels as if they could run here: without a device they are what they mean, in plain PyTorch."""
    monkeypatch.setattr(fused.kernels, "reason", lambda device, dtype, width, grad: None)
    return fused.kernels


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capture": Capture([0, 129], rows=slice(3, 99))},
        {"capture": Capture(weights=rand(2, 130, 3).abs(), heads="none"), "scale": 0.5},
        {"regions": Regions(torch.arange(130) % 4, torch.arange(130) % 3 + 1, rand(2, 130))},
        {"blocks": Blocks(torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]) > 0, 64, 64)},
        {"blend": Blend([0.0, 0.3, 1.0, 1.0], rows=slice(2, 90)), "capture": Capture([4])},
    ],
)
def test_fused_kernels_are_given_all_that_is_asked(kernels, options):
    q, (k, v) = qkv(2, 4, 130, 130)[0], qkv(2, 2, 130, 130)[1:]
    same(attend(q, k, v, **options, backend="fused"), dense(q, k, v, **options))


def test_fused_kernels_say_what_is_not_for_them(kernels):
    q, k, v = qkv(1, 1, 130, 130)
    for options, message in (
        ({"mask": torch.zeros(130)}, "give regions or blocks"),
        ({"window": Window((130,), 5)}, "those of whole tiles"),
        ({"capture": Capture(range(33))}, "at most 32 maps at a time, not 33"),
        ({"blocks": Blocks(torch.ones(130, 3) > 0, 64)}, "64 queries by 64 keys"),
    ):
        with pytest.raises(KernelError, match=f"fused: .*{message}"):
            attend(q, k, v, **options, backend="fused")


def test_fused_kernels_tell_what_is_missing_here():
    q, k, v = qkv(1, 1, 130, 130)
    assert explain(q, k, v, capture=Capture([1])).rejected["fused"] == fused.kernels.reason("cpu", q.dtype, 64, False)


ASKED = {
    "capture": {"capture": Capture([0, 7, 200])},
    "weights": {"capture": Capture(weights=rand(1, 256, 3).abs(), heads="none")},
    "regions": {"regions": Regions(torch.arange(256) % 4 + 4, torch.arange(256) % 3 + 1, rand(2, 256))},
    "window": {"window": Window((16, 16), 5)},
    "tiles": {"window": Window((16, 16), 8, stride=8, order=(8, 8))},
    "text": {"window": Window((12, 16), 7, first=64), "capture": Capture([3, 65])},
    "blocks": {"blocks": Blocks(rand(4, 4) > 0, keys=64, queries=64)},
    "own-blocks": {"blocks": Blocks(rand(1, 4, 256, 4) > 0, keys=64)},
    "blend": {"blend": Blend([0.0, 0.3, 1.0, 1.0], rows=slice(2, 90)), "capture": Capture([4])},
}


EVERY = list(itertools.product((torch.float16, torch.bfloat16), door.ROUTES, ASKED))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "name", "asked"), EVERY if torch.cuda.is_available() else EVERY[:1])
def test_routes_of_an_accelerator_give_what_dense_attention_gives(dtype, name, asked):
    """Outputs and maps, and where the route has them gradients."""
    tensors, options, route = qkv(1, 4, 256, 256, 64, dtype=dtype), ASKED[asked], door.ROUTES[name]
    here = [x.cuda() for x in tensors]
    if why := route.reason(Problem(*here, **options)):
        pytest.skip(why)
    found = attend(*here, **options, backend=name)
    right = dense(*tensors, **options)
    same(tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu(), right, 1.5e-2)
    here = [x.requires_grad_() for x in here]
    if route.reason(Problem(*here, **options)) is None:
        exact = [x.double().requires_grad_() for x in tensors]
        made, meant = (_each(f(*own, **options)) for f, own in ((partial(attend, backend=name), here), (dense, exact)))
        given = [rand(*x.shape, seed=n, dtype=x.dtype) for n, x in enumerate(made)]
        ours = torch.autograd.grad(made, here, [x.cuda() for x in given])
        theirs = torch.autograd.grad(meant, exact, [x.double() for x in given])
        same(tuple(x.cpu() for x in ours), theirs, 2e-2)


def _each(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize(
    "window",
    [
        Window((24, 16), 8, stride=8, order=(8, 8)),
        Window((40, 16), 24, stride=8, order=(8, 8), first=64),
        Window((8, 8, 4), (4, 8, 4), stride=4, order=(4, 4, 4)),
        Window((256,), 128, borders="wrap", shift=64),
        Window((16, 16), 8, borders="parted", order=(8, 8)),
    ],
)
def test_fused_kernels_take_windows_of_whole_tiles(kernels, window):
    M = window.place.stop + 30
    tensors = qkv(1, 2, M, M)
    listed = window.tiled(64, M).repeat_interleave(64, 0).repeat_interleave(64, 1)[:M, :M]
    assert torch.equal(listed, window.visible(range(M), M)) and not listed.all()
    same(attend(*tensors, window=window, backend="fused"), dense(*tensors, window=window))
    both = {"window": window, "blocks": Blocks(rand(-(-M // 64), -(-M // 64)) > 0, 64, 64)}
    same(attend(*tensors, **both, backend="fused"), dense(*tensors, **both))


@pytest.mark.parametrize(
    "window",
    [
        Window((32, 32), 16, order=(8, 8)),  # slides token by token
        Window((32, 32), 16, stride=8, order=(8, 8)),  # an even number of tiles: windows end in the middle of some
        Window((32, 32), 24, stride=8),  # row by row
        Window((20, 32), 24, stride=8, order=(8, 8)),  # shorter tiles at the end
        Window((32, 32), 24, stride=8, order=(8, 8), first=30),
    ],
)
def test_windows_that_see_tiles_in_part_are_told(kernels, window):
    assert window.tiled(64, 1054) is None
    q, k, v = qkv(1, 1, 1054, 1054)
    with pytest.raises(KernelError, match="fused: of windows it takes those of whole tiles: an order of 64 tokens"):
        attend(q, k, v, window=window, backend="fused")
