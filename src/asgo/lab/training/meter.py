"""Time, tokens and losses of a run. Evaluation and saving do not count as training time."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OptimizerClock:
    """Seconds spent in the optimizer's step; on CUDA by events, which do not hold up the device.

    Args:
        device: where the optimizer works.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._start = 0.0

    def start(self) -> None:
        """The optimizer begins."""
        if self._cuda:
            self._mark()
        self._start = time.perf_counter()

    def stop(self) -> None:
        """The optimizer has been called."""
        if self._cuda:
            self._mark()
        else:
            self.seconds += time.perf_counter() - self._start

    def settle(self) -> None:
        """Read the events; the device must have been synchronized."""
        for first, second in zip(self._marks[::2], self._marks[1::2], strict=True):
            self.seconds += first.elapsed_time(second) / 1000
        self._marks.clear()

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)


class Meter:
    """What a run has measured so far; goes into every checkpoint, so that a resumed run continues it.

    Args:
        device: where the run computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock = OptimizerClock(device)
        self.seconds = 0.0
        self.tokens = 0
        self.val_losses: list[float] = []
        self._losses = torch.zeros((), device=device)
        self._count = 0
        self._logged = (0.0, 0)
        self._since = time.perf_counter()

    def start(self) -> None:
        """Training goes on: time counts."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Training rests: time no longer counts."""
        synchronize(self.device)
        self.seconds += time.perf_counter() - self._since
        self.clock.settle()

    def add(self, loss: Tensor, tokens: int) -> None:
        """Count one step with its mean loss; does not wait for the device."""
        self._losses += loss
        self._count += 1
        self.tokens += tokens

    def loss(self) -> float:
        """The mean loss of the steps since the last `lap`."""
        return float(self._losses) / max(1, self._count)

    def lap(self) -> float:
        """Tokens per second since the last lap; a new lap begins."""
        seconds, tokens = self._logged
        rate = (self.tokens - tokens) / max(self.seconds - seconds, 1e-9)
        self._logged = (self.seconds, self.tokens)
        self._losses.zero_()
        self._count = 0
        return rate

    def state_dict(self) -> dict[str, Any]:
        """Everything measured, as plain numbers."""
        return {
            "seconds": self.seconds,
            "optimizer_seconds": self.clock.seconds,
            "tokens": self.tokens,
            "val_losses": list(self.val_losses),
            "losses": float(self._losses),
            "count": self._count,
            "logged": list(self._logged),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.seconds, self.tokens = state["seconds"], state["tokens"]
        self.clock.seconds = state["optimizer_seconds"]
        self.val_losses = list(state["val_losses"])
        self._losses.fill_(state["losses"])
        self._count = state["count"]
        self._logged = (state["logged"][0], state["logged"][1])
