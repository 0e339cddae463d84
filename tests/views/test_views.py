"""Laws of views: every named view reads a parameter as the stack it claims, and back, bit for bit."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asgo.distributed.placement import part_regions, pieces
from asgo.views import (
    MATRIX,
    STACK,
    TRANSPOSED,
    View,
    blocks,
    conv,
    default_view,
    fused,
    fused_qkv,
    head_columns,
    heads,
)
from asgo.views.patterns import per_expert

Shape = tuple[int, ...]
Fit = tuple[View, Shape]

length = st.integers(0, 5)
some = st.integers(1, 4)


@st.composite
def interleaved(draw: st.DrawFn, transposed: bool) -> Fit:
    sizes, times, n = draw(st.lists(some, min_size=1, max_size=4)), draw(length), draw(length)
    order = draw(st.sampled_from(["by head", "by group", "in blocks", "alternating"]))
    rows = times * (len(sizes) if order == "alternating" else sum(sizes))
    parts = {f"part {i}": size for i, size in enumerate(sizes)}
    d = draw(st.sampled_from([0, math.gcd(*sizes)])) if order != "alternating" else 0
    some_heads = draw(st.lists(st.sampled_from([*parts]), unique=True))
    view = fused(parts=parts, order=order, transposed=transposed, head_dim=d, heads=some_heads)
    return view, ((n, rows) if transposed else (rows, n))


@st.composite
def several(draw: st.DrawFn, ndim: int) -> Fit:
    d = draw(some)
    sizes = {"q": draw(some) * d, "k": draw(some) * d, "z": draw(some), "dt": draw(some)}
    shape = (sum(sizes.values()), draw(length), *[draw(some) for _ in range(ndim - 2)])
    return fused(parts=sizes, head_dim=draw(st.sampled_from([0, d])), ndim=ndim), shape


@st.composite
def fused_by_rows(draw: st.DrawFn, transposed: bool) -> Fit:
    d, n = draw(some), draw(length)
    q, k, v = draw(some) * d, draw(some) * d, draw(length)
    rows = q + k + v
    return fused_qkv(q, k, v, d, transposed), ((n, rows) if transposed else (rows, n))


@st.composite
def convolution(draw: st.DrawFn, transposed: bool) -> Fit:
    groups, kernel = draw(some), draw(st.lists(length, min_size=1, max_size=3))
    shape = (groups * draw(length), draw(length), *kernel)
    return conv(len(shape), groups, transposed), shape


FITS: dict[str, st.SearchStrategy[Fit]] = {
    "matrix": st.builds(lambda m, n: (MATRIX, (m, n)), length, length),
    "transposed": st.builds(lambda m, n: (TRANSPOSED, (m, n)), length, length),
    "stack": st.builds(lambda e, m, n: (STACK, (e, m, n)), length, length, length),
    "heads": st.builds(lambda h, d, n: (heads(h), (h * d, n)), some, length, length),
    "head_columns": st.builds(lambda h, d, m: (head_columns(h), (m, h * d)), some, length, length),
    "blocks": st.builds(lambda r, c, a, b: (blocks(r, c), (a * r, b * c)), some, some, length, length),
    "fused_qkv": fused_by_rows(False),
    "fused_qkv_transposed": fused_by_rows(True),
    "interleaved": interleaved(False),
    "interleaved_transposed": interleaved(True),
    "several": several(2),
    "several_convolutions": several(4),
    "experts_of_groups": st.builds(
        lambda e, g, a, b, n: (per_expert(fused(q=a * b, v=b, order="by group", head_dim=b)), (e, g * (a + 1) * b, n)),
        length,
        length,
        some,
        some,
        length,
    ),
    "experts": st.builds(lambda e, a, b, n: (per_expert(fused(q=a, v=b)), (e, a + b, n)), length, some, some, length),
    "conv": convolution(False),
    "conv_transposed": convolution(True),
    "by_hand": st.builds(
        lambda a, b, m, n: (View("(a b) m n -> b (a m) n", {"b": b}), (a * b, m, n)),
        length,
        some,
        length,
        length,
    ),
    "by_hand_split": st.builds(
        lambda a, b, n: (View(("m n -> 1 m n", "m n -> m 1 n"), split=(a, b)), (a + b, n)),
        length,
        length,
        length,
    ),
}
fits = st.sampled_from(sorted(FITS)).flatmap(lambda name: FITS[name])
every_view = pytest.mark.parametrize("name", FITS)


def random_bits(shape: Shape, seed: int = 0) -> Tensor:
    """Arbitrary float32 bit patterns: NaN payloads, infinities and negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


