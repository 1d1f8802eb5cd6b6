"""Windows on grids: what is seen, counted; published examples; and what they become at their ends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffguide.errors import KernelError
from diffguide.kernels import Window
from diffguide.kernels.windows import BORDERS, Axis, inverse, tile_order


def seen(window):
    return window.visible(range(window.tokens), window.tokens)


@st.composite
def sliding(draw):
    """n, k, s, d of one axis."""
    n = draw(st.integers(1, 20))
    d = draw(st.integers(1, n))
    k = draw(st.integers(1, n // d))
    return n, k, draw(st.integers(1, k)), d


@given(sliding())
@settings(max_examples=80)
def test_every_token_sees_as_many_in_windows_that_move_inward(numbers):
    n, k, s, d = numbers
    A = seen(Window((n,), k, stride=s, dilation=d))
    assert A.sum(1).tolist() == [k] * n
    for i in range(n):
        keys = A[i].nonzero()[:, 0].tolist()
        assert {j % d for j in keys} == {i % d} and keys == list(range(keys[0], keys[0] + k * d, d))
        group = [j for j in range(n) if j % d == i % d and j // d // s == i // d // s]
        assert all(torch.equal(A[i], A[j]) for j in group)


@given(st.integers(1, 30), st.integers(0, 20))
@settings(max_examples=60)
def test_an_odd_window_is_the_inward_one_of_freeswim(n, half):
    """Its mask, as its code writes it: room that lacks on one side is given on the other."""
    A = seen(Window((n,), 2 * half + 1))
    for y in range(n):
        more, less = max(0, half - y), max(0, half + y - n + 1)
        for x in range(n):
            inside = y - half - less <= x <= y + half + more
            assert bool(A[y, x]) == (inside or 2 * half + 1 > n)


@given(st.integers(1, 6), st.integers(0, 3), st.integers(1, 5))
@settings(max_examples=40)
def test_an_odd_number_of_tiles_with_that_stride_is_sliding_tile_attention(tile, half, more):
    tiles, K = 2 * half + more, 2 * half + 1
    A = seen(Window((tiles * tile,), K * tile, stride=tile)) if tiles >= K else None
    for c in range(tiles) if A is not None else ():
        center = min(max(c, half), tiles - 1 - half)
        for other in range(tiles):
            block = A[c * tile : (c + 1) * tile, other * tile : (other + 1) * tile]
            assert block.all() if abs(center - other) <= half else not block.any()


@pytest.mark.parametrize(
    ("n", "k", "s", "d", "i", "keys"),
    [
        (9, 4, 1, 1, 4, [2, 3, 4, 5]),  # even windows have one more at the left
        (9, 4, 1, 1, 0, [0, 1, 2, 3]),
        (9, 4, 1, 1, 8, [5, 6, 7, 8]),
        (9, 4, 3, 1, 5, [2, 3, 4, 5]),  # the leader of 3, 4, 5 is 4
        (9, 3, 1, 3, 5, [2, 5, 8]),
        (7, 2, 2, 3, 6, [3, 6]),  # 0, 3, 6 share a group; 6 leads itself
    ],
)
def test_windows_are_those_of_natten(n, k, s, d, i, keys):
    assert seen(Window((n,), k, stride=s, dilation=d))[i].nonzero()[:, 0].tolist() == keys


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4))
@settings(max_examples=40)
def test_windows_that_are_cut_keep_their_middle(n, k, s):
    k = min(k, n)
    s = min(s, k)
    A, B = seen(Window((n,), k, stride=s, borders="cut")), seen(Window((n,), k, stride=s))
    for i in range(n):
        leader = min(i // s * s + s // 2, n - 1)
        assert A[i].nonzero()[:, 0].tolist() == [j for j in range(leader - k // 2, leader - k // 2 + k) if 0 <= j < n]
        assert torch.equal(A[i], B[i]) or leader < k // 2 or leader - k // 2 + k > n


def test_stride_of_the_whole_window_gives_blocks():
    A = seen(Window((4, 6), (2, 3), stride=(2, 3)))
    block = torch.tensor([r // 2 * 2 + c // 3 for r in range(4) for c in range(6)])
    assert torch.equal(A, block[:, None] == block)


def sides(window):
    """Lengths of the windows along the only axis, in order."""
    (axis,) = window.axes()
    return [len(group) for group in axis.members()]


@pytest.mark.parametrize(
    ("n", "k", "plain", "shifted"),
    [
        (45, 15, [15, 15, 15], [7, 15, 15, 8]),
        (80, 27, [27, 27, 26], [13, 27, 27, 13]),
        (21, 6, [6, 6, 6, 3], [3, 6, 6, 6]),
        (68, 15, [15, 15, 15, 15, 8], [7, 15, 15, 15, 15, 1]),
    ],
)
def test_windows_of_seedvr_are_short_at_the_ends(n, k, plain, shifted):
    assert sides(Window((n,), k, borders="short")) == plain
    assert sides(Window((n,), k, borders="short", shift=k // 2)) == shifted


def test_seedvr_keeps_the_area_of_720p():
    plain, shifted = (Window.seedvr((21, 45, 80), shifted=s) for s in (False, True))
    assert plain.sizes == (6, 15, 27) and shifted.shift == (3, 7, 13)
    assert Window.seedvr((21, 68, 120), shifted=False).sizes == (6, 15, 27)
    assert Window.seedvr((1, 6, 6), shifted=True).shift == (0, 0, 0)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 39))
@settings(max_examples=60)
def test_short_windows_part_the_axis(n, k, shift):
    k = min(n, k)
    (axis,) = Window((n,), k, borders="short", shift=min(shift, k - 1)).axes()
    groups = axis.members()
    assert [i for group in groups for i in group] == list(range(n)) and all(0 < len(g) <= k for g in groups)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 4))
@settings(max_examples=40)
def test_shifted_windows_wrap_around(k, count, shift):
    n, shift = k * count, min(shift, k - 1)
    x = torch.arange(n)
    rolled = torch.roll(x, -shift).reshape(count, k)
    A = seen(Window((n,), k, borders="wrap", shift=shift))
    B = seen(Window((n,), k, borders="parted", shift=shift))
    for members in rolled:
        assert A[members][:, members].all() and A[members].sum(1).tolist() == [k] * k
        around = members < members[0]
        assert torch.equal(B[members][:, members], around[:, None] == around)
    assert not (B & ~A).any()


def test_a_shift_of_nothing_gives_blocks():
    plain = seen(Window((6, 4), (3, 2), stride=(3, 2)))
    for borders in ("wrap", "parted", "short"):
        assert torch.equal(seen(Window((6, 4), (3, 2), borders=borders)), plain)


@given(st.sampled_from([(7,), (4, 6), (2, 4, 6)]), st.sampled_from(BORDERS))
def test_what_is_seen_on_several_axes_is_seen_on_each(shape, borders):
    window = Window(shape, 2, borders=borders if shape != (7,) else "inward")
    A = seen(window)
    at = [divmod_all(i, shape) for i in range(window.tokens)]
    for i in range(window.tokens):
        for j in range(0, window.tokens, 3):
            axes = zip(window.axes(), at[i], at[j], strict=True)
            assert bool(A[i, j]) == all(axis.sees(a, b) for axis, a, b in axes)


def divmod_all(i, shape):
    found = []
    for n in reversed(shape):
        i, r = divmod(i, n)
        found.insert(0, r)
    return found


@pytest.mark.parametrize("borders", BORDERS)
def test_a_window_over_the_whole_grid_hides_nothing(borders):
    size = (9, 13) if borders == "cut" else (4, 6)  # cut windows keep their middle
    assert Window((4, 6), size if borders != "cut" else (4, 6), borders=borders).whole == (borders != "cut")
    assert seen(Window((4, 6), 99)).all() and Window((4, 6), 99).sizes == (4, 6)
    assert not Window((4, 6), (4, 5)).whole


@given(st.sampled_from([(5,), (4, 6), (5, 7), (3, 4, 5)]), st.integers(1, 4))
def test_tiles_hold_neighbours_and_there_is_a_way_back(shape, side):
    tile = (side,) * len(shape)
    order = tile_order(shape, tile)
    assert torch.equal(order[inverse(order)], torch.arange(math.prod(shape)))
    at = torch.stack(torch.unravel_index(order, shape), 1) // side
    changes = (at[1:] != at[:-1]).any(1).sum() + 1
    assert changes == math.prod(-(-n // side) for n in shape)  # each tile is one run


@given(st.integers(0, 3), st.integers(0, 3))
def test_text_sees_all_and_is_seen_by_all(before, after):
    window = Window((3, 4), 2, first=before, order=(2, 2))
    M = 12 + before + after
    A = window.visible(range(M), M)
    text = [i for i in range(M) if not before <= i < before + 12]
    assert A[text].all() and A[:, text].all()
    order = tile_order((3, 4), (2, 2))
    assert torch.equal(A[window.place, window.place], seen(Window((3, 4), 2))[order][:, order])
    assert torch.equal(window.visible(range(2, 9), M), A[2:9])


def test_an_axis_lists_its_groups_in_order():
    assert Axis((1, 0, 1), (1, 0, 0), (0, 0, 0), (2, 1, 2)).members() == [[1], [2, 0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window((), 1), "one to three sides"),
        (lambda: Window((4, 0), 1), "one to three sides"),
        (lambda: Window((4, 4), (1, 2, 3)), "for each of the 2 axes"),
        (lambda: Window((4, 4), 0), "Window.size = 0"),
        (lambda: Window((4, 4), 2, stride=3), "stride 3 is above the size 2"),
        (lambda: Window((9,), 4, dilation=3), "reaches over 12 tokens, the grid has 9"),
        (lambda: Window((9,), 4, borders="swin"), "none of inward, cut"),
        (lambda: Window((9,), 4, shift=2), "is for borders"),
        (lambda: Window((9,), 4, borders="wrap"), 'does not divide the side 9.*"short"'),
        (lambda: Window((8,), 4, borders="wrap", shift=4), "not below the size 4"),
        (lambda: Window((8,), 4, borders="short", stride=2), "stride and dilation are 1"),
        (lambda: Window((8,), 4, first=-1), "Window.first = -1"),
    ],
)
def test_numbers_that_do_not_fit_are_named(make, message):
    with pytest.raises(KernelError, match=message):
        make()
