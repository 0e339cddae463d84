"""Conditions on single matrices, without waiting for a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool


def known_all_true(mask: Bool[Tensor, "..."]) -> bool:
    """Whether a mask is known to hold everywhere.

    The mask is read on the CPU only: elsewhere, and while a graph is traced, reading would wait for the device, so the
    answer is False. False means that `torch.where` is needed, True that it can be left out.
    """
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())


def where(mask: Bool[Tensor, "..."], yes: Tensor, no: Tensor | float) -> Tensor:
    """``torch.where``, which costs nothing where the mask is known to hold: `yes` itself then."""
    return yes if known_all_true(mask) else torch.where(mask, yes, no)


def masked_lerp_(memory: Tensor, seen: Tensor, weight: float, active: Bool[Tensor, "b 1 1"]) -> None:
    """``memory <- (1 - weight) memory + weight seen`` in place, for the active matrices."""
    memory.lerp_(seen, weight if known_all_true(active) else weight * active.to(memory.dtype))
