"""Following the rows of every weight through a forward pass, and judging `asgo.route` by where they meet.

An index per row travels beside a layer's output through whatever only moves entries (views, splits, permutations,
elementwise functions). Where two parts of one weight meet in a product (query with key, attention with value, gate
with up), they are apart; a view is right if none of its matrices holds rows of two parts. Parts that are computed with
but never meet are shown as ``separate``: rotary halves of one query are such parts, too, and stay whole.
"""

from __future__ import annotations

import collections
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from asgo.views.routing import Decision, explain

MOVES = {
    *(
        "view",
        "reshape",
        "chunk",
        "split",
        "tensor_split",
        "transpose",
        "permute",
        "contiguous",
        "unsqueeze",
        "squeeze",
    ),
    *(
        "expand",
        "__getitem__",
        "flatten",
        "unflatten",
        "select",
        "narrow",
        "unbind",
        "clone",
        "movedim",
        "swapaxes",
        "mT",
    ),
    *(
        "repeat_interleave",
        "repeat",
        "view_as",
        "T",
        "t",
        "split_with_sizes",
        "to",
        "float",
        "type_as",
        "expand_as",
        "stack",
    ),
    *("swapdims", "type", "half", "bfloat16", "detach", "cat", "concat", "flip", "roll", "__get__"),
}
"""Functions that only move entries, or copy them."""

TURNS = {"t", "T", "mT", "transpose", "__get__"}
"""Functions that make ``x @ weight.T`` of a weight."""

MEETINGS = {"mul", "__mul__", "__rmul__", "matmul", "__matmul__", "bmm", "baddbmm", "einsum", "mul_"}
"""Products of two tensors: parts of one weight that meet here are apart."""


@dataclass
class Rows:
    """What was seen of the rows of one weight.

    Args:
        meetings: pairs of sets of rows that met in a product.
        separate: sets of rows that something was computed with.
    """

    meetings: set[tuple[frozenset[int], frozenset[int]]] = field(default_factory=set)
    separate: set[frozenset[int]] = field(default_factory=set)


class Tracer(TorchFunctionMode):
    """Follow the rows of linear layers while the mode is active.

    Args:
        names: names of the weights by identity.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._kept: list[Tensor] = []
        self.names, self.found = dict(names), collections.defaultdict[str, Rows](Rows)
        self._marks: dict[int, tuple[Tensor, str, Tensor]] = {}  # the tensor itself keeps its id from being used again

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and args and id(args[0]) in self.names and getattr(func, "__name__", "") in TURNS:
            self.names[id(out)], self._kept = self.names[id(args[0])], [*self._kept, out]
            return out
        given = [*_tensors(args), *_tensors(list((kwargs or {}).values()))]
        marked = [self._marks[id(x)] for x in given if id(x) in self._marks]
        name = getattr(func, "__name__", "")
        if (
            name in ("linear", "addmm", "conv1d", "conv2d", "matmul", "__matmul__")
            and (weight := self._weight(given)) is not None
        ):
            self._consume(marked, given)
            self._mark_output(out, *weight)
        elif marked:
            self._follow(name, func, args, kwargs or {}, out, marked, given)
        return out

    def _weight(self, given: Sequence[Tensor]) -> tuple[str, int, int] | None:
        """The weight of a layer, its number of output features, and the axis of its output that has them."""
        for x in given:
            if id(x) in self.names and x.ndim >= 2:
                if x.ndim > 2 and x.shape[1] == 1:
                    return None  # depthwise: what comes out are the channels that went in
                return self.names[id(x)], x.shape[0], -1 if x.ndim == 2 else 1
        return None

    def _mark_output(self, out: Tensor, name: str, rows: int, dim: int) -> None:
        if out.shape[dim] != rows:
            rows = out.shape[dim]  # stored as (in, out)
        shape = [1] * out.ndim
        shape[dim] = rows
        self._marks[id(out)] = (out, name, torch.arange(rows).reshape(shape).expand(out.shape))

    def _follow(self, name, func, args, kwargs, out, marked, given) -> None:  # noqa: ANN001
        outs = [x for x in _tensors([out]) if id(x) not in self._marks]
        weights = {weight for _, weight, _ in marked}
        if name in MOVES and len(weights) == 1:
            with torch._C.DisableTorchFunction():
                moved = self._move(func, args, kwargs)
            for x, rows in zip(outs, moved, strict=False):
                if x.shape == rows.shape:
                    self._marks[id(x)] = (x, *weights, rows)
            return
        if name in MEETINGS or "attention" in name:
            self._meet(marked)
        self._consume(marked, given)
        _, weight, rows = marked[0]
        is_product = name in MEETINGS and len([m for m in marked if m[1] == weight]) > 1
        for x in outs:
            if name == "conv1d" and x.shape[:-1] == rows.shape[:-1]:
                rows = rows[..., :1].expand(x.shape)
            if x.shape == rows.shape and len(weights) == 1 and not is_product and "attention" not in name:
                self._marks[id(x)] = (x, weight, rows)

    def _move(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The same function of the indices; -1 where the entries are of something else."""

        def index(x: Any) -> Any:
            if isinstance(x, Tensor):
                return (
                    self._marks[id(x)][2]
                    if id(x) in self._marks
                    else torch.full(x.shape, -1)
                    if x.is_floating_point()
                    else x
                )
            return type(x)(map(index, x)) if type(x) in (list, tuple) else x

        if getattr(func, "__name__", "") in ("to", "float", "type_as", "type", "half", "bfloat16", "detach"):
            return [index(args[0])]
        try:
            return _tensors([func(*index(tuple(args)), **{key: index(value) for key, value in kwargs.items()})])
        except (RuntimeError, TypeError):
            return []

    def _meet(self, marked: Sequence[tuple[Tensor, str, Tensor]]) -> None:
        for i, (_, weight, rows) in enumerate(marked):
            for _, other, others in marked[i + 1 :]:
                if weight == other:
                    a, b = _rows(rows), _rows(others)
                    if a and b and not a & b:
                        self.found[weight].meetings.add((a, b))

    def _consume(self, marked: Sequence[tuple[Tensor, str, Tensor]], given: Sequence[Tensor]) -> None:
        for _, weight, rows in marked:
            self.found[weight].separate.add(_rows(rows))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _rows(index: Tensor) -> frozenset[int]:
    return frozenset(index.unique().tolist()) - {-1}


