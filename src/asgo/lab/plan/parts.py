"""What an optimizer keeps for each matrix of a model, read from its state on the meta device."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from asgo.distributed.summing import sent
from asgo.optimizer.param_groups import names_of, with_views
from asgo.optimizer.step import StructuredOptimizer
from asgo.state_keys import part_key
from asgo.structures import OneSided, Packed, Structure
from asgo.views import View


@dataclass(frozen=True)
class Part:
    """One stack of matrices of a parameter, or with `view` None a parameter on AdamW.

    Args:
        name: of the parameter.
        shape: of the parameter.
        view: how it is read.
        structure: how its statistic is kept; None without a view.
        index: its number among the parts of a split.
        stack: ``(b, m, n)``.
        tp_dim: the axis that tensor parallel cuts; None: every rank has all of it.
        sizes: bytes of each tensor of its state, by key.
        counter: bytes of what every rank has for the parameter: its count of steps.
    """

    name: str
    shape: tuple[int, ...]
    view: View | None
    structure: Structure | None
    index: int
    stack: tuple[int, int, int]
    tp_dim: int | None
    sizes: Mapping[str, int]
    counter: int

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.stack)

    @property
    def root_keys(self) -> tuple[str, ...]:
        """Keys of the state that are computed from the statistic."""
        return () if self.structure is None else tuple(self.structure.derived)

    @property
    def sharded_keys(self) -> tuple[str, ...]:
        """Keys that are cut as the matrices are where statistics are summed."""
        return () if self.structure is None else tuple(self.structure.spread)

    @property
    def statistic_keys(self) -> tuple[str, ...]:
        """Keys of the statistic."""
        known = ("exp_avg", "exp_avg_sq", "failures", *self.root_keys, *self.sharded_keys)
        return tuple(key for key in self.sizes if key not in known)

    @property
    def sent_statistic(self) -> int:
        """Numbers that a shard sends of the statistic of one gradient."""
        b, m, n = self.stack
        return 0 if self.structure is None else b * sent(self.structure, m, n)[0]

    def lengths(self, interval: int) -> int:
        """Norms, beside two, that shards of a matrix tell each other: of rows under old roots, else of the update."""
        structure = self.structure.inner if isinstance(self.structure, Packed) else self.structure
        if isinstance(structure, OneSided) and interval > 1:
            return min(self.stack[1:]) if structure.side == "auto" else self.stack[1 if structure.side == "left" else 2]
        return 1 if self.sharded_keys else 0

    def bytes_of(self, keys: tuple[str, ...]) -> int:
        """Bytes of some tensors of its state."""
        return sum(self.sizes[key] for key in keys)


def read_parts(optimizer: StructuredOptimizer, tp_plan: Mapping[str, str]) -> list[Part]:
    """Every part of every parameter of an optimizer (on the meta device), in its order.

    Args:
        optimizer: any.
        tp_plan: how tensor parallel cuts modules, as transformers tells.
    """
    found: list[Part] = []
    names = names_of(optimizer)
    for group in optimizer.param_groups:
        structure = optimizer.structure(group)
        for param, view in with_views(group):
            found += _parts_of(names[param], param, view, structure, optimizer.state[param], tp_plan)
    return found


def _parts_of(
    name: str,
    param: nn.Parameter,
    view: View | None,
    structure: Structure | None,
    state: Mapping[str, Tensor],
    tp_plan: Mapping[str, str],
) -> list[Part]:
    shape, tp_dim = tuple(param.shape), tensor_parallel_dim(name, param, tp_plan)
    if view is None or structure is None:
        sizes = {key: tensor.nbytes for key, tensor in state.items() if key.startswith("exp_avg")}
        counter = sum(tensor.nbytes for tensor in state.values()) - sum(sizes.values())
        return [Part(name, shape, None, None, 0, (1, 1, param.numel()), tp_dim, sizes, counter)]
    found = []
    for index, stack in enumerate(view.shapes(param.shape)):
        momentum = state[part_key("exp_avg", index)]
        keys = ("exp_avg", *structure.init(momentum), "failures")
        sizes = {key: state[part_key(key, index)].nbytes for key in keys}
        counter = state["step"].nbytes if index == 0 else 0
        found.append(Part(name, shape, view, structure, index, stack, tp_dim, sizes, counter))
    return found


def tensor_parallel_dim(name: str, param: Tensor, plan: Mapping[str, str]) -> int | None:
    """The axis along which a plan of transformers cuts a parameter; None: none.

    Args:
        name: of the parameter.
        param: the parameter.
        plan: ``{"layers.*.mlp.up_proj": "colwise", ...}``.
    """
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
    kind = plan.get(pattern) or plan.get(pattern.rpartition(".")[0]) or ""
    if kind == "embedding_rowwise" or ("colwise" in kind and param.ndim == 1):
        return 0
    if "colwise" in kind:
        return param.ndim - 2
    return param.ndim - 1 if "rowwise" in kind and param.ndim > 1 else None
