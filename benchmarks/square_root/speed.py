"""The update of the square-root form beside Muon's on the same matrices.

python benchmarks/square_root/speed.py --out benchmarks/square_root

A transformer layer as six matrices (q, k, v, o, fc, proj). The form has momentum and update in float32 as the optimizer
keeps them, S in bfloat16 (in the dtype of the state for "fp32"), and the same momentum, decay and scaling as Muon. Each
pair runs in one process in ABBA order; the figure is the median of the ratios of neighbouring runs, with their
quartiles. Let nothing else run. The files are named after the units and the threads.

On a CPU with units for bfloat16 the peer is `torch.optim.Muon` itself, all in bfloat16. On one without, torch's
products in bfloat16 take up to fifty times as long as in float32. There the peer is the same step with products in
float32 that are rounded to bfloat16, as the form has them, and `torch.optim.Muon` is timed once beside it ("torch").
`--without-units` leaves those of this CPU unused, and that peer out. "eigh" is the library's default root on a CPU,
`OneSided` in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from asgo.linalg import half_precision, polar
from asgo.structures import OneSided, SquareRoot

LAYERS = {
    "GPT-2 124M, one layer": [(4, 768, 768), (1, 3072, 768), (1, 768, 3072)],
    "six of 128 x 128": [(6, 128, 128)],
    "six of 512 x 512": [(6, 512, 512)],
}
BETA1, LR, DECAY, RMS = 0.95, 0.01, 0.1, 0.2


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
FORMS = [("bf16", 0.2), ("bf16_fast", 0.2), ("bf16_deep", 0.2), ("bf16", 0.0), ("fp32", 0.2), ("eigh", 0.2)]
Update = Callable[[Tensor, int], Tensor]


class Step:
    """One step for stacks: momentum with Nesterov, an update, rescaling, decay."""

    def __init__(self, shapes: list[tuple[int, int, int]], update: Update) -> None:
        self.update = update
        self.stacks = [torch.randn(shape) for shape in shapes]
        self.grads = [torch.randn(shape).bfloat16() for shape in shapes]
        self.momenta = [torch.zeros(shape) for shape in shapes]

    def __call__(self) -> None:
        for i, (W, given, momentum) in enumerate(zip(self.stacks, self.grads, self.momenta, strict=True)):
            grad = given.float()
            momentum.lerp_(grad, 1 - BETA1)
            U = self.update(momentum.lerp(grad, 1 - BETA1), i)
            size = RMS * (U.shape[1] * U.shape[2]) ** 0.5 / torch.linalg.vector_norm(U, dim=(1, 2), keepdim=True)
            W.mul_(1 - LR * DECAY).sub_(U.mul_(size * LR))


def form(shapes: list[tuple[int, int, int]], name: str, beta2: float) -> Step:
    """The square-root form in a precision, or the library's default on a CPU."""
    structure = OneSided(root="eigh") if name == "eigh" else SquareRoot(precision=name)
    states = [structure.init(torch.zeros(shape)) for shape in shapes]

    def update(D: Tensor, i: int) -> Tensor:
        if isinstance(structure, SquareRoot):
            return structure.update(states[i], D, D, beta2, out=D)[0]
        structure.update_statistic(states[i], structure.compute_statistic(D), beta2)
        structure.compute_root(states[i])
        return structure.precondition(states[i], D)

    return Step(shapes, update)


def newton_schulz(D: Tensor, i: int) -> Tensor:
    """Muon's five steps, one matrix at a time, with products in float32 that are rounded to bfloat16."""
    a, b, c = NEWTON_SCHULZ
    results = []
    for G in D:
        X = (G if G.shape[0] <= G.shape[1] else G.mT).bfloat16()
        X = X / X.norm()
        for _ in range(5):
            R = rounded(X, X.mT)
            X = rounded(rounded(R, R, R, b, c), X, X, a, 1.0)
        results.append((X if G.shape[0] <= G.shape[1] else X.mT).float())
    return torch.stack(results)


def rounded(A: Tensor, B: Tensor, C: Tensor | None = None, c: float = 0.0, a: float = 1.0) -> Tensor:
    wide = A.float() @ B.float() if C is None else torch.addmm(C.float(), A.float(), B.float(), beta=c, alpha=a)
    return wide.bfloat16()


def muon(shapes: list[tuple[int, int, int]]) -> Callable[[], object]:
    params = [nn.Parameter(torch.randn(m, n).bfloat16()) for b, m, n in shapes for _ in range(b)]
    for p in params:
        p.grad = torch.randn_like(p)
    return torch.optim.Muon(params, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw").step  # pyright: ignore


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(one: Callable[[], object], peer: Callable[[], object], rounds: int) -> list[float]:
    for step in (one, peer):
        step()
    ratios = []
    for _ in range(rounds):
        a, b, c, d = timed(one), timed(peer), timed(peer), timed(one)
        ratios += [(a + d) / (b + c)]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-units", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    present = half_precision.UNITS[torch.bfloat16]
    units = half_precision.UNITS[torch.bfloat16] = present and not args.without_units
    threads = "" if args.threads == 1 else f"_{args.threads}_threads"
    target = args.out / f"speed_{'with' if units else 'without'}_units{threads}"
    rows, lines = [], [f"# `python {' '.join(sys.argv)}`", ""]
    has = "with" if units else "with unused" if present else "without"
    machine = f"torch {torch.__version__}, {platform.machine()} CPU {has} units for bfloat16"
    lines += [f"{machine}, {args.threads} thread(s), {args.rounds} rounds.", ""]
    lines += ["| matrices | form | b2 | of Muon's time | quartiles | products, of Muon's |"]
    lines += ["|---|---|---:|---:|---|---:|"]
    for name, shapes in LAYERS.items():
        peer = muon(shapes) if units else Step(shapes, newton_schulz)
        found = [(form_name, beta2, form(shapes, form_name, beta2), args.rounds) for form_name, beta2 in FORMS]
        if not present and max(max(shape) for shape in shapes) <= 512:  # beyond that a step takes minutes
            found += [("torch", 0.0, muon(shapes), 1)]
        for form_name, beta2, step, rounds in found:
            ratios = compare(step, peer, rounds)
            low, median, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
            plan = polar.PLANS.get(form_name)
            products = counted(shapes, plan, beta2) / counted_muon(shapes) if plan and form_name != "fp32" else None
            rows.append({"matrices": name, "form": form_name, "beta2": beta2, "ratios": ratios, "products": products})
            shown = "" if products is None else f"{products:.2f}"
            lines.append(f"| {name} | {form_name} | {beta2} | {median:.2f} | {low:.2f} to {high:.2f} | {shown} |")
            print(lines[-1], flush=True)
            record = {"machine": machine, "threads": args.threads, "rows": rows}
            target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            target.with_suffix(".md").write_text("\n".join(lines) + "\n")


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
