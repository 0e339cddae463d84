"""The update of the square-root form beside the step of `torch.optim.Muon` on the same matrices, both in bfloat16.

python benchmarks/square_root/speed.py --out benchmarks/square_root

A transformer layer as six matrices (q, k, v, o, fc, proj). Muon steps bfloat16 parameters with five quintic steps; the
form has momentum and update in float32 as the optimizer keeps them, S in bfloat16, and the same momentum, decay and
scaling. Both run in one process in ABBA order; the figure is the median of the ratios of neighbouring runs, with their
quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from asgo.linalg import polar
from asgo.structures import SquareRoot

LAYERS = {
    "GPT-2 124M, one layer": [(4, 768, 768), (1, 3072, 768), (1, 768, 3072)],
    "six of 128 x 128": [(6, 128, 128)],
    "six of 512 x 512": [(6, 512, 512)],
}
BETA1, LR, DECAY, RMS = 0.95, 0.01, 0.1, 0.2


class Form:
    """One step for stacks: momentum with Nesterov, the form, rescaling, decay."""

    def __init__(self, shapes: list[tuple[int, int, int]], precision: str, beta2: float) -> None:
        self.structure, self.beta2 = SquareRoot(precision=precision), beta2
        self.stacks = [torch.randn(shape) for shape in shapes]
        self.grads = [torch.randn(shape).bfloat16() for shape in shapes]
        self.momenta = [torch.zeros(shape) for shape in shapes]
        self.states = [self.structure.init(momentum) for momentum in self.momenta]

    def step(self) -> None:
        for W, given, momentum, state in zip(self.stacks, self.grads, self.momenta, self.states, strict=True):
            grad = given.float()
            momentum.lerp_(grad, 1 - BETA1)
            direction = momentum.lerp(grad, 1 - BETA1)
            U, _ = self.structure.update(state, direction, direction, self.beta2)
            size = RMS * (U.shape[1] * U.shape[2]) ** 0.5 / torch.linalg.vector_norm(U, dim=(1, 2), keepdim=True)
            W.mul_(1 - LR * DECAY).sub_(U.mul_(size * LR))


def muon(shapes: list[tuple[int, int, int]]) -> Callable[[], Tensor | None]:
    params = [nn.Parameter(torch.randn(m, n).bfloat16()) for b, m, n in shapes for _ in range(b)]
    for p in params:
        p.grad = torch.randn_like(p)
    return torch.optim.Muon(params, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw").step  # pyright: ignore


def timed(step: Callable[[], object]) -> float:
    """Seconds of processor time, which other processes of the machine add less to than to the wall's."""
    start = time.process_time()
    step()
    return time.process_time() - start


def compare(form: Callable[[], object], peer: Callable[[], object], rounds: int) -> list[float]:
    for step in (form, peer):
        step()
    ratios = []
    for _ in range(rounds):
        a, b, c, d = timed(form), timed(peer), timed(peer), timed(form)
        ratios += [(a + d) / (b + c)]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, lines = [], ["# `python benchmarks/square_root/speed.py --out benchmarks/square_root`", ""]
    lines += [f"torch {torch.__version__}, {platform.machine()} CPU, one thread, processor time, a shared machine.", ""]
    lines += [
        "| matrices | plan | b2 | of Muon's time | quartiles | products, of Muon's |",
        "|---|---|---:|---:|---|---:|",
    ]
    for name, shapes in LAYERS.items():
        for precision, beta2 in (("bf16", 0.2), ("bf16_fast", 0.2), ("bf16", 0.0), ("bf16_fast", 0.0)):
            ratios = compare(Form(shapes, precision, beta2).step, muon(shapes), args.rounds)
            low, median, high = statistics.quantiles(ratios, n=4)
            products = counted(shapes, polar.PLANS[precision], beta2) / counted_muon(shapes)
            rows.append({"matrices": name, "plan": precision, "beta2": beta2, "ratios": ratios, "products": products})
            lines.append(
                f"| {name} | {precision} | {beta2} | {median:.2f} | {low:.2f} to {high:.2f} | {products:.2f} |"
            )
            print(lines[-1], flush=True)
    (args.out / "speed.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    (args.out / "speed.md").write_text("\n".join(lines) + "\n")


def counted(shapes: list[tuple[int, int, int]], plan: polar.Plan, beta2: float) -> float:
    """Operations of the form, nothing taken off for symmetric products."""
    total = 0.0
    for b, m, n in shapes:
        k, long = min(m, n), max(m, n)
        wide = long + (k if beta2 else 0)
        total += b * k**3 * (plan.products(k, wide) + (wide / k if beta2 else 0))
    return total


def counted_muon(shapes: list[tuple[int, int, int]]) -> float:
    return sum(b * min(m, n) ** 3 * 5 * (2 * max(m, n) / min(m, n) + 1) for b, m, n in shapes)


if __name__ == "__main__":
    main()