def trace(model: nn.Module, run: Callable[[], object]) -> dict[str, Rows]:
    """What the rows of every weight are used for in a forward pass."""
    names = {id(param): name for name, param in model.named_parameters()}
    with torch.no_grad(), Tracer(names) as tracer:
        run()
    return dict(tracer.found)


@dataclass(frozen=True)
class Verdict:
    """One weight's view against what was seen.

    Args:
        name: of the parameter.
        parts: the numbers of rows of the parts that met.
        view: `asgo.route`'s.
        verdict: ``right``, ``whole`` (one matrix holds several parts, and all is one matrix), ``WRONG`` (cut, and a
            matrix still holds rows of two parts) or ``separate`` (parts are computed with apart
            but never meet in a product), ``whole`` or ``apart``.
        how: why `route` decided so.
    """

    name: str
    parts: tuple[int, ...]
    view: str
    verdict: str
    how: str


def judge(decision: Decision, rows: Rows) -> Verdict | None:
    """Whether a view keeps parts apart; None for weights in which there are no parts, or that have no view."""
    if decision.view is None or len(decision.shape) < 2:
        return None
    axis = max(
        range(2),
        key=lambda dim: (decision.shape[dim] == 1 + max(map(max, filter(None, rows.separate)), default=-1), -dim),
    )
    numbers = torch.arange(decision.shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(decision.shape))])
    matrices = [m for stack in decision.view.matrices(numbers.expand(decision.shape)) for m in stack]
    held = [_rows(matrix) for matrix in matrices]
    mixed = any(one & a and one & b for a, b in rows.meetings for one in held)
    pieces = sorted({a for pair in rows.meetings for a in pair}, key=min)
    how, view = decision.how, str(decision.view)
    sizes = tuple(len(piece) for piece in pieces)
    if mixed:
        return Verdict(decision.name, sizes, view, "WRONG" if len(matrices) > 1 else "whole", how)
    if rows.meetings:
        return Verdict(decision.name, sizes, view, "right", how)
    whole = frozenset().union(*rows.separate)
    apart = {a for a in rows.separate if a and a != whole}
    alone = sorted((a for a in apart if a and not any(a & b and not a >= b for b in apart)), key=min)
    if len(alone) < 2:
        return None
    mixed = any(sum(bool(one & a) for a in alone) > 1 for one in held)
    return Verdict(decision.name, tuple(map(len, alone)), view, "separate, whole" if mixed else "separate, apart", how)


class Table:
    """Rows of a record, printed as they come: one for each kind of weight, number of parts and verdict of a family."""

    def __init__(self) -> None:
        self.counts = collections.Counter[str]()
        self._shown: set[tuple[str, ...]] = set()
        print("| family | weight | parts | view | verdict | found by |\n|---|---|---|---|---|---|")

    def add(self, family: str, model: nn.Module, seen: Mapping[str, Rows]) -> None:
        """The verdicts on one model's weights."""
        for verdict in verdicts(model, seen):
            self.counts[verdict.verdict] += 1
            parts = "+".join(map(str, verdict.parts))
            row = (family, generic(verdict.name), parts, verdict.view, verdict.verdict, verdict.how)
            kind = (family, *row[1].split(".")[-2:], str(len(verdict.parts)), verdict.verdict)
            if kind not in self._shown:
                self._shown.add(kind)
                print("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |", flush=True)


def verdicts(model: nn.Module, seen: Mapping[str, Rows]) -> Iterator[Verdict]:
    """The verdict on every weight in which parts were seen."""
    for decision in explain(model):
        verdict = judge(decision, seen[decision.name]) if decision.name in seen else None
        if verdict is not None:
            yield verdict


def generic(name: str) -> str:
    """The name without numbers of layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split(".")[-4:])


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
