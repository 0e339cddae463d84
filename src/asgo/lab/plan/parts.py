"""What an optimizer keeps and does for each matrix of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from asgo.buckets import part_key
from asgo.distributed.summing import most_shards, sent
from asgo.optimizer import StructuredOptimizer
from asgo.param_groups import names_of, with_views
from asgo.structures import Packed
from asgo.triangles import rectangle, size
from asgo.views import View


@dataclass(frozen=True)
class Part:
    """One stack of matrices of a parameter, or with `view` None a parameter of AdamW's.

    Args:
        name: of the parameter.
        shape: of the parameter.
        view: how it is read.
        part: its number among the parts of a split.
        stack: ``(b, m, n)``.
        k: size of its statistic.
        cost: multiplications of its roots, up to their number of products.
        work: multiplications of its statistic and application.
        packed: whether statistic and root are kept as triangles.
        tp_dim: the axis that tensor parallel cuts; None: every rank has all of it.
        momentum: bytes of the momentum; of both moments for AdamW.
        statistic: bytes of the statistic.
        root: bytes of the root.
        rest: bytes of all else that goes with the matrices.
        spread: bytes of that which are cut where the rows or columns of the matrices are, if statistics are summed.
        summed: for each axis of the parameter, into how many shards it may be cut so that statistics are summed.
        measured: numbers of the statistics of one gradient.
        counter: bytes of the parameter's count of steps, and for AdamW of failures, which every rank has.
    """

    name: str
    shape: tuple[int, ...]
    view: View | None
    part: int
    stack: tuple[int, int, int]
    k: int
    cost: float
    work: float
    packed: bool
    tp_dim: int | None
    momentum: int
    statistic: int
    root: int
    rest: int
    spread: int
    summed: tuple[int, ...]
    measured: int
    counter: int

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.stack)

    @property
    def square(self) -> int:
        """Numbers of one root, and of one statistic."""
        return math.prod(rectangle(self.k)) if self.packed else self.k**2


def read(optimizer: StructuredOptimizer, tp_plan: Mapping[str, str]) -> list[Part]:
    """Every part of every parameter of an optimizer (on the meta device), in its order.

    Args:
        optimizer: any with structures that have a root.
        tp_plan: how tensor parallel cuts modules, as transformers tells.
    """
    found: list[Part] = []
    names = names_of(optimizer)
    for group in optimizer.param_groups:
        for param, view in with_views(group):
            name, state = names[param], optimizer.state[param]
            tp_dim = _tp_dim(name, param, tp_plan)
            if view is None:
                found.append(_plain(name, param, state, tp_dim))
                continue
            structure = optimizer.structure(group)
            summed = tuple(most_shards(view, param.shape, dim, structure) for dim in range(param.ndim))
            for part, stack in enumerate(view.shapes(param.shape)):
                own = {
                    key: state[part_key(key, part)]
                    for key in (*structure.init(state[part_key("exp_avg", part)]), "failures")
                }
                sizes = {key: _bytes(tensor) for key, tensor in own.items()}
                statistic, root = sizes.pop("gram"), sizes.pop("root")
                momentum = _bytes(state[part_key("exp_avg", part)])
                (b, m, n), packed = stack, isinstance(structure, Packed)
                k = size(own["root"]) if packed else own["root"].shape[-1]
                costs = b * structure.cost(m, n), b * structure.work(m, n), packed
                counter = _bytes(state["step"]) if part == 0 else 0
                where = (name, tuple(param.shape), view, part, stack, k)
                kept = momentum, statistic, root, sum(sizes.values()), sum(sizes[key] for key in structure.spread)
                measured = b * sent(structure, m, n)[0]
                found.append(Part(*where, *costs, tp_dim, *kept, summed, measured, counter))
    return found


def _plain(name: str, param: nn.Parameter, state: Mapping[str, Tensor], tp_dim: int | None) -> Part:
    moments = sum(_bytes(state[key]) for key in ("exp_avg", "exp_avg_sq"))
    counters = sum(map(_bytes, state.values())) - moments
    where = (name, tuple(param.shape), None, 0, (1, 1, param.numel()))
    return Part(*where, 0, 0.0, 0.0, False, tp_dim, moments, 0, 0, 0, 0, (), 0, counters)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tp_dim(name: str, param: Tensor, plan: Mapping[str, str]) -> int | None:
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
    kind = plan.get(pattern) or plan.get(pattern.rpartition(".")[0]) or ""
    if kind == "embedding_rowwise" or ("colwise" in kind and param.ndim == 1):
        return 0
    if "colwise" in kind:
        return param.ndim - 2
    return param.ndim - 1 if "rowwise" in kind and param.ndim > 1 else None
