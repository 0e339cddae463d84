"""Losses of a small character GPT: the square-root form in every precision beside float64 eigendecompositions.

python benchmarks/square_root/losses.py --out benchmarks/square_root/losses.jsonl --beta2 0.2 --forms exact bf16

One simple loop steps all: momentum .95 with Nesterov, decoupled decay, an update of root mean square 0.2, AdamW for the
rest, so that forms differ in their preconditioner alone. The form "exact" has eps 1e-6, "exact 4.7e-6" another. Runs of
one seed have the same weights and batches. Each run is a line of the output; those that are there are not repeated, so
that the command can be stopped and given again.

The commands of the whole table stand in benchmarks/README.md. On one core of an AMD EPYC with units for bfloat16 a run
takes 30 seconds at width 128, 4 to 5 minutes at 384.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from workload import CharGPT, batches, exact_root, tokens

from asgo.linalg.masked import masked_lerp_
from asgo.structures import SquareRoot

BETA1, LR, DECAY, RMS, EPS, CROSS = 0.95, 0.014, 0.1, 0.2, 1e-6, 0.95
SIZES = {128: (4, 4, 8, 128), 384: (4, 6, 8, 128)}
"""Layers, heads, batch and block by width."""


class Exact:
    """The statistic and its root in float64, preconditioning the shorter side as `OneSided` does."""

    def __init__(self, eps: float) -> None:
        self.V: Tensor | None = None
        self.eps = eps

    def update(self, direction: Tensor, seen: Tensor, beta2: float) -> Tensor:
        left = direction.shape[1] < direction.shape[2]
        D, G = (x.double() if left else x.double().mT for x in (direction, seen))
        seen_now = (1 - beta2) * (G @ G.mT)
        self.V = seen_now if self.V is None else beta2 * self.V + seen_now
        U = exact_root(self.V, self.eps) @ D
        return (U if left else U.mT).float()


class Form:
    """The structure under test."""

    def __init__(self, precision: str) -> None:
        self.structure, self.state = SquareRoot(precision=precision), None
        self.failures = torch.zeros((), dtype=torch.int64)

    def update(self, direction: Tensor, seen: Tensor, beta2: float) -> Tensor:
        self.state = self.structure.init(direction) if self.state is None else self.state
        U, ok = self.structure.update(self.state, direction, seen, beta2)
        self.failures += (~ok).sum()
        return U


class Hidden:
    """The step of a stack of equal hidden matrices."""

    def __init__(self, params: Sequence[Tensor], form: Exact | Form, statistic: str, beta2: float) -> None:
        self.params, self.form, self.statistic, self.beta2 = params, form, statistic, beta2
        self.momentum = torch.zeros(len(params), *params[0].shape)
        left = self.momentum.shape[1] < self.momentum.shape[2]
        self.axis = 1 if left else 2
        self.cross = torch.zeros_like(self.momentum.sum(self.axis, keepdim=True))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        grad = torch.stack([p.grad for p in self.params])  # pyright: ignore[reportArgumentType]
        self.momentum.lerp_(grad, 1 - BETA1)
        direction = self.momentum.lerp(grad, 1 - BETA1)
        U = self.form.update(direction, direction if self.statistic == "momentum" else grad, self.beta2)
        square = U.square().mean(self.axis, keepdim=True)
        masked_lerp_(self.cross, square, 1 - CROSS, square.sum((1, 2), keepdim=True) > 0)
        U = U * self.cross.clamp_min(1e-38).rsqrt()
        U = U * (RMS * math.sqrt(U[0].numel()) / torch.linalg.vector_norm(U, dim=(1, 2), keepdim=True))
        for p, u in zip(self.params, U, strict=True):
            p.mul_(1 - lr * DECAY).sub_(u, alpha=lr)


def train(form: str, statistic: str, beta2: float, seed: int, width: int, steps: int, lr: float) -> dict[str, object]:
    layers, heads, size, block = SIZES[width]
    training, held_out, count = tokens()
    torch.manual_seed(seed)
    model = CharGPT(count, layers, width, heads, block)
    hidden = [
        Hidden(params, Exact(float(form[6:] or EPS)) if form.startswith("exact") else Form(form), statistic, beta2)
        for params in model.matrices().values()
    ]
    inside = {id(p) for h in hidden for p in h.params}
    adamw = torch.optim.AdamW([p for p in model.parameters() if id(p) not in inside], lr=0.003, betas=(0.9, 0.95))
    start, losses = time.time(), []
    for step, batch in zip(range(steps), batches(training, seed, size, block), strict=False):
        loss = model(batch)
        loss.backward()
        factor = min(1.0, (step + 1) / 20) * min(1.0, (steps - step) / (0.4 * steps))
        for h in hidden:
            h.step(lr * factor)
        adamw.param_groups[0]["lr"] = 0.003 * factor
        adamw.step()
        model.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        draws = batches(held_out, 10_000, 32, block)
        validation = sum(model(next(draws)).item() for _ in range(16)) / 16
    failures = sum(int(h.form.failures) for h in hidden if isinstance(h.form, Form))
    return {
        "form": form, "statistic": statistic, "beta2": beta2, "seed": seed, "width": width, "steps": steps,
        "lr": lr,
        "loss": round(validation, 5), "train": round(sum(losses[-20:]) / 20, 5), "failures": failures,
        "seconds": round(time.time() - start, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--statistic", choices=("momentum", "gradient"), default="momentum")
    parser.add_argument("--beta2", type=float, nargs="+", default=[0.2])
    parser.add_argument("--forms", nargs="+", default=["exact", "bf16"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=LR)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    keys = ("form", "statistic", "beta2", "seed", "width", "steps", "lr")
    done = {tuple(json.loads(line)[key] for key in keys) for line in lines}
    for seed in args.seeds:
        for beta2 in args.beta2:
            for form in args.forms:
                wanted = (form, args.statistic, beta2, seed, args.width, args.steps, args.lr)
                if wanted in done:
                    continue
                result = train(*wanted)
                print(json.dumps(result), flush=True)
                with args.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
