"""SPAM: a wrapper that clips spikes of the gradient and resets the state from time to time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from asgo.distributed.collectives import all_reduce_and
from asgo.distributed.placement import find, gradient, local
from asgo.distributed.strategies import Placed
from asgo.optimizer.hyperparameters import Constraint, check, positive, whole
from asgo.optimizer.state import state_dtype
from asgo.optimizer.step import StepHook, StructuredOptimizer
from asgo.presets.info import OptimInfo

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DECAY = 0.999
"""Decay of the mean square that spikes are compared with, as of Adam's second moment."""
ARMED = 20
"""Steps after each reset before spikes are clipped, as released: the mean square must have seen some gradients."""
FAINT = 0.99
"""By how much of itself lr is reduced at the first step after a reset, as released."""


@dataclass
class SpikeClipping(StepHook):
    """The part of `SPAM` that runs in every step: reset, clip, and the lr of the step. See there for the arguments."""

    threshold: float
    interval: int
    warmup: int

    def before_update(self, optimizer: StructuredOptimizer, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Reset when it is time to, clip the gradients in place, and return the groups with the lr of this step."""
        t = steps_of(optimizer.param_groups) + 1
        since = t % self.interval
        if since == 0:
            self._reset(optimizer)
        params = [param for group in groups for param in group["params"] if param.grad is not None]
        for param, nonzero in zip(params, _nonzero_on_any_rank(params), strict=True):
            self._clip(param, _mean_square(optimizer, param), nonzero, since >= ARMED)
        for group in optimizer.param_groups:
            group["spam_step"] = t
        if t < self.interval or since >= self.warmup:
            return groups
        factor = 1 - FAINT * (1 + math.cos(math.pi * since / (self.warmup + 1))) / 2
        return [{**group, "lr": group["lr"] * factor} for group in groups]

    def on_group(self, optimizer: StructuredOptimizer, group: dict[str, Any]) -> None:
        """Start the count and the mean squares of a group."""
        group["spam_step"] = steps_of(optimizer.param_groups[:1])  # all have the same
        for param in group["params"]:
            find(param, None, "SPAM")  # all ranks create its process group now
            _mean_square(optimizer, param)

    def before_peak(self, groups: list[dict[str, Any]]) -> None:
        """Let the next step be the last one before a reset, when spikes are clipped."""
        for group in groups:
            group["spam_step"] = max(0, self.interval - 2)

    def _reset(self, optimizer: StructuredOptimizer) -> None:
        optimizer.reset()
        for group in optimizer.param_groups:
            for param in group["params"]:
                _mean_square(optimizer, param).zero_()

    def _clip(self, param: Tensor, v: Tensor, nonzero: Tensor, armed: bool) -> None:
        """Clip the spikes of a gradient; a zero gradient, and entries that are not finite, do not change v."""
        grad = gradient(param)
        seen = grad.to(v.dtype)
        finite = seen.isfinite()
        if armed:
            limit = (self.threshold * v).sqrt()
            seen = torch.where(finite, seen.clamp(-limit, limit), seen)
            grad.copy_(seen)
        weight = (finite & nonzero).to(v.dtype) * (1 - DECAY)
        v.lerp_(torch.where(finite, seen, 0).square(), weight)


def steps_of(groups: Sequence[dict[str, Any]]) -> int:
    """The number of steps taken, which the groups count."""
    return max((group.get("spam_step", 0) for group in groups), default=0)


def _nonzero_on_any_rank(params: list[Tensor]) -> Sequence[Tensor]:
    """Whether each gradient has a nonzero entry, on any rank."""
    if not params:
        return ()
    zero = torch.stack([~(gradient(param) != 0).any() for param in params])
    return (~all_reduce_and(zero, [find(param, None, "SPAM").ranks for param in params])).unbind()


def _mean_square(optimizer: Optimizer, param: Tensor) -> Tensor:
    """The mean square of a parameter's gradients, on the parameter's device; zero at first."""
    state, held, dtype = optimizer.state[param], local(param.detach()), state_dtype(param)
    known = state.get("spike_sq")
    if known is None or known.shape != held.shape:
        known = torch.zeros_like(held, dtype=dtype)
    state["spike_sq"] = known.to(param.device, dtype)
    return state["spike_sq"]


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

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "threshold": positive("5000"),
        "interval": whole("a whole number of steps"),
        "warmup": whole("a whole number of steps", low=0),
    }
    info: ClassVar[OptimInfo] = OptimInfo(
        paper="SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training (Huang, Zhu, Jin, Liu, Wang, Liu)",
        year=2025,
        memory="3 d",
        cost="8 d",
        lr=5.7e-3,
    )

    optimizer: StructuredOptimizer
    hook: SpikeClipping

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
        check("SPAM", own, self.constraints)
        self.__setstate__({"optimizer": optimizer, **own})
        for group in optimizer.param_groups:
            self.hook.on_group(optimizer, group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The groups of the wrapped optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The optimizer's own state, with ``spike_sq`` for every parameter."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The optimizer's own defaults."""
        return self.optimizer.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the optimizer; see `StructuredOptimizer.step`."""
        return self.optimizer.step(closure)

    def failures(self) -> dict[str, int]:
        """The counts of failures of the wrapped optimizer."""
        return self.optimizer.failures()

    def record_metrics(self, every: int = 1) -> None:
        """Let the optimizer record what its steps do, see `StructuredOptimizer.record_metrics`."""
        self.optimizer.record_metrics(every)

    def metrics(self) -> dict[str, dict[str, float]]:
        """What the last recorded step did, see `StructuredOptimizer.metrics`; gradients are clipped."""
        return self.optimizer.metrics()

    def distribute(
        self,
        process_group: ProcessGroup | None = None,
        shard_state: bool = False,
        strategy: type[Placed] | None = None,
    ) -> None:
        """Call `distribute` of the wrapped optimizer; every rank keeps the mean squares of all parameters."""
        self.optimizer.distribute(process_group, shard_state, strategy)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own, with ``spike_sq`` of every parameter and ``spam_step`` of every group."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of a wrapped optimizer.

        Raises:
            ValueError: state of another optimizer, model or view, or of one that is not wrapped.
        """
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, **asdict(self.hook)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = dict(state)
        self.hook = SpikeClipping(own.pop("threshold"), own.pop("interval"), own.pop("warmup"))
        super().__setstate__(own)
        self.optimizer.step_hooks = (self.hook,)
