"""SPAM: a wrapper that clips spikes of the gradient and starts the memory anew from time to time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from asgo.distributed.collectives import agree
from asgo.distributed.placement import find, gradient, local
from asgo.optimizer import hyperparameters
from asgo.optimizer.state import state_dtype
from asgo.optimizer.step import StructuredOptimizer

DECAY = 0.999
"""Of the mean square that tells a spike: Adam's second moment."""
ARMED = 20
"""Steps after each start before spikes are clipped, as released: the mean square must have seen something."""
FAINT = 0.99
"""The share of lr that is missing at the first step after a reset, as released."""


class SPAM(Optimizer):
    r"""Spike-aware: any optimizer of this library behind a clip of single entries, with momentum that is reset.

    At step t of the wrapper, with r steps since the last reset::

        if t is a multiple of interval:  the optimizer's state <- as before its first step;  v <- 0
        G_ij <- sign(G_ij) sqrt(threshold v_ij)  where G_ij^2 > threshold v_ij          if r >= 20
        v_ij <- 0.999 v_ij + 0.001 G_ij^2
        lr   <- lr (1 - 0.99 (1 + cos(pi r / (warmup + 1))) / 2)  for this step         if t >= interval and r < warmup
        one step of the optimizer

    "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", Huang, Zhu, Jin, Liu, Wang and Liu 2025
    (arXiv 2501.06842), which wraps Adam. Three departures, as ours must fit every structure: v is the wrapper's own (in
    Adam it is the second moment); the whole state is reset, with what corrects its bias; and decay is scaled with lr.

    The wrapper shares groups and state with the optimizer, so schedulers and checkpoints (by name too) work as with
    the optimizer alone. Gradients are clipped in place. Memory: one number per entry more. Cost: a few operations per
    entry.

    Args:
        optimizer: the optimizer to wrap; use the wrapper in its place from then on.
        threshold: an entry is a spike if its square is more than this many times its mean square; 5000 as in the paper.
        interval: steps between resets; the paper's 500.
        warmup: steps after a reset over which lr rises again as a cosine; the paper's 150. 0 for none.

    Raises:
        ValueError: an argument out of range, an optimizer that is wrapped already.
        TypeError: an optimizer of another library.
    """

    optimizer: StructuredOptimizer
    threshold: float
    interval: int
    warmup: int

    def __init__(
        self, optimizer: StructuredOptimizer, threshold: float = 5000.0, interval: int = 500, warmup: int = 150
    ) -> None:
        if not isinstance(optimizer, StructuredOptimizer):
            raise TypeError(
                f"SPAM wraps optimizers of this library, such as asgo.ASGO; got {type(optimizer).__name__}."
            )
        if any("spike_sq" in state for state in optimizer.state.values()):
            raise ValueError("SPAM: the optimizer is wrapped already; wrap it once.")
        own = {"threshold": threshold, "interval": interval, "warmup": warmup}
        hyperparameters.check("SPAM", own, hyperparameters.SPAM_CHECKS)
        self.__setstate__({"optimizer": optimizer, **own})
        self._start(optimizer.param_groups, 0)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The optimizer's own groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The optimizer's own state, with ``spike_sq`` for every parameter."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The optimizer's own defaults."""
        return self.optimizer.defaults

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the optimizer, with what stands above around it.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            TypeError: a sparse gradient; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hyperparameters.refuse_sparse(self.optimizer)
        t = self.param_groups[0].setdefault("spam_step", 0) + 1
        since = t % self.interval
        if since == 0:
            self._reset()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for param, moved in zip(params, self._moved(params), strict=True):
            self._clip(param, moved, since >= ARMED)
        self._step_scaled(self._share(since) if t >= self.interval else 1.0)
        for group in self.param_groups:
            group["spam_step"] = t
        return loss

    def _share(self, since: int) -> float:
        """The share of lr that a step takes, so many steps after a reset."""
        return 1.0 if since >= self.warmup else 1 - FAINT * (1 + math.cos(math.pi * since / (self.warmup + 1))) / 2

    def _step_scaled(self, share: float) -> None:
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, lr in zip(self.param_groups, rates, strict=True):
                group["lr"] = lr if share == 1 else lr * share
            self.optimizer.step()
        finally:
            for group, lr in zip(self.param_groups, rates, strict=True):
                group["lr"] = lr

    def _moved(self, params: list[Tensor]) -> Sequence[Tensor]:
        """Whether each gradient has an entry that is not zero, on any rank."""
        if not params:
            return ()
        zero = torch.stack([~(gradient(param) != 0).any() for param in params])
        return (~agree(zero, [find(param, None, "SPAM").ranks for param in params])).unbind()

    def _clip(self, param: Tensor, moved: Tensor, armed: bool) -> None:
        """Clip the spikes of a gradient; a gradient of zeros, and entries that are not finite, leave v as it is."""
        grad, dtype = gradient(param), state_dtype(param)
        v = self._mean_square(param)
        seen = grad.to(dtype)
        finite = seen.isfinite()
        if armed:
            limit = (self.threshold * v).sqrt()
            seen = torch.where(finite, seen.clamp(-limit, limit), seen)
            grad.copy_(seen)
        weight = (finite & moved).to(dtype) * (1 - DECAY)
        v.lerp_(torch.where(finite, seen, 0).square(), weight)

    def _mean_square(self, param: Tensor) -> Tensor:
        """The mean square of a parameter's gradients, where the parameter is; zero when it is first met."""
        state, held, dtype = self.state[param], local(param.detach()), state_dtype(param)
        known = state.get("spike_sq")
        if known is None or known.shape != held.shape:
            known = torch.zeros_like(held, dtype=dtype)
        state["spike_sq"] = known.to(param.device, dtype)
        return state["spike_sq"]

    def _reset(self) -> None:
        self.optimizer.reset()
        for group in self.param_groups:
            for param in group["params"]:
                self._mean_square(param).zero_()

    def _start(self, groups: list[dict[str, Any]], t: int) -> None:
        for group in groups:
            group["spam_step"] = t
            for param in group["params"]:
                find(param, None, "SPAM")  # all ranks meet its group now
                self._mean_square(param)

    # ---- the optimizer's own ----------------------------------------------------------------------------------

    def failures(self) -> dict[str, int]:
        """The optimizer's own counts."""
        return self.optimizer.failures()

    def record_metrics(self, on: bool = True) -> None:
        """Let the optimizer record what its steps do, see `StructuredOptimizer.record_metrics`."""
        self.optimizer.record_metrics(on)

    def metrics(self) -> dict[str, dict[str, float]]:
        """What the last recorded step did, see `StructuredOptimizer.metrics`; gradients are clipped."""
        return self.optimizer.metrics()

    def distribute(self, process_group: ProcessGroup | None = None, shard_state: bool = False) -> None:
        """Share the optimizer's work, as `StructuredOptimizer.distribute` does; the mean squares stay whole."""
        self.optimizer.distribute(process_group, shard_state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer."""
        known, t = len(self.param_groups), self.param_groups[0]["spam_step"]
        self.optimizer.add_param_group(param_group)
        self._start(self.param_groups[known:], t)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own, in which that of the wrapper stands: ``spike_sq``, and ``spam_step`` of every group."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of a wrapper gave.

        Raises:
            ValueError: state of another optimizer, model or view, or of one that is not wrapped.
        """
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "threshold", "interval", "warmup")
        return {name: getattr(self, name) for name in names}
