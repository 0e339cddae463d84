"""Gate and up in one weight, by the shape of what reads them: a neighbour with half as many inputs.

A gated MLP computes ``down(act(gate) * up)``, so that a layer of ``2 f`` rows has a neighbour of ``f`` columns and
none of ``2 f``. The first half is one matrix, the second the other; in some classes they alternate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from asgo.views.patterns import (
    ALTERNATING_GATES,
    EXPERT_GATES,
    GATES,
    TRANSPOSED_ALTERNATING_GATES,
    TRANSPOSED_GATES,
)
from asgo.views.sizes import linear
from asgo.views.view import View

GATE_UP = {
    *("gate_up_proj", "up_gate_proj", "w12", "w13", "Wi", "wi", "gate_up", "w1w3", "linear_fc1", "input_linear"),
    *("ff_proj", "up_gate", "linear_in"),
}
"""Exact names of fused gates: their neighbour may also have the shape of a layer beside them."""

INTERLEAVED = {"GptOssExperts", "GptOssGroupedExperts"}
"""Classes in which gate and up alternate: of transformers and of torchtitan."""


def gated(place: nn.Module, slot: str, shape: Sequence[int], above: nn.Module | None = None) -> View | None:
    """Gate and up as a matrix each, of every expert if there are several; None if the shapes do not fit an MLP.

    Args:
        place: the module that holds the layer or the parameter.
        slot: its name there.
        shape: of the weight: ``(2 f, n)``, ``(e, 2 f, n)``, or stored as (in, out) ``(e, n, 2 f)``.
        above: the module above, whose layers are looked at where `place` holds this one alone.
    """
    others = beside(place, slot) or (beside(above, "") if above is not None else [])
    shapes = [other for other in others if len(other) == len(shape)]
    named = slot in GATE_UP or _is_unit(place) or any(isinstance(child, nn.GLU) for child in place.children())
    alternate = bool(INTERLEAVED & {kind.__name__ for kind in type(place).__mro__})
    if _reads_half(shape, shapes, named):
        return View(GATES if len(shape) == 2 else ALTERNATING_GATES if alternate else EXPERT_GATES, {"g": 2})
    if len(shape) == 3 and _reads_half(_turned(shape), [_turned(other) for other in shapes], named):
        return View(TRANSPOSED_ALTERNATING_GATES if alternate else TRANSPOSED_GATES, {"g": 2})
    return None


def gated_convolution(place: nn.Module, layer: nn.Module) -> View | None:
    """Gate and up of a convolution over single positions before a gated linear unit and a depthwise one (Conformer)."""
    out, kernel = getattr(layer, "out_channels", 0), getattr(layer, "kernel_size", ())
    if out % 2 or set(kernel) != {1} or getattr(layer, "groups", 0) != 1:
        return None
    others = [child for child in place.children() if child is not layer and hasattr(child, "in_channels")]
    depthwise = any(other.in_channels == getattr(other, "groups", 0) == out // 2 for other in others)
    if not depthwise or any(other.in_channels == out for other in others):
        return None
    axes = " ".join(f"k{i}" for i in range(len(kernel)))
    return View(f"(g m) n {axes} -> g m (n {axes})", {"g": 2})


def _reads_half(shape: Sequence[int], others: Sequence[Sequence[int]], named: bool) -> bool:
    """Whether another weight has half of this one's rows as columns and gives what this one reads; none has them all.

    Without a known name the shape must be clear: a square neighbour could stand beside this layer, not behind it.
    """
    rows, columns = shape[-2:]
    if rows % 2 or not rows or any(other[-1] == rows for other in others if tuple(other) != tuple(shape)):
        return False
    behind = [other for other in others if other[-1] == rows // 2 and other[-2] == columns]
    return bool(behind) if named else len(behind) == 1 and columns != rows // 2


def _turned(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _is_unit(module: nn.Module) -> bool:
    """Whether a class is a gated linear unit by its name, such as ``GEGLU``."""
    return any(kind.__name__.lower().endswith("glu") for kind in type(module).__mro__)


def beside(module: nn.Module, slot: str) -> list[tuple[int, ...]]:
    """Shapes of the weights of the layers and parameters that a module holds beside `slot`."""
    return list(_weights(module, slot))


def _weights(module: nn.Module, slot: str) -> Iterator[tuple[int, ...]]:
    for name, param in module.named_parameters(recurse=False):
        if name != slot and param.ndim >= 2:
            yield tuple(param.shape)
    for name, wrapped in module.named_children():
        child = getattr(wrapped, "base_layer", wrapped)  # of an adapter
        layer = linear(child) if name != slot and len([*child.children()]) <= 1 else None
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor):
            yield tuple(weight.shape)
