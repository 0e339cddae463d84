"""What every rank of a mesh holds, keeps and sends for an optimizer, before there is any: no process group, no memory.

Where parts are placed, who owns them, when a root is due, and what ranks keep and send is asked of the functions of
`asgo.distributed` and `asgo.optimizer` that the optimizer asks, with shapes alone. Counts are tensors with a number for
each rank, ``(replicate, fsdp, tp)``; those of traffic have two, bytes sent and bytes received.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from asgo.distributed.ownership import STRATEGIES, WorkItem, owners
from asgo.distributed.planned_part import Mesh, PlannedPart, on_shards
from asgo.optimizer.param_groups import names_of, with_views
from asgo.optimizer.refresh_schedule import balanced_phases
from asgo.optimizer.step import StructuredOptimizer
from asgo.state_keys import part_key
from asgo.structures import Structure

KEPT = ("params", "gradients", "momentum", "statistics", "roots", "adamw", "rest")
"""What `memory` tells apart."""


def read_parts(optimizer: StructuredOptimizer, tp_plan: Mapping[str, str]) -> list[PlannedPart]:
    """Every part of every parameter of an optimizer, by preference on the meta device, in its order."""
    found: list[PlannedPart] = []
    names = names_of(optimizer)
    for group in optimizer.param_groups:
        structure = optimizer.structure(group)
        for param, view in with_views(group):
            state, name = optimizer.state[param], names[param]
            moments = sum(tensor.nbytes for key, tensor in state.items() if key.startswith("exp_avg"))
            whole = PlannedPart(
                name=name,
                shape=tuple(param.shape),
                view=view,
                structure=None if view is None else structure,
                stack=(1, 1, param.numel()),
                state={"adamw": moments},
                counter=sum(tensor.nbytes for tensor in state.values()) - moments,
                tp_dim=tensor_parallel_dim(name, param, tp_plan),
            )
            if view is None:
                found.append(whole)
            for i, stack in enumerate(() if view is None else view.shapes(param.shape)):
                sizes, counter = _sizes(structure, state, i), state["step"].nbytes if i == 0 else 0
                found.append(replace(whole, index=i, stack=stack, state=sizes, counter=counter))
    return found


def _sizes(structure: Structure, state: Mapping[str, Tensor], index: int) -> dict[str, int]:
    momentum = state[part_key("exp_avg", index)]
    found = {"momentum": momentum.nbytes, "failures": state[part_key("failures", index)].nbytes}
    found |= {"statistics": 0, "roots": 0, "sharded": 0}
    for key in structure.init(momentum):
        kind = "roots" if key in structure.root_keys else "sharded" if key in structure.sharded_keys else "statistics"
        found[kind] += state[part_key(key, index)].nbytes
    return found


def tensor_parallel_dim(name: str, param: Tensor, plan: Mapping[str, str]) -> int | None:
    """The axis along which a plan of transformers, as ``{"layers.*.mlp.up_proj": "colwise"}``, cuts a parameter."""
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
    kind = plan.get(pattern) or plan.get(pattern.rpartition(".")[0]) or ""
    if kind == "embedding_rowwise" or ("colwise" in kind and param.ndim == 1):
        return 0
    if "colwise" in kind:
        return param.ndim - 2
    return param.ndim - 1 if "rowwise" in kind and param.ndim > 1 else None


def place(parts: Sequence[PlannedPart], mesh: Mesh, interval: int) -> list[PlannedPart]:
    """The parts on a mesh, with the owners and refresh phases that the optimizer chooses."""
    found = [replace(on_shards(part, mesh), interval=interval) for part in parts]
    viewed = [(i, structure, p.stack) for i, p in enumerate(found) if (structure := p.structure) is not None]
    phases = balanced_phases([b * structure.root_flops(m, n) for _, structure, (b, m, n) in viewed], interval)
    items: dict[int, WorkItem] = {}
    for (i, structure, stack), phase in zip(viewed, phases, strict=True):
        found[i] = part = replace(found[i], refresh_phase=phase)
        strategy, ranks = STRATEGIES[part.kind], tuple(range(math.prod(part.ranks)))
        if strategy.has_owners(structure):
            items[i] = WorkItem(strategy.owner_cost(structure, stack), ranks, (interval, phase))
    for i, owner in zip(items, owners(list(items.values())), strict=True):
        found[i] = replace(found[i], owner=owner)
    return found


def memory(placed: Sequence[PlannedPart], mesh: Mesh, itemsize: int) -> dict[str, Tensor]:
    """Bytes that every rank keeps, by the names of `KEPT`; activations and temporaries are not among them."""
    found = {name: torch.zeros(mesh.shape, dtype=torch.float64) for name in KEPT}
    for part in placed:
        for name in ("params", "gradients"):
            found[name] += part.on_mesh(part.on_ranks * itemsize, mesh)
        found["rest"] += part.counter
        for name, share in STRATEGIES[part.kind].kept(part).items():
            found[name if name in KEPT else "rest"] += part.on_mesh(share * part.state[name], mesh)
    return {name: ranks.round().long() for name, ranks in found.items()}


def traffic(placed: Sequence[PlannedPart], mesh: Mesh, interval: int, itemsize: int) -> list[Tensor]:
    """Bytes that every rank sends and receives in each step of an interval, ``(2, replicate, fsdp, tp)``.

    Not in it is what gradients cost on the way to their ranks, which is the same for every optimizer.
    """
    always = torch.zeros(2, *mesh.shape, dtype=torch.int64)
    flows = [torch.zeros_like(always) for _ in range(interval)]
    for part in placed:
        strategy = STRATEGIES[part.kind]
        always += part.on_mesh(strategy.sent(part, itemsize), mesh)
        flows[part.refresh_phase] += part.on_mesh(strategy.sent_roots(part), mesh)
    return [always + flow for flow in flows]


def gradient_bytes(numbers: int, mesh: Mesh, itemsize: int) -> float:
    """What each rank sends for the gradients, whatever the optimizer: a ring's all-reduce or reduce-scatter.

    ``2 (N - 1)/N`` of the bytes for copies, ``(F - 1)/F`` for shards and then the copies of a shard.
    """
    local = numbers * itemsize / mesh.tp
    scattered = local * (mesh.fsdp - 1) / mesh.fsdp
    return scattered + 2 * local / mesh.fsdp * (mesh.replicate - 1) / mesh.replicate
