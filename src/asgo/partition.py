"""Views that read a parameter of any number of axes, for optimizers that leave nothing to AdamW."""

from __future__ import annotations

from collections.abc import Sequence

from asgo.views import View, heads


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
    merge = {heads(1).pattern: "(h d) n -> 1 h (d n)", heads(1, True).pattern: "n (h d) -> 1 h (d n)"}
    if isinstance(view.pattern, str):
        return View(merge.get(view.pattern, view.pattern), view.sizes, view.split, view.split_dim)
    return View(tuple(merge.get(part, part) for part in view.pattern), view.sizes, view.split, view.split_dim)


def _axes(ndim: int) -> list[str]:
    if ndim < 3:
        return ["m", "n"][2 - ndim :]
    return ["o", "i", *(f"k{i}" for i in range(ndim - 2))]


def _joined(axes: Sequence[str]) -> str:
    """One axis of the stack that holds these: ``1``, a name, or several in parentheses."""
    return f"({' '.join(axes)})" if len(axes) > 1 else "".join(axes) or "1"


def _view(axes: Sequence[str], row: str, column: Sequence[str]) -> View:
    return View(f"{' '.join(axes)} -> 1 {row} {_joined(column)}".strip())
