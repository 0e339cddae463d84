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
        "failures": torch.zeros((), dtype=torch.int64, device=like.device),
    }


def adamw(params: Sequence[Tensor], states: Sequence[State], group: dict[str, Any]) -> None:
    """One step of AdamW on parameters that have gradients, in place.

    Parameters of lower precision than their state are updated in the state's precision and rounded once. A
    gradient that is not finite counts as a failure and is taken as zero, without waiting for the device.
    """
    if not params:
        return
    dtypes = [state["exp_avg"].dtype for state in states]
    work = [param.to(dtype) for param, dtype in zip(params, dtypes, strict=True)]  # itself where it has that dtype
    grads = [param.grad.to(dtype) for param, dtype in zip(params, dtypes, strict=True)]  # pyright: ignore[reportOptionalMemberAccess]
    for i, (norm, state) in enumerate(zip(torch._foreach_norm(grads), states, strict=True)):
        state["failures"] += ~norm.isfinite()
        grads[i] = torch.where(norm.isfinite(), grads[i], 0)
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
    for param, updated in zip(params, work, strict=True):
        if updated is not param:
            param.copy_(updated)
