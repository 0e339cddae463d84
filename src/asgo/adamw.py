"""AdamW for parameters without a view: vectors, embeddings, output heads.

The arithmetic is `torch.optim.AdamW`'s own ("Decoupled Weight Decay Regularization", Loshchilov and Hutter
2019), called through its functional form, so the two agree step for step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from asgo._types import State

DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
"""What a group without a view uses unless it says otherwise: the released ASGO's settings for Adam."""


def init(like: Tensor, dtype: torch.dtype) -> State:
    """Zero first and second moments in the precision of the state."""
    return {
        "exp_avg": torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format),
    }


def adamw(params: Sequence[Tensor], states: Sequence[State], group: dict[str, Any]) -> None:
    """One step of AdamW on parameters that have gradients, in place.

    Parameters of lower precision than their state are updated in the state's precision and rounded once.
    """
    if not params:
        return
    low = [param.dtype != state["exp_avg"].dtype for param, state in zip(params, states, strict=True)]
    pairs = list(zip(params, states, low, strict=True))
    work = [param.to(state["exp_avg"].dtype) if cast else param for param, state, cast in pairs]
    grads = [param.grad.to(state["exp_avg"].dtype) for param, state in zip(params, states, strict=True)]  # pyright: ignore[reportOptionalMemberAccess]
    torch_adamw(
        work,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for (param, _, cast), updated in zip(pairs, work, strict=True):
        if cast:
            param.copy_(updated)
