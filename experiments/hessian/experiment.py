"""``python -m experiments.hessian``: the jobs, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from asgo.lab.packages import need
from asgo.lab.tables import csv_text
from experiments.hessian import picture
from experiments.hessian.config import Curvature, HessianConfig, check
from experiments.hessian.curvature import INSTALL
from experiments.hessian.matrices import Matrix
from experiments.hessian.measure import Measure, Training, build, do
from experiments.hessian.pairs import Pairs
from experiments.hessian.report import COLUMNS, Row, by_parameter, cells, says
from experiments.hessian.states import State, find_states
from experiments.jobs import JobPlan, Results
from experiments.runner import Report, run_experiment

NAME = "hessian"
Column = tuple[State, Curvature]


def hessian(config: HessianConfig, console: Console | None = None) -> dict[str, Any]:
    """Measure, or measure what is left, and return what ``results.json`` holds.

    Raises:
        LabError: for a number, model, corpus or folder that does not fit, a model without matrices, a loss that is not
            finite, and if curvlinops is not installed; nothing has been written then.
        Stopped: after SIGINT or SIGTERM; finished jobs are kept.
    """
    check(config)
    need("curvlinops", f"experiments.{NAME}", INSTALL)
    states = find_states(config)
    for state in states:
        if state.training is None:
            build(state.point)
    matrices = build(replace(states[0].point, step=0, file=None)).matrices
    return run_experiment(
        NAME,
        config,
        do,
        lambda done: _plan(config, states, matrices, done),
        lambda done: _conclude(config, states, matrices, done),
        console,
    )


# ---- jobs ----------------------------------------------------------------------------------------


def _measure(config: HessianConfig, state: State, curvature: Curvature, column: int, matrix: Matrix) -> Measure:
    m, n = matrix.shape
    numbers = config.exact_up_to, config.probes, config.chunk
    return Measure(state.point, curvature, column, matrix.name, m * n, matrix.heads, *numbers)


def _jobs(config: HessianConfig, state: State, matrices: Sequence[Matrix]) -> list[Measure]:
    return [
        _measure(config, state, curvature, column, matrix)
        for curvature in config.curvatures
        for column, matrix in enumerate(matrices)
    ]


def _plan(
    config: HessianConfig, states: Sequence[State], matrices: Sequence[Matrix], done: Results
) -> JobPlan[Measure | Training]:
    """Training first, with what needs none; then what could be trained."""
    jobs: list[Measure | Training] = []
    remaining = 0.0
    for state in states:
        measures = _jobs(config, state, matrices)
        if state.training is not None:
            jobs.insert(0, state.training)
            if state.training.key not in done:
                remaining += sum(job.weight for job in measures)
                continue
        if state.training is None or "reason" not in done[state.training.key]:
            jobs += measures
    return JobPlan(jobs, remaining)


def _result(job: Measure, state: State, done: Results) -> dict[str, Any]:
    """What a job found; the reason of the training where there was nothing to measure."""
    return done[job.key] if job.key in done else done[state.training.key] if state.training else {}


# ---- conclusions ---------------------------------------------------------------------------------


def _conclude(config: HessianConfig, states: Sequence[State], matrices: Sequence[Matrix], done: Results) -> Report:
    rows: list[Row] = []
    pairs: list[Pairs] = []
    for state in states:
        jobs = _jobs(config, state, matrices)
        for curvature in config.curvatures:
            own = [_result(job, state, done) for job in jobs if job.curvature == curvature]
            step = state.point.step
            rows += [Row.of(step, curvature, *each) for each in zip(matrices, own, strict=True)]
            pairs.append(Pairs.of(step, curvature, matrices, own))
    lines = [line for each in pairs for line in says([row for row in rows if row.of_same(each)], each)]
    table, sides = [row.flat() for row in rows], by_parameter(rows, states[-1].point.step, config.curvatures[0])
    pair_rows = [row for each in pairs for row in each.rows()]
    return Report(
        rows=table,
        head=COLUMNS,
        cells=[cells(row) for row in rows],
        title=f"curvature of {len(matrices)} matrices",
        lines=lines,
        picture=picture.draw_blocks(rows),
        data={"pairs": pair_rows, "training": _training(states, done)},
        note=NOTE,
        files={
            "pairs.png": picture.draw_pairs(pairs),
            "pairs.csv": csv_text(pair_rows, list(pair_rows[0])).encode(),
            "sides.png": picture.draw_sides(rows),
            "sides.json": (json.dumps(sides, indent=2) + "\n").encode(),
        },
    )


def _training(states: Sequence[State], done: Results) -> dict[str, Any]:
    return {str(state.point.step): done[state.training.key] for state in states if state.training is not None}


NOTE = (
    "By head and by neuron: share of the squared Frobenius norm of a matrix's block of the curvature that lies within "
    "heads, and within output neurons (structureless: 1/heads and 1/rows). Left, right: relative norm of the block's "
    "projection on S kron I and on I kron S (1/columns and 1/rows). ± is one standard error of probing; without it a "
    "number is exact."
)
