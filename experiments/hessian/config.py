"""What the Hessian experiment measures: the flags and their ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from asgo.lab.config.runs import ModelConfig, OptimizerConfig
from asgo.lab.data.batches import DataConfig
from asgo.lab.errors import LabError
from experiments.hessian.estimates import SETS

Curvature = Literal["hessian", "ggn"]
STEPS = (0, 500)
TINY = ModelConfig(preset="tiny")
ADAMW = OptimizerConfig(name="adamw")


@dataclass(frozen=True)
class HessianConfig:
    """Measure how block-diagonal the Hessian of a language model is, and which side of each matrix it favours.

    Args:
        data: corpus, tokens and the batch whose loss is differentiated.
        model: the language model.
        optimizer: what trains it before it is measured again.
        run: a run folder of asgo train: its model, corpus and checkpoints instead of training one here.
        steps: training steps after which to measure, 0 the initial weights; None: 0 and 500, with --run 0 and the
            last checkpoint.
        train_batch: blocks per training step.
        curvatures: hessian, ggn (the generalised Gauss-Newton matrix), or both.
        exact_up_to: largest matrix, in entries, whose block is measured exactly, column by column; larger ones by
            probing.
        probes: sets of random signs for each matrix that is probed, of 4 products each and one for each head.
        chunk: most products at once; of large models fewer are taken, to save memory.
        seed: of the initial weights, the batches and the signs.
        processes: matrices at once, each with one thread; None: one per processor.
        out: folder to write; must be new or empty, or an experiment to --resume.
        resume: continue an interrupted experiment; what is done is not repeated.
    """

    data: Annotated[DataConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: DataConfig(block_size=32, batch_size=4)
    )
    model: ModelConfig = TINY
    optimizer: OptimizerConfig = ADAMW
    run: Path | None = None
    steps: tuple[int, ...] | None = None
    train_batch: int = 16
    curvatures: tuple[Curvature, ...] = ("hessian", "ggn")
    exact_up_to: int = 4096
    probes: int = 16
    chunk: int = 64
    seed: int = 0
    processes: int | None = None
    out: Path = Path("runs/hessian")
    resume: bool = False


def check(config: HessianConfig) -> None:
    """Refuse numbers that nothing can be measured with.

    Raises:
        LabError: naming the flag, what was got and what would fit.
    """
    config.data.check()
    for name, least in (("train_batch", 1), ("exact_up_to", 0), ("probes", SETS), ("chunk", 1), ("seed", 0)):
        if getattr(config, name) < least:
            flag = "--" + name.replace("_", "-")
            raise LabError(f"{flag} {getattr(config, name)} is out of range: pass {least} or more.")
    for name in ("steps", "curvatures"):
        values = getattr(config, name)
        if values is not None and (not values or len(set(values)) < len(values)):
            raise LabError(f"--{name} {' '.join(map(str, values))}: pass at least one, each once.")
    if min(config.steps or (0,)) < 0:
        raise LabError(f"--steps {min(config.steps or (0,))} is out of range: pass 0 or more.")
