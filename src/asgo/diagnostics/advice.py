"""Advice from gradients: which view, side, interval and statistic each parameter deserves, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from asgo.diagnostics.evidence import LAGS, SIDES, STATISTICS, Choice, Collector, Evidence, Side
from asgo.diagnostics.losses import gradients
from asgo.diagnostics.reports import text_table
from asgo.optimizer.param_groups import with_views
from asgo.views import View
from asgo.views.routing import Rule, route

SLACK = 0.05
"""What differs by less than this share counts as equal."""
KEPT = 0.9
"""The least cosine of the directions by the oldest root and by a fresh one."""
NOISY = 0.1
"""A gradient with a larger share of noise is averaged before it is remembered. Low, as the other statistic trained
worse on a language model whose batches were half noise (benchmarks/defaults)."""
COLUMNS = ("name", "view", "side", "interval", "statistic")
EVIDENCE = (
    "bound whole auto/left/right",
    "bound heads auto/left/right",
    "kept at 2/5/10",
    "noise share",
    "stable rank",
    "curvature left/right",
)


@dataclass(frozen=True)
class Line:
    """The advice for one parameter."""

    name: str  # of the parameter
    word: str  # ``whole``, or ``heads`` for one matrix per head; the defaults of `asgo.route` where `note` is set
    views: Mapping[str, View]  # what the words mean for this parameter
    side: Side  # which side to precondition; ``auto`` is the shorter one
    interval: int  # steps between refreshes of the root
    statistic: str  # ``momentum`` or ``gradient``
    evidence: Evidence  # what was measured
    curvature: Mapping[str, float]  # ``left`` and ``right``, as they were given
    note: str = ""  # why it could not be measured; there is no rule for it then

    @property
    def view(self) -> View:
        """Through which it should be read."""
        return self.views[self.word]

    def rule(self) -> Rule:
        """The line as a rule; options that are ASGO's defaults are left out."""
        options: dict[str, Any] = {} if self.side == "auto" else {"side": self.side}
        options |= {"precondition_frequency": self.interval} if self.interval > 1 else {}
        if self.statistic == "gradient":
            options |= {"statistic": "gradient", "betas": STATISTICS["gradient"]}
        return Rule(escape(self.name), self.view, options)


@dataclass(frozen=True)
class Advice:
    """A line for every parameter that has a matrix; ``str(advice)`` is a table with the evidence beside each line."""

    lines: tuple[Line, ...]

    @property
    def rules(self) -> list[Rule]:
        """The advice as rules: ``ASGO(asgo.route(model, advice.rules))``."""
        return [line.rule() for line in self.lines if not line.note]

    @property
    def against(self) -> list[Rule]:
        """The opposite, to test the advice by: the view and side of the worst bound whose roots cost no more than the
        default's."""
        return [_worst(line).rule() for line in self.lines if line.evidence.bound]

    def __str__(self) -> str:
        return text_table([[*COLUMNS, *EVIDENCE], *(_cells(line) for line in self.lines)])


