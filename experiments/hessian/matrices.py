"""The matrices of a model: what each is for, where its entries are, and to which head they belong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from asgo.views.defaults import view_of as default_view
from asgo.views.layouts import FUSED
from asgo.views.model_scan import Site, find_sites
from asgo.views.projections import QUERY_KEY

Role = Literal["query", "key", "value", "output", "fused", "other"]

VALUES = ("v_proj", "value", "v_lin", "v", "linear_v", "to_v", "Wv", "value_proj", "v_proj_weight")
"""Names of the value's projection beside those of `asgo.views.layouts.QUERY_KEY`."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of a model.

    Args:
        name: the parameter's name, with the number of the matrix if it holds several.
        label: a short name.
        parameter: the parameter's name.
        places: where each entry of the matrix is in the flattened parameter, shape (m, n).
        role: what it is for.
        heads: how many heads its rows (of an output projection: its columns) are divided into; 1: none known.
    """

    name: str
    label: str
    parameter: str
    places: Tensor
    role: Role
    heads: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        m, n = self.places.shape
        return m, n

    @property
    def kind(self) -> str:
        """The label without the layer."""
        return self.label.lstrip("0123456789 ") or self.label

    @property
    def groups(self) -> Tensor | None:
        """The head of every entry, ``(m, n)``; None if heads are not known."""
        m, n = self.shape
        if self.heads == 1:
            return None
        if self.role == "output":
            return (torch.arange(n) // (n // self.heads))[None, :].expand(m, n)
        return (torch.arange(m) // (m // self.heads))[:, None].expand(m, n)


def find_matrices(model: nn.Module) -> list[Matrix]:
    """The matrices that an optimizer of this library preconditions, in the model's order; an empty list if none.

    The parts of a fused query-key-value projection are matrices of their own.
    """
    found: list[Matrix] = []
    for site in find_sites(model):
        view = default_view(site)
        if view is None:
            continue
        numbers = torch.arange(site.param.numel()).reshape(site.param.shape)
        stacks = view.matrices(numbers)
        several = sum(len(stack) for stack in stacks) > 1
        for part, stack in enumerate(stacks):
            role, heads = _role(site, part, len(stacks))
            for index, places in enumerate(stack):
                tag = f"[{part if len(stacks) > 1 else index}]" if several else ""
                name = site.names[0] + tag
                fits = places.shape[1 if role == "output" else 0] % heads == 0
                matrix = Matrix(name, name, site.names[0], places.contiguous(), role, heads if fits else 1)
                found.append(replace(matrix, label=_label(matrix, site)))
    labels = Counter(matrix.label for matrix in found)
    return [matrix if labels[matrix.label] == 1 else replace(matrix, label=matrix.name) for matrix in found]


def layers(matrices: Sequence[Matrix]) -> list[str]:
    """The number of the layer that each matrix is in, empty where its name has none."""
    return [_layer(matrix.parameter) for matrix in matrices]


def _layer(name: str) -> str:
    number = re.search(r"\.(\d+)\.", name)
    return number[1] if number else ""


def _label(matrix: Matrix, site: Site) -> str:
    what = site.slot if matrix.role in ("other", "fused") else matrix.role
    return f"{_layer(matrix.parameter)} {what}".strip()


def _role(site: Site, part: int, parts: int) -> tuple[Role, int]:
    """What a part of a parameter is for, and in how many heads."""
    attention, slot = site.parent, site.slot
    if attention is None:
        return "other", 1
    children = dict(attention.named_children())
    fused = next((name for name in FUSED if name in children), None)
    pair = next((pair for pair in QUERY_KEY if all(name in children for name in pair)), None)
    if fused is None and pair is None:
        return "other", 1
    if slot == fused:
        roles: tuple[Role, ...] = ("query", "key", "value")
        return (roles[part], _heads(site, min(part, 1))) if parts == 3 else ("fused", 1)
    query = _sibling(site, fused or (pair or ("",))[0])
    if pair is not None and fused is None and slot in (*pair, *VALUES):
        if slot == pair[0]:
            return "query", _heads(site, 0)
        return ("key" if slot == pair[1] else "value"), _heads(_sibling(site, pair[1]), 0)
    return "output", _heads(query, 0)


def _sibling(site: Site, slot: str) -> Site:
    """The weight of another child of the same module."""
    module = getattr(site.parent, slot)
    above = ((site.parent, slot), *site.ancestors[1:])
    return replace(site, param=module.weight, module=module, slot=slot, leaf="weight", ancestors=above)


def _heads(site: Site, part: int) -> int:
    """How many heads the view by head reads from a part of a query, key or fused projection."""
    view = default_view(site, per_head=True)
    shapes = [] if view is None else view.shapes(site.shape)
    return shapes[part][0] if len(shapes) > part else 1
