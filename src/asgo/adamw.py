"""AdamW for parameters without a view: vectors, embeddings, output heads.

The arithmetic is `torch.optim.AdamW`'s own ("Decoupled Weight Decay Regularization", Loshchilov and Hutter
2019), called through its functional form with the fused kernel, so the two agree step for step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

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

    Parameters of lower precision than their state are updated in the state's precision and rounded once. Where a
    gradient is not finite, all of the call on that device rest, and the failure is counted for its parameter;
    the device is not waited for.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, State]]] = {}
    for param, state in zip(params, states, strict=True):
        kinds.setdefault((param.device, state["exp_avg"].dtype), []).append((param, state))
    for (device, dtype), members in kinds.items():
        _alike([param for param, _ in members], [state for _, state in members], group, device, dtype)


def _alike(
    params: list[Tensor], states: list[State], group: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> None:
    """The step for parameters of one device whose state has one precision."""
    work = [param.to(dtype) for param in params]  # itself where it has that dtype
    grads = [_in_order(param.grad, of) for param, of in zip(params, work, strict=True)]  # pyright: ignore[reportArgumentType]
    finite = torch.stack(torch._foreach_norm(grads)).isfinite()
    torch._foreach_add_([state["failures"] for state in states], list((~finite).long().unbind()))
    fused = device.type in (*_get_fused_kernels_supported_devices(), "meta")
    if not fused:
        grads = [torch.where(finite.all(), grad, 0) for grad in grads]
    torch_adamw(
        work,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=fused,
        found_inf=(~finite.all()).float() if fused else None,  # pyright: ignore[reportArgumentType]
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


def _in_order(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient in the precision and memory order of its parameter, which the fused kernel takes for granted."""
    if grad.stride() == like.stride():
        return grad.to(like.dtype)
    return torch.empty_like(like).copy_(grad)