def advise(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    curvature: Mapping[str, Mapping[str, float]] | None = None,
) -> Advice:
    """Advice for `ASGO` from the gradients of some batches at the weights that the model has now.

    For every matrix that `asgo.route` finds:

    - **view and side**: the cheapest roots among those whose bound is within 5 % of the least. The bound is the factor
      ``tr (sum_t G_t G_t^T)^(1/2)`` of ASGO's regret (``G_t^T G_t`` on the right; summed over heads where each head is
      a matrix). The other factor, ``D_op``, needs the solution and is taken to be the same. Of equally cheap ones the
      default is kept. Where `curvature` favours the other side by more than 5 %, the default side is kept too.
    - **interval**: the longest of 1, 2, 5 and 10 steps at which even the oldest root gives directions of a cosine of
      0.9 or more with a fresh one's, in steps of ASGO that do not move the weights. 10 takes 11 batches.
    - **statistic**: "momentum" where more than a tenth of a batch's gradient is noise, as the statistic of the gradient
      would follow its noise too; else "gradient" with the paper's betas (0.9, 0.8).

    Gradients at the initial weights differ from later ones: train a little first. Nothing is changed: parameters,
    gradients, buffers, training flags and torch's random numbers are left as they were, also after an error.

    "ASGO: Adaptive Structured Gradient Optimization", An, Liu, Pan, Ren, Ma, Goldfarb and Zhang 2025.

    Args:
        model: any module with matrices; not one wrapped for data parallel training.
        batches: two or more equal ones, each what `loss` takes, of the size that one step will have; 20 or more let
            the momentum settle.
        loss: ``(model, batch)`` to the mean loss, a tensor of one number.
        curvature: by name of a parameter, ``left`` and ``right``: how much of its Hessian block lies in the algebra of
            each side, as ``python -m experiments.hessian`` writes it. The larger is favoured. Names may be missing.

    Returns:
        The advice. A parameter without a gradient, or with one that is not finite, has a line that says so and no rule.

    Raises:
        TypeError: a model that is no module, a loss that is not a function or gives no tensor.
        ValueError: fewer than two batches, a loss that is not one finite number or depends on no parameter, a model
            without matrices, curvature of unknown parameters or that is not a number.

    Example:
        >>> advice = asgo.advise(model, batches, lambda model, batch: model(**batch).loss)   # doctest: +SKIP
        >>> optimizer = ASGO(route(model, advice.rules))   # doctest: +SKIP
    """
    views, params = _candidates(model)
    _check_curvature(curvature or {}, views)
    if not callable(loss):
        raise TypeError(f"advise: loss must be a function (model, batch) -> tensor; got {type(loss).__name__}.")
    batches = batches if isinstance(batches, Sequence) else list(batches)
    if len(batches) < 2:
        raise ValueError(f"advise: two batches or more are needed to tell noise from signal; got {len(batches)}.")
    collectors = {name: Collector(views[name], len(batches)) for name in views}
    notes: dict[str, str] = {}
    with _untouched(model), torch.enable_grad():
        for number, batch in enumerate(batches, 1):
            found = _gradients(loss(model, batch), list(params.values()), number)
            for name, gradient in zip(params, found, strict=True):
                note = notes.get(name) or _note(gradient, number)
                if note:
                    notes[name] = note
                elif gradient is not None:
                    collectors[name].add(gradient)
    curvature = curvature or {}
    lines = [_line(name, views[name], collectors[name], curvature.get(name, {}), notes.get(name, "")) for name in views]
    return Advice(tuple(lines))


def _candidates(model: nn.Module) -> tuple[dict[str, dict[str, View]], dict[str, Tensor]]:
    """The views of every parameter that has a matrix, by word, and the parameters."""
    views: dict[str, dict[str, View]] = {}
    params: dict[str, Tensor] = {}
    for word, per_head in (("whole", False), ("heads", True)):
        for group in route(model, per_head=per_head):
            for (name, param), view in with_views(group):
                if view is not None and param.numel() and view not in views.get(name, {}).values():
                    views.setdefault(name, {})[word] = view
                    params[name] = param
    if not views:
        raise ValueError(
            f"advise: {type(model).__name__} has no matrices, all of its parameters go to AdamW: there is nothing to "
            "advise. Give the parameters that should be read as matrices a view, see asgo.Rule."
        )
    return views, params


def _gradients(loss: Any, params: Sequence[Tensor], number: int) -> list[Tensor | None]:
    caller = f"advise, batch {number}"
    if isinstance(loss, Tensor) and loss.numel() == 1 and not math.isfinite(float(loss.detach())):
        raise ValueError(
            f"{caller}: the loss is {float(loss.detach())}. Leave the batch out, or look for what is wrong with it."
        )
    return gradients(caller, loss, params)


