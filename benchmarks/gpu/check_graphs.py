"""Whole steps that never wait for the device, and steps that are captured in a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from asgo import ASGO
from benchmarks.gpu.check_steps import GIVEN, Named, gradient, groups_of, parameters
from benchmarks.gpu.device import Mode
from benchmarks.gpu.forms import FORMS, LR, PRESETS, SQUARE_ROOT, Form, Groups, interval_of, unavailable
from benchmarks.gpu.matrices import CONDITION
from benchmarks.gpu.part import Part, check

STEPS, BETA2 = 3, 0.2
MODES: tuple[Mode, ...] = ("global", "relaxed")
"""How much else a process may do while a graph is captured. A script uses the first; the second tells, where the first
fails, whether it was for a call that capture forbids though it does no harm."""
GRAPHS: dict[str, dict[str, Any]] = {
    "": {"root": "minimax"},
    ", packed": {"root": "minimax", "packed_state": True},
    ", square root": {"root": "square_root", "betas": (0.95, BETA2)},
}
"""What the rows add to their names, and options."""


def run(part: Part) -> None:
    """Rows for steps that must not wait, then for graphs."""
    for form in FORMS:
        if unavailable(form, part.device) is None:
            part.attempt(f"waits: form {form.name}", partial(_form_waits, part, form))
    for preset in PRESETS:
        part.attempt(f"waits: {preset.name}", partial(_may_wait, part, preset.make))
    part.attempt("waits: bfloat16 parameters", partial(_must_not_wait, part, _minimax, torch.bfloat16))
    for name, options in GRAPHS.items():
        for mode in MODES:
            part.attempt(f"graph{name}, capture mode {mode}", partial(_graph, part, mode, options), fragile=True)


def _minimax(groups: Groups) -> Optimizer:
    return ASGO(groups, lr=LR, root="minimax")


def _form_waits(part: Part, form: Form) -> Mapping[str, Any]:
    def make(groups: Groups) -> Optimizer:
        return form.make(interval_of(form, groups))

    return _may_wait(part, make) if form.waits else _must_not_wait(part, make)


def _must_not_wait(
    part: Part, make: Callable[[Groups], Optimizer], dtype: torch.dtype = torch.float32
) -> Mapping[str, Any]:
    """Steps after the first, which sorts parameters into stacks; torch raises where one waits."""
    optimizer = make(groups_of(parameters(GIVEN, part.device.torch, dtype)))
    optimizer.step()
    with part.device.no_waits():
        for _ in range(STEPS):
            optimizer.step()
    return {"waits": False if part.device.is_cuda else None, "steps": STEPS}


def _may_wait(part: Part, make: Callable[[Groups], Optimizer]) -> Mapping[str, Any]:
    """The same for steps of which nothing is promised: whether they wait is a result, not a failure."""
    try:
        return _must_not_wait(part, make)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return {"waits": True, "why": str(error).splitlines()[0]}


def _graph(part: Part, mode: Mode, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Steps by replays of one graph, with new gradients and a new lr for each, against eager steps.

    Both run the same kernels, so that nothing but the order of sums in products can differ. That is rounding, which the
    condition of the statistics multiplies, once for each step. The square-root form computes in half precision: the
    two updates differ by twice the error of one, `SQUARE_ROOT`, times the condition of S; S keeps b2 of that for the
    next step, so that the sum over steps is ``1 / (1 - b2)`` times as much, relative to the way that a parameter went.
    """
    device, warm = part.device, 2
    sets: dict[str, Named] = {name: parameters(GIVEN, device.torch, torch.float32) for name in ("eager", "graph")}
    rates = {name: torch.tensor(0.05, device=device.torch) for name in sets}
    steps = {
        name: ASGO(groups_of(named), lr=rates[name], capturable=True, **options).step for name, named in sets.items()
    }
    start = [param.detach().clone() for _, param in sets["eager"]]
    for _ in range(warm):
        steps["eager"]()
    replay = device.capture(steps["graph"], warm, mode)
    for number in range(STEPS):
        for name, act in (("eager", steps["eager"]), ("graph", replay)):
            _new_gradients(sets[name], number)
            rates[name].fill_(0.05 / (number + 1))
            act()
    device.synchronize()
    differences = {}
    for (each, eager), (_, replayed), old in zip(sets["eager"], sets["graph"], start, strict=True):
        differences[each.name] = _relative(replayed.detach(), eager.detach())
        bound = (warm + STEPS) * CONDITION * max(each.shape) * 42 * torch.finfo(torch.float32).eps
        if options["root"] == "square_root" and each.view is not None:
            way = float((eager.detach() - old).norm() / eager.detach().norm())
            bound += 2 * SQUARE_ROOT["bf16"] * CONDITION**0.5 / (1 - BETA2) * way
        check(differences[each.name], bound, f"the difference of {each.name!r}")
    return {"differences": differences, "steps": STEPS, "mode": mode, "equal bits": not any(differences.values())}


def _new_gradients(named: Named, number: int) -> None:
    for i, (each, param) in enumerate(named):
        if param.grad is not None:
            param.grad.copy_(gradient(each, 1000 * (number + 1) + i).to(param.device, param.dtype))


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
