"""What several processes cost and spare: time, bytes sent and bytes of state of one step, per layout.

Every process is a rank of a gloo group on this machine. No model runs: parameters are those of a real model, in the
layout that is measured, and gradients are drawn.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from asgo.lab.config.codec import command, to_json
from asgo.lab.errors import LabError
from asgo.lab.figures import STYLES, png
from asgo.lab.files import make_folder, write_bytes, write_text
from asgo.lab.optimizers.registry import state_bytes
from asgo.lab.tables import csv_text
from asgo.optimizer.param_groups import with_views
from asgo.presets import ASGO
from benchmarks.speed.command import program, run_command
from benchmarks.speed.config import DistributedConfig, check
from benchmarks.speed.tables import Table, machine, show, write_tables
from benchmarks.speed.timing import WorkProgress
from benchmarks.speed.workloads import make_workload

SENDING = ("all_to_all_single", "all_gather", "all_reduce")
"""The collectives of a step; their second, second and first argument is what a rank sends."""
COLUMNS = (
    "layout", "processes", "ms / step", "to one process", "MB sent per rank", "of an all-gather",
    "of one statistic's all-reduce", "MB of state per rank", "of one process's",
)  # fmt: skip


@dataclass(frozen=True)
class DistributedRow:
    """One layout on one number of processes.

    Args:
        layout: ddp, zero1 or fsdp2; alone for one process.
        processes: how many.
        seconds: median over the timed steps of the slowest rank.
        slowdown: of it to one process.
        sent: bytes that a rank sends per step, the most of any rank; AdamW sends none beside the gradients.
        gathered: bytes that a rank would send if the matrices' gradients were gathered whole on every rank, by a ring.
        reduced: bytes that a rank would send if one k x k statistic per matrix were all-reduced, by a ring.
        state: bytes of state, the most of any rank.
        state_share: of it to one process.
    """

    layout: str
    processes: int
    seconds: float
    slowdown: float
    sent: int
    gathered: float
    reduced: float
    state: int
    state_share: float


def bench_distributed(config: DistributedConfig, console: Console) -> list[DistributedRow]:
    """Measure every layout on every number of processes; print the table, write table, picture and record to ``--out``.

    Raises:
        LabError: for a name that does not exist, a value out of range, a folder in use, or a process that ended.
    """
    check(config)
    make_folder(config.out)
    cases = [("alone", 1), *((layout, n) for n in config.processes if n > 1 for layout in config.layouts)]
    rows: list[DistributedRow] = []
    with WorkProgress(console, "bench distributed", sum(n for _, n in cases)) as progress:
        for layout, processes in cases:
            progress.advance(0, f"{layout} on {processes}")
            rows.append(_row(layout, processes, _measure(layout, processes, config), rows[:1]))
            progress.advance(processes, f"{layout} on {processes}")
    title = f"{config.shapes[0]}: one step of ASGO, roots every {config.interval}"
    table = Table(title, COLUMNS, tuple(map(_cells, rows)))
    console.print(table.rich())
    verb = command(program("distributed"), config)
    record = {"command": verb, "config": to_json(config), "machine": machine(torch.device("cpu"))}
    write_tables(config.out, f"`{verb}`", [table], record | {"rows": [vars(row) for row in rows]})
    write_text(config.out / "table.csv", csv_text([vars(row) for row in rows]))
    write_bytes(config.out / "plot.png", _draw(rows))
    console.print(f"written to {config.out}", highlight=False, soft_wrap=True)
    return rows


def _row(layout: str, processes: int, ranks: list[dict[str, Any]], first: list[DistributedRow]) -> DistributedRow:
    seconds = statistics.median(max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True))
    state, share = max(rank["state"] for rank in ranks), (processes - 1) / processes
    return DistributedRow(
        layout,
        processes,
        seconds,
        seconds / first[0].seconds if first else 1.0,
        max(rank["sent"] for rank in ranks),
        share * ranks[0]["matrices"],
        2 * share * ranks[0]["statistics"],
        state,
        state / first[0].state if first else 1.0,
    )


def _cells(row: DistributedRow) -> tuple[str, ...]:
    return (
        row.layout,
        str(row.processes),
        f"{row.seconds * 1e3:,.1f}",
        show(row.slowdown),
        show(row.sent / 1e6, "{:.3g}"),
        show(row.sent / row.gathered if row.gathered else None),
        show(row.sent / row.reduced if row.reduced else None),
        show(row.state / 1e6, "{:.3g}"),
        show(row.state_share),
    )


# ---- the processes -------------------------------------------------------------------------------------------


def _measure(layout: str, processes: int, config: DistributedConfig) -> list[dict[str, Any]]:
    """What every rank has measured."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        started, pipes = [], []
        for rank in range(processes):
            here, there = context.Pipe(False)
            args = (there, rank, processes, layout, config, str(Path(meeting) / "store"))
            started.append(context.Process(target=_work, args=args, daemon=True))
            started[-1].start()
            there.close()
            pipes.append(here)
        try:
            found: dict[Any, dict[str, Any]] = {}
            while len(found) < processes:
                for pipe in wait([pipe for pipe in pipes if pipe not in found]):
                    found[pipe] = pipe.recv()  # pyright: ignore
            return [found[pipe] for pipe in pipes]
        except EOFError:
            raise LabError(
                f"a process of {layout} on {processes} ended before it had measured; it may have been out of memory. "
                "Pass fewer --processes or --layers."
            ) from None
        finally:
            for process in started:
                process.kill()


