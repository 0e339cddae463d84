"""The command ``asgo``: train, compare, demo, inspect, optimizers, plan, bench, and the experiments of the papers."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Union

import tyro
from rich.console import Console

from asgo.lab.advice import AdviceConfig, inspect_advise
from asgo.lab.bench.config import DistributedConfig, RootConfig, StepConfig
from asgo.lab.bench.distributed import bench_distributed
from asgo.lab.bench.root import bench_root
from asgo.lab.bench.step import bench_step
from asgo.lab.compare import compare
from asgo.lab.config import DEMO, CompareConfig, TrainConfig, from_json
from asgo.lab.convex.glm import GlmConfig, glm
from asgo.lab.errors import LabError
from asgo.lab.experiment import marker
from asgo.lab.files import read_json
from asgo.lab.gradients import MARKER, GradientsConfig, inspect_gradients
from asgo.lab.hessian.config import HessianConfig
from asgo.lab.hessian.experiment import inspect_hessian
from asgo.lab.inspect import RoutingConfig, inspect_routing
from asgo.lab.optimizers import OptimizersConfig, list_optimizers
from asgo.lab.plan.config import PlanConfig
from asgo.lab.plan.plan import plan
from asgo.lab.regret import RegretConfig, regret
from asgo.lab.signals import Stopped
from asgo.lab.theory.experiment import TheoryConfig, theory
from asgo.lab.train import train
from asgo.lab.vision.experiment import VisionConfig, vision

DESCRIPTION = "Train language models with ASGO and its peers, compare them, time them, and look at what they do."
DEMO_HELP = "Compare ASGO, AdamW and Muon on Shakespeare: asgo compare with its settings chosen."
BENCH_HELP = "Measure speed: of whole optimizer steps, on several processes, or of the inverse roots inside them."
INSPECT_HELP = "Look at a model as an optimizer sees it."
INTERRUPTED = 130

Resumable = (
    TrainConfig
    | CompareConfig
    | GradientsConfig
    | HessianConfig
    | GlmConfig
    | RegretConfig
    | VisionConfig
    | TheoryConfig
)
Tables = RoutingConfig | AdviceConfig | OptimizersConfig | PlanConfig
Command = Resumable | Tables | StepConfig | RootConfig | DistributedConfig

SAVED: dict[type[Any], str] = {
    TrainConfig: "config.json",
    CompareConfig: "comparison.json",
    GradientsConfig: MARKER,
    HessianConfig: marker("hessian"),
    GlmConfig: marker("glm"),
    RegretConfig: marker("regret"),
    VisionConfig: marker("vision"),
    TheoryConfig: marker("theory"),
}
"""The file in which a folder keeps the configuration of what can be resumed."""

TEXTS: dict[type[Any], Callable[[Any], str]] = {RoutingConfig: inspect_routing, OptimizersConfig: list_optimizers}
"""Commands whose result is a text."""

EXPERIMENTS: dict[type[Any], Callable[[Any, Console], Any]] = {
    CompareConfig: compare,
    GradientsConfig: inspect_gradients,
    AdviceConfig: inspect_advise,
    HessianConfig: inspect_hessian,
    StepConfig: bench_step,
    RootConfig: bench_root,
    DistributedConfig: bench_distributed,
    GlmConfig: glm,
    RegretConfig: regret,
    VisionConfig: vision,
    TheoryConfig: theory,
    PlanConfig: plan,
}
"""Commands that show their progress and leave a folder of results."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for what cannot be done, 130 after Ctrl-C.

    Args:
        args: the words after ``asgo``; None: those of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(f"asgo {version('asgo')}")
        return 0
    config = None
    try:
        config = parse(args)
        return 0 if config is None else run(config)
    except Stopped as stopped:
        return _fail(str(stopped), INTERRUPTED, "") if _first() else INTERRUPTED
    except KeyboardInterrupt:
        how = " Repeat the command with --resume to go on." if isinstance(config, Resumable) else ""
        return _fail(f"interrupted.{how}", INTERRUPTED, "")
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in the buffer
        return _fail("stopped: nobody reads its output any more.", 1, "") if config is not None else 1
    except LabError as error:
        return _fail(str(error), 2)


