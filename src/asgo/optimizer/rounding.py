"""How an update in float32 is written into parameters of fewer bits.

A bfloat16 number has 8 significant bits: a change of less than 1/512 of it is lost when the sum is rounded to nearest.
All three modes compute ``decay * target + update`` in the precision of the update and round it once:

- ``"nearest"``: to the nearest number. No memory; small changes are lost.
- ``"stochastic"``: up or down, at random, with the probability that keeps the mean. No memory; changes are kept on
  average, with noise of up to one spacing per step.
- ``"compensated"``: to the nearest number, and what that loses is kept in 16 bits, as 1/65536 of the spacing of the
  target. Target and residual together hold the 24 bits of a float32 number, in the bytes of one.

Targets of 32 and 64 bits are updated in place, whatever the mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Rounding: TypeAlias = Literal["nearest", "stochastic", "compensated"]

BITS = {torch.bfloat16: 8, torch.float16: 11}
"""Significant bits of the types that are narrower than their state, the leading one included."""

SMALLEST = {torch.bfloat16: 2.0**-100, torch.float16: 2.0**-14}
"""Below these magnitudes the spacing is taken as constant: float16 has it so; bfloat16 would leave float32's range."""

SCALE = 65536.0
"""Steps of a residual in one spacing of its target."""


def init_residual(param: Tensor) -> Tensor:
    """The residual of a parameter that equals its float32 value: int16 zeros; empty where nothing is lost."""
    shape = param.shape if param.dtype in BITS else (0,)
    return torch.zeros(shape, dtype=torch.int16, device=param.device)


def add_rounded_(
    targets: Sequence[Tensor],
    decay: float | Tensor,
    updates: Sequence[Tensor],
    mode: Rounding = "nearest",
    residuals: Sequence[Tensor] | None = None,
    seeds: Sequence[int | Tensor] | None = None,
) -> None:
    """``target <- round(decay * target + update)`` in place, rounded once. It never waits for a device.

    Args:
        targets: plain tensors, of any strides: parameters, shards or parts of them.
        decay: a number, or a scalar tensor on their device.
        updates: of the targets' shapes, in float32 or float64.
        mode: how to round.
        residuals: for ``"compensated"``, one per target, as from `init_residual`; updated in place.
        seeds: for ``"stochastic"``, one per target, as from `seed_of`.

    Raises:
        ValueError: a mode without what it needs.
    """
    _check(mode, residuals, seeds)
    wide = widened(targets, updates, residuals if mode == "compensated" else None)
    torch._foreach_mul_(wide, decay)
    torch._foreach_add_(wide, list(updates))
    write_rounded_(targets, wide, mode, residuals, seeds)


def widened(targets: Sequence[Tensor], like: Sequence[Tensor], residuals: Sequence[Tensor] | None) -> list[Tensor]:
    """The targets in the types of `like`, with what their residuals keep: copies, or themselves where nothing is lost.

    Together with `write_rounded_` this is for updates that are no sum, such as a fused kernel's.
    """
    wide = [
        target.to(torch.promote_types(target.dtype, other.dtype)) for target, other in zip(targets, like, strict=True)
    ]
    if residuals is None:
        return wide
    kept = zip(targets, wide, residuals, strict=True)
    return [value + lost * _unit(target) if target.dtype in BITS else value for target, value, lost in kept]


def write_rounded_(
    targets: Sequence[Tensor],
    values: Sequence[Tensor],
    mode: Rounding = "nearest",
    residuals: Sequence[Tensor] | None = None,
    seeds: Sequence[int | Tensor] | None = None,
) -> None:
    """Write values into the targets, each rounded once; the arguments are the same as of `add_rounded_`."""
    _check(mode, residuals, seeds)
    narrow = [i for i, (target, value) in enumerate(zip(targets, values, strict=True)) if target is not value]
    rounded = [values[i] for i in narrow]
    if mode == "stochastic" and seeds is not None:
        rounded = [_random(values[i], targets[i].dtype, seeds[i]) for i in narrow]
    if narrow:
        torch._foreach_copy_([targets[i] for i in narrow], rounded)
    if mode == "compensated" and residuals is not None:
        for i in narrow:
            if targets[i].dtype in BITS:
                residuals[i].copy_(_lost(values[i], targets[i]))


def seed_of(step: int | Tensor, index: int) -> int | Tensor:
    """The seed of one target at one step: a function of its arguments alone, so a resumed run draws the same numbers.

    Ranks that hold the same entries draw the same as long as they give a target the same index, e.g. its parameter's
    place among all. A `step` that is a tensor stays on its device.
    """
    return (step.long() if isinstance(step, Tensor) else int(step)) * 0x9E3779B1 + index


def uniform(like: Tensor, seed: int | Tensor) -> Tensor:
    """Numbers in ``[0, 1)``, multiples of 2^-24, each a hash of the seed and of its place in row-major order.

    The same on every device and for every memory format, and there is no generator whose state must be saved.
    """
    place = torch.arange(like.numel(), device=like.device).view(like.shape)
    return (_hash(_hash(place) + seed) >> 8).to(torch.float32) * 2.0**-24


def _hash(x: Tensor) -> Tensor:
    """32 bits of each int64, from two rounds of shift and product (both factors fit, so nothing overflows)."""
    x = x & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _random(value: Tensor, dtype: torch.dtype, seed: int | Tensor) -> Tensor:
    """One of the two neighbours of each value among the numbers of `dtype`, in the type of `value`."""
    if dtype not in BITS:
        return value
    unit = _spacing(value, dtype)
    below = torch.floor(value / unit)
    above = uniform(value, seed) < value / unit - below
    return torch.where(value.isfinite(), (below + above) * unit, value)


def _spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    power = (value.float().view(torch.int32) & 0x7F800000).view(torch.float32)  # the power of two not above |value|
    return power.clamp_min(SMALLEST[dtype]) * 2.0 ** (1 - BITS[dtype])


def _unit(target: Tensor) -> Tensor:
    """What one step of a residual is worth."""
    return _spacing(target, target.dtype) / SCALE


def _check(mode: str, residuals: object, seeds: object) -> None:
    needed = {"nearest": True, "stochastic": seeds is not None, "compensated": residuals is not None}
    if mode not in needed:
        raise ValueError(f"rounding must be one of {', '.join(map(repr, needed))}; got {mode!r}.")
    if not needed[mode]:
        what, how = ("seeds", "seed_of") if mode == "stochastic" else ("residuals", "init_residual")
        raise ValueError(
            f"rounding {mode!r} needs {what}, one for each target: make them by asgo.optimizer.rounding.{how}."
        )


def _lost(value: Tensor, rounded: Tensor) -> Tensor:
    """What rounding took from a value, in steps of a residual; 0 where it is not finite."""
    steps = (value - rounded) / _unit(rounded)
    return steps.nan_to_num(0.0, 0.0, 0.0).round().clamp(-32768, 32767).to(torch.int16)
