"""The flags of the benchmarks, and their ranges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from asgo.lab.config.ranges import SEED, THREADS, Range, check_distinct, check_known, check_ranges
from asgo.lab.files import check_new
from asgo.linalg.inverse_root import ROOTS
from benchmarks.speed.matrices import KINDS
from benchmarks.speed.optimizers import BENCH_OPTIMIZERS
from benchmarks.speed.workloads import WORKLOADS


@dataclass(frozen=True)
class StepConfig:
    """Time one optimizer step on the shapes of real models. No model runs: gradients are drawn.

    Args:
        shapes: whose parameters: gpt2-124m, llama-1b, resnet-50, olmoe, olmoe-small, or tiny-... to try it out.
        optimizers: which optimizers take part; those that are not installed become a row that says so.
        intervals: steps between refreshes of the roots. Each of them for asgo, asgo-heads and asgo-packed; the others
            that have such a setting use the first.
        layers: transformer blocks; None: gpt2-124m 12, llama-1b 2, olmoe 1. resnet-50 is always whole.
        matrices_only: leave out embeddings, output head and vectors.
        repeats: timed rounds; in each of them every optimizer has its turn of one whole interval.
        warm: steps before that of ASGO, at least 10: its first ten refresh all roots. Others have at least 3.
        device: auto: a GPU if there is one.
        dtype: precision of parameters and gradients.
        threads: CPU threads of torch; None: torch's choice.
        limit: seconds that one step may take; an optimizer that is slower is left out from there on.
        memory: billions of bytes for the states of the optimizers that take turns; those that do not fit together
            come in several sweeps, each with AdamW and Muon. None: 60 % of what is free.
        compile_peers: let heavyball compile its steps, as it does by default; their first steps take minutes.
        seed: seed of weights and gradients.
        out: folder of the results; must be new or empty.
    """

    shapes: tuple[str, ...] = ("gpt2-124m",)
    optimizers: tuple[str, ...] = tuple(BENCH_OPTIMIZERS)
    intervals: Annotated[tuple[int, ...], Range(1, 1e6, "numbers of steps")] = (1, 2)
    layers: Annotated[int | None, Range(1, 1e4, "a number of blocks")] = None
    matrices_only: bool = False
    repeats: Annotated[int, Range(1, 1e6, "a number of rounds")] = 10
    warm: Annotated[int, Range(10, 1e6, "a number of steps")] = 12
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: Annotated[int | None, THREADS] = None
    limit: Annotated[float, Range(1e-3, 1e9, "a number of seconds")] = 60.0
    memory: Annotated[float | None, Range(1e-3, 1e6, "billions of bytes")] = None
    compile_peers: bool = True
    seed: Annotated[int, SEED] = 0
    out: Path = Path("runs/bench-step")


@dataclass(frozen=True)
class DistributedConfig:
    """Time one step on several processes of this machine, and count what they send and keep.

    Args:
        shapes: whose parameters, one name: gpt2-124m, llama-1b, resnet-50, olmoe, olmoe-small, or tiny-... to try it.
        layouts: how processes divide the work: ddp (roots), zero1 (and state), fsdp2 (and parameters and gradients).
        processes: how many; one process is always measured.
        layers: transformer blocks; None: the shapes' own.
        interval: steps between refreshes of the roots.
        repeats: timed rounds of one whole interval.
        warm: steps before.
        threads: CPU threads of each process; None: one.
        seed: seed of weights and gradients.
        out: folder of the results; must be new or empty.
    """

    shapes: tuple[str, ...] = ("gpt2-124m",)
    layouts: tuple[str, ...] = ("ddp", "zero1", "fsdp2")
    processes: Annotated[tuple[int, ...], Range(1, 1024, "numbers of processes")] = (1, 2, 4)
    layers: Annotated[int | None, Range(1, 1e4, "a number of blocks")] = None
    interval: Annotated[int, Range(1, 1e6, "a number of steps")] = 1
    repeats: Annotated[int, Range(1, 1e6, "a number of rounds")] = 5
    warm: Annotated[int, Range(10, 1e6, "a number of steps")] = 10
    threads: Annotated[int | None, THREADS] = None
    seed: Annotated[int, SEED] = 0
    out: Path = Path("runs/bench-distributed")


@dataclass(frozen=True)
class RootConfig:
    """Time the inverse roots and compare them with float64: one matrix product of the same size is the unit.

    Args:
        roots: names of `asgo.linalg.inverse_root.ROOTS`.
        sizes: k of the k x k matrices.
        batches: how many of them at once.
        matrices: signal: average over drifting low-rank gradients in power-law noise; first: one gradient of rank
            k/8; identity; real: gradients of a GPT of width k that learns Python's help texts.
        eps: damping relative to the Frobenius norm.
        repeats: timed rounds; in each of them product and roots have their turn.
        real_steps: training steps behind the real matrices.
        device: auto: a GPU if there is one.
        threads: CPU threads of torch; None: torch's choice.
        seed: seed of the matrices.
        out: folder of the results; must be new or empty.
    """

    roots: tuple[str, ...] = tuple(ROOTS)
    sizes: Annotated[tuple[int, ...], Range(1, 32768, "numbers of rows")] = (64, 128, 384, 768, 1024)
    batches: Annotated[tuple[int, ...], Range(1, 1e6, "numbers of matrices")] = (1, 4)
    matrices: tuple[str, ...] = tuple(KINDS)
    eps: Annotated[float, Range(1e-12, 1, "a share of the norm")] = 1e-6
    repeats: Annotated[int, Range(1, 1e6, "a number of rounds")] = 7
    real_steps: Annotated[int, Range(1, 1e6, "a number of steps")] = 30
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int | None, THREADS] = None
    seed: Annotated[int, SEED] = 0
    out: Path = Path("runs/bench-root")


BenchConfig = StepConfig | RootConfig | DistributedConfig

LAYOUTS = ("ddp", "zero1", "fsdp2")
_NAMES = {"shapes": WORKLOADS, "optimizers": BENCH_OPTIMIZERS, "roots": ROOTS, "matrices": KINDS, "layouts": LAYOUTS}


def check(config: BenchConfig) -> None:
    """Refuse names that do not exist, values out of range, and an output folder that is in use.

    Raises:
        LabError: naming the flag, the value and what would fit.
    """
    for name, value in vars(config).items():
        if isinstance(value, tuple):
            check_distinct(name, value)
        if name in _NAMES:
            check_known(name, value, _NAMES[name])
    check_ranges(config)
    check_new(config.out)
