"""Gradients of a loss, with an error that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(caller: str, loss: Any, params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of every parameter; None where the loss does not depend on it. ``.grad`` is not touched.

    Raises:
        TypeError: a loss that is not a tensor.
        ValueError: a loss that is not one number, or that depends on no parameter.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{caller}: the loss must be a tensor of one number; got {type(loss).__name__}. Do not call item()."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"{caller}: the loss must be one number; got a tensor {tuple(loss.shape)}. Reduce it, e.g. by loss.mean()."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{caller}: the loss depends on no parameter that is trained. Compute it by the model, without "
            f"torch.no_grad."
        )
    return list(torch.autograd.grad(loss.sum(), params, allow_unused=True))