def _note(gradient: Tensor | None, number: int) -> str:
    if gradient is None:
        return "no gradient"
    if gradient.layout != torch.strided:
        return "sparse gradient"
    return "" if bool(gradient.isfinite().all()) else f"gradient of batch {number} not finite"


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, gradients, buffers, training flags and random numbers are as before afterwards."""
    params = list(model.parameters())
    kept = [param.grad for param in params]
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({param.device.index for param in params if param.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            for param in params:
                param.grad = None
            yield
    finally:
        for param, gradient in zip(params, kept, strict=True):
            param.grad = gradient
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


# ---- the decisions -------------------------------------------------------------------------------------------------


def _line(
    name: str, views: Mapping[str, View], collector: Collector, curvature: Mapping[str, float], note: str
) -> Line:
    line = Line(name, "whole", views, "auto", 1, "momentum", Evidence(), curvature, note)
    if note:
        return line
    evidence = collector.evidence()
    word, side = _choose(evidence, curvature)
    statistic = "gradient" if evidence.noise_share is not None and evidence.noise_share <= NOISY else "momentum"
    good = [interval for interval in LAGS if evidence.kept.get((statistic, interval), 0.0) >= KEPT]
    # the longest of the run that starts at 1: a longer interval that is good by luck does not count
    interval = max([1, *(i for i in good if all(j in good for j in LAGS if j < i))])
    return replace(line, word=word, side=side, interval=interval, statistic=statistic, evidence=evidence)


def _choose(evidence: Evidence, curvature: Mapping[str, float]) -> Choice:
    """The cheapest view and side of a bound within `SLACK` of the least."""
    near = [choice for choice, bound in evidence.bound.items() if bound <= 1 + SLACK]
    if not near:
        return "whole", "auto"
    cheapest = min(evidence.cost[choice] for choice in near)
    # "auto" stands before the side that it is, and "whole" before "heads": of equals, the default
    best = min((c for c in near if evidence.cost[c] == cheapest), key=lambda c: (c[1] != "auto", evidence.bound[c]))
    favoured = _favoured(curvature)
    return (best[0], "auto") if best[1] != "auto" and favoured not in ("", best[1]) else best


def _worst(line: Line) -> Line:
    bound, cost = line.evidence.bound, line.evidence.cost
    most = cost.get(("whole", "auto"), max(cost.values()))
    word, side = max((choice for choice in bound if cost[choice] <= most), key=lambda choice: bound[choice])
    return replace(line, word=word, side=side, interval=1, statistic="momentum")


def _favoured(curvature: Mapping[str, float]) -> str:
    """The side whose algebra holds more of the curvature, if the difference is more than `SLACK`."""
    if not curvature:
        return ""
    left, right = curvature["left"], curvature["right"]
    if max(left, right) <= (1 + SLACK) * min(left, right):
        return ""
    return "left" if left > right else "right"


def _check_curvature(curvature: Mapping[str, Mapping[str, float]], views: Mapping[str, Any]) -> None:
    for name, sides in curvature.items():
        if name not in views:
            known = ", ".join(map(repr, list(views)[:3]))
            raise ValueError(f"advise: curvature names {name!r}, which is no matrix of the model; it has {known}, ...")
        for side in ("left", "right"):
            value = sides.get(side) if isinstance(sides, Mapping) else None
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(
                    f"advise: curvature of {name!r} needs numbers >= 0 as 'left' and 'right'; got {sides!r}."
                )


def _cells(line: Line) -> list[str]:
    head = [line.name, line.word, line.side, str(line.interval), line.statistic]
    if line.note:
        return [*head, f"not measurable: {line.note}", *[""] * (len(EVIDENCE) - 1)]
    evidence = line.evidence
    bounds = [_shown(*(evidence.bound.get((word, side)) for side in SIDES)) for word in ("whole", "heads")]
    kept = _shown(*(evidence.kept.get((line.statistic, interval)) for interval in LAGS))
    numbers = [_shown(evidence.noise_share), _shown(evidence.stable_rank)]
    return [*head, *bounds, kept, *numbers, _shown(*(line.curvature.get(side) for side in SIDES[1:]))]


def _shown(*values: float | None) -> str:
    return "-" if all(v is None for v in values) else "/".join("-" if v is None else f"{v:.2f}" for v in values)
