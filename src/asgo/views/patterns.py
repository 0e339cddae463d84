"""The named patterns: matrices, heads, blocks, convolutions, fused projections, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from asgo.views.view import View, axes_of

MATRIX = View("m n -> 1 m n")
"""A `torch.nn.Linear` weight, whole."""

TRANSPOSED = View("n m -> 1 m n")
"""A weight stored as (in, out): Hugging Face's `Conv1D`."""

STACK = View("e m n -> e m n")
"""A stack of matrices in one parameter: mixture-of-experts weights ``(experts, out, in)``."""


def heads(h: int, transposed: bool = False) -> View:
    """One matrix ``(d, n)`` per attention head: query and key, whose Hessians are block-diagonal by head.

    With `transposed`, for layers that store (in, out).
    """
    return View("n (h d) -> h d n" if transposed else "(h d) n -> h d n", {"h": h})


def head_columns(h: int) -> View:
    """One matrix ``(m, d)`` per head for an output projection, whose columns belong to heads."""
    return View("m (h d) -> h m d", {"h": h})


def blocks(r: int, c: int) -> View:
    """Independent blocks of `r` rows and `c` columns."""
    return View("(a r) (b c) -> (a b) r c", {"r": r, "c": c})


def fused_qkv(q: int, k: int, v: int, d: int, transposed: bool = False) -> View:
    """A fused projection of `q`, `k` and `v` rows: query and key per head of `d` rows, value whole.

    Covers grouped-query attention (``k < q``) and, with `transposed`, layers that store (in, out).
    """
    per_head, whole = ("n (h d) -> h d n", "n m -> 1 m n") if transposed else ("(h d) n -> h d n", MATRIX.pattern)
    return View((per_head, per_head, str(whole)), {"d": d}, (q, k, v), 1 if transposed else 0)


Order = Literal["blocks", "by head", "by group", "in blocks", "alternating"]
"""How the rows of several parts alternate in one weight: once each, or again and again."""

ORDERS: tuple[str, ...] = get_args(Order)


def fused(
    q: int = 0,
    k: int = 0,
    v: int = 0,
    order: Order = "blocks",
    *,
    parts: Mapping[str, int] | None = None,
    head_dim: int = 0,
    heads: Sequence[str] = ("q", "k"),
    transposed: bool = False,
    ndim: int = 2,
) -> View:
    """A weight that holds several matrices, such as query, key and value: each is a matrix of its own.

    In ``"blocks"``, all rows of the first part come first, then all of the second. In every other order the parts
    repeat: ``"by head"``, ``"by group"`` of heads, ``"in blocks"`` or, row by row, ``"alternating"``; how often,
    the weight's shape decides.

    Args:
        q: rows of the query: in all with ``"blocks"``, else in one repetition.
        k: rows of the key.
        v: rows of the value.
        order: how the parts alternate. ``"alternating"`` has one row of each in turn, so that sizes do not count.
        parts: instead of `q`, `k` and `v`: rows by name, in the order in which they are stored.
        head_dim: rows of one head; the parts named in `heads` are then one matrix per head. 0: parts stay whole.
        heads: the parts that have heads.
        transposed: for layers that store (in, out).
        ndim: the weight's axes; those after the second are a kernel's.

    Raises:
        ValueError: without parts, with a size below 1, or heads that do not divide their part.

    >>> fused(q=8, k=4, v=4).shapes((16, 5))
    [(1, 8, 5), (1, 4, 5), (1, 4, 5)]
    >>> fused(q=2, k=2, v=2, order="by head").shapes((24, 5))
    [(3, 8, 5)]
    >>> fused(q=4, k=2, v=2, order="by group").shapes((24, 5))
    [(1, 12, 5), (1, 6, 5), (1, 6, 5)]
    """
    sizes = dict(parts) if parts is not None else {name: n for name, n in (("q", q), ("k", k), ("v", v)) if n}
    if order not in ORDERS:
        raise ValueError(f"order={order!r} of a fused weight is not known; choose from {', '.join(map(repr, ORDERS))}.")
    if not sizes or min(sizes.values()) < 1:
        raise ValueError(f"a fused weight needs parts of one row or more; got {sizes}. Pass q=, k= and v=, or parts=.")
    uneven = [name for name in heads if head_dim and sizes.get(name, 0) % head_dim]
    if uneven:
        raise ValueError(f"head_dim={head_dim} does not divide the rows of {', '.join(uneven)} in {sizes}.")
    if order == "blocks":
        return _in_blocks(sizes, head_dim, heads, transposed, ndim)
    if head_dim and all(size % head_dim == 0 and name in heads for name, size in sizes.items()):
        return View(_pattern("(h d)", "h", "d", transposed, ndim), {"d": head_dim})
    by_head = [name for name in sizes if head_dim and name in heads]
    if order != "alternating" and (by_head or len(set(sizes.values())) > 1):
        return _repeated(sizes, head_dim, by_head, transposed, ndim)
    unit = 1 if order == "alternating" else next(iter(sizes.values()))
    return View(_pattern("(h r d)", "r", "(h d)", transposed, ndim), {"r": len(sizes), "d": unit})


