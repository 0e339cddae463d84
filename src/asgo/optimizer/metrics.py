"""What a step did to every parameter: sizes of gradient, update and weights, failures, and the error of its root."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asgo._types import Stack, State
from asgo.distributed.collectives import group_of
from asgo.linalg.inverse_root import ROOTS, relative, undamped
from asgo.optimizer.bucket import Bucket
from asgo.optimizer.hyperparameters import adamw_of
from asgo.optimizer.step_plan import StepPlan
from asgo.parts import Strategy
from asgo.structures import OneSided, Packed, Structure
from asgo.structures.packed import opened

COLUMNS = ("gradient", "update", "weight", "failures")
"""What is added up over parts and ranks; beside each stands how many entries, or matrices, were added."""


@dataclass(frozen=True)
class Note:
    """One number for each of some parameters, on their device.

    Args:
        column: one of `COLUMNS`, or ``"residual"``.
        params: the parameters.
        values: ``(len(params),)``: norms, counts of failures, or residuals.
        count: how many entries each norm, or matrices each count, is of.
    """

    column: str
    params: Sequence[Tensor]
    values: Tensor
    count: int | Sequence[int]


class Recorder:
    """Keeps the numbers of one step on the device; see `StructuredOptimizer.metrics`.

    A step passes the norms that it has computed anyway, and it adds one pass over the updates, one over the weights
    and, for AdamW's parameters, one over the gradients. Nothing waits for a device before `read`.
    """

    def __init__(self) -> None:
        self._notes: list[Note] = []
        self._strategies: dict[Tensor, Strategy] = {}
        self._matrices: dict[Tensor, int] = {}

    def gradients(self, bucket: Bucket, norms: Tensor) -> None:
        """Take up the norms ``(b, 1, 1)`` of the gradients of whole matrices."""
        self._note_bucket("gradient", bucket, norms, bucket.matrices_per_param * bucket.matrix_numel)

    def updates(self, bucket: Bucket, structure: Structure, group: Mapping[str, Any], update: Stack) -> None:
        """Take up the updates of a bucket, failures and the error of the roots that made them."""
        norms = torch.linalg.vector_norm(update, dim=(1, 2))
        self._note_bucket("update", bucket, norms, bucket.matrices_per_param * update[0].numel())
        first, count = (
            (bucket.own.start or 0) // bucket.matrices_per_param,
            len(bucket.memory["failures"]) // bucket.matrices_per_param,
        )
        kept = [part.param for part in bucket.parts[first : first + count]]
        if not kept:
            return
        failures = bucket.memory["failures"].view(count, -1).sum(1)
        self._notes.append(Note("failures", kept, failures, bucket.matrices_per_param))
        found = residuals(structure, group, bucket.memory)
        if found is not None:
            self._notes.append(Note("residual", kept, found.view(count, -1).amax(1), 1))

    def finish(
        self, groups: Iterable[Mapping[str, Any]], plans: Iterable[StepPlan], states: Mapping[Tensor, State]
    ) -> None:
        """Take up AdamW's parameters and the weights, after a step by these plans."""
        for group, plan in zip(groups, plans, strict=True):
            self._strategies |= dict(zip(plan.entries, plan.strategies, strict=True))
            self._matrices |= dict.fromkeys(plan.entries, 1)
            for bucket in plan.buckets:
                for part in bucket.all_parts:
                    self._strategies[part.param] = part.strategy
                    self._matrices[part.param] = sum(b for b, _, _ in part.view.shapes(part.param.shape))
            params = [*plan.viewed, *plan.entries]
            for some in _by_device(params):
                held = [self._strategies[param].held(param.detach()) for param in some]
                norms = torch.stack(torch._foreach_norm(held, 2, dtype=_wide(held)))
                self._notes.append(Note("weight", some, norms, [x.numel() for x in held]))
            for some in _by_device(plan.entries):
                self._note_entries(some, [states[param] for param in some], adamw_of(group))

    def read(self, names: Mapping[Tensor, str]) -> dict[str, dict[str, float]]:
        """The numbers of every parameter that had a gradient, by its name. Waits for the device, once."""
        sums: dict[Tensor, list[float]] = {}
        residual: dict[Tensor, float] = {}
        for note, values in zip(self._notes, _to_host([note.values for note in self._notes]), strict=True):
            counts = [note.count] * len(values) if isinstance(note.count, int) else note.count
            for param, value, count in zip(note.params, values, counts, strict=True):
                if note.column == "residual":
                    residual[param] = max(value, residual.get(param, 0.0))
                    continue
                at = 2 * COLUMNS.index(note.column)
                row = sums.setdefault(param, [0.0] * (2 * len(COLUMNS)))
                row[at] += value if note.column == "failures" else value**2
                row[at + 1] += count
        table = {param: (row, residual.get(param, -1.0)) for param, row in sums.items()}
        table |= self._gathered(table)
        return {names[p]: self._metrics(p, *found) for p, found in table.items() if p in names}

    def _note_bucket(self, column: str, bucket: Bucket, norms: Tensor, count: int) -> None:
        whole = torch.linalg.vector_norm(norms.reshape(-1, bucket.matrices_per_param), dim=1)
        self._notes.append(Note(column, [part.param for part in bucket.parts], whole, count))

    def _note_entries(self, params: list[Tensor], states: list[State], group: Mapping[str, Any]) -> None:
        where = [self._strategies[param] for param in params]
        grads = [at.entries(param, at.gradient(param)) for at, param in zip(where, params, strict=True)]
        sizes = [grad.numel() for grad in grads]
        norms = torch.stack(torch._foreach_norm(grads, 2, dtype=_wide(grads)))
        updates = torch.where(norms.isfinite(), adamw_norms(states, group), 0.0)
        self._notes.append(Note("gradient", params, norms, sizes))
        self._notes.append(Note("update", params, updates, sizes))
        self._notes.append(Note("failures", params, torch.stack([state["failures"] for state in states]), 1))

    def _gathered(self, table: Mapping[Tensor, tuple[list[float], float]]) -> dict[Tensor, tuple[list[float], float]]:
        """The rows of sharded parameters, added up over the ranks that hold them."""
        by_ranks: dict[tuple[int, ...], list[Tensor]] = {}
        for param, where in self._strategies.items():  # in the same order on all ranks
            if param in table and not where.counts_all:
                by_ranks.setdefault(where.ranks, []).append(param)
        found: dict[Tensor, tuple[list[float], float]] = {}
        for ranks in sorted(by_ranks):
            params = by_ranks[ranks]
            mine = torch.tensor([[*row, error] for row, error in (table[param] for param in params)])
            mine = mine.to(params[0].device)
            all_of_them = [torch.empty_like(mine) for _ in ranks]
            dist.all_gather(all_of_them, mine, group=group_of(ranks))
            stacked = torch.stack(all_of_them)
            rows, errors = stacked[..., :-1].double().sum(0).tolist(), stacked[..., -1].amax(0).tolist()
            found |= dict(zip(params, zip(rows, errors, strict=True), strict=True))
        return found

    def _metrics(self, param: Tensor, row: Sequence[float], residual: float) -> dict[str, float]:
        """Means over what was added up, so that entries which several ranks hold do not count more than once."""
        gradient, update, weight, failures = (
            total / max(count, 1) for total, count in zip(row[::2], row[1::2], strict=True)
        )
        update_rms, weight_rms = math.sqrt(update), math.sqrt(weight)
        found = {
            "update_rms": update_rms,
            "weight_rms": weight_rms,
            "ratio": update_rms / weight_rms if weight_rms else math.inf,
            "gradient_norm": math.sqrt(gradient * param.numel()),
            "failures": round(failures * self._matrices[param]),
        }
        return found | ({"root_residual": residual} if residual >= 0 else {})


