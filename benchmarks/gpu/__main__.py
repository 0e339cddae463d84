"""The command ``python -m benchmarks.gpu``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.gpu.parts import BUDGETS, PARTS, Plan, run_part
from benchmarks.gpu.record import FILE, read_rows
from benchmarks.gpu.results import write_results

REHEARSAL = 600.0
"""Seconds for each part, far more than it takes: a busy machine should not cut a rehearsal off."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with budgets and parts checked."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description="Checks and timings of asgo on a GPU.")
    parser.add_argument("--out", type=Path, help="folder of the results (runs/gpu; runs/gpu-rehearsal to rehearse)")
    parser.add_argument("--rehearse", action="store_true", help="everything on the CPU with tiny shapes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="rows by name, e.g. 'root *'")
    parser.add_argument("--budget", nargs="+", default=[], metavar="PART=SECONDS", help=f"other times than {BUDGETS}")
    parser.add_argument("--resume", action="store_true", help="go on with a record: rows with an outcome stay")
    parser.add_argument("--start", choices=("spawn", "fork"), help="how processes begin: spawn; to rehearse, fork")
    parser.add_argument("--tables", action="store_true", help="measure nothing; write the tables of a record")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/gpu-rehearsal" if args.rehearse else "runs/gpu")
    args.budget = _budgets(parser, args.budget, dict.fromkeys(BUDGETS, REHEARSAL) if args.rehearse else BUDGETS)
    if (args.out / FILE).exists() and not (args.resume or args.tables or args.rehearse):
        parser.error(f"{args.out} holds a record: pass another --out, --resume to go on with it, or --tables.")
    return args


def _budgets(parser: argparse.ArgumentParser, given: Sequence[str], usual: dict[str, float]) -> dict[str, float]:
    budgets = dict(usual)
    for text in given:
        name, _, seconds = text.partition("=")
        if name not in budgets or not seconds.replace(".", "", 1).isdigit():
            parser.error(f"--budget {text}: write a part and its seconds, e.g. speed=60; parts: {', '.join(PARTS)}")
        budgets[name] = float(seconds)
    return budgets


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts, write the results after each, and return 1 if a row failed, else 0."""
    args = arguments(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rehearse and not args.resume:
        (args.out / FILE).unlink(missing_ok=True)
    start = args.start or ("fork" if args.rehearse else "spawn")
    if start == "fork":
        import torch._dynamo  # noqa: F401, PLC0415 (once for all parts; torch's optimizers import it)
    plan = Plan(args.out, "cpu" if args.rehearse else args.device, args.rehearse, tuple(args.only), start)
    try:
        _run(plan, [] if args.tables else args.parts, args.budget)
    except KeyboardInterrupt:
        print("interrupted: the rows that were measured are kept", flush=True)
    print(write_results(args.out, picture=True), flush=True)
    return int(any(row["status"] == "failed" for row in read_rows(args.out / FILE)))


def _run(plan: Plan, parts: Sequence[str], budgets: dict[str, float]) -> None:
    end = time.monotonic() + sum(budgets[name] for name in parts)
    for name in parts:
        left = end - time.monotonic()
        run_part(plan, name, left if name == parts[-1] else min(left, budgets[name]))
        write_results(plan.out, picture=False)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
