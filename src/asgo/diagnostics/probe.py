"""Looks at the matrices of a model while an optimizer trains it, now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from asgo.diagnostics.losses import gradients
from asgo.diagnostics.noise import Moments
from asgo.diagnostics.sample import Observation, Sample
from asgo.optimizer.param_groups import names_of, with_views
from asgo.optimizer.step import StructuredOptimizer
from asgo.views import View


class GradientProbe:
    """Samples every matrix that an optimizer preconditions, at step 1 and at every multiple of `every`.

    It hangs on the optimizer's own step, so a training loop stays as it is::

        probe = GradientProbe(optimizer, every=50)
        for inputs, targets in batches:
            loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(probe.samples[-1].stable_rank)

    Matrices are read through the optimizer's views, so heads, experts and parts of a fused projection are matrices of
    their own. Signal and noise need the gradients of several microbatches: where ``backward`` is called several times
    before a step, of losses that add up, hooks on the parameters see them; else give `split` the losses of parts of
    the batch. Nothing that trains is changed, and between samples nothing is done.

    A sample costs the eigenvalues of two matrices per matrix, in float64. `seconds` says how long all of them took.

    Args:
        optimizer: of this library; for `SPAM`, the optimizer inside.
        every: steps between samples; 50 keeps them below 5 % of the time of most trainings.
        done: steps that the optimizer has done already, in a run that goes on.

    Raises:
        TypeError: an optimizer of another library.
        ValueError: `every` or `done` out of range, or an optimizer without matrices.
    """

    def __init__(self, optimizer: StructuredOptimizer, every: int = 50, done: int = 0) -> None:
        _check(optimizer, every, done)
        self.optimizer, self.every, self.done = optimizer, every, done
        self.samples: list[Sample] = []
        self.seconds = 0.0
        self._watched: dict[Tensor, View] = {}
        self._moments: dict[Tensor, list[Moments]] = {}
        self._before: dict[Tensor, Tensor] = {}
        self._summed = True
        self._gradient_hooks: list[RemovableHandle] = []
        self._step_hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._arm()

    @property
    def due(self) -> bool:
        """Whether the coming step will be sampled."""
        return bool(self._step_hooks) and (self.done == 0 or (self.done + 1) % self.every == 0)

    def split(self, losses: Iterable[Tensor]) -> None:
        """Measure signal and noise of the coming step from the losses of equal parts of its batch.

        For steps that accumulate nothing; call it before ``backward``. It costs about one more forward and backward.
        Gradients and random numbers are left as they were; buffers change if the forward pass changes them. Make the
        losses lazily, one graph at a time:
        ``probe.split(loss(model(x), y) for x, y in zip(inputs.chunk(4), targets.chunk(4)))``. Before steps that are
        not `due`, nothing is computed.

        Raises:
            TypeError, ValueError: a loss that is not one number, or depends on no parameter.
        """
        if not self.due:
            return
        with self._timed():
            self._disarm()
            self._moments, self._summed = {}, False
            params = [param for param in self._watched if param.requires_grad]
            devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
            with torch.random.fork_rng(devices), torch.enable_grad():
                for loss in losses:
                    for param, gradient in zip(params, gradients("split", loss, params), strict=True):
                        if gradient is not None:
                            self._see(param, gradient)

    def close(self) -> None:
        """Let the optimizer go; `samples` stay."""
        self._disarm()
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks = []

    def __enter__(self) -> GradientProbe:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # ---- hooks -------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Watch the gradients of the coming step, if it is due."""
        self._moments, self._summed = {}, True
        if self.due:
            groups = self.optimizer.param_groups
            self._watched = {p: view for group in groups for p, view in with_views(group) if view is not None}
            for param in self._watched:
                if param.requires_grad:
                    self._gradient_hooks.append(param.register_hook(partial(self._accumulate, param)))

    def _disarm(self) -> None:
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks = []

    def _accumulate(self, param: Tensor, gradient: Tensor) -> None:
        with self._timed():
            if param.grad is None:  # the first microbatch of a step, also after a step that was given up
                self._moments.pop(param, None)
            self._see(param, gradient)

    def _see(self, param: Tensor, gradient: Tensor) -> None:
        stacks = self._watched[param].matrices(gradient.detach())
        for moments, stack in zip(self._moments.setdefault(param, [Moments() for _ in stacks]), stacks, strict=True):
            moments.add(stack)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.due:
            with self._timed():
                self._before = {param: param.detach().clone() for param in self._watched}

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        was_due = self.due
        self.done += 1
        if was_due:
            with self._timed():
                self._disarm()
                self._sample()
        self._arm()

    def _sample(self) -> None:
        names = names_of(self.optimizer)
        for group in self.optimizer.param_groups:
            structure = self.optimizer.structure(group)
            for param, view in with_views(group):
                if view is not None and param in self._before:
                    moments, state = self._moments.get(param, []), self.optimizer.state[param]
                    before = self._before.pop(param)
                    seen = Observation(
                        names[param], param, before, moments, self._summed, state, view, group, structure
                    )
                    self.samples += seen.samples(self.done)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        for device in {param.device for param in self._watched if param.device.type != "cpu"}:
            torch.accelerator.synchronize(device)  # what waits there already is not ours
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


def _check(optimizer: StructuredOptimizer, every: int, done: int) -> None:
    if not isinstance(optimizer, StructuredOptimizer):
        raise TypeError(
            f"GradientProbe reads optimizers of this library, such as asgo.ASGO; got {type(optimizer).__name__}. "
            "Of a SPAM, pass its attribute optimizer."
        )
    for name, value, least in (("every", every, 1), ("done", done, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"GradientProbe: {name} must be a whole number of steps >= {least}; got {value!r}.")
    if not any(any(group["views"]) for group in optimizer.param_groups):
        raise ValueError(
            f"GradientProbe: this {type(optimizer).__name__} has no matrices, all of its parameters go to AdamW. Give "
            "it groups with views, for example asgo.route(model)."
        )
