"""The weights at which the curvature is taken: initial ones, trained here, or those of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from asgo.lab.config.checks import validate
from asgo.lab.config.runs import TrainConfig
from asgo.lab.errors import LabError
from asgo.lab.training.run_folder import RunFolder
from experiments.hessian.config import STEPS, HessianConfig
from experiments.hessian.measure import Point, Training


@dataclass(frozen=True)
class State:
    """Weights, and how they come about.

    Args:
        point: where the curvature is taken.
        training: the job that makes the weights; None: they are there already.
    """

    point: Point
    training: Training | None = None


def find_states(config: HessianConfig) -> list[State]:
    """The states to measure, by steps.

    Raises:
        LabError: for a model or an optimizer out of range, a folder that is no run, a step without a checkpoint, and
            flags that the run decides.
    """
    return _trained(config) if config.run is None else _saved(config, config.run)


def _trained(config: HessianConfig) -> list[State]:
    start = Point(config.model, config.data, config.data.block_size, config.seed, config.seed, 0)
    states = []
    for steps in sorted(STEPS if config.steps is None else config.steps):
        data = replace(config.data, batch_size=config.train_batch)
        folder = config.out / "training" / f"steps-{steps}"
        job = Training(config.model, config.optimizer, data, max(steps, 1), config.seed, folder)
        validate(job.config)
        states.append(State(replace(start, step=steps, file=job.file), job) if steps else State(start))
    return states


def _saved(config: HessianConfig, path: Path) -> list[State]:
    folder, plain = RunFolder(path), HessianConfig()
    if not (path / "config.json").exists():
        raise LabError(f"--run {path} holds no run: pass a folder that asgo train has written.")
    given = [name for name in ("model", "optimizer", "train_batch") if getattr(config, name) != getattr(plain, name)]
    given += [name for name in ("corpus", "tokenizer") if getattr(config.data, name) != getattr(plain.data, name)]
    if given:
        raise LabError(f"--{given[0].replace('_', '-')} does not go with --run, which has its own: leave it out.")
    run = folder.config()
    if config.data.block_size > run.data.block_size:
        most = run.data.block_size
        raise LabError(
            f"--block-size {config.data.block_size} is longer than the {most} of --run {path}: pass at most {most}."
        )
    saved = {int(file.stem.removeprefix("step-")): file for file in folder.saved()}
    return [State(_point(config, run, saved, step)) for step in _steps(config, saved, path)]


def _steps(config: HessianConfig, saved: dict[int, Path], path: Path) -> Sequence[int]:
    steps = (0, *sorted(saved)[-1:]) if config.steps is None else sorted(config.steps)
    missing = [step for step in steps if step and step not in saved]
    if missing:
        there = ", ".join(map(str, [0, *sorted(saved)]))
        raise LabError(f"--run {path} has no checkpoint of step {missing[0]}: pass --steps of {there}.")
    return steps


def _point(config: HessianConfig, run: TrainConfig, saved: dict[int, Path], step: int) -> Point:
    data = replace(config.data, corpus=run.data.corpus, tokenizer=run.data.tokenizer)
    return Point(run.model, data, run.data.block_size, run.seed, config.seed, step, saved[step] if step else None)
