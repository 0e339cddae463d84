"""AdamW for parameters without a view: vectors, embeddings, output heads.

The arithmetic is `torch.optim.AdamW`'s own ("Decoupled Weight Decay Regularization", Loshchilov and Hutter
2019), called through its functional form with the fused kernel, so the two agree step for step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from asgo._types import State
from asgo.linalg.masked import known_all_true
from asgo.optimizer.rounding import seed_of, widened, write_rounded_

DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
"""What a group without a view uses unless it says otherwise: the released ASGO's settings for Adam."""


def init(like: Tensor, dtype: torch.dtype) -> State:
    """Zero first and second moments in the precision of the state."""
    return {
        "exp_avg": torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format),
        "failures": torch.zeros((), dtype=torch.int64, device=like.device),
    }


@dataclass(frozen=True)
class Written:
    """The parameters of one device: updated in the precision of their state, then rounded once when written back."""

    params: list[Tensor]
    states: list[State]
    places: list[int]
    group: Mapping[str, Any]

    @property
    def _residuals(self) -> list[Tensor] | None:
        kept = self.group["rounding"] == "compensated" and all("residual" in state for state in self.states)
        return [state["residual"] for state in self.states] if kept else None

    def widened(self) -> list[Tensor]:
        """The parameters in the precision of their state, with what rounding lost; themselves where they have it.

        Parameters with gaps in memory are copied: the fused kernel assumes dense memory.
        """
        wide = widened(self.params, [state["exp_avg"] for state in self.states], self._residuals)
        return [value if _is_dense(value) else torch.empty_like(value).copy_(value) for value in wide]

    def write(self, values: list[Tensor]) -> None:
        """Write their new values, rounded as the group asks."""
        residuals, seeds = self._residuals, None
        if self.group["rounding"] == "stochastic":
            seeds = [seed_of(state["step"], place) for state, place in zip(self.states, self.places, strict=True)]
        mode = self.group["rounding"] if residuals or seeds else "nearest"
        write_rounded_(self.params, values, mode, residuals, seeds)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    group: dict[str, Any],
    places: Sequence[int] = (),
    all_agree: Callable[[Tensor, Sequence[int]], Tensor] = lambda flags, of: flags,
) -> None:
    """One step of AdamW on parameters that have gradients, in place.

    Parameters of lower precision than their state are updated in the state's precision and rounded once. A parameter
    whose gradient is not finite, and its state, do not change, and the failure is counted. Never waits for a device.

    Args:
        params: what this rank holds of them.
        grads: likewise.
        states: their states.
        group: with the hyperparameters.
        places: a number for each that it has on all ranks and no other has, for random numbers.
        all_agree: given one flag for each of some parameters and their places, which of them hold on every rank that
            has entries of the parameter.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, param in enumerate(params):
        kinds.setdefault((param.device, param.dtype), []).append(i)
    for some in kinds.values():
        numbers = [places[i] if places else i for i in some]
        written = Written([params[i] for i in some], [states[i] for i in some], numbers, group)
        work = written.widened()
        alike = [_in_order(grads[i], of) for i, of in zip(some, work, strict=True)]
        finite = all_agree(torch.stack(torch._foreach_norm(alike)).isfinite(), some)
        _update_finite(work, alike, [states[i] for i in some], finite, group)
        written.write(work)


def _update_finite(
    params: list[Tensor], grads: list[Tensor], states: list[State], finite: Tensor, group: dict[str, Any]
) -> None:
    """Update the parameters whose gradients are finite, and count the others.

    The fused kernel can skip a whole call, not single parameters: where flags cannot be read without waiting for
    the device, each parameter gets its own call.
    """
    torch._foreach_add_([state["failures"] for state in states], list((~finite).long().unbind()))
    if known_all_true(finite):
        _update(params, grads, states, group, None)
    elif finite.device.type == "cpu" and not torch.compiler.is_compiling():
        kept = [i for i, fine in enumerate(finite.tolist()) if fine]
        _update([params[i] for i in kept], [grads[i] for i in kept], [states[i] for i in kept], group, None)
    else:
        for param, grad, state, skip in zip(params, grads, states, (~finite).float().unbind(), strict=True):
            _update([param], [grad], [state], group, skip)


def _update(
    params: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], skip: Tensor | None
) -> None:
    """The step for parameters of one device in the precision of their state; none where `skip` is 1."""
    if not params:
        return
    fused = params[0].device.type in (*_get_fused_kernels_supported_devices(), "meta")
    before = None if fused or skip is None else [x.clone() for x in _touched(params, states)]
    torch_adamw(
        params,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=fused,
        found_inf=skip if fused else None,  # pyright: ignore[reportArgumentType]
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for now, then in zip(_touched(params, states), before, strict=True) if before else ():
        now.copy_(torch.where(skip > 0, then, now))  # pyright: ignore[reportOptionalOperand]


def _touched(params: list[Tensor], states: list[State]) -> list[Tensor]:
    """The tensors that a step changes: parameters, moments and counts of steps."""
    return [*params, *(state[key] for state in states for key in ("exp_avg", "exp_avg_sq", "step"))]


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _in_order(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient in the precision and memory order of its parameter, which the fused kernel takes for granted."""
    if grad.stride() == like.stride():
        return grad.to(like.dtype)
    return torch.empty_like(like).copy_(grad)
