"""Loss against learning rate, on one's own model and text: where the best rate of one optimizer is for another.

A folder of run folders, so an interrupted search goes on where it was::

    rates.json                       the configuration
    runs/OPTIMIZER/lr-LR/            a short run for each rate
    table.md  plot.png  results.json
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from matplotlib.figure import Figure
from rich.console import Console

from asgo.lab.compare.tune import Tuning, search
from asgo.lab.config.checks import validate
from asgo.lab.config.codec import command, to_json
from asgo.lab.config.ranges import SEED, STEPS, Range, check_distinct
from asgo.lab.config.runs import CadenceConfig, OptimizerConfig, RunConfig, TrainConfig
from asgo.lab.data.batches import open_data
from asgo.lab.errors import Diverged
from asgo.lab.figures import STYLES, label, png
from asgo.lab.files import finite, make_folder, write_bytes, write_json, write_text
from asgo.lab.optimizers.registry import resolve
from asgo.lab.optimizers.spec import parse_spec
from asgo.lab.terminal import say
from asgo.lab.training import environment
from asgo.lab.training.run_folder import check_out
from asgo.lab.training.train import train

MARKER = "rates.json"
CADENCE = CadenceConfig(eval_every=10**9, checkpoint_every=10**9)
"""Only the losses at the beginning and the end, and no checkpoints but the last: the runs are short."""


@dataclass(frozen=True)
class RatesConfig(RunConfig):
    """Draw the loss after a short run against the learning rate, for each optimizer.

    Args:
        optimizers: names, or name:key=value,... as of asgo compare.
        rates: learning rates tried for each, the same number: in factors of two from the recorded default towards the
            best, then in between.
        seed: of weights and batches, the same for all runs.
        out: folder; must be new or empty, or one to --resume.
        resume: continue; finished runs are not repeated.
    """

    optimizers: tuple[str, ...] = ("asgo", "adamw")
    rates: Annotated[int, Range(1, 1000, "a number of learning rates")] = 7
    seed: Annotated[int, SEED] = 0
    steps: Annotated[int, STEPS] = 150
    cadence: CadenceConfig = CADENCE
    out: Path = Path("runs/lr")
    resume: bool = False


def learning_rates(config: RatesConfig, console: Console | None = None) -> dict[str, Any]:
    """Run the search, or what is left of it, and return what ``results.json`` holds.

    Raises:
        LabError: for a config, corpus or folder that does not fit; nothing has been written then.
        Stopped: after SIGINT or SIGTERM; finished runs are kept.
    """
    console = console or Console(quiet=True)
    validate(config)
    check_distinct("optimizers", config.optimizers)
    specs = {text: resolve(parse_spec(text)) for text in config.optimizers}
    check_out(config, MARKER, "search")
    open_data(config.data, config.seed, 0, 1)
    make_folder(config.out)
    write_json(config.out / MARKER, to_json(replace(config, resume=False)))
    found = {text: _search(config, text, spec, console) for text, spec in specs.items()}
    return _conclude(config, found, console)


def _search(config: RatesConfig, text: str, spec: OptimizerConfig, console: Console) -> Tuning:
    shared = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    folder = config.out / "runs" / re.sub(r"[^A-Za-z0-9._=-]+", "_", text)

    def loss(lr: float) -> float:
        out = folder / f"lr-{lr:.6g}"
        run = TrainConfig(**shared, optimizer=replace(spec, lr=lr), seed=config.seed, out=out, resume=True)
        try:
            return train(run, console, f"{text} lr {lr:.4g}")["val_loss"]
        except Diverged:
            return math.inf

    return search(spec.lr or 0.0, config.rates, loss)


def _conclude(config: RatesConfig, found: Mapping[str, Tuning], console: Console) -> dict[str, Any]:
    results = {
        "searches": {text: asdict(tuning) for text, tuning in found.items()},
        "command": command("asgo lr", replace(config, resume=False)),
        "date": environment.now(),
    }
    table = _table(found)
    write_text(config.out / "table.md", table + "\n")
    write_bytes(config.out / "plot.png", draw_rates(found))
    write_json(config.out / "results.json", finite(results))
    say(console, table, config.out / "plot.png")
    return results


def _table(found: Mapping[str, Tuning]) -> str:
    lines = ["| optimizer | best lr | loss there | at half | at twice | |", "|---|---|---|---|---|---|"]
    for text, tuning in found.items():
        losses = dict(tuning.tried)
        near = [next((x for lr, x in losses.items() if math.isclose(lr, tuning.lr * by)), None) for by in (1, 0.5, 2)]
        numbers = " | ".join("-" if x is None else f"{x:.4f}" for x in near)
        edge = "" if tuning.bracketed else "at the edge of what was tried: raise --rates"
        lines.append(f"| {text} | {tuning.lr:.4g} | {numbers} | {edge} |")
    return "\n".join(lines)


def draw_rates(found: Mapping[str, Tuning]) -> bytes:
    """Loss against learning rate, a curve for each optimizer; runs that diverged are left out."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, (text, tuning) in enumerate(found.items()):
        points = sorted((lr, loss) for lr, loss in tuning.tried if math.isfinite(loss))
        color, style, marker = STYLES[number % len(STYLES)]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linestyle=style, marker=marker, label=text)
            axes.axvline(tuning.lr, color=color, linewidth=0.8, alpha=0.6)
    axes.set_xscale("log", base=2)
    label(axes, "learning rate", "validation loss (nats per token)")
    return png(figure)
