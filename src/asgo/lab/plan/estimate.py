"""Seconds of an optimizer step and bytes of memory on a mesh, from operations, bytes and the speeds of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asgo.lab.plan import traffic
from asgo.lab.plan.hardware import Machine
from asgo.lab.plan.mesh import Mesh
from asgo.lab.plan.parts import Part
from asgo.lab.plan.placing import Placed, Stagger, place
from asgo.lab.plan.work import Memory, Numbers, Work, memory, work


@dataclass(frozen=True)
class Root:
    """How roots are computed: one of `asgo.roots.ROOTS`, and its number of products."""

    name: str
    products: float


@dataclass(frozen=True)
class Row:
    """One mesh with one interval. Times are of the rank that takes longest, means over an interval.

    Args:
        mesh: the mesh.
        interval: steps between refreshes of a root.
        statistics: seconds of the statistics.
        roots: seconds of the roots.
        application: seconds of the products of roots and directions.
        elementwise: seconds of reading and writing beside the products.
        links: seconds of the links; nothing of it is taken to be hidden behind other work.
        step: seconds of the whole optimizer step.
        worst: seconds of the longest step of an interval.
        overhead: `step` as a share of the model's forward and backward.
        worst_overhead: `worst` likewise.
        roots_mean: roots that a step refreshes in the whole model.
        roots_worst: the most in a step of an interval.
        products_mean: matrix products of a step on the rank with the most.
        products_worst: the most in a step of an interval.
        bytes_sent: by the rank that sends most in the mean step, without gradients.
        gradient_bytes: that a rank sends for gradients, with any optimizer.
        adamw: seconds that AdamW would take for all parameters.
        memory: what the fullest rank keeps.
        fits: whether that is within the share of the memory that it may take.
    """

    mesh: Mesh
    interval: int
    statistics: float
    roots: float
    application: float
    elementwise: float
    links: float
    step: float
    worst: float
    overhead: float
    worst_overhead: float
    roots_mean: float
    roots_worst: int
    products_mean: float
    products_worst: float
    bytes_sent: float
    gradient_bytes: float
    adamw: float
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class Setting:
    """What all rows share.

    Args:
        machine: speeds.
        root: of the optimizer.
        numbers: bytes of a number.
        tokens: for each GPU and step.
        model_seconds: of forward and backward on one GPU.
        room: bytes that parameters, gradients and state may take.
    """

    machine: Machine
    root: Root
    numbers: Numbers
    tokens: int
    model_seconds: float
    room: float


def estimate(parts: Sequence[Part], mesh: Mesh, interval: int, stagger: Stagger, setting: Setting) -> Row:
    """The row of a mesh and an interval.

    Args:
        parts: of all parameters.
        mesh: the ranks.
        interval: steps between refreshes of a root.
        stagger: how turns are chosen, see `asgo.lab.plan.placing.place`.
        setting: what all rows share.
    """
    numbers, placed = setting.numbers, place(parts, mesh, interval, stagger)
    always = traffic.fixed(placed, mesh, numbers.param, numbers.state)
    due: list[list[Placed]] = [[] for _ in range(interval)]
    for p in placed:
        due[p.turn].append(p)
    flows = [always + traffic.roots(some, mesh, numbers.state) for some in due]
    done = work(placed, mesh, interval, setting.root.products, numbers)
    return _row(placed, mesh, interval, done, flows, setting)


def _row(
    placed: Sequence[Placed],
    mesh: Mesh,
    interval: int,
    done: Work,
    flows: Sequence[traffic.Traffic],
    setting: Setting,
) -> Row:
    machine, numbers = setting.machine, setting.numbers
    kept = memory(placed, mesh, numbers, numbers.state / 4)
    columns = []
    for flow, cubic in zip(flows, done.roots, strict=True):
        packed = 2 * (flow.sent + flow.received)  # what is sent is copied once on either side
        seconds = np.stack(
            [
                done.statistic / machine.fp32,
                cubic / machine.root(setting.root.name),
                done.application / machine.fp32,
                (done.elements + packed) / machine.memory,
            ]
        ).reshape(4, -1)
        slowest = seconds[:, seconds.sum(0).argmax()]
        columns.append([*slowest, flow.busiest / machine.link(mesh.team)])
    parts = np.array(columns)
    mean, steps = parts.mean(0), parts.sum(1)
    numel = sum(p.part.numel for p in placed)
    most = done.products.reshape(interval, -1).max(1)
    return Row(
        mesh,
        interval,
        *(float(value) for value in mean),
        step=float(steps.mean()),
        worst=float(steps.max()),
        overhead=float(steps.mean() / setting.model_seconds),
        worst_overhead=float(steps.max() / setting.model_seconds),
        roots_mean=float(done.refreshed.mean()),
        roots_worst=int(done.refreshed.max()),
        products_mean=float(most.mean()),
        products_worst=float(most.max()),
        bytes_sent=float(np.mean([flow.sent for flow in flows], axis=0).max()),
        gradient_bytes=traffic.gradients(numel, mesh, numbers.param),
        adamw=_adamw(placed, mesh, numbers) / machine.memory,
        memory=kept,
        fits=kept.total <= setting.room,
    )


def _adamw(placed: Sequence[Placed], mesh: Mesh, numbers: Numbers) -> float:
    """Bytes of memory traffic that AdamW would have on the rank with the most."""
    return float(sum(max(p.held) for p in placed)) * numbers.adamw
