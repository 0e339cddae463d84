"""Whether the parts of a fused weight train better apart or as one matrix: losses of small models, paired by seed.

    python -m benchmarks.layouts.apart
    python -m benchmarks.layouts.apart --kinds MLA LFM2
    python -m benchmarks.layouts.apart --steps 5 --out /tmp/rehearsal

Of every kind of model in `small_models`, one form has all of its fused weights cut into their parts ("apart"), and for
each of these weights another form has that weight as one matrix. Each form gets the same search: three learning rates
of ASGO, and further ones while the best stands at an edge, by the mean held-out loss of the search's seeds. Then both
train with other seeds at the best rates of both, and count at the better of these. Runs of one seed have the same
weights and batches, so that a paired t-test says whether the difference is one; its p is adjusted for the number of
weights (Holm).

The seeds of a rate are stacked and trained side by side, by `torch.func.vmap` and as one optimizer's stacks; but for
rounding, each seed is what it would be alone. Losses go into ``apart.jsonl``; runs that are there are not repeated, so
that the command can be stopped and given again. ``apart.json`` and ``apart.md`` are written at the end of each kind.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim.lr_scheduler import LambdaLR

from asgo import ASGO, Rule, route
from asgo.views import MATRIX
from benchmarks.layouts.small_models import KINDS, Kind

RATES = (0.005, 0.01, 0.02)
"""Where the search begins; further rates are twice or half of those at the edges."""
EDGES = 2
"""At most so many further rates of one form."""
SEARCH_SEEDS, TEST_SEEDS = (100, 101), tuple(range(6))
RUNS = len(RATES) * len(SEARCH_SEEDS) + len(TEST_SEEDS)
"""Of each form, without further rates."""
ADAMW_LR, WARMUP, DECAY = 0.003, 20, 0.4
"""Of what is no matrix; steps of the warm-up; the share of steps in which the rate falls to zero."""
LEVEL = 0.05


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        kind: of model.
        form: ``"apart"``, or the layer whose weight is one matrix.
        lr: ASGO's.
        seed: of weights and batches.
        steps: of training.
    """

    kind: str
    form: str
    lr: float
    seed: int
    steps: int


class Ledger:
    """Finished runs with their losses, in a file with a line for those that were stacked.

    Args:
        path: of the file.
        kinds: of which runs are still to come, for the time left.
        steps: of every run, instead of the kinds' own.
    """

    def __init__(self, path: Path, kinds: Sequence[Kind], steps: int | None) -> None:
        self.path, self.steps = path, steps
        self.done: dict[Run, float] = {}
        self.seconds: dict[str, list[float]] = {}
        self.left = {kind.name: (1 + len(kind.apart)) * RUNS for kind in kinds}
        for line in path.read_text().splitlines() if path.exists() else []:
            self._keep(json.loads(line))

    def losses(self, kind: Kind, form: str, lr: float, seeds: Sequence[int]) -> list[float]:
        """The held-out loss of each seed; those that are not in the ledger are trained together."""
        steps = self.steps or kind.steps
        runs = [Run(kind.name, form, lr, seed, steps) for seed in seeds]
        missing = [run.seed for run in runs if run not in self.done]
        self.left[kind.name] = max(self.left[kind.name] - len(seeds), 0)
        if missing:
            start = time.time()
            found = train(kind, form, lr, missing, steps)
            line = {
                "kind": kind.name, "form": form, "lr": lr, "seeds": missing, "steps": steps, "losses": found,
                "seconds": round(time.time() - start, 1),
            }  # fmt: skip
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._keep(line)
            print(
                f"{kind.name}, {form}, lr {lr:g}, {len(missing)} seeds: {_mean(found):.4f} in {line['seconds']:.0f} s; "
                f"about {self.time_left() / 60:.0f} min left",
                flush=True,
            )
        return [self.done[run] for run in runs]

    def _keep(self, line: Mapping[str, Any]) -> None:
        for seed, loss in zip(line["seeds"], line["losses"], strict=True):
            self.done[Run(line["kind"], line["form"], line["lr"], seed, line["steps"])] = loss
        self.seconds.setdefault(line["kind"], []).append(line["seconds"] / len(line["seeds"]))

    def time_left(self) -> float:
        """Seconds that the runs still to come take if they take what those of their kind took, or of all kinds."""
        every = [seconds for kind in self.seconds.values() for seconds in kind]
        return sum(runs * _mean(self.seconds.get(kind, every)) for kind, runs in self.left.items())