# ---- round trips -------------------------------------------------------------------------------------------


@every_view
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_restore_inverts_matrices_bit_for_bit(name: str, data: st.DataObject) -> None:
    view, shape = data.draw(FITS[name])
    x = random_bits(shape)
    stacks = view.matrices(x)
    assert len(stacks) == view.parts
    assert same_bits(view.restore(stacks, shape), x)
    assert same_bits(view.restore([stack.clone() for stack in stacks], shape), x)


@every_view
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_each_part_is_restored_alone_and_from_any_strides(name: str, data: st.DataObject) -> None:
    view, shape = data.draw(FITS[name])
    x = random_bits(shape).permute(*reversed(range(len(shape)))).contiguous()
    x = x.permute(*reversed(range(len(shape))))
    for i, part in enumerate(view.cut(x)):
        assert same_bits(view.unstack(i, view.stack(i, part), part.shape), part)


@every_view
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_shapes_are_those_of_the_stacks(name: str, data: st.DataObject) -> None:
    view, shape = data.draw(FITS[name])
    stacks = view.matrices(torch.zeros(shape))
    assert view.shapes(shape) == [tuple(stack.shape) for stack in stacks]
    assert all(len(each) == 3 for each in view.shapes(shape))
    assert sum(stack.numel() for stack in stacks) == torch.zeros(shape).numel()
    view.check("w", shape)


