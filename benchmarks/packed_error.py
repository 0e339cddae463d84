"""What it costs in a root's accuracy to keep it symmetric, as packed state does, or in bfloat16.

python -m benchmarks.packed_error > benchmarks/root/packed.md
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from asgo.linalg.inverse_root import ROOTS
from benchmarks.speed.accuracy import exact_steps
from benchmarks.speed.matrices import Problem, first, low_rank, real, signal

EPS, CPU = 1e-6, torch.device("cpu")
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda Z: Z,
    "packed": lambda Z: (Z + Z.mT) / 2,
    "one triangle, mirrored": lambda Z: Z.tril() + Z.tril(-1).mT,
    "in bfloat16": lambda Z: Z.bfloat16().float(),
}


def worst(name: str, kept: Callable[[Tensor], Tensor], problems: list[Problem]) -> float:
    """The largest relative error of the step against float64."""
    errors = []
    for problem in problems:
        roots = kept(ROOTS[name](problem.grams, EPS)[0])
        for root, direction, wanted in zip(roots, problem.directions, exact_steps(problem, EPS), strict=True):
            if wanted is not None:
                errors.append(float(((root @ direction).double() - wanted).norm() / wanted.norm()))
    return max(errors)


def main() -> None:
    """Measure all and print a table."""
    torch.set_num_threads(1)
    kinds = {
        "real and drawn gradients": [real(64, CPU, 0, 30), real(384, CPU, 0, 30), signal(384, CPU, 0, 0)],
        "first steps of rank 8 to 64": [first(384, CPU, 0, 0), low_rank(384, 64, CPU, 0), low_rank(128, 8, CPU, 0)],
        "of rank 1": [low_rank(128, 1, CPU, 0)],
    }
    print(f"# `python -m benchmarks.packed_error`\n\n| root | kept | {' | '.join(kinds)} |\n|---|---|---:|---:|---:|")
    for name in ("eigh", "minimax", "minimax_fast", "minimax_bf16x3"):
        for how, kept in KEPT.items():
            cells = " | ".join(f"{worst(name, kept, problems):.1e}" for problems in kinds.values())
            print(f"| {name} | {how} | {cells} |")


if __name__ == "__main__":
    main()
