"""Conditions on single matrices, without waiting for a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool


def holds(mask: Bool[Tensor, "..."]) -> bool:
    """Whether a mask is known to hold everywhere.

    It is read on the CPU only: elsewhere, and while a graph is traced, that would wait for the device, and the
    answer is False. So a False calls for `torch.where`, a True spares it.
    """
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())


def choose(mask: Bool[Tensor, "..."], yes: Tensor, no: Tensor | float) -> Tensor:
    """``torch.where``, which costs nothing where the mask is known to hold: `yes` itself then."""
    return yes if holds(mask) else torch.where(mask, yes, no)


def blend(memory: Tensor, seen: Tensor, weight: float, moved: Bool[Tensor, "b 1 1"]) -> None:
    """``memory <- (1 - weight) memory + weight seen`` in place, for the matrices that moved."""
    memory.lerp_(seen, weight if holds(moved) else weight * moved.to(memory.dtype))
