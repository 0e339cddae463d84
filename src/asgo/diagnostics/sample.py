"""What is known of one matrix at one step of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asgo._types import State
from asgo.diagnostics.noise import Moments
from asgo.diagnostics.spectra import effective_rank, nuclear_over_frobenius, singular_values, stable_rank
from asgo.diagnostics.statistic import conditioning
from asgo.state_keys import part_key
from asgo.structures import Structure
from asgo.views import View


@dataclass(frozen=True)
class Sample:
    """One matrix at one step. What could not be measured is None; `note` says why, where the gradient is the reason.

    The gradient is the one that the step used, after any clipping; signal and noise are of what backward gave.
    """

    step: int
    """steps done, this one included"""
    name: str
    """of the parameter"""
    part: int
    """of a view that splits the parameter, such as a fused projection"""
    index: int
    """in the stack, such as the head"""
    rows: int
    """m"""
    columns: int
    """n"""
    gradient_norm: float | None = None
    """Frobenius norm"""
    stable_rank: float | None = None
    """``||G||_F^2 / ||G||_2^2``"""
    effective_rank: float | None = None
    """``exp(entropy(s / sum s))``"""
    nuclear_over_frobenius: float | None = None
    """``||G||_* / ||G||_F``"""
    signal: float | None = None
    """``||E G||_F^2``, without bias, see `Moments`"""
    noise: float | None = None
    """``E ||G - E G||_F^2``, without bias"""
    noise_share: float | None = None
    """noise over the sum of both, which is ``||G||_F^2``"""
    condition: float | None = None
    """of the damped statistic that the root is of"""
    residual: float | None = None
    """``||Z A Z^T - I||_F / sqrt(k)`` of the root Z in use"""
    update_rms: float | None = None
    """root mean square of the change of the weights, decay included"""
    weight_rms: float | None = None
    """root mean square of the weights before the step"""
    failed_share: float | None = None
    """share of all steps so far in which this matrix's gradient was not finite, or its root could not be computed"""
    note: str = ""
    """why something could not be measured"""
    singular_values: tuple[float, ...] = ()
    """of the gradient, descending"""


@dataclass(frozen=True)
class Observation:
    """A parameter after a step that was watched."""

    name: str  # of the parameter
    param: Tensor  # after the step, with its gradient
    before: Tensor  # its values before the step
    moments: Sequence[Moments]  # of its microbatches, one per part; empty where none were seen
    summed: bool  # whether the gradient is the sum of the microbatches', or their mean
    state: State  # the optimizer's
    view: View  # of the parameter
    group: Mapping[str, Any]  # of the optimizer
    structure: Structure  # of the group

    def samples(self, step: int) -> list[Sample]:
        """A sample of every matrix that has entries."""
        view, found = self.view, []
        gradients = None if self.param.grad is None else view.matrices(self.param.grad)
        stacks = zip(view.matrices(self.before), view.matrices(self.param.detach()), strict=True)
        for part, (old, new) in enumerate(stacks):
            if old.numel() == 0:
                continue
            columns, spectra = _of_gradient(None if gradients is None else gradients[part])
            columns |= self._of_noise(part) | self._of_state(part, step)
            columns |= {"update_rms": _rms(new.double() - old.double()), "weight_rms": _rms(old)}
            numbers = {key: column.tolist() for key, column in columns.items()}
            for i in range(len(old)):
                own = {key: _known(column[i]) for key, column in numbers.items()}
                note = _note(gradients is not None, own.get("gradient_norm"))
                values = () if note else tuple(spectra[i].tolist())
                found.append(Sample(step, self.name, part, i, *old.shape[1:], **own, note=note, singular_values=values))
        return found

    def _of_noise(self, part: int) -> dict[str, Tensor]:
        if not self.moments:
            return {}
        signal, noise = self.moments[part].split(self.summed)
        return {"signal": signal, "noise": noise, "noise_share": noise / (signal + noise)}

    def _of_state(self, part: int, step: int) -> dict[str, Tensor]:
        columns = {"failed_share": self.state[part_key("failures", part)].double() / step}
        found = conditioning(self.structure, self.group, self.state, part)
        return columns if found is None else columns | dict(zip(("condition", "residual"), found, strict=True))


def _of_gradient(gradient: Tensor | None) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
    """The columns about the gradient, ``(b,)`` each, and its spectra."""
    if gradient is None:
        return {}, ()
    values = singular_values(gradient)
    columns = {
        "gradient_norm": torch.linalg.vector_norm(gradient.double(), dim=(1, 2)),
        "stable_rank": stable_rank(values),
        "effective_rank": effective_rank(values),
        "nuclear_over_frobenius": nuclear_over_frobenius(values),
    }
    return columns, list(values)


def _rms(stack: Tensor) -> Tensor:
    return stack.double().square().mean((1, 2)).sqrt()


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _note(has_gradient: bool, norm: float | None) -> str:
    if not has_gradient:
        return "no gradient"
    if norm is None:
        return "gradient not finite"
    return "" if norm else "gradient is zero"
