"""The command ``asgo``: train, compare, demo, lr, inspect, optimizers, plan."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Annotated, Any, Union

import tyro
from rich.console import Console

from asgo.lab import terminal
from asgo.lab.compare.compare import compare
from asgo.lab.compare.learning_rates import MARKER as RATES
from asgo.lab.compare.learning_rates import RatesConfig, learning_rates
from asgo.lab.config.codec import from_json
from asgo.lab.config.ranges import check_known
from asgo.lab.config.runs import CompareConfig, RunConfig, TrainConfig
from asgo.lab.config.workloads import DEMO, WORKLOADS
from asgo.lab.errors import LabError
from asgo.lab.files import read_json
from asgo.lab.inspection.advice import AdviceConfig, inspect_advise
from asgo.lab.inspection.gradients import MARKER, GradientsConfig, inspect_gradients
from asgo.lab.inspection.routing import RoutingConfig, inspect_routing
from asgo.lab.optimizers.listing import OptimizersConfig, list_optimizers
from asgo.lab.plan.config import PlanConfig
from asgo.lab.plan.plan import plan
from asgo.lab.terminal import exit_code, is_first_process, say
from asgo.lab.training.train import train

DESCRIPTION = "Train language models with ASGO and its peers, compare them, and look at what they do."
DEMO_HELP = "Compare ASGO, AdamW and Muon on Shakespeare: asgo compare with its settings chosen."
INSPECT_HELP = "Look at a model as an optimizer sees it."

Resumable = TrainConfig | CompareConfig | RatesConfig | GradientsConfig
Tables = RoutingConfig | AdviceConfig | OptimizersConfig | PlanConfig
Command = Resumable | Tables

SAVED: dict[type[Any], str] = {
    TrainConfig: "config.json",
    CompareConfig: "comparison.json",
    RatesConfig: RATES,
    GradientsConfig: MARKER,
}
"""The file in which a folder keeps the configuration of what can be resumed."""

TEXTS: dict[type[Any], Callable[[Any], str]] = {RoutingConfig: inspect_routing, OptimizersConfig: list_optimizers}
"""Commands whose result is a text."""

COMMANDS: dict[type[Any], Callable[[Any, Console], Any]] = {
    CompareConfig: compare,
    RatesConfig: learning_rates,
    GradientsConfig: inspect_gradients,
    AdviceConfig: inspect_advise,
    PlanConfig: plan,
}
"""Commands that show their progress and leave a folder of results."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, as `exit_code` does."""
    words = list(sys.argv[1:] if args is None else args)
    if words == ["--version"]:
        print(f"asgo {version('asgo')}")
        return 0
    return exit_code(lambda: parse(words or ["--help"]), run)


def run(config: Command) -> None:
    """Do what a config says, with progress and results on standard output."""
    console = Console()
    if isinstance(config, TrainConfig):
        result = train(config, console)
        if is_first_process():
            say(console, f"validation loss {result['val_loss']:.4f} after {result['steps']} steps; {config.out}")
    elif type(config) in TEXTS:
        print(TEXTS[type(config)](config))
    else:
        COMMANDS[type(config)](config, console)


def parse(args: Sequence[str]) -> Command | None:
    """The config that the words describe; None if they asked for help, which is then printed.

    With ``--resume``, fields that are not given have the values of the run in the folder, not the usual defaults.
    """
    if args[:1] == ["bench"]:
        raise LabError(f"benchmarks are programs of the repository: in a clone of it run {_benchmark(args[1:])}.")
    args, workload = _take_workload(args)
    config = _parse(args, workload)
    if not isinstance(config, Resumable) or not config.resume:
        return config
    kind, path = type(config), config.out / SAVED[type(config)]
    return _parse(args, {kind: from_json(kind, read_json(path))}) if path.exists() else config


def _benchmark(words: Sequence[str]) -> str:
    name, *flags = words or ["NAME"]
    return shlex.join(["python", "-m", f"benchmarks.{name}", *flags])


def _take_workload(args: Sequence[str]) -> tuple[list[str], dict[type[Any], Any]]:
    """The words without ``--workload NAME``, and the configurations that they start from instead of the defaults."""
    words = [part for word in args for part in (word.split("=", 1) if word.startswith("--workload=") else [word])]
    if "--workload" not in words:
        return words, {}
    at = words.index("--workload")
    name = "".join(words[at + 1 : at + 2])
    if words[0] not in ("train", "compare"):
        raise LabError(f"asgo {words[0]} has no --workload: it is for asgo train and asgo compare.")
    check_known("workload", [name], WORKLOADS)
    shared = {field.name: getattr(WORKLOADS[name], field.name) for field in fields(RunConfig)}
    return words[:at] + words[at + 2 :], {kind: replace(kind(), **shared) for kind in (TrainConfig, CompareConfig)}


def _parse(args: Sequence[str], saved: Mapping[type[Any], Any]) -> Command | None:
    """The command, with the fields of a saved configuration in place of the defaults of its kind."""
    demo = saved.get(CompareConfig, DEMO)
    kinds = Union[  # noqa: UP007 (built from values, so it cannot be written with |)
        _subcommand("train", TrainConfig, saved),
        _subcommand("compare", CompareConfig, saved),
        Annotated[CompareConfig, tyro.conf.subcommand("demo", default=demo, description=DEMO_HELP)],
        _subcommand("lr", RatesConfig, saved),
        Annotated[
            Union[  # noqa: UP007
                _subcommand("routing", RoutingConfig, saved),
                _subcommand("gradients", GradientsConfig, saved),
                _subcommand("advise", AdviceConfig, saved),
            ],
            tyro.conf.subcommand("inspect", description=INSPECT_HELP),
        ],
        _subcommand("optimizers", OptimizersConfig, saved),
        _subcommand("plan", PlanConfig, saved),
    ]
    return terminal.parse(kinds, args, "asgo", DESCRIPTION)


def _subcommand(name: str, kind: type[Any], saved: Mapping[type[Any], Any]) -> Any:
    return Annotated[kind, tyro.conf.subcommand(name, default=saved.get(kind, kind()))]
