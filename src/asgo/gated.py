"""Fused gate and up projections of gated MLPs: two matrices in one weight, by its name and that of its neighbour."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from asgo.views import View

GATE_UP = "gate_up_proj"
"""What the fused projection is called: Phi-3, GLM, and the experts of Mixtral, OLMoE, Qwen-MoE, DeepSeek, Llama 4."""

INTERLEAVED = {"GptOssExperts"}
"""Classes in which gate and up alternate; in all others the gate is the first half."""

GATES = "(g m) n -> g m n"
EXPERT_GATES = "e (g m) n -> (e g) m n"
TRANSPOSED_GATES = "e m (g n) -> (e g) m n"
ALTERNATING_GATES = "e m (n g) -> (e g) m n"


def gated_view(mlp: nn.Module, shape: Sequence[int]) -> View | None:
    """Gate and up as a matrix each, of every expert if there are several; None if the shapes are not those of an MLP.

    The neighbour ``down_proj`` tells which axis holds both: it has their number of rows once.

    Args:
        mlp: the module that holds both projections, as layers or as parameters.
        shape: of the fused weight: ``(2 f, n)``, ``(e, 2 f, n)``, or stored as (in, out) ``(e, n, 2 f)``.
    """
    down = getattr(mlp, "down_proj", None)
    down = down.weight if isinstance(down, nn.Linear) else down
    if not isinstance(down, Tensor) or down.ndim != len(shape) or tuple(down.shape[:-2]) != tuple(shape[:-2]):
        return None
    rows, columns = shape[-2:]
    if (rows, columns) == (2 * down.shape[-1], down.shape[-2]):
        return View(GATES if len(shape) == 2 else EXPERT_GATES, {"g": 2})
    if len(shape) == 3 and (rows, columns) == (down.shape[-1], 2 * down.shape[-2]):
        alternate = bool(INTERLEAVED & {kind.__name__ for kind in type(mlp).__mro__})
        return View(ALTERNATING_GATES if alternate else TRANSPOSED_GATES, {"g": 2})
    return None