@settings(max_examples=100, deadline=None)
@given(fit=fits)
def test_plain_data_survives_a_checkpoint(fit: Fit) -> None:
    view, shape = fit
    file = io.BytesIO()
    torch.save({"view": view.to_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["view"]
    assert loaded == view.to_dict()
    assert View.of(loaded) == view
    assert hash(View.of(loaded)) == hash(view)
    assert View.of(loaded).shapes(shape) == view.shapes(shape)  # pyright: ignore


def test_equal_views_are_equal_however_they_are_written() -> None:
    assert View("(a b) n -> a b n", {"b": 2, "a": 3}) == View("(a b) n -> a b n", (("a", 3), ("b", 2)))
    assert View.of("m n -> 1 m n") == MATRIX == View.of(MATRIX) == View.of({"pattern": "m n -> 1 m n"})
    assert View.of(None) is None
    assert len({heads(2), heads(2), heads(3)}) == 2


# ---- what the named views mean -----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(h=some, d=some, n=some)
def test_heads_are_consecutive_rows_or_columns(h: int, d: int, n: int) -> None:
    x = torch.arange(h * d * n, dtype=torch.float64).reshape(h * d, n)
    (rows,), (columns,) = heads(h).matrices(x), head_columns(h).matrices(x.T)
    for i in range(h):
        assert torch.equal(rows[i], x[i * d : (i + 1) * d])
        assert torch.equal(columns[i], x.T[:, i * d : (i + 1) * d])


@settings(max_examples=30, deadline=None)
@given(d=some, h=some, kv=some, n=some)
def test_fused_qkv_is_separate_q_k_v(d: int, h: int, kv: int, n: int) -> None:
    q, k, v = (torch.randn(rows * d, n) for rows in (h, kv, kv))
    x = torch.cat([q, k, v])
    expected = [*heads(h).matrices(q), *heads(kv).matrices(k), *MATRIX.matrices(v)]
    for got, want in zip(fused_qkv(h * d, kv * d, kv * d, d).matrices(x), expected, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(fused_qkv(h * d, kv * d, kv * d, d, True).matrices(x.T), expected, strict=True):
        assert torch.equal(got, want)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(some, min_size=2, max_size=4), d=some, times=some, n=some, transposed=st.booleans())
def test_repeated_parts_are_the_rows_at_their_places_in_every_repetition(sizes, d, times, n, transposed):
    sizes = {f"part {i}": size * d for i, size in enumerate(sizes)}
    unit = sum(sizes.values())
    x = np.random.default_rng(0).normal(size=(times * unit, n))
    view = fused(parts=sizes, order="by group", head_dim=d, heads=["part 0"], transposed=transposed)
    held = torch.from_numpy(x.T if transposed else x)
    place, begin = np.arange(times * unit) % unit, 0
    boxes = part_regions(view, tuple(held.shape))
    for part, (size, stack) in enumerate(zip(sizes.values(), view.matrices(held), strict=True)):
        rows = (place >= begin) & (place < begin + size)
        expected = x[rows].reshape(-1, d, n) if part == 0 else x[rows][None]
        np.testing.assert_array_equal(stack.numpy(), expected)
        inside = np.zeros(held.shape, bool)
        for box, piece in zip(boxes[part], pieces(view, view.cut(held)[part]), strict=True):
            inside[tuple(slice(*sides) for sides in box)] = True
            assert torch.equal(piece, held[tuple(slice(*sides) for sides in box)])
            assert piece.data_ptr() == held[tuple(slice(*sides) for sides in box)].data_ptr()
        np.testing.assert_array_equal(inside, np.broadcast_to(rows[None] if transposed else rows[:, None], held.shape))
        begin += size


@settings(max_examples=30, deadline=None)
@given(r=some, c=some, a=some, b=some)
def test_blocks_are_tiles(r: int, c: int, a: int, b: int) -> None:
    x = torch.randn(a * r, b * c)
    (tiles,) = blocks(r, c).matrices(x)
    for i in range(a):
        for j in range(b):
            assert torch.equal(tiles[i * b + j], x[i * r : (i + 1) * r, j * c : (j + 1) * c])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [(3,), (3, 2), (1, 2, 3)])
def test_conv_multiplies_patches_group_by_group(groups: int, kernel: Shape) -> None:
    layer_type = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[len(kernel)]
    layer = layer_type(8, 4, kernel, groups=groups, bias=False)  # pyright: ignore
    patch = torch.randn(1, 8, *kernel)
    (stack,) = conv(layer.weight.ndim, groups).matrices(layer.weight.detach())
    by_hand = torch.bmm(stack, patch.reshape(groups, -1, 1)).reshape(-1)
    torch.testing.assert_close(layer(patch).detach().reshape(-1), by_hand)


def test_transposed_conv_spreads_group_by_group() -> None:
    layer = torch.nn.ConvTranspose1d(6, 4, 3, groups=2, bias=False)
    (stack,) = conv(3, 2, transposed=True).matrices(layer.weight.detach())
    assert stack.shape == (2, 2, 9)
    x = torch.randn(1, 6, 1)
    spread = torch.einsum("goik,gi->gok", stack.reshape(2, 2, 3, 3), x.reshape(2, 3)).reshape(1, 4, 3)
    torch.testing.assert_close(layer(x).detach(), spread)


@pytest.mark.parametrize(
    ("ndim", "view"), [(0, None), (1, None), (2, MATRIX), (3, conv(3)), (4, conv(4)), (5, conv(5))]
)
def test_default_view_goes_by_axes(ndim: int, view: View | None) -> None:
    assert default_view(ndim) == view


# ---- memory and dtypes -------------------------------------------------------------------------------------

SHARING: list[Fit] = [
    (MATRIX, (4, 6)),
    (TRANSPOSED, (4, 6)),
    (STACK, (2, 4, 6)),
    (heads(2), (4, 6)),
    (head_columns(2), (4, 6)),
    (fused_qkv(4, 2, 2, 2), (8, 3)),
    (fused_qkv(4, 2, 2, 2, transposed=True), (3, 8)),
    (conv(4), (4, 3, 2, 2)),
]


@pytest.mark.parametrize(("view", "shape"), SHARING, ids=str)
def test_stacks_of_a_contiguous_parameter_share_its_memory(view: View, shape: Shape) -> None:
    x = torch.zeros(shape)
    for stack in view.matrices(x):
        stack.add_(1)
    assert torch.equal(x, torch.ones(shape))


@settings(max_examples=60, deadline=None)
@given(fit=fits)
def test_cut_shares_memory(fit: Fit) -> None:
    view, shape = fit
    x = torch.zeros(shape)
    for part in view.cut(x):
        part.add_(1)
    assert torch.equal(x, torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    view, x = fused_qkv(4, 2, 2, 2), torch.randn(8, 3).to(dtype)
    restored = view.restore(view.matrices(x), x.shape)
    assert restored.dtype == dtype
    assert torch.equal(restored, x)


# ---- errors ------------------------------------------------------------------------------------------------

MISFITS: list[tuple[View, Shape, str]] = [
    (
        heads(12),
        (770, 768),
        "view '(h d) n -> h d n' with h=12 does not fit 'w' (770, 768): 770 is not a multiple of 12. "
        "Pass sizes or a split that fit, or route it with 'm n -> 1 m n'.",
    ),
    (heads(0), (4, 4), "4 is not a multiple of 0"),
    (blocks(2, 3), (4, 4), "4 is not a multiple of 3"),
    (View("(h d) n -> h d n", {"h": 2, "d": 3}), (8, 4), "8 is not equal to 6"),
    (View("(h d) n -> h d n"), (8, 4), "the sizes of h, d are not given"),
    (MATRIX, (7,), "the pattern reads 2 axes, the parameter has 1. Pass sizes or a split that fit, or route"),
    (MATRIX, (7,), "with view=None (AdamW)."),
    (MATRIX, (2, 3, 4), "the pattern reads 2 axes, the parameter has 3"),
    (MATRIX, (2, 3, 4), "route it with a view of its own."),
    (conv(4), (4, 6), "the pattern reads 4 axes, the parameter has 2"),
    (fused_qkv(4, 2, 2, 2), (9, 3), "split=(4, 2, 2) does not fit 'w' (9, 3): the split adds up to 8, not 9"),
    (fused_qkv(4, 2, 2, 2, True), (3, 9), "on dim 1 does not fit 'w' (3, 9): the split adds up to 8, not 9"),
    (fused_qkv(4, 2, 2, 2, True), (8,), "there is no dim 1"),
    (
        fused(q=4, k=1, order="by head"),
        (9, 3),
        "split=(4, 1), repeated does not fit 'w' (9, 3): the repeated split adds up to 5, which does not divide 9",
    ),
    (fused_qkv(4, 3, 2, 2), (9, 3), "3 is not a multiple of 2"),
    (View("m n -> m n"), (2, 3), "it gives 2 axes (2, 3), not three axes b m n"),
    (View("m n -> 1 1 m n"), (2, 3), "it gives 4 axes"),
    (View("m n -> 1 m k"), (2, 3), "does not fit 'w' (2, 3): "),
    (View("m n -> 1 m"), (2, 3), "does not fit 'w' (2, 3): "),
    (View("m n) -> 1 m n"), (2, 3), "does not fit 'w' (2, 3): "),
]


@pytest.mark.parametrize(("view", "shape", "message"), MISFITS)
def test_misfit_says_who_what_and_what_to_do(view: View, shape: Shape, message: str) -> None:
    with pytest.raises(ValueError) as error:
        view.check("w", shape)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError):
        view.shapes(shape)


NOT_VIEWS: list[tuple[Callable[[], object], str]] = [
    (
        lambda: View("m n"),
        "view 'm n' is not a pattern: write the parameter's axes, '->' and three axes b m n",
    ),
    (lambda: View("m -> n -> 1 m n"), "is not a pattern"),
    (lambda: View(("m n -> 1 m n",) * 2, split=(1, 2, 3)), "has 2 patterns for 3 parts: pass one pattern"),
    (lambda: View(("m n -> 1 m n",) * 2), "has 2 patterns for 1 parts"),
    (lambda: View.of("heads"), "is not a pattern"),
    (lambda: View.of(3), "view 3 is not understood: pass a View, an einops pattern"),  # pyright: ignore
    (lambda: View.of({"sizes": {}}), "is not understood"),
    (lambda: View.of({"pattern": "m n -> 1 m n", "size": {}}), "is not understood"),
]


@pytest.mark.parametrize(("make", "message"), NOT_VIEWS)
def test_what_is_no_view_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