def run(config: Command) -> int:
    """Do what a config says, with progress and results on standard output."""
    console = Console()
    if isinstance(config, TrainConfig):
        result = train(config, console)
        if _first():
            text = f"validation loss {result['val_loss']:.4f} after {result['steps']} steps; {config.out}"
            console.print(text, highlight=False, soft_wrap=True)
    elif type(config) in TEXTS:
        print(TEXTS[type(config)](config))
    else:
        EXPERIMENTS[type(config)](config, console)
    return 0


def parse(args: Sequence[str]) -> Command | None:
    """The config that the words describe; None if they asked for help, which is then printed.

    With ``--resume``, fields that are not given are those of the run in the folder, not the usual defaults.

    Raises:
        LabError: for flags that do not exist or do not fit.
    """
    config = _parse(args, {})
    if not isinstance(config, Resumable) or not config.resume:
        return config
    kind, path = type(config), config.out / SAVED[type(config)]
    return _parse(args, {kind: from_json(kind, read_json(path))}) if path.exists() else config


def _parse(args: Sequence[str], saved: Mapping[type[Any], Any]) -> Command | None:
    """The command, with the fields of a saved configuration in place of the defaults of its kind."""
    demo = saved.get(CompareConfig, DEMO)
    kinds = Union[  # noqa: UP007 (built from values, so it cannot be written with |)
        _subcommand("train", TrainConfig, saved),
        _subcommand("compare", CompareConfig, saved),
        Annotated[CompareConfig, tyro.conf.subcommand("demo", default=demo, description=DEMO_HELP)],
        Annotated[
            Union[  # noqa: UP007
                _subcommand("routing", RoutingConfig, saved),
                _subcommand("gradients", GradientsConfig, saved),
                _subcommand("advise", AdviceConfig, saved),
                _subcommand("hessian", HessianConfig, saved),
            ],
            tyro.conf.subcommand("inspect", description=INSPECT_HELP),
        ],
        _subcommand("optimizers", OptimizersConfig, saved),
        _subcommand("plan", PlanConfig, saved),
        Annotated[
            Union[  # noqa: UP007
                _subcommand("step", StepConfig, saved),
                _subcommand("root", RootConfig, saved),
                _subcommand("distributed", DistributedConfig, saved),
            ],
            tyro.conf.subcommand("bench", description=BENCH_HELP),
        ],
        _subcommand("glm", GlmConfig, saved),
        _subcommand("regret", RegretConfig, saved),
        _subcommand("vision", VisionConfig, saved),
        _subcommand("theory", TheoryConfig, saved),
    ]
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            return tyro.cli(kinds, args=args, prog="asgo", description=DESCRIPTION)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except SystemExit as stop:
        if stop.code:
            raise LabError(_one_line(words.getvalue())) from None
        return None


def _subcommand(name: str, kind: type[Any], saved: Mapping[type[Any], Any]) -> Any:
    return Annotated[kind, tyro.conf.subcommand(name, default=saved.get(kind, kind()))]


def _one_line(box: str) -> str:
    """The message inside the frame that tyro draws, without its rules, colours and title."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in box.splitlines()]
    inside = [line.strip("│ ") for line in lines if line.startswith("│")]
    message = " ".join(line for line in inside if line and not set(line) <= {"─"})
    return message or " ".join(lines)


def _first() -> bool:
    """Whether this is the process that speaks for all of a run; what one alone meets, it says itself."""
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str, code: int, kind: str = "error: ") -> int:
    print(f"asgo: {kind}{' '.join(message.split())}", file=sys.stderr)
    return code
