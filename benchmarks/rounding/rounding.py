"""What rounding costs: bfloat16 parameters against float32 masters, on a character GPT (4 layers of width 128).

    python benchmarks/rounding/rounding.py --steps 150 --seeds 0 1 2

All runs compute forward and backward in float32 on weights that are bfloat16 numbers, and round gradients to bfloat16.
They differ in how the optimizer's float32 result is kept. ``table.md`` beside this file is what it printed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asgo import ASGO, route
from asgo.lab.config.runs import ModelConfig
from asgo.lab.data.batches import DataConfig, open_data
from asgo.lab.models.language import build_model, token_loss
from asgo.optimizer.rounding import Rounding, init_residual, seed_of, widened, write_rounded_

LR, BLOCK, BATCH = 1.4e-2, 128, 4
MODES = ("masters", "twice", "nearest", "stochastic", "compensated")
"""float32 parameters beside the bfloat16 ones; decay and update each rounded; three modes of rounding."""


class Kept:
    """What lasts from step to step of a list of float32 parameters: bfloat16 numbers, and what the mode adds.

    Args:
        params: of the optimizer, which works in float32.
        mode: one of `MODES`.
    """

    def __init__(self, params: Sequence[Tensor], mode: str) -> None:
        self.params, self.mode = list(params), mode
        self.narrow = [param.detach().bfloat16() for param in params]
        self.residuals = [init_residual(x) for x in self.narrow] if mode == "compensated" else None

    def write(self, step: int, decays: list[float]) -> None:
        """Round what the optimizer has made, and give that back to it."""
        if self.mode == "masters":
            torch._foreach_copy_(self.narrow, self.params)
            return
        values = [param.detach() for param in self.params]
        if self.mode == "twice":
            sums = zip(self.narrow, values, decays, strict=True)
            values = [(old * decay).float() + (new - old.float() * decay) for old, new, decay in sums]
        seeds = [seed_of(step, i) for i in range(len(values))]
        mode: Rounding = "nearest" if self.mode == "twice" else self.mode  # pyright: ignore[reportAssignmentType]
        write_rounded_(self.narrow, values, mode, self.residuals, seeds)
        with torch.no_grad():
            torch._foreach_copy_(self.params, widened(self.narrow, values, self.residuals))

    @property
    def nbytes(self) -> int:
        """Of the parameters and what the mode keeps beside them."""
        masters = self.params if self.mode == "masters" else []
        return sum(x.nbytes for x in [*self.narrow, *masters, *(self.residuals or [])])


def factor(step: int, steps: int) -> float:
    """A linear rise over a tenth of the steps, then a cosine to 2 %."""
    warm = steps // 10
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def run(mode: str, seed: int, steps: int) -> tuple[float, float]:
    """Validation loss after the last step, and the bytes of parameters and state per parameter."""
    data = open_data(DataConfig(batch_size=BATCH, block_size=BLOCK), seed)
    net, own = (build_model(ModelConfig(), data.vocab_size, BLOCK, seed).bfloat16().float() for _ in range(2))
    optimizer = ASGO(route(own), lr=LR)
    weights, params = list[Tensor](net.parameters()), list[Tensor](own.parameters())
    kept = Kept(params, mode)
    decay = {p: group.get("weight_decay", 0.0) for group in optimizer.param_groups for p in group["params"]}
    for step in range(steps):
        token_loss(net, *data.batches.batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for weight, param in zip(weights, params, strict=True):
            param.grad, weight.grad = weight.grad.bfloat16().float(), None  # pyright: ignore[reportOptionalMemberAccess]
        lr = LR * factor(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        kept.write(step, [1 - lr * decay[param] for param in params])
        with torch.no_grad():
            torch._foreach_copy_(weights, kept.narrow)
    state = sum(x.nbytes for of in optimizer.state.values() for x in of.values())
    return validation(net, data), (kept.nbytes + state) / sum(x.numel() for x in params)


@torch.no_grad()
def validation(net: nn.Module, data: Any) -> float:
    """The mean loss over 128 held-out blocks."""
    total, tokens = 0.0, 0
    for inputs, targets in data.validation(16, 128):
        total += float(token_loss(net, inputs, targets)) * targets.numel()
        tokens += targets.numel()
    return total / tokens


def main() -> None:
    """Print a table, a row for each mode."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", default=MODES)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in args.modes}
    for seed in args.seeds:
        for mode in args.modes:
            found[mode].append(run(mode, seed, args.steps))
            print(mode, seed, *found[mode][-1], file=sys.stderr)
    seeds = " | ".join(f"seed {seed}" for seed in args.seeds)
    print(f"| parameters | {seeds} | mean | over {args.modes[0]} | bytes each |")
    print("|---" + "|---:" * (len(args.seeds) + 3) + "|")
    for mode, results in found.items():
        losses = [loss for loss, _ in results]
        over = statistics.mean(a - b for a, (b, _) in zip(losses, found[args.modes[0]], strict=True))
        cells = [f"{loss:.4f}" for loss in (*losses, statistics.mean(losses))] + [
            f"{over:+.4f}",
            f"{results[0][1]:.2f}",
        ]
        print(f"| {mode} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