def residuals(structure: Structure, group: Mapping[str, Any], state: State) -> Tensor | None:
    """An estimate of ``||Z A Z - I||_F / sqrt(k)`` for every root Z of a damped statistic A, ``(b,)``.

    ``||(Z A Z - I) x|| / sqrt(k)`` in float64 for one fixed x with entries of 1 and -1; for independent signs its
    mean square is that of the matrix. 0 for a matrix that has had no gradient. None for structures without such a
    root, and where what the root inverts is not linear in A and its norm, as of "inside" and "outside".
    """
    inner = structure.inner if isinstance(structure, Packed) else structure
    if not isinstance(inner, OneSided) or ROOTS[group["root"]].formula not in (relative, undamped):
        return None
    eps = group["eps"] if ROOTS[group["root"]].formula is relative else 0.0
    _, own = opened(structure, {key: state[key] for key in inner.symmetric})
    norm = torch.linalg.vector_norm(own["gram"], dim=(1, 2), keepdim=True).double()
    A, Z = own["gram"].double(), own["root"].double()
    x = _signs(A.shape[-1], A.device).expand(len(A), -1, 1)
    y = Z @ x
    error = Z @ (A @ y + eps * norm * y) - x
    error = torch.linalg.vector_norm(error, dim=(1, 2)) / math.sqrt(A.shape[-1])
    return torch.where(norm[:, 0, 0] > 0, error, 0.0)


@lru_cache(maxsize=256)
def _signs(k: int, device: torch.device) -> Tensor:
    """``(k, 1)``, the same in every run."""
    dice = torch.Generator().manual_seed(0)
    return (2.0 * torch.randint(2, (k, 1), generator=dice) - 1).double().to(device)


def adamw_norms(states: Sequence[State], group: Mapping[str, Any]) -> Tensor:
    """The norms of the updates that AdamW has just made, without weight decay, from its state, ``(n,)``.

    ``lr ||m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)||``.
    """
    moments = [state["exp_avg"] for state in states]
    steps = torch.stack([state["step"] for state in states]).to(moments[0].device)
    first, second = (1 - beta**steps for beta in group["betas"])
    divisors = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
    torch._foreach_add_(divisors, list((group["eps"] * second.sqrt()).unbind()))
    norms = torch.stack(torch._foreach_norm(torch._foreach_div(moments, divisors)))
    return norms * (group["lr"] * second.sqrt() / first)


def _by_device(params: Sequence[Tensor]) -> list[list[Tensor]]:
    sorts: dict[torch.device, list[Tensor]] = {}
    for param in params:
        sorts.setdefault(param.device, []).append(param)
    return list(sorts.values())


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _to_host(values: Sequence[Tensor]) -> list[list[float]]:
    """All numbers, with one transfer from every device."""
    found: list[list[float]] = [[] for _ in values]
    for device in {x.device for x in values}:
        some = [i for i, x in enumerate(values) if x.device == device]
        numbers = torch.cat([values[i].to(torch.promote_types(values[i].dtype, torch.float32)) for i in some]).tolist()
        for i in some:
            found[i], numbers = numbers[: len(values[i])], numbers[len(values[i]) :]
    return found