def _in_blocks(sizes: Mapping[str, int], d: int, heads: Sequence[str], transposed: bool, ndim: int) -> View:
    whole, by_head = _pattern("m", "1", "m", transposed, ndim), _pattern("(h d)", "h", "d", transposed, ndim)
    patterns = tuple(by_head if d and name in heads and size > d else whole for name, size in sizes.items())
    if len(sizes) == 1:
        return View(patterns[0], {"d": d} if patterns[0] == by_head else ())
    used = {"d": d} if by_head in patterns else ()
    return View(patterns, used, tuple(sizes.values()), 1 if transposed else 0)


def _repeated(sizes: Mapping[str, int], d: int, heads: Sequence[str], transposed: bool, ndim: int) -> View:
    whole = _pattern("g m", "1", "(g m)", transposed, ndim)
    by_head = _pattern("g (h d)", "(g h)", "d", transposed, ndim)
    patterns = tuple(by_head if name in heads else whole for name in sizes)
    return View(patterns, {"d": d} if heads else (), tuple(sizes.values()), 1 if transposed else 0, repeated=True)


def _pattern(rows: str, stack: str, m: str, transposed: bool, ndim: int) -> str:
    """From a weight with these rows to a stack of ``m x n`` matrices; axes after the second join the columns."""
    kernel = "".join(f" k{i}" for i in range(ndim - 2))
    source = f"n {rows}{kernel}" if transposed else f"{rows} n{kernel}"
    return f"{source} -> {stack} {m} {f'(n{kernel})' if kernel else 'n'}"


def conv(ndim: int, groups: int = 1, transposed: bool = False) -> View:
    """A convolution weight with `ndim` axes as ``out x (in * kernel)``, one matrix per group.

    Read depthwise convolutions with ``groups=1``, as one matrix ``channels x kernel``: in a stack of single rows
    there would be nothing to precondition.
    """
    kernel = " ".join(f"k{i}" for i in range(ndim - 2))
    if transposed:
        return View(f"(g i) o {kernel} -> g o (i {kernel})", {"g": groups})
    return View(f"(g o) i {kernel} -> g o (i {kernel})", {"g": groups})


def default_view(ndim: int) -> View | None:
    """The view of a bare parameter by its number of axes.

    A vector or scalar has none (AdamW); two axes are one matrix, three a convolution over time, four and five
    convolutions over images and volumes. Stacks of experts need a view of their own or `asgo.route`.
    """
    if ndim < 2:
        return None
    return MATRIX if ndim == 2 else conv(ndim)


GATES = "(g m) n -> g m n"
EXPERT_GATES = "e (g m) n -> (e g) m n"
TRANSPOSED_GATES = "e m (g n) -> (e g) m n"
ALTERNATING_GATES = "e (m g) n -> (e g) m n"
TRANSPOSED_ALTERNATING_GATES = "e m (n g) -> (e g) m n"


def per_expert(view: View) -> View:
    """The same view of every matrix of a stack ``(e, m, n)``: ``"m n -> 1 m n"`` becomes ``"e m n -> e m n"``."""
    stacked = []
    for pattern in (view.pattern,) if isinstance(view.pattern, str) else view.pattern:
        source, target = pattern.split(" -> ")
        first, *rest = axes_of(target)
        axes = " ".join(["e", *(name for name in first if name != "1")])
        stacked.append(f"e {source} -> {f'({axes})' if ' ' in axes else axes} {' '.join(map(_joined, rest))}")
    pattern = stacked[0] if isinstance(view.pattern, str) else tuple(stacked)
    return replace(view, pattern=pattern, split_dim=view.split_dim + 1)


# ---- views of parameters with any number of axes -----------------------------------------------------------


def flat(ndim: int) -> View:
    """The whole parameter as one row: ``"m n -> 1 1 (m n)"``."""
    axes = _axes(ndim)
    return _view(axes, "1", axes)


