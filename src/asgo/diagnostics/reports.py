"""What an optimizer does with every parameter, as rows and as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from asgo._types import State
from asgo.diagnostics.step_memory import step_bytes
from asgo.linalg.inverse_root import products
from asgo.optimizer.group_checks import fits_within
from asgo.optimizer.param_groups import names_of, views_of
from asgo.optimizer.step import StructuredOptimizer
from asgo.presets.asgo import ASGO
from asgo.state_keys import base_key, is_own
from asgo.structures import Packed, Structure
from asgo.views import default_view


@dataclass(frozen=True)
class Row:
    """One parameter of a `Report`."""

    name: str
    """its name, or its place where it has none"""
    shape: tuple[int, ...]
    """of the parameter"""
    view: str
    """the pattern through which it is read, or ``-``"""
    matrices: str
    """``b x m x n`` of its stacks"""
    structure: str
    """what is remembered: the structure and the size of its statistic, or ``AdamW``"""
    state_bytes: int
    """of all its state tensors"""
    root_flops: float
    """operations of one refresh of its roots"""


@dataclass(frozen=True)
class Report:
    """The rows of all parameters; ``str(report)`` is a table with totals, and a line about the memory of a step."""

    rows: tuple[Row, ...]
    step_bytes: int | None = None
    """the most that a step takes above parameters, gradients and state, see `step_memory.step_bytes`"""

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def root_flops(self) -> float:
        """Operations of refreshing every root once."""
        return sum(row.root_flops for row in self.rows)

    def __str__(self) -> str:
        titles = [field.name.replace("_", " ") for field in fields(Row)]
        total = ("total", "", "", "", "", self.state_bytes, self.root_flops)
        table = text_table([titles, *(_cells(astuple(row)) for row in self.rows), _cells(total)])
        if self.step_bytes is None:
            return table
        return f"{table}\na step takes up to {self.step_bytes / 1e6:.2g} MB above parameters, gradients and state"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them titles, in columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def report(optimizer: StructuredOptimizer) -> Report:
    """Name, shape, view, structure, state bytes and cost of the roots of every parameter.

    Bytes are counted from the tensors that the optimizer holds. The cost of a root is its number of ``k^3``
    products (`asgo.linalg.inverse_root.products`) times ``2 k^3`` operations, for each matrix of the stack; a model
    on the meta device is counted as one on the CPU. What a step allocates is found by a step of a copy without data.

    >>> print(report(ASGO(route(model))))   # doctest: +SKIP
    """
    optimizer.state_dict()  # takes up parameters that were put into the groups meanwhile
    rows, names = [], names_of(optimizer)
    for group in optimizer.param_groups:
        for param, view in zip(group["params"], views_of(group), strict=True):
            name = names[param]
            state = {key: kept for key, kept in optimizer.state[param].items() if is_own(key)}
            size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
            if view is None:
                kind = "AdamW, above max_size" if _is_above(optimizer.largest_side(group), param) else "AdamW"
                rows.append(Row(name, tuple(param.shape), "-", "-", kind, size, 0.0))
                continue
            shapes = view.shapes(param.shape)
            structure = optimizer.structure(group)
            cubes = sum(b * structure.root_flops(m, n) for b, m, n in shapes)
            flops = 2 * _products(group, param) * cubes
            matrices = " + ".join("x".join(map(str, shape)) for shape in shapes)
            kept = _remembered(structure, state)
            rows.append(Row(name, tuple(param.shape), str(view), matrices, kept, size, flops))
    return Report(tuple(rows), step_bytes(optimizer))


def state_bytes(
    groups: Sequence[Mapping[str, Any]], optimizer: Callable[[list[dict[str, Any]]], Optimizer] = ASGO
) -> int:
    """The bytes of the state that an optimizer will keep for these groups, before it is built.

    Exactly what `report` measures afterwards; nothing is allocated, so models on the meta device can be asked about.

    Args:
        groups: as for the optimizer, e.g. from `asgo.route`.
        optimizer: makes the optimizer from groups: a preset, or ``lambda groups: Shampoo(groups, lr=1e-3)``.

    Raises:
        ValueError, TypeError: as the optimizer's constructor does.

    >>> state_bytes(route(model))   # doctest: +SKIP
    """
    shapes = [{**group, "params": [_without_data(member) for member in group["params"]]} for group in groups]
    held = [tensor for state in optimizer(shapes).state.values() for tensor in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _products(group: Mapping[str, Any], param: Tensor) -> float:
    """Products of ``k^3`` multiplications of one root; for "square_root" they are part of its structure's cost."""
    if group["root"] == "square_root":
        return 1.0
    return products(group["root"], group["eps"], "cpu" if param.is_meta else param.device)


def _is_above(limit: int | None, param: Tensor) -> bool:
    view = default_view(param.ndim)
    return limit is not None and view is not None and not fits_within(view, param.shape, limit)


def _without_data(member: Any) -> Any:
    if isinstance(member, tuple):
        return member[0], _without_data(member[1])
    return torch.nn.Parameter(torch.empty_like(member, device="meta"), requires_grad=member.requires_grad)


def _remembered(structure: Structure, state: State) -> str:
    statistic = next(iter(structure.init(torch.empty(1, 1, 1))))
    sizes = [_size(tensor) for key, tensor in state.items() if base_key(key) == statistic]
    names = [type(structure.inner).__name__, "packed"] if isinstance(structure, Packed) else [type(structure).__name__]
    return " ".join([*names, *sizes])


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _cells(values: tuple[object, ...]) -> list[str]:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    return [cell(value) for value in values]