def _work(pipe: Any, rank: int, processes: int, layout: str, config: DistributedConfig, store: str) -> None:
    """One rank: build, step, count, time."""
    torch.set_num_threads(config.threads or 1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    workload = make_workload(config.shapes[0], config.layers, False, torch.device("cpu"), torch.float32, config.seed)
    workload.reset()
    workload.draw(0)
    sizes = _sizes(workload.whole)
    workload.attach()
    if layout == "fsdp2":
        _cut(workload.whole, processes)
    optimizer = ASGO(workload.whole, precondition_frequency=config.interval)
    if layout in ("ddp", "zero1"):
        optimizer.distribute(shard_state=layout == "zero1")
    with counting() as sent:
        optimizer.step()
    for _ in range(config.warm - 1):
        optimizer.step()
    seconds = []
    for _ in range(config.repeats * config.interval):
        dist.barrier()
        begin = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    pipe.send({"seconds": seconds, "sent": sent(), "state": state_bytes(optimizer), **sizes})
    dist.barrier()


def _sizes(groups: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes of all matrices, and of one statistic of each."""
    viewed = [(view, p) for group in groups for (_, p), view in with_views(group) if view is not None]
    matrices = [param for _, param in viewed]
    shapes = [shape for view, param in viewed if view is not None for shape in view.shapes(param.shape)]
    return {
        "matrices": sum(param.numel() * param.element_size() for param in matrices),
        "statistics": sum(4 * b * min(m, n) ** 2 for b, m, n in shapes),
    }


def _cut(groups: list[dict[str, Any]], processes: int) -> None:
    """Put shards in the place of parameters and gradients, cut by rows as FSDP2 does."""
    mesh = init_device_mesh("cpu", (processes,))
    for group in groups:
        cut = []
        for name, param in group["params"]:
            sharded = nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)], src_data_rank=None))
            sharded.grad = distribute_tensor(param.grad, mesh, [Shard(0)], src_data_rank=None)  # pyright: ignore[reportArgumentType]
            param.grad = None
            cut.append((name, sharded))
        group["params"] = cut


@contextmanager
def counting() -> Generator[Callable[[], int], None, None]:
    """Count the bytes that this rank gives to collectives inside; ask the answer for them."""
    total, originals = 0, {name: getattr(dist, name) for name in SENDING}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
            nonlocal total
            tensor: Tensor = args[0] if name == "all_reduce" else args[1]
            total += tensor.numel() * tensor.element_size()
            options = {} if op is None else {"op": op}
            return originals[name](*args, group=group, async_op=async_op, **options)

        return call

    for name in SENDING:
        setattr(dist, name, counted(name))
    try:
        yield lambda: total
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _draw(rows: list[DistributedRow]) -> bytes:
    """Time, bytes sent and state against the number of processes, a line per layout."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = (
        ("milliseconds per step", lambda row: row.seconds * 1e3),
        ("MB sent per rank and step", lambda row: row.sent / 1e6),
        ("MB of state per rank", lambda row: row.state / 1e6),
    )
    layouts = list(dict.fromkeys(row.layout for row in rows if row.processes > 1))
    for axes, (label, value) in zip(figure.subplots(1, 3), panels, strict=True):
        for layout, (colour, line, marker) in zip(layouts, STYLES, strict=False):
            some = [row for row in rows if row.layout in (layout, "alone")]
            values = [value(row) for row in some]
            axes.plot([row.processes for row in some], values, color=colour, ls=line, marker=marker, label=layout)
        axes.set_xlabel("processes")
        axes.set_ylabel(label)
        axes.set_xticks(sorted({row.processes for row in rows}))
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        if layouts:
            axes.legend(frameon=False)
    return png(figure)


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark; the words are those of the process if None."""
    return run_command("distributed", DistributedConfig, bench_distributed, args)


if __name__ == "__main__":
    sys.exit(main())
