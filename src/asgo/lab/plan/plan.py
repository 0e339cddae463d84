"""``asgo plan``: what ASGO's step costs on so many GPUs, and which setting keeps it cheap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from asgo.lab import tables
from asgo.lab.config import command, to_json
from asgo.lab.errors import LabError
from asgo.lab.files import finite, make_folder, write_bytes, write_json, write_text
from asgo.lab.plan.cells import MEMORY_HEAD, NOTE, TIME_HEAD, memory_cells, number, record, time_cells
from asgo.lab.plan.config import PlanConfig, check
from asgo.lab.plan.draw import draw
from asgo.lab.plan.estimate import Root, Row, Setting, estimate
from asgo.lab.plan.hardware import Machine, describe
from asgo.lab.plan.mesh import Mesh, parse, sensible
from asgo.lab.plan.model import Subject, flops_per_token, load
from asgo.lab.plan.parts import Part, read
from asgo.lab.plan.work import Numbers, products_of
from asgo.lab.progress import LiveLine
from asgo.presets import ASGO
from asgo.routing import route

BATCH, LEAST_TOKENS = 2**19, 8192
"""Tokens of a step unless --tokens says otherwise: of all GPUs, and at least of each."""

SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Plan:
    """What was found.

    Args:
        about: model, machine and assumptions, a line each.
        rows: one for each mesh and interval.
        verdict: which setting keeps the overhead small and which do not fit, in one sentence.
        setting: what all rows share.
    """

    about: tuple[str, ...]
    rows: tuple[Row, ...]
    verdict: str
    setting: Setting


def plan(config: PlanConfig, console: Console | None = None) -> Plan:
    """Estimate every mesh with every interval, show it, and save it if asked.

    Args:
        config: what is asked.
        console: where progress, tables and the verdict are shown; None: nowhere.

    Raises:
        LabError: for a model, a mesh or a number that does not fit; nothing has been written then.
    """
    console = console or Console(quiet=True)
    check(config)
    given = [parse(text, config.gpus) for text in config.mesh]
    subject = load(config.model, config.block_size)
    meshes = given or sensible(config.gpus, subject.tp_sizes)
    meshes = [replace(mesh, repeats=config.replicas == "repeat") for mesh in meshes]
    _check_meshes(meshes, subject)
    products = _products(config)
    with LiveLine(console, "asgo plan", len(meshes) * len(config.intervals) + 1) as progress:
        progress.begin(0)
        flops, counted = flops_per_token(subject)
        parts = parts_of(subject, config.per_head, config.packed_state)
        setting = _setting(config, flops, products)
        rows: list[Row] = []
        for done, (mesh, interval) in enumerate(product(meshes, config.intervals), 1):
            progress.show(done, f"{mesh} every {interval}")
            rows.append(estimate(parts, mesh, interval, config.stagger, setting))
        progress.show(progress.total, "done")
    about = _about(config, subject, parts, setting, f"{flops:.4g} per token, {counted}")
    found = Plan(about, tuple(rows), verdict(rows, config, setting), setting)
    if config.out is not None:
        _save(config, config.out, found)
    _show(config, found, console)
    return found


def parts_of(subject: Subject, per_head: bool = False, packed: bool = False) -> list[Part]:
    """What ASGO keeps and does for every parameter of a model."""
    with torch.device("meta"):
        return read(ASGO(route(subject.model, per_head=per_head), packed_state=packed), subject.tp_plan)


def _check_meshes(meshes: Sequence[Mesh], subject: Subject) -> None:
    for place, mesh in enumerate(meshes):
        if mesh in meshes[:place]:
            raise LabError(f"--mesh {mesh} is given twice under two names: pass each once.")
        if mesh.tp > 1 and not subject.tp_plan:
            raise LabError(
                f"--mesh {mesh}: transformers has no tensor-parallel plan for {subject.name} "
                f"({type(subject.model).__name__}); pass fsdp, replicate and fsdp, or ddp."
            )
        if mesh.tp not in subject.tp_sizes:
            sizes = ", ".join(map(str, subject.tp_sizes))
            raise LabError(
                f"--mesh {mesh}: tp={mesh.tp} does not divide the {subject.heads} heads and {subject.kv_heads} key and "
                f"value heads of {subject.name}; tp of {sizes} would."
            )


def _products(config: PlanConfig) -> float:
    try:
        own = products_of(config.root, config.eps)
    except ValueError as error:
        raise LabError(f"{error}.") from error
    return own if config.products is None else config.products


def _setting(config: PlanConfig, flops: float, products: float) -> Setting:
    names = ("bf16_tflops", "tf32_tflops", "fp32_tflops", "memory_gb", "memory_gbs", "nvlink_gbs", "network_gbs")
    gpu = describe(config.gpu, {name: getattr(config, name) for name in names})
    machine = Machine(gpu, config.utilization, config.gpus_per_node)
    tokens = config.tokens or max(LEAST_TOKENS, -(-BATCH // config.gpus))
    return Setting(
        machine,
        Root(config.root, products),
        Numbers(SIZES[config.param_dtype], SIZES[config.state_dtype]),
        tokens,
        flops * tokens / machine.bf16,
        gpu.memory_gb * 1e9 * config.state_share,
    )


def _about(
    config: PlanConfig, subject: Subject, parts: Sequence[Part], setting: Setting, flops: str
) -> tuple[str, ...]:
    stacked = [part for part in parts if part.view is not None]
    matrices, inside = sum(part.stack[0] for part in stacked), sum(part.numel for part in stacked)
    gpu = setting.machine.gpu
    return (
        f"{config.model}: {_short(subject.parameters)} parameters, {_short(inside)} of them in {matrices:,} matrices;"
        f" {config.param_dtype} parameters and gradients, {config.state_dtype} state"
        + ("" if config.state_dtype == "float32" else " (what if: asgo keeps float32)"),
        f"{config.gpus:,} x {config.gpu}, published peaks: {gpu.bf16_tflops:g} bfloat16, {gpu.tf32_tflops:g} TF32 and "
        f"{gpu.fp32_tflops:g} float32 TFLOP/s, {gpu.memory_gb:g} GB at {gpu.memory_gbs:g} GB/s, links of "
        f"{gpu.nvlink_gbs:g} within {config.gpus_per_node} and {gpu.network_gbs:g} GB/s between; "
        f"{100 * config.utilization:g} % of them reached",
        f"{setting.tokens:,} tokens per GPU and step ({setting.tokens * config.gpus:,} in all) in sequences of "
        f"{subject.block:,}; forward and backward {number(1e3 * setting.model_seconds)} ms, operations {flops}",
        f"roots by {config.root}, {setting.root.products:g} products each"
        + ("; queries and keys by head" if config.per_head else "")
        + ("; statistics and roots as triangles" if config.packed_state else ""),
    )


def _short(count: int) -> str:
    return f"{count / 1e9:,.4g}B" if count >= 1e9 else f"{count / 1e6:,.4g}M"


def verdict(rows: Sequence[Row], config: PlanConfig, setting: Setting) -> str:
    """Which setting keeps the overhead within the target, and which do not fit, in one sentence."""
    target, fitting = f"{100 * config.target:g} %", [row for row in rows if row.fits]
    good = [row for row in fitting if row.overhead <= config.target]
    first = {str(row.mesh): row for row in sorted(good, key=lambda row: -row.interval)}
    ranked = sorted(first.values(), key=lambda row: (row.interval, row.overhead))
    if ranked:
        best = ranked[0]
        text = (
            f"{_named(best)} keeps ASGO within {target} of forward and backward ({100 * best.overhead:.2g} %), the "
            "smallest of these intervals that does"
        )
        text += "".join(f"; {row.mesh} needs {row.interval} ({100 * row.overhead:.2g} %)" for row in ranked[1:])
    elif fitting:
        best = min(fitting, key=lambda row: row.overhead)
        enough = setting.tokens * best.overhead / config.target
        text = (
            f"nothing here keeps ASGO within {target} of forward and backward: {_named(best)} comes nearest with "
            f"{100 * best.overhead:.2g} %, and would with {_rounded(enough):,} tokens per GPU and step"
        )
    else:
        text = "nothing here fits"
    return text + _too_large(rows, config, setting) + "."


def _named(row: Row) -> str:
    return f"{row.mesh} with roots " + ("at every step" if row.interval == 1 else f"every {row.interval} steps")


def _rounded(tokens: float) -> int:
    """Up to two digits."""
    unit = 10 ** max(0, len(str(int(tokens))) - 2)
    return -int(-tokens // unit) * unit


def _too_large(rows: Sequence[Row], config: PlanConfig, setting: Setting) -> str:
    large = {str(row.mesh): row.memory.total / 1e9 for row in rows if not row.fits}
    if not large:
        return "; all of these meshes fit" if len({str(row.mesh) for row in rows}) > 1 else "; it fits"
    names = ", ".join(f"{name} ({number(size)} GB)" for name, size in large.items())
    verb = "does" if len(large) == 1 else "do"
    return f"; {names} {verb} not fit into the {number(setting.room / 1e9)} GB that an {config.gpu} has for it"


# ---- what is shown and saved ---------------------------------------------------------------------


def _save(config: PlanConfig, out: Path, found: Plan) -> None:
    words = command(f"asgo plan {config.model}", replace(config, model=PlanConfig().model))
    memory, times = memory_cells(found.rows, found.setting), time_cells(found.rows)
    text = (
        f"`{words}`",
        "\n".join(f"- {line}" for line in found.about),
        NOTE,
        tables.markdown(MEMORY_HEAD, memory),
        tables.markdown(TIME_HEAD, times),
        found.verdict,
    )
    rows = [record(row) for row in found.rows]
    make_folder(out)
    write_text(out / "table.md", "\n\n".join(text) + "\n")
    write_text(out / "table.csv", tables.csv_text(rows, list(rows[0])))
    write_bytes(out / "plot.png", draw(found.rows, config.target, found.setting, config.model))
    results = {"rows": rows, "says": found.verdict, "about": found.about, "command": words, "config": to_json(config)}
    write_json(out / "results.json", finite(results))


def _show(config: PlanConfig, found: Plan, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for line in found.about:
        say(line)
    console.print(tables.rich_table(MEMORY_HEAD, memory_cells(found.rows, found.setting), "memory of the fullest rank"))
    console.print(tables.rich_table(TIME_HEAD, time_cells(found.rows), "an optimizer step"))
    say(found.verdict)
    if config.out is not None:
        for name in ("table.md", "plot.png", "results.json"):
            say(f"{config.out / name}")
