"""Where a step of ASGO spends its time on the matrices of GPT-2 124M, and the least that its operations take.

    python -m benchmarks.profile_step > benchmarks/step/profile.md

One thread, so that shares are of work. The floor is what each matrix's eigendecomposition and products take alone, in a
loop on memory that is warm, with nothing between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from asgo import ASGO
from asgo.state_keys import part_key
from asgo.views import View
from benchmarks.speed.workloads import make_workload

LAYERS, STEPS = 4, 5
ROOTS, PRODUCTS, REST = "eigendecompositions", "products", "all else"


def kind_of(operation: str) -> str:
    """The row of the table that an operation counts for."""
    if "eigh" in operation:
        return ROOTS
    return PRODUCTS if operation.rpartition("::")[2] in ("bmm", "baddbmm", "mm") else REST


def seconds(act: Callable[[], object]) -> float:
    """The median of some runs."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return median(times)


def main() -> None:
    """Profile, time the parts alone, and print both as a table."""
    torch.set_num_threads(1)
    work = make_workload("gpt2-124m", LAYERS, True, torch.device("cpu"), torch.float32, 0)
    work.reset()
    optimizer = ASGO([dict(group) for group in work.whole], lr=1e-3)
    for number in range(12):
        work.draw(number)
        work.attach()
        optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            optimizer.step()
    spent: dict[str, float] = {ROOTS: 0.0, PRODUCTS: 0.0, REST: 0.0}
    for row in profiler.key_averages():
        spent[kind_of(row.key)] += row.self_cpu_time_total / 1e3 / STEPS

    floor: dict[str, float] = {ROOTS: 0.0, PRODUCTS: 0.0}
    for gram, count, long in _statistics(optimizer):
        wide = torch.randn(len(gram), long)
        floor[ROOTS] += 1e3 * count * seconds(partial(torch.linalg.eigh, gram))
        # The statistic, and the product that makes the root of eigenvectors, are symmetric: 5/8 of each.
        apply, square = seconds(partial(torch.mm, gram, wide)), seconds(partial(torch.mm, gram, gram))
        floor[PRODUCTS] += 1e3 * count * (1.625 * apply + 0.625 * square)

    total = sum(spent.values())
    print(
        f"# `python -m benchmarks.profile_step`\n\n{LAYERS} layers of GPT-2 124M, one thread, torch {torch.__version__}"
    )
    print("\n| | ms per step | share | alone, ms |\n|---|---:|---:|---:|")
    for kind, taken in spent.items():
        alone = f"{floor[kind]:.0f}" if kind in floor else ""
        print(f"| {kind} | {taken:.0f} | {100 * taken / total:.0f} % | {alone} |")
    print(f"| the step | {total:.0f} | | {sum(floor.values()):.0f} |")


def _statistics(optimizer: ASGO) -> Iterator[tuple[Tensor, int, int]]:
    """The statistic of a matrix of every part, how many such matrices it has, and their longer side."""
    for group in optimizer.param_groups:
        view = View.of(group["view"])
        for param in group["params"] if view is not None else ():
            for part, (b, m, n) in enumerate(view.shapes(param.shape)):  # pyright: ignore[reportOptionalMemberAccess]
                yield optimizer.state[param][part_key("gram", part)][0], b, max(m, n)


if __name__ == "__main__":
    main()