def rules(kind: Kind, form: str) -> list[Rule]:
    """All fused weights cut into their parts, but for the one that `form` names."""
    return [Rule(f"*.{layer}.weight", MATRIX if layer == form else view) for layer, view in kind.apart.items()]


def train(kind: Kind, form: str, lr: float, seeds: Sequence[int], steps: int) -> list[float]:
    """The held-out loss of each seed after training."""
    models = [_seeded(kind, seed) for seed in seeds]
    all_models = nn.ModuleList(models)
    optimizer = ASGO(route(all_models, rules(kind, form)), lr=lr, adamw={"lr": ADAMW_LR})
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP, max(steps - step, 0) / (DECAY * steps)))
    streams = [kind.batches(seed, kind.size, kind.length) for seed in seeds]
    for _ in range(steps):
        losses(models, [next(stream) for stream in streams]).sum().backward()
        optimizer.step()
        schedule.step()
        all_models.zero_grad()
    held_out = kind.batches(10_000, 4 * kind.size, kind.length, held_out=True)
    with torch.no_grad():
        found = sum(losses(models, [next(held_out)] * len(models)) for _ in range(8)) / 8
    return [round(loss, 5) for loss in found.tolist()]  # pyright: ignore[reportAttributeAccessIssue]


def losses(models: Sequence[nn.Module], batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """The loss of each model on its batch (models,): one forward of all, with their weights stacked."""
    first = models[0]
    named = [dict(model.named_parameters()) for model in models]
    stacked = {name: torch.stack([params[name] for params in named]) for name in named[0]}
    buffers = dict(first.named_buffers())

    def loss(params: dict[str, Tensor], *batch: Tensor) -> Tensor:
        return functional_call(first, params | buffers, batch)

    return vmap(loss)(stacked, *(torch.stack(parts) for parts in zip(*batches, strict=True)))


def _seeded(kind: Kind, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return kind.build()


def search(kind: Kind, form: str, ledger: Ledger) -> dict[float, float]:
    """Mean losses by rate: of the first rates, and of further ones while the best is the smallest or largest."""

    def mean(lr: float) -> float:
        found = ledger.losses(kind, form, lr, SEARCH_SEEDS)
        return _mean(found) if all(map(math.isfinite, found)) else math.inf

    tried = {lr: mean(lr) for lr in RATES}
    for _ in range(EDGES):
        best = min(tried, key=tried.__getitem__)
        if best not in (min(tried), max(tried)):
            break
        further = best / 2 if best == min(tried) else 2 * best
        tried[further] = mean(further)
    return dict(sorted(tried.items()))


def compare(kind: Kind, ledger: Ledger) -> list[dict[str, Any]]:
    """A row for each fused weight of a kind: both searches, the losses of all seeds, and the paired test."""
    searches = {form: search(kind, form, ledger) for form in ("apart", *kind.apart)}
    best = {form: min(tried, key=tried.__getitem__) for form, tried in searches.items()}
    rows = []
    for layer, view in kind.apart.items():
        rates = sorted({best["apart"], best[layer]})
        lr, losses = {}, {}
        for name, form in (("apart", "apart"), ("whole", layer)):
            tested = {rate: ledger.losses(kind, form, rate, TEST_SEEDS) for rate in rates}
            lr[name] = min(rates, key=lambda rate: _mean(tested[rate]))
            losses[name] = tested[lr[name]]
        test = stats.ttest_rel(losses["apart"], losses["whole"])
        interval = test.confidence_interval(1 - LEVEL)
        rows.append(
            {
                "kind": kind.name, "weight": layer, "view": str(view), "seeds": len(TEST_SEEDS),
                "searches": {"apart": searches["apart"], "whole": searches[layer]}, "lr": lr, "losses": losses,
                "difference": _mean(losses["apart"]) - _mean(losses["whole"]),
                "low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue),
            }
        )  # fmt: skip
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted probabilities, in the order given."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def verdict(row: Mapping[str, Any]) -> str:
    """What is better by the adjusted test."""
    if not row["holm"] < LEVEL:
        return "no difference shown"
    return "apart is better" if row["difference"] < 0 else "whole is better"


def write(rows: list[dict[str, Any]], out: Path, kinds: Sequence[Kind]) -> None:
    """The record and its tables."""
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["holm"] = adjusted
    ran = {"torch": torch.__version__, "transformers": transformers.__version__}
    (out / "apart.json").write_text(json.dumps({**ran, "rows": rows}, indent=1) + "\n")
    (out / "apart.md").write_text("\n".join([*_head(ran, kinds), *map(_line, rows), *_searches(rows)]) + "\n")


def _head(ran: Mapping[str, str], kinds: Sequence[Kind]) -> list[str]:
    chosen = "" if len(kinds) == len(KINDS) else f" --kinds {' '.join(k.name for k in kinds)}"
    sizes = "; ".join(f"{k.name} {k.steps} steps of {k.size} x {k.length}" for k in kinds)
    return [
        f"# `python -m benchmarks.layouts.apart{chosen}`",
        "",
        f"Held-out losses of small models, each form at the better of both best rates, {len(TEST_SEEDS)} paired seeds: "
        "the difference is apart minus whole, negative where apart is better, with its 95 % interval and the p of the "
        f"paired t-test, as it is and adjusted for {sum(len(k.apart) for k in kinds)} weights (Holm). Width 48, "
        f"{sizes} (characters of Shakespeare; for AdaLN, patches of digits). "
        f"torch {ran['torch']}, transformers {ran['transformers']}.",
        "",
        "| model | weight | parts by | lr apart | lr whole | loss apart | loss whole | difference | p | adjusted | |",
        "|---|---|---|---:|---:|---:|---:|---|---:|---:|---|",
    ]


def _line(row: Mapping[str, Any]) -> str:
    apart, whole = (_mean(row["losses"][form]) for form in ("apart", "whole"))
    view = row["view"].replace("|", "/")
    difference = f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
    return (
        f"| {row['kind']} | `{row['weight']}` | {view} | {row['lr']['apart']:g} | {row['lr']['whole']:g} | "
        f"{apart:.4f} | {whole:.4f} | {difference} | {row['p']:.2g} | {row['holm']:.2g} | {verdict(row)} |"
    )


def _searches(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["", f"The searches, mean losses of {len(SEARCH_SEEDS)} other seeds by rate:", ""]
    lines += ["| model | form | losses |", "|---|---|---|"]
    forms = {
        (row["kind"], "all apart" if form == "apart" else f"`{row['weight']}` whole"): row["searches"][form]
        for row in rows
        for form in ("apart", "whole")
    }
    for (kind, form), tried in forms.items():
        shown = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in tried.items())
        lines.append(f"| {kind} | {form} | {shown} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [kind.name for kind in KINDS]
    parser.add_argument("--kinds", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, help="of every run, for a rehearsal")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)
    kinds, rows = [kind for kind in KINDS if kind.name in options.kinds], []
    ledger = Ledger(options.out / "apart.jsonl", kinds, options.steps)
    for i, kind in enumerate(kinds):
        rows += compare(kind, ledger)
        write(rows, options.out, kinds[: i + 1])
    print((options.out / "apart.md").read_text())


if __name__ == "__main__":
    main()
