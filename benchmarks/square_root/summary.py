"""The table of `losses.py`'s runs: paired differences from the exact form.

python benchmarks/square_root/summary.py benchmarks/square_root/losses.jsonl > benchmarks/square_root/losses.md
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

HEAD = """# `python benchmarks/square_root/summary.py benchmarks/square_root/losses.jsonl`

A character GPT of 4 layers, 300 steps of 8 x 128 characters, lr .014 at width 128 and .0047 at 384, loss on 65,536
held-out characters. "exact" is float64 with eps 1e-6. Differences are paired by seed, with their standard error.

| width | statistic | b2 | form | seeds | loss | minus exact | by seed |
|---:|---|---:|---|---:|---:|---:|---|"""


def main() -> None:
    runs = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    cells: dict[tuple[int, str, float, str], dict[int, float]] = {}
    for run in runs:
        cells.setdefault((run["width"], run["statistic"], run["beta2"], run["form"]), {})[run["seed"]] = run["loss"]
    print(HEAD)
    for (width, statistic, beta2, form), losses in sorted(cells.items(), key=lambda item: _order(*item[0])):
        reference = cells.get((width, statistic, beta2, "exact"), {})
        paired = [losses[seed] - reference[seed] for seed in sorted(losses) if seed in reference]
        mean, shown = ("", "") if form == "exact" else (_mean(paired), " ".join(f"{x:+.4f}" for x in paired))
        loss = statistics.mean(losses.values())
        print(f"| {width} | {statistic} | {beta2} | {form} | {len(losses)} | {loss:.4f} | {mean} | {shown} |")


def _order(width: int, statistic: str, beta2: float, form: str) -> tuple[int, bool, float, str]:
    return width, statistic == "gradient", beta2, form


def _mean(paired: list[float]) -> str:
    if len(paired) < 2:
        return f"{paired[0]:+.4f}" if paired else ""
    return f"{statistics.mean(paired):+.4f} ± {statistics.stdev(paired) / len(paired) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
