"""Projections of query, key, value and output whose heads are axes of the parameter: ``(in, heads, head size)``."""

from __future__ import annotations

import re
from math import prod

from asgo.views.layouts import FUSED
from asgo.views.patterns import STACK
from asgo.views.projections import Reading
from asgo.views.sizes import HEAD_DIM, HEADS, KEY_HEADS, Place
from asgo.views.view import View

_ROLE = re.compile(
    r"(?:w|to|attn|proj)?_?(q|k|v|o|query|key|value|out|output)(?:_?(?:w|proj|kernel|weight))?", re.IGNORECASE
)


def with_head_axes(place: Place, shape: tuple[int, ...]) -> Reading | None:
    """The reading of a parameter with an axis of heads, or an axis of query, key and value; None if it has neither.

    Known are ``(in, heads, d)`` (XLNet, Funnel), and by the parameter's name ``(heads, in, d)`` (TransformerLens),
    ``(heads, d, in)``, and each of them with an axis of three for query, key and value. The numbers of heads and rows
    must agree with the module or its config.
    """
    if place.slot in FUSED and len(shape) in (3, 4):
        return _of_three(place, shape)
    if len(shape) != 3 or shape[0] == 1 or not place.heads:
        return None
    found = _ROLE.fullmatch(place.slot)
    role = found[1].lower()[:1] if found else ""
    axes = _order(place, shape, role)
    if not axes:
        return None
    if role == "o":
        view = View(f"{axes.replace('n', 'm')} -> 1 m (h d)")
        return Reading(view, view, f"output, axes {axes.replace('n', 'out')}")
    view = View(f"{axes} -> 1 (h d) n")
    by_head = View(f"{axes} -> h d n") if role in ("q", "k") else view
    return Reading(view, by_head, f"input, heads and head size as axes {axes}")


def _order(place: Place, shape: tuple[int, ...], role: str = "") -> str:
    """Which axes are heads ``h``, rows of a head ``d`` and features ``n``; empty if no order fits."""
    d, heads = place.number(*HEAD_DIM), {place.number(*HEADS)}
    if role in ("k", "v"):
        heads |= {place.number(*KEY_HEADS)} - {0}
    if shape[1] in heads and shape[2] == (d or shape[0] / place.heads):
        return "n h d"
    if not (role and d and shape[0] in heads):
        return ""
    return "h n d" if shape[2] == d else "h d n" if shape[1] == d else ""


def _of_three(place: Place, shape: tuple[int, ...]) -> Reading | None:
    """Query, key and value along an axis of their own: the first, or the second after the input."""
    how = f"{place.slot}: query, key and value along an axis"
    if len(shape) == 3 and shape[0] == 3 and prod(shape[1:]) > 0:
        d = place.head_dim or (shape[1] // place.heads if place.heads else 0)
        by_head = STACK if not d or shape[1] % d else _cut("r (h d) n", "r m n -> r m n", 0, d)
        return Reading(STACK, by_head, how)
    if len(shape) == 4 and 3 in shape[:2] and place.heads:
        at = shape.index(3)
        axes = _order(place, (*shape[:at], *shape[at + 1 :]), "q").split()
        if axes:
            source = " ".join([*axes[:at], "r", *axes[at:]])
            return Reading(View(f"{source} -> r (h d) n"), _cut(source, f"{source} -> r (h d) n", at), how)
    return None


def _cut(source: str, whole: str, dim: int, d: int = 0) -> View:
    """Queries and keys by head, values whole."""
    by_head = f"{source} -> (r h) d n"
    return View((by_head, by_head, whole), {"d": d} if d else (), (1, 1, 1), dim)
