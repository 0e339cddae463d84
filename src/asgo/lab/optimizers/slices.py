"""Optimizers of other libraries on the same matrices as ours: q, k and v apart, experts apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from asgo.views import View

Named: TypeAlias = list[tuple[str, nn.Parameter]]


class Sliced(Optimizer):
    """An optimizer of two-dimensional parameters, given every matrix of a view as a parameter of its own.

    The matrices share the memory of the parameter they are of; where a view has to copy, results are copied back.
    ``param_groups`` is the inner optimizer's list, so that schedulers work.

    Args:
        make: builds the optimizer from pairs of a name, ``PARAMETER#NUMBER``, and a matrix.
        named: pairs of a name and a parameter.
        views: how each is read.
    """

    def __init__(
        self, make: Callable[[Named], Optimizer], named: Sequence[tuple[str, Tensor]], views: Sequence[View]
    ) -> None:
        self.whole = [(param, view) for (_, param), view in zip(named, views, strict=True)]
        self.slices = [[nn.Parameter(x) for x in _matrices(view, p.detach())] for p, view in self.whole]
        pairs = zip(named, self.slices, strict=True)
        self.inner = make([(f"{name}#{i}", x) for (name, _), some in pairs for i, x in enumerate(some)])
        super().__init__([param for _, param in named], {})
        self.param_groups = self.inner.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner optimizer's."""
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Ignored: torch's constructor assigns an empty state, and the inner optimizer keeps its own."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the inner optimizer on the matrices of parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for (param, view), some in zip(self.whole, self.slices, strict=True):
            parts = _matrices(view, param.detach())
            grads = [None] * len(some) if param.grad is None else _matrices(view, param.grad)
            for x, part, grad in zip(some, parts, grads, strict=True):
                x.data, x.grad = part, None if grad is None else grad.contiguous()
        self.inner.step()
        for (param, view), some in zip(self.whole, self.slices, strict=True):
            if any(x.untyped_storage().data_ptr() != param.untyped_storage().data_ptr() for x in some):
                param.copy_(_restored(view, some, param.shape))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the parameters, not of the matrices."""
        for param, _ in self.whole:
            param.grad = None if set_to_none else param.grad

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups


def _matrices(view: View, x: Tensor) -> list[Tensor]:
    return [matrix for stack in view.matrices(x) for matrix in stack]


def _restored(view: View, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    left = iter(matrices)
    return view.restore([torch.stack([next(left) for _ in range(b)]) for b, _, _ in view.shapes(shape)], shape)
