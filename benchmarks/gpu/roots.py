"""Time and error of every root and of the square-root form, and which root `auto` should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from asgo.linalg.inverse_root import ROOTS, relative
from asgo.structures import SquareRoot
from asgo.structures.square_root import from_gram
from benchmarks.gpu.forms import EPS, STATED
from benchmarks.gpu.matrices import drifting, exact
from benchmarks.gpu.part import Part
from benchmarks.gpu.record import Row

FIRST = ("minimax", "eigh", "minimax_bf16x3", "minimax_fast", "minimax_tf32")
NAMES = (
    *FIRST,
    *(name for name, root in ROOTS.items() if root.formula is relative and name not in (*FIRST, "auto", "eigh64")),
)
"""Every root that damps relatively, the most important first; float64 comes last."""
CANDIDATES = ("eigh", "minimax")
"""What `auto` chooses from: the roots in plain float32."""
SIZES, BATCHES = (32, 64, 128, 256, 512, 768, 1024, 2048, 4096), (1, 12, 64)
UPDATE, BETA2 = "square root", 0.2
"""The row of the square-root form, and its b2."""
MOST = 2**28
"""Numbers in a stack: 64 matrices of 2,048 are the largest."""
ON_CPU = 1024
"""Up to this size the float64 reference is computed on the CPU, whose eigendecompositions are the older ones."""
SLOW = 0.5
"""Seconds; a root that takes longer is timed once, and not for more matrices."""


def run(part: Part) -> None:
    """A row for each size, number of matrices and root or form, the small sizes first."""
    sizes, batches = ((8, 16), (1, 2)) if part.tiny else (SIZES, BATCHES)
    slow: set[tuple[str, int]] = set()
    for k in sizes:
        if part.left <= 0:
            break
        gram, momentum = (tensor.to(part.device.torch) for tensor in drifting(k, 2 * k, k))
        wanted: dict[float, Tensor] = {}
        measures: dict[str, Callable[[int], Mapping[str, Any]]] = {
            name: partial(_row, part, run_root, name, gram, momentum, wanted)
            for name, run_root in _contenders().items()
        }
        measures = {UPDATE: partial(_square_root, part, gram, momentum[:, :k].contiguous(), {}), **measures}
        for batch in (b for b in batches if b == 1 or b * k * k <= MOST):
            for name, measure in measures.items():
                row = f"{name}, k = {k}, {batch}"
                if (name, k) in slow:
                    part.skip(row, "one of them is slow already")
                    continue
                found = part.attempt(row, partial(measure, batch))
                if found is not None and found.get("seconds", 0) > SLOW:
                    slow.add((name, k))
        part.device.release()


Run = Callable[[Tensor, float], tuple[Tensor, Any]]


def _contenders() -> dict[str, Run]:
    return {**{name: ROOTS[name] for name in NAMES}, "Cholesky": cholesky, "eigh64": ROOTS["eigh64"]}


def cholesky(A: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``L^-1`` of ``A + eps ||A||_F I = L L^T``: a square root of the inverse, though not the symmetric one.

    No root of ours; the least that a factorisation takes.
    """
    size = torch.linalg.vector_norm(A, dim=(1, 2), keepdim=True)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    factor, info = torch.linalg.cholesky_ex(A + eps * size * eye)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False), info == 0


def _row(
    part: Part, root: Run, name: str, gram: Tensor, momentum: Tensor, wanted: dict[float, Tensor], batch: int
) -> Mapping[str, Any]:
    eps = EPS.get(name, 1e-6)  # "Cholesky" is no root of the table
    stack = gram.expand(batch, -1, -1).contiguous()
    found = {"name": name, "eps": eps, **_timed(part, partial(root, stack, eps), stack)}
    if batch > 1 or name == "Cholesky":
        return found
    roots, ok = root(stack, eps)
    if eps not in wanted:
        wanted[eps] = _exact(gram, eps).to(gram.device) @ momentum.double()
    return {**found, "ok": bool(ok.all()), "error": _error(roots[0].double() @ momentum.double(), wanted[eps])}


