"""What recording metrics costs: optimizer steps with and without, in turns of four (off, on, on, off) in one process.

    OMP_NUM_THREADS=1 python benchmarks/metrics.py --out benchmarks/metrics

On a CPU, time is the processor time of this process, so that other work on the machine counts for little; on CUDA it is
that of events around the step.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from asgo import ASGO, route
from benchmarks.speed.timing import seconds


def taken(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return seconds(run, device)
    start = time.process_time()
    run()
    return time.process_time() - start


def rounds(optimizer: ASGO, count: int, device: torch.device) -> tuple[list[float], list[float], list[float]]:
    """Seconds of steps that are not recorded and of those that are, and of reading the metrics, a pair each round."""
    off, on, read = [], [], []
    for _ in range(count):
        times = {False: 0.0, True: 0.0}
        for recorded in (False, True, True, False):
            optimizer.record_metrics(int(recorded))
            times[recorded] += taken(optimizer.step, device) / 2
        off.append(times[False])
        on.append(times[True])
        read.append(taken(optimizer.metrics, device))
    return off, on, read


def measured(
    width: int, layers: int, vocabulary: int, options: dict[str, Any], count: int, device: torch.device
) -> dict[str, Any]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=width // 64)
    model = GPT2LMHeadModel(config).to(device)  # pyright: ignore[reportArgumentType]
    optimizer = ASGO(route(model), **options)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    for _ in range(12):  # past the first steps, which refresh every root
        optimizer.step()
    off, on, read = rounds(optimizer, count, device)
    extra = statistics.median((b - a) / a for a, b in zip(off, on, strict=True))
    reading = statistics.median(r / a for a, r in zip(off, read, strict=True))
    return {
        "width": width,
        "layers": layers,
        "vocabulary": vocabulary,
        "options": options,
        "rounds": count,
        "step_ms": 1000 * statistics.median(off),
        "recording": extra,
        "reading": reading,
        "every_10": (extra + reading) / 10,
        "every_50": (extra + reading) / 50,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = [
        measured(width, options.layers, options.vocabulary, extra, options.rounds, device)
        for width in options.widths
        for extra in ({}, {"root": "square_root"}, {"precondition_frequency": 10})
    ]
    lines = ["| width | options | step, ms | recording a step | reading | every 10th step | every 50th |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        words = ", ".join(f"{key}={value}" for key, value in row["options"].items()) or "defaults"
        shares = " | ".join(f"{100 * row[key]:.2g} %" for key in ("recording", "reading", "every_10", "every_50"))
        lines.append(f"| {row['width']} | {words} | {row['step_ms']:.3g} | {shares} |")
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    (options.out / "results.json").write_text(json.dumps({"rows": rows, **versions}, indent=1) + "\n")
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
