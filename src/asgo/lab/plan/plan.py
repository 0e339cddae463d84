"""``asgo plan``: memory of every rank and bytes sent, by the optimizer's own planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console

from asgo.distributed.planned_part import Mesh, PlannedPart
from asgo.lab import tables
from asgo.lab.config.codec import command, to_json
from asgo.lab.errors import LabError
from asgo.lab.files import write_results
from asgo.lab.models.named import NamedModel, load
from asgo.lab.plan.config import PlanConfig, check
from asgo.lab.plan.mesh import parse, sensible
from asgo.lab.terminal import say
from asgo.optimizer import planning
from asgo.presets import ASGO
from asgo.views.routing import route


@dataclass(frozen=True)
class Memory:
    """Bytes that the fullest rank keeps, without activations."""

    params: int
    gradients: int
    momentum: int
    statistics: int
    roots: int
    adamw: int
    rest: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())

    @property
    def state(self) -> int:
        """What the optimizer keeps."""
        return self.total - self.params - self.gradients


@dataclass(frozen=True)
class Row:
    """One mesh with one interval."""

    mesh: Mesh  # the mesh
    interval: int  # steps between refreshes of a root
    memory: Memory  # of the fullest rank
    fits: bool  # whether that is within the share of a GPU's memory that it may take
    roots_mean: float  # roots that a step refreshes in the whole model
    roots_worst: int  # the most in a step of an interval
    bytes_mean: float  # sent by the rank that sends most in the mean step, without gradients
    bytes_worst: int  # sent or received by a rank in the step and on the rank with the most
    gradient_bytes: float  # that a rank sends for gradients, with any optimizer


@dataclass(frozen=True)
class Plan:
    """What was found: what was planned for, a row for each mesh and interval, and which meshes fit, in a sentence."""

    about: str
    rows: tuple[Row, ...]
    verdict: str


def plan(config: PlanConfig, console: Console | None = None) -> Plan:
    """Plan every mesh with every interval, show it, and save it if asked.

    Raises:
        LabError: for a model, a mesh or a number that does not fit; nothing has been written then.
    """
    check(config)
    given = [parse(text, config.gpus) for text in config.mesh]
    model = load(config.model)
    meshes = given or sensible(config.gpus, model.tp_sizes)
    _check_meshes(meshes, model)
    parts = parts_of(model, config)
    intervals = (1,) if config.root == "square_root" else config.intervals
    rows = tuple(plan_mesh(parts, mesh, interval, config) for mesh in meshes for interval in intervals)
    found = Plan(_about(config, parts), rows, verdict(rows, config))
    _report(config, found, console or Console(quiet=True))
    return found


def parts_of(model: NamedModel, config: PlanConfig) -> list[PlannedPart]:
    """What ASGO keeps for every parameter of a model, in the precision of a GPU."""
    form: dict[str, Any] = {"root": "square_root", "precision": "fp16"} if config.root == "square_root" else {}
    with torch.device("meta"):
        groups = route(model.module, per_head=config.per_head)
        return planning.read_parts(ASGO(groups, packed_state=config.packed_state, **form), model.tp_plan)


def plan_mesh(parts: Sequence[PlannedPart], mesh: Mesh, interval: int, config: PlanConfig) -> Row:
    """The row of a mesh and an interval."""
    itemsize = getattr(torch, config.param_dtype).itemsize
    placed = planning.place(parts, mesh, interval)
    kept = planning.memory(placed, mesh, itemsize)
    fullest = torch.stack(list(kept.values())).sum(0).argmax()
    memory = Memory(**{name: int(ranks.flatten()[fullest]) for name, ranks in kept.items()})
    roots = [0] * interval
    for part in placed:
        roots[part.refresh_phase] += part.stack[0] if part.state.get("roots") else 0
    flows = planning.traffic(placed, mesh, interval, itemsize)
    return Row(
        mesh,
        interval,
        memory,
        fits=memory.total <= _room(config),
        roots_mean=sum(roots) / interval,
        roots_worst=max(roots),
        bytes_mean=float(torch.stack([sent for sent, _ in flows]).double().mean(0).max()),
        bytes_worst=max(int(flow.max()) for flow in flows),
        gradient_bytes=planning.gradient_bytes(sum(part.numel for part in parts), mesh, itemsize),
    )


def _room(config: PlanConfig) -> float:
    """Bytes that parameters, gradients and state of a rank may take."""
    return config.memory_gb * 1e9 * config.state_share


def _check_meshes(meshes: Sequence[Mesh], model: NamedModel) -> None:
    for place, mesh in enumerate(meshes):
        if mesh in meshes[:place]:
            raise LabError(f"--mesh {mesh} is given twice under two names: pass each once.")
        if mesh.tp > 1 and not model.tp_plan:
            raise LabError(
                f"--mesh {mesh}: transformers has no tensor-parallel plan for {model.name} "
                f"({type(model.module).__name__}); pass fsdp, replicate and fsdp, or ddp."
            )
        if mesh.tp not in model.tp_sizes:
            sizes = ", ".join(map(str, model.tp_sizes))
            raise LabError(
                f"--mesh {mesh}: tp={mesh.tp} does not divide the {model.heads} heads and {model.kv_heads} key and "
                f"value heads of {model.name}; tp of {sizes} would."
            )


def verdict(rows: Sequence[Row], config: PlanConfig) -> str:
    """Which meshes fit, which of them keeps least and which sends least, in one sentence."""
    text = "nothing here fits"
    if fitting := [row for row in rows if row.fits]:
        small = min(fitting, key=lambda row: (row.memory.total, row.bytes_mean))
        quiet = min(fitting, key=lambda row: (row.bytes_mean, row.memory.total))
        text = f"{small.mesh} keeps the least ({number(small.memory.total / 1e9)} GB)"
        text += f", {quiet.mesh} every {quiet.interval} sends the least ({number(quiet.bytes_mean / 1e6)} MB)"
    large = {str(row.mesh): row.memory.total / 1e9 for row in rows if not row.fits}
    if not large:
        return text + "; all of these meshes fit."
    names = ", ".join(f"{name} ({number(size)} GB)" for name, size in large.items())
    verb = "does" if len(large) == 1 else "do"
    return f"{text}; {names} {verb} not fit into {number(_room(config) / 1e9)} GB."


# ---- what is shown and saved ---------------------------------------------------------------------

MEMORY_COLUMNS = (
    *("mesh", "params GB", "gradients GB", "momentum GB", "statistics GB", "roots GB", "AdamW GB", "all GB"),
    *("of memory %", "fits"),
)
TRAFFIC_COLUMNS = ("mesh", "every", "roots mean", "roots worst", "sent MB", "worst step MB", "gradients MB")
NOTE = (
    "Memory: of the fullest rank, in 1e9 bytes, without activations. Roots: refreshed in a step in the whole model. "
    "Sent: by the busiest rank in the mean step, without gradients; worst step: sent or received in the busiest step "
    "of an interval. The first ten steps refresh every root."
)


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _memory_cells(rows: Sequence[Row], config: PlanConfig) -> list[list[str]]:
    """A line for each mesh, with its first interval."""
    lines = {}
    for row in rows:
        kept = row.memory
        sizes = (kept.params, kept.gradients, kept.momentum, kept.statistics, kept.roots, kept.adamw, kept.total)
        share = number(kept.total / config.memory_gb / 1e7)
        cells = [str(row.mesh), *(number(size / 1e9) for size in sizes), share, "yes" if row.fits else "no"]
        lines.setdefault(row.mesh, cells)
    return list(lines.values())


def _traffic_cells(rows: Sequence[Row]) -> list[list[str]]:
    counts = [(str(row.mesh), str(row.interval), number(row.roots_mean), number(row.roots_worst)) for row in rows]
    sizes = [(row.bytes_mean, row.bytes_worst, row.gradient_bytes) for row in rows]
    return [[*count, *(number(size / 1e6) for size in some)] for count, some in zip(counts, sizes, strict=True)]


def _about(config: PlanConfig, parts: Sequence[PlannedPart]) -> str:
    stacked = [part for part in parts if part.view is not None]
    matrices, inside = sum(part.stack[0] for part in stacked), sum(part.numel for part in stacked)
    return (
        f"{config.model} on {config.gpus:,} GPUs: {_short(sum(part.numel for part in parts))} parameters, "
        f"{_short(inside)} of them in {matrices:,} matrices; {config.param_dtype} parameters and "
        "gradients, float32 state"
        + ("; queries and keys by head" if config.per_head else "")
        + ("; statistics and roots as triangles" if config.packed_state else "")
        + ("; square roots in bfloat16 in place of statistics and roots" if config.root == "square_root" else "")
    )


def _short(count: int) -> str:
    return f"{count / 1e9:,.4g}B" if count >= 1e9 else f"{count / 1e6:,.4g}M"


def _record(row: Row) -> dict[str, Any]:
    plain = {key: value for key, value in vars(row).items() if key not in ("mesh", "memory")}
    kept = {f"{key}_memory": value for key, value in asdict(row.memory).items()}
    return {"mesh": str(row.mesh)} | plain | kept | {"total_memory": row.memory.total}


def _report(config: PlanConfig, found: Plan, console: Console) -> None:
    """Show a plan, and save it if asked."""
    shown = {
        "memory of the fullest rank": (MEMORY_COLUMNS, _memory_cells(found.rows, config)),
        "an optimizer step": (TRAFFIC_COLUMNS, _traffic_cells(found.rows)),
    }
    say(console, found.about)
    for title, (columns, cells) in shown.items():
        console.print(tables.rich_table(columns, cells, title))
    say(console, found.verdict)
    if config.out is None:
        return
    words = command(f"asgo plan {config.model}", replace(config, model=PlanConfig().model))
    texts = (f"`{words}`", found.about + ".", NOTE, *(tables.markdown(*table) for table in shown.values()))
    rows = [_record(row) for row in found.rows]
    results = {"rows": rows, "says": found.verdict, "about": found.about, "command": words, "config": to_json(config)}
    contents = {"table.md": "\n\n".join((*texts, found.verdict)) + "\n", "table.csv": tables.csv_text(rows)}
    contents |= {"results.json": results}
    write_results(config.out, contents)
    say(console, *(config.out / name for name in contents))