def _square_root(
    part: Part, gram: Tensor, direction: Tensor, known: dict[str, Tensor], batch: int
) -> Mapping[str, Any]:
    """A whole update for a square direction, which is statistic, root and preconditioned direction in one."""
    structure = SquareRoot("left")
    D = direction.expand(batch, -1, -1).contiguous()
    if not known:
        near = gram.double().cpu() if len(gram) <= ON_CPU else gram.double()
        V = BETA2 * near + (1 - BETA2) * (direction.double() @ direction.double().mT).to(near.device)
        known["S"] = from_gram({"gram": near[None]}, torch.float64)["sqrt"].to(gram.device)
        known["U"] = exact(V, 1e-6).to(gram.device) @ direction.double()
    state = structure.init(D)
    first = state["sqrt"].copy_(known["S"].expand(batch, -1, -1)).clone()
    found = {"name": UPDATE, **_timed(part, partial(structure.update, state, D, D, BETA2), D)}
    if batch > 1:
        return found
    state["sqrt"].copy_(first)
    update, ok = structure.update(state, D, D, BETA2)
    return {**found, "ok": bool(ok.all()), "error": _error(update[0].double(), known["U"])}


def _timed(part: Part, act: Callable[[], Any], stack: Tensor) -> dict[str, Any]:
    """Times of a call for a stack of square matrices, also in products of that stack in float32."""
    first = part.device.seconds(act)
    repeats = 0 if first > SLOW else 3 if first > SLOW / 10 else 7
    times = [part.device.seconds(act) for _ in range(repeats)] or [first]
    seconds, batch = median(times), len(stack)
    square = torch.randn_like(stack)
    product = min(part.device.seconds(partial(torch.bmm, square, square)) for _ in range(3))
    sizes = {"k": stack.shape[-1], "batch": batch}
    return {**sizes, "seconds": seconds, "times": times, "each": seconds / batch, "products": seconds / product}


def _error(found: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))


def _exact(gram: Tensor, eps: float) -> Tensor:
    """On the CPU as far as that takes less than a second or two."""
    return exact(gram.cpu() if len(gram) <= ON_CPU else gram, eps)


# ---- the table of `auto` ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The fastest candidate for some matrices.

    Args:
        k: their size.
        batch: their number.
        name: of the root.
        seconds: that it takes.
        ahead: seconds of the next one over these; 1 where there is no other.
    """

    k: int
    batch: int
    name: str
    seconds: float
    ahead: float


def choices(rows: Iterable[Row], names: Iterable[str] = CANDIDATES) -> list[Choice]:
    """For every size and number of matrices the fastest root within the error that its documentation states."""
    timed = [row for row in rows if row["part"] == "roots" and row["status"] == "ok" and row.get("name") in set(names)]
    wrong = {(row["name"], row["k"]) for row in timed if row.get("error", 0.0) > STATED[row["name"]]}
    sound = [row for row in timed if (row["name"], row["k"]) not in wrong]
    found = []
    for k, batch in sorted({(row["k"], row["batch"]) for row in sound}):
        here = sorted((row["seconds"], row["name"]) for row in sound if (row["k"], row["batch"]) == (k, batch))
        seconds, name = here[0]
        found.append(Choice(k, batch, name, seconds, here[1][0] / seconds if len(here) > 1 else 1.0))
    return found


def auto_table(rows: Iterable[Row]) -> str:
    """The table from which `auto` is set on this device, in Markdown: the fastest candidate by size and number, and how
    many times as long the next one takes."""
    found = choices(rows)
    batches = sorted({choice.batch for choice in found})
    cells = {(choice.k, choice.batch): f"{choice.name} ({choice.ahead:.1f})" for choice in found}
    lines = ["| k | " + " | ".join(map(str, batches)) + " |", "|---:|" + "---|" * len(batches)]
    lines += [
        f"| {k} | " + " | ".join(cells.get((k, b), "") for b in batches) + " |"
        for k in sorted({choice.k for choice in found})
    ]
    return "\n".join(lines)
