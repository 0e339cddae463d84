"""``asgo inspect advise``: train a little, ask `asgo.advise`, and leave rules that ``asgo:rules=FILE`` follows.

::

    advice.json   the configuration              rules.json     for asgo compare --optimizers asgo asgo:rules=...
    table.md      the advice and its evidence    against.json   the opposite, to test the evidence by
    table.csv     results.json                   plot.png
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from asgo.diagnostics.advice import KEPT, NOISY, SLACK, Advice, Line, advise
from asgo.diagnostics.evidence import LAGS, SIDES
from asgo.lab import tables
from asgo.lab.config.codec import command, to_json
from asgo.lab.config.ranges import SEED, STEPS, Range
from asgo.lab.config.runs import OptimizerConfig, RunConfig
from asgo.lab.errors import Diverged, LabError
from asgo.lab.figures import STYLES, label, png
from asgo.lab.files import check_new, write_results
from asgo.lab.inspection.run import run_of
from asgo.lab.models.language import token_loss
from asgo.lab.optimizers.rules import write_rules
from asgo.lab.terminal import say
from asgo.lab.training import environment
from asgo.lab.training.progress import LiveLine
from asgo.lab.training.train import Trainer

Batch = tuple[Tensor, Tensor]
COLUMNS = (
    *("name", "view", "side", "interval", "statistic"),
    *(f"bound_{word}_{side}" for word in ("whole", "heads") for side in SIDES),
    *(f"kept_{statistic}_{interval}" for statistic in ("momentum", "gradient") for interval in LAGS),
    *("noise_share", "stable_rank", "curvature_left", "curvature_right", "note"),
)


@dataclass(frozen=True)
class AdviceConfig(RunConfig):
    """Ask the gradients of a run which view, side, interval and statistic each parameter deserves.

    Args:
        steps: optimizer steps of the whole run, over which its schedule goes.
        optimizer: what trains before the gradients are looked at.
        seed: seed of the initial weights and the order of the data; keep it out of what is compared later.
        after: steps of training before the gradients are looked at.
        batches: batches whose gradients are looked at, each of one step's size.
        curvature: sides.json of the Hessian experiment: {"NAME": {"left": 0.4, "right": 0.3}}, the larger is favoured.
        out: folder to write; must be new or empty.
    """

    steps: Annotated[int, STEPS] = 300
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: Annotated[int, SEED] = 1000
    after: Annotated[int, Range(0, 1e12, "a number of steps")] = 100
    batches: Annotated[int, Range(2, 1e6, "a number of batches")] = 32
    curvature: Path | None = None
    out: Path = Path("runs/advice")


def inspect_advise(config: AdviceConfig, console: Console | None = None) -> Advice:
    """Train, advise, write and show.

    Raises:
        LabError: for a config, corpus, folder or file that does not fit; nothing has been written then.
        Diverged: when the loss is NaN or infinite.
    """
    console = console or Console(quiet=True)
    trainer, curvature = _prepare(config)
    with LiveLine(console, "advise", config.after + config.batches) as line:
        trainer.learn(config.after, line)
        batches = [(i, trainer.step_batch(config.after + i)) for i in range(config.batches)]

        def loss(model: nn.Module, numbered: tuple[int, Batch]) -> Tensor:
            number, batch = numbered
            line.show(config.after + number + 1, f"batch {number + 1}/{config.batches} of evidence")
            return token_loss(model, *batch)

        try:
            advice = advise(trainer.raw, batches, loss, curvature)
        except (ValueError, TypeError) as error:
            raise LabError(str(error)) from error
    rows = [row(line) for line in advice.lines]
    words, says = command("asgo inspect advise", config), summary(advice)
    session = environment.describe(trainer.device, 1, config.after)
    files = {
        "advice.json": to_json(config),
        "table.md": f"`{words}`\n\n```text\n{advice}\n```\n\n- " + "\n- ".join(says) + "\n",
        "table.csv": tables.csv_text(rows, COLUMNS),
        "plot.png": draw(advice),
        "results.json": {"command": words, "config": to_json(config), "says": says, "rows": rows, "session": session},
    }
    write_results(config.out, files)
    write_rules(config.out / "rules.json", advice.rules)
    write_rules(config.out / "against.json", advice.against)
    say(console, advice, *says, *(config.out / name for name in ("table.md", "plot.png", "rules.json")))
    return advice


def _prepare(config: AdviceConfig) -> tuple[WarmupTrainer, dict[str, Any]]:
    """What needs no writing, so that all that can be refused is refused first."""
    run = run_of("asgo inspect advise", config, config.optimizer, config.seed, config.out, resume=False)
    if config.after > config.steps:
        raise LabError(f"--after {config.after} is more than --steps {config.steps}: look earlier, or train longer.")
    check_new(config.out)
    return WarmupTrainer(run), _read_curvature(config.curvature)


def _read_curvature(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LabError(f"--curvature {path} cannot be read: {error}. Pass a JSON file, or leave it out.") from error
    if not isinstance(found, dict):
        raise LabError(f'--curvature {path} holds no object: write it as {{"NAME": {{"left": 0.4, "right": 0.3}}}}.')
    return found


class WarmupTrainer(Trainer):
    """A run that is trained a while and leaves no folder."""

    def learn(self, steps: int, line: LiveLine) -> None:
        """Do so many steps; raise `Diverged` when the loss is not finite afterwards."""
        torch.manual_seed(self.config.seed)
        line.begin(0)
        while self.step < steps:
            self._train_step()
            line.show(self.step, f"step {self.step}/{steps} of training")
        loss = self.meter.loss()
        if not math.isfinite(loss):
            name, lr = self.config.optimizer.name, self.config.optimizer.lr
            raise Diverged(
                f"the loss is {loss} within {steps} steps ({name}, lr {lr:g}): pass a smaller --optimizer.lr."
            )

    def step_batch(self, step: int) -> Batch:
        """The whole batch of one step: all that is accumulated."""
        parts = self.config.grad_accumulation
        pairs = [self._batch(self.data.batches, step * parts + part) for part in range(parts)]
        return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


# ---- what is left in the folder --------------------------------------------------------------------------------


def row(line: Line) -> dict[str, Any]:
    """A line of advice with its evidence, a number per column."""
    bound, kept, evidence = line.evidence.bound, line.evidence.kept, asdict(line.evidence)
    values = {f"bound_{word}_{side}": value for (word, side), value in bound.items()}
    values |= {f"kept_{statistic}_{interval}": value for (statistic, interval), value in kept.items()}
    values |= {f"curvature_{side}": value for side, value in line.curvature.items()}
    values |= {name: evidence[name] for name in ("noise_share", "stable_rank")}
    values |= {"name": line.name, "view": line.word, "note": line.note}
    values |= {name: getattr(line, name) for name in ("side", "interval", "statistic")}
    return {name: values.get(name) for name in COLUMNS}


def summary(advice: Advice) -> list[str]:
    """How often the advice departs from the defaults, in words."""
    lines = [line for line in advice.lines if not line.note]
    departs = {
        "view": sum(line.word != "whole" for line in lines),
        "side": sum(line.side != "auto" for line in lines),
        "interval": sum(line.interval > 1 for line in lines),
        "statistic": sum(line.statistic != "momentum" for line in lines),
    }
    says = [f"{name}: {count} of {len(lines)} parameters depart from the default" for name, count in departs.items()]
    return says + [f"not measurable: {line.name}: {line.note}" for line in advice.lines if line.note]


def draw(advice: Advice) -> bytes:
    """The evidence of every parameter and the thresholds that decide."""
    lines = [line for line in advice.lines if not line.note]
    figure = Figure(figsize=(14, max(4, 1.8 + 0.32 * len(lines))), layout="constrained")
    bounds, kept, noise = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    _dots(bounds, lines, [("bound", word, side) for word in ("whole", "heads") for side in SIDES])
    _dots(kept, lines, [("kept", statistic, 2) for statistic in ("momentum", "gradient")])
    _dots(noise, lines, [("noise", "", "")])
    names = {bounds: "bound / least", kept: "cosine kept by a root one step old", noise: "noise (share of a batch)"}
    for (axes, name), edge in zip(names.items(), (1 + SLACK, KEPT, NOISY), strict=True):
        axes.axvline(edge, color="#404040", linewidth=0.8, linestyle=(0, (2, 2)))
        axes.set_yticks(range(len(lines)), [line.name for line in lines])
        axes.set_ylim(len(lines) - 0.5, -0.5)
        label(axes, name, "", legend=False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return png(figure)


def _dots(axes: Axes, lines: Sequence[Line], columns: Sequence[tuple[str, str, Any]]) -> None:
    """A marker for each column; filled where it is what the advice takes."""
    for (what, first, second), (color, _, marker) in zip(columns, STYLES, strict=False):
        name = f"{first} {second}" if what == "bound" else first
        for taken in (False, True):
            own = [(y, line) for y, line in enumerate(lines) if _is_taken(line, what, first, second) == taken]
            points = [(value, y) for y, line in own if (value := _value(line, what, first, second)) is not None]
            x, y = zip(*points, strict=True) if points else ((), ())
            face = color if taken else "none"
            axes.plot(
                x, y, linestyle="", color=color, marker=marker, markerfacecolor=face, label=name if taken else None
            )


def _is_taken(line: Line, what: str, first: str, second: Any) -> bool:
    return (line.word, line.side) == (first, second) if what == "bound" else first in ("", line.statistic)


def _value(line: Line, what: str, first: str, second: Any) -> float | None:
    if what == "noise":
        return line.evidence.noise_share
    found: Mapping[Any, float] = line.evidence.bound if what == "bound" else line.evidence.kept
    return found.get((first, second))
