"""The command ``asgo``: train, compare, demo, inspect, optimizers, bench."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from rich.console import Console

from asgo.lab.bench.config import RootConfig, StepConfig
from asgo.lab.bench.root import bench_root
from asgo.lab.bench.step import bench_step
from asgo.lab.compare import compare
from asgo.lab.config import DEMO, CompareConfig, TrainConfig, from_json
from asgo.lab.errors import LabError
from asgo.lab.files import read_json
from asgo.lab.inspect import InspectConfig, inspect_routing
from asgo.lab.optimizers import OptimizersConfig, list_optimizers
from asgo.lab.signals import Stopped
from asgo.lab.train import train

DESCRIPTION = "Train language models with ASGO and its peers, compare them, time them, and look at what they do."
DEMO_HELP = "Compare ASGO, AdamW and Muon on Shakespeare: asgo compare with its settings chosen."
BENCH_HELP = "Measure speed: of whole optimizer steps, or of the inverse roots inside them."
INTERRUPTED = 130

Command = TrainConfig | CompareConfig | InspectConfig | OptimizersConfig | StepConfig | RootConfig


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what cannot be done, 130 after Ctrl-C.

    Args:
        args: the words after ``asgo``; None: those of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(f"asgo {version('asgo')}")
        return 0
    try:
        config = parse(args)
        return 0 if config is None else run(config)
    except Stopped as stopped:
        return _fail(str(stopped), INTERRUPTED, "")
    except KeyboardInterrupt:
        return _fail("interrupted. Repeat the command with --resume to go on.", INTERRUPTED, "")
    except LabError as error:
        return _fail(str(error), 2)


def run(config: Command) -> int:
    """Do what a config says, with progress and results on standard output."""
    console = Console()
    if isinstance(config, TrainConfig):
        result = train(config, console)
        if os.environ.get("RANK", "0") == "0":
            text = f"validation loss {result['val_loss']:.4f} after {result['steps']} steps; {config.out}"
            console.print(text, highlight=False, soft_wrap=True)
    elif isinstance(config, CompareConfig):
        compare(config, console)
    elif isinstance(config, OptimizersConfig):
        print(list_optimizers(config))
    elif isinstance(config, StepConfig):
        bench_step(config, console)
    elif isinstance(config, RootConfig):
        bench_root(config, console)
    else:
        print(inspect_routing(config))
    return 0


def parse(args: Sequence[str]) -> Command | None:
    """The config that the words describe; None if they asked for help, which is then printed.

    With ``--resume``, fields that are not given are those of the run in the folder, not the usual defaults.

    Raises:
        LabError: for flags that do not exist or do not fit.
    """
    config = _parse(args, TrainConfig(), CompareConfig(), DEMO)
    if isinstance(config, TrainConfig) and config.resume and (config.out / "config.json").exists():
        return _parse(args, _saved(TrainConfig, config.out / "config.json"), CompareConfig(), DEMO)
    if isinstance(config, CompareConfig) and config.resume and (config.out / "comparison.json").exists():
        saved = _saved(CompareConfig, config.out / "comparison.json")
        return _parse(args, TrainConfig(), saved, saved)
    return config


def _saved(kind: type[Any], path: Path) -> Any:
    return from_json(kind, read_json(path))


def _parse(args: Sequence[str], run: TrainConfig, comparison: CompareConfig, demo: CompareConfig) -> Command | None:
    subcommand = tyro.conf.subcommand
    kinds = Union[  # noqa: UP007 (built from values, so it cannot be written with |)
        Annotated[TrainConfig, subcommand("train", default=run)],
        Annotated[CompareConfig, subcommand("compare", default=comparison)],
        Annotated[CompareConfig, subcommand("demo", default=demo, description=DEMO_HELP)],
        Annotated[InspectConfig, subcommand("inspect")],
        Annotated[OptimizersConfig, subcommand("optimizers")],
        Annotated[
            Union[Annotated[StepConfig, subcommand("step")], Annotated[RootConfig, subcommand("root")]],  # noqa: UP007
            subcommand("bench", description=BENCH_HELP),
        ],
    ]
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            return tyro.cli(kinds, args=args, prog="asgo", description=DESCRIPTION)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except SystemExit as stop:
        if stop.code:
            raise LabError(_one_line(words.getvalue())) from None
        return None


def _one_line(box: str) -> str:
    """The message inside the frame that tyro draws, without its rules, colours and title."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in box.splitlines()]
    inside = [line.strip("│ ") for line in lines if line.startswith("│")]
    message = " ".join(line for line in inside if line and not set(line) <= {"─"})
    return message or " ".join(lines)


def _fail(message: str, code: int, kind: str = "error: ") -> int:
    print(f"asgo: {kind}{' '.join(message.split())}", file=sys.stderr)
    return code
