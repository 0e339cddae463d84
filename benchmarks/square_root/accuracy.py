"""How near the square-root form is to float64: direction and statistic, by precision, b2 and number of Gram steps.

python benchmarks/square_root/accuracy.py --out benchmarks/square_root

Gradients are those of a character GPT of 2 layers and width 128 that the exact step trains. It writes
``accuracy.json`` and ``accuracy.md``. "cos" is the cosine of an update to that of the float64 root with eps 1e-6, the
median and the smallest over all matrices and steps but the first three; "V" is ``||S S^T - V||_F / ||V||_F``, the
median and the largest. float16 has no fast product on most CPUs and so runs on the first 8 steps only.

The second table simulates the Gram form on single singular values in float64: with an error of one unit of rounding,
relative to the largest eigenvalue and with the worst sign, in every R. It gives the largest distance from 1 of what
starts in ``[low, 1]``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from losses import LR, SIZES, Exact, Hidden
from torch import Tensor
from torch.nn import functional as F
from workload import CharGPT, batches, exact_root, tokens

from asgo.linalg import polar
from asgo.structures import SquareRoot

STEPS, STEPS_FP16, SKIPPED, EPS = 30, 8, 3, 1e-6
VARIANTS = [
    ("bf16", 0), ("bf16", 2), ("bf16", 3), ("bf16_fast", 0), ("bf16_fast", 2), ("fp16", 0), ("fp16", 2), ("fp16", 3),
    ("fp32", 0),
]  # fmt: skip
Seen = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Row:
    precision: str
    gram: int
    statistic: str
    beta2: float
    cosine: float
    least_cosine: float
    error: float
    largest_error: float


class Recorder(Exact):
    """The exact step, keeping what it was given."""

    def __init__(self, name: str, seen: list[Seen]) -> None:
        super().__init__(EPS)
        self.name, self.seen = name, seen

    def update(self, direction: Tensor, seen: Tensor, beta2: float) -> Tensor:
        self.seen[-1][self.name] = (direction.clone(), seen.clone())
        return super().update(direction, direction, 0.2)


def gradients(steps: int) -> list[Seen]:
    """Directions and gradients of every step, by kind of matrix."""
    training, _, count = tokens()
    _, heads, size, block = SIZES[128]
    torch.manual_seed(0)
    model = CharGPT(count, 2, 128, heads, block)
    seen: list[Seen] = []
    hidden = [Hidden(ps, Recorder(name, seen), "gradient", 0.2) for name, ps in model.matrices().items()]
    inside = {id(p) for h in hidden for p in h.params}
    adamw = torch.optim.AdamW([p for p in model.parameters() if id(p) not in inside], lr=0.003, betas=(0.9, 0.95))
    for step, batch in zip(range(steps), batches(training, 0, size, block), strict=False):
        seen.append({})
        model(batch).backward()
        for h in hidden:
            h.step(LR * min(1.0, (step + 1) / 20))
        adamw.step()
        model.zero_grad()
    return seen


def exact(seen: list[Seen], statistic: str, beta2: float) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """V and the update of every step and kind, from the left."""
    V: dict[str, Tensor] = {}
    result = {}
    for t, kinds in enumerate(seen):
        for name, pair in kinds.items():
            D, G = (turned(x).double() for x in pair)
            new = (1 - beta2) * (D @ D.mT if statistic == "momentum" else G @ G.mT)
            V[name] = new if name not in V else beta2 * V[name] + new
            result[t, name] = (V[name], exact_root(V[name], EPS) @ D)
    return result


def turned(x: Tensor) -> Tensor:
    return x if x.shape[1] < x.shape[2] else x.mT


def measure(
    seen: list[Seen], wanted: dict[tuple[int, str], tuple[Tensor, Tensor]], precision: str, statistic: str, beta2: float
) -> tuple[Tensor, Tensor]:
    """Cosines and errors of V, over matrices and steps."""
    structure, states, cosines, errors = SquareRoot("left", precision), {}, [], []
    for t, kinds in enumerate(seen):
        for name, pair in kinds.items():
            D, G = (turned(x).contiguous() for x in pair)
            state = states.setdefault(name, structure.init(D))
            update, _ = structure.update(state, D, D if statistic == "momentum" else G, beta2)
            if t >= SKIPPED:
                V, U = wanted[t, name]
                S = state["sqrt"].double()
                cosines.append(F.cosine_similarity(update.double().flatten(1), U.flatten(1)))
                errors.append(torch.linalg.matrix_norm(S @ S.mT - V) / torch.linalg.matrix_norm(V))
    return torch.cat(cosines), torch.cat(errors)


def merged(kept: list[Row], rows: list[Row]) -> list[Row]:
    """The rows that are kept, each as it was measured last."""
    fresh = {(r.statistic, r.beta2, r.precision, r.gram): r for r in rows}
    return [fresh.get((r.statistic, r.beta2, r.precision, r.gram), r) for r in kept]


def table(seen: list[Seen], precisions: list[str]) -> list[Row]:
    rows, plans = [], dict(polar.PLANS)
    for statistic, beta2 in itertools.product(("momentum", "gradient"), (0.2, 0.5, 0.8, 0.95)):
        wanted = exact(seen, statistic, beta2)
        for precision, gram in VARIANTS:
            if precision not in precisions:
                continue
            polar.PLANS[precision] = replace(plans[precision], gram=gram)
            steps = seen[:STEPS_FP16] if precision.startswith("fp16") else seen
            cosines, errors = measure(steps, wanted, precision, statistic, beta2)
            figures = (cosines.median(), cosines.min(), errors.median(), errors.max())
            rows.append(Row(precision, gram, statistic, beta2, *(float(f"{float(x):.4g}") for x in figures)))
            print(rows[-1], flush=True)
    polar.PLANS.update(plans)
    return rows


def worst(plan: polar.Plan) -> float:
    """Largest distance from 1 with the worst rounding of every R of the Gram form."""
    unit = torch.finfo(plan.dtype).eps / 2
    start = torch.logspace(torch.log10(torch.tensor(plan.low)).item(), 0, 4001, dtype=torch.float64)
    plain, last = plan.steps[: len(plan.steps) - plan.gram], plan.steps[len(plan.steps) - plan.gram :]
    for step in plain:
        start = start * bracket(step, start.square())
    distance = 0.0
    for signs in itertools.product((-1, 1), repeat=plan.gram):
        r, q = start.square(), torch.ones_like(start)
        for step, sign in zip(last, signs, strict=True):
            factor = bracket(step, r + sign * unit * float(r.max()))
            r, q = (r + sign * unit * float(r.max())) * factor.square(), q * factor
        distance = max(distance, float((start * q - 1).abs().max()))
    return distance


def bracket(step: tuple[float, ...], r: Tensor) -> Tensor:
    return sum((c * r**i for i, c in enumerate(step)), torch.zeros_like(r))


def text(rows: list[Row], simulated: dict[str, list[float]]) -> str:
    lines = ["# `python benchmarks/square_root/accuracy.py --out benchmarks/square_root`", ""]
    lines += [f"torch {torch.__version__}, {platform.machine()} CPU, one thread.", ""]
    lines += ["| statistic | b2 | precision | Gram steps | cos, median | least | V, median | largest |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {r.statistic} | {r.beta2} | {r.precision} | {r.gram} | {r.cosine:.4f} | {r.least_cosine:.3f} | "
        f"{r.error:.1e} | {r.largest_error:.1e} |"
        for r in rows
    ]
    lines += ["", "Largest distance of a singular value from 1, simulated, by the number of Gram steps:", ""]
    lines += ["| plan | 0 | 1 | 2 | 3 | 4 |", "|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {name} | " + " | ".join(f"{x:.1e}" for x in found) + " |" for name, found in simulated.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    known = list(dict.fromkeys(precision for precision, _ in VARIANTS))
    parser.add_argument("--precisions", nargs="+", choices=known, default=known, help="rows to measure anew")
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    names = ("bf16", "bf16_fast", "fp16", "fp16_fast")
    simulated = {
        name: [worst(replace(polar.PLANS[name], gram=g)) for g in range(min(4, len(polar.PLANS[name].steps)) + 1)]
        for name in names
    }
    rows = table(gradients(STEPS), args.precisions)
    if args.precisions != known:
        kept = [Row(**row) for row in json.loads((out / "accuracy.json").read_text())["rows"]]
        rows = merged(kept, rows)
    record = {"torch": torch.__version__, "rows": [vars(row) for row in rows], "simulated": simulated}
    (out / "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "accuracy.md").write_text(text(rows, simulated))


if __name__ == "__main__":
    main()