def rows(ndim: int) -> View:
    """One row per output feature: ``"o i k0 -> 1 o (i k0)"``; a vector or a scalar is one row."""
    axes = _axes(ndim)
    return flat(ndim) if ndim < 2 else _view(axes, axes[0], axes[1:])


def entries(ndim: int) -> View:
    """One row per entry of a vector; `rows` for others."""
    return View("n -> 1 n 1") if ndim == 1 else rows(ndim)


def kernels(ndim: int) -> View:
    """One row per kernel of a convolution, ``"o i k0 -> 1 (o i) k0"``; `entries` for others."""
    axes = _axes(ndim)
    return entries(ndim) if ndim < 3 else _view(axes, "(o i)", axes[2:])


def columns(ndim: int) -> View:
    """One column per input feature: ``"o i k0 -> 1 (o k0) i"``; a vector or a scalar is one column."""
    axes = _axes(ndim)
    return _view(axes, _joined(axes), ()) if ndim < 2 else _view(axes, _joined([axes[0], *axes[2:]]), axes[1:2])


def equal(count: int, ndim: int) -> View:
    """`count` rows of equal length, each a run of the flattened parameter; its first axis must divide into them."""
    if ndim == 0:
        return flat(0)
    first, *rest = _axes(ndim)
    return View(f"{' '.join([f'(c {first})', *rest])} -> 1 c {_joined([first, *rest])}", {"c": count})


def head_rows(view: View) -> View:
    """The view with every head as one row of one matrix, so that a number per row is a number per head.

    ``"(h d) n -> h d n"`` becomes ``"(h d) n -> 1 h (d n)"``, in each part of a split; others stay.
    """
    merge = {
        heads(1).pattern: "(h d) n -> 1 h (d n)",
        heads(1, transposed=True).pattern: "n (h d) -> 1 h (d n)",
        "g (h d) n -> (g h) d n": "g (h d) n -> 1 (g h) (d n)",
        "n g (h d) -> (g h) d n": "n g (h d) -> 1 (g h) (d n)",
    }
    if isinstance(view.pattern, str):
        return replace(view, pattern=merge.get(view.pattern, view.pattern))
    return replace(view, pattern=tuple(merge.get(part, part) for part in view.pattern))


def _axes(ndim: int) -> list[str]:
    if ndim < 3:
        return ["m", "n"][2 - ndim :]
    return ["o", "i", *(f"k{i}" for i in range(ndim - 2))]


def _joined(axes: Sequence[str]) -> str:
    """One axis of the stack that holds these: ``1``, a name, or several in parentheses."""
    return f"({' '.join(axes)})" if len(axes) > 1 else "".join(axes) or "1"


def _view(axes: Sequence[str], row: str, column: Sequence[str]) -> View:
    return View(f"{' '.join(axes)} -> 1 {row} {_joined(column)}".strip())


# ---- what views are called ---------------------------------------------------------------------------------

KINDS: dict[object, str] = {
    MATRIX.pattern: "matrix",
    TRANSPOSED.pattern: "transposed matrix",
    STACK.pattern: "stack",
    heads(2).pattern: "heads",
    heads(2, transposed=True).pattern: "transposed heads",
    per_expert(heads(2)).pattern: "stack of heads",
    head_columns(2).pattern: "head columns",
    blocks(2, 2).pattern: "blocks",
    GATES: "gates",
    **dict.fromkeys(
        (EXPERT_GATES, TRANSPOSED_GATES, ALTERNATING_GATES, TRANSPOSED_ALTERNATING_GATES), "stack of gates"
    ),
    fused(2, 2, 2, "by head").pattern: "interleaved",
    fused(2, 2, 2, "by head", transposed=True).pattern: "transposed interleaved",
    "(e m) n -> e m n": "rows of experts",
}


def label(view: View | None) -> str:
    """The kind of a view and its numbers, such as ``heads (h=4)``; the pattern of one that has no name."""
    if view is None:
        return "adamw"
    parts = "" if view.parts == 1 else f"{view.parts} parts"
    kind = parts or KINDS.get(view.pattern, "")
    if " k0" in view.pattern and not parts:
        kind = f"conv{str(view.pattern).count(' k') // 2}d"
    notes = [f"{axis}={size}" for axis, size in view.sizes if (axis, size) != ("g", 1)]
    notes += ["+".join(map(str, view.split)) + ", repeated" * view.repeated] if view.split else []
    return kind + (f" ({', '.join(notes)})" if notes else "") if kind else str(view)
