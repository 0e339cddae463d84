"""The table of `losses.py`'s runs: paired differences from the exact form.

python benchmarks/square_root/summary.py benchmarks/square_root/losses.jsonl > benchmarks/square_root/losses.md
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

HEAD = """# `python benchmarks/square_root/summary.py benchmarks/square_root/losses.jsonl`

A character GPT of 4 layers and width 128, 300 steps of 8 x 128 characters, loss on 65,536 held-out characters. "exact"
is float64 with eps 1e-6. Differences are paired by seed; with one seed they say little, see "exact 4.7e-6", which
differs from "exact" in the damping alone.

| statistic | b2 | form | seeds | loss | minus exact, mean | by seed |
|---|---:|---|---:|---:|---:|---|"""


def main() -> None:
    runs = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    cells: dict[tuple[str, float, str], dict[int, float]] = {}
    for run in runs:
        cells.setdefault((run["statistic"], run["beta2"], run["form"]), {})[run["seed"]] = run["loss"]
    print(HEAD)
    for (statistic, beta2, form), losses in sorted(cells.items(), key=lambda item: (item[0][0] == "gradient", item[0])):
        reference = cells.get((statistic, beta2, "exact"), {})
        paired = [losses[seed] - reference[seed] for seed in sorted(losses) if seed in reference]
        shown = " ".join(f"{x:+.4f}" for x in paired) if form != "exact" else ""
        mean = f"{statistics.mean(paired):+.4f}" if form != "exact" and paired else ""
        loss = statistics.mean(losses.values())
        print(f"| {statistic} | {beta2} | {form} | {len(losses)} | {loss:.4f} | {mean} | {shown} |")


if __name__ == "__main__":
    main()
