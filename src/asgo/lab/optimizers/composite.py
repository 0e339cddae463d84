"""Several optimizers as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Composite(Optimizer):
    """Several optimizers, each with its own parameters, as one.

    Groups are shared with the parts, so schedulers and gradient scaling work on the whole.

    Args:
        optimizers: the parts; together they should have every parameter once.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([p for part in self.optimizers for g in part.param_groups for p in g["params"]], {})
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self.optimizers for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The parts' state by parameter."""
        return {param: state for part in self.optimizers for param, state in part.state.items()}

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Ignored: torch's constructor assigns an empty state, and the parts keep their own."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every part; `closure`, if any, is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.optimizers:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call every part's: the gradients that `Sliced` clears are not in its groups."""
        for part in self.optimizers:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The parts' state, in their order."""
        return {"optimizers": [part.state_dict() for part in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        for part, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            part.load_state_dict(state)
        self._share()
