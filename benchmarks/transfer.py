"""The best learning rates of ASGO and AdamW over the width and the depth of a GPT on Shakespeare.

    python benchmarks/transfer.py --out runs/transfer
    python benchmarks/transfer.py --out runs/transfer --steps 10 --rates 2 --widths 64 --depths 2   # a rehearsal

Widths at a depth of 4, depths at a width of 128; each is one `asgo lr`. It goes on where it was stopped, so the same
command continues it. ``table.md``, ``results.json`` and ``plot.png`` are written anew after every search.
"""

import argparse
import json
import math
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from asgo.lab.compare.learning_rates import RatesConfig, learning_rates
from asgo.lab.config.runs import CadenceConfig, MachineConfig, ModelConfig
from asgo.lab.data.batches import DataConfig
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.figures import STYLES, label, png

DEPTH, WIDTH = 4, 128


def config_of(width: int, depth: int, options: Namespace) -> RatesConfig:
    return RatesConfig(
        data=DataConfig(corpus=CorpusConfig(name=options.corpus), block_size=64, batch_size=8),
        model=ModelConfig(preset="demo", width=width, layers=depth, heads=max(1, width // 32)),
        machine=MachineConfig(threads=options.threads),
        cadence=CadenceConfig(log_every=50, eval_every=10**9, eval_blocks=256, checkpoint_every=10**9),
        optimizers=("asgo", "adamw"),
        rates=options.rates,
        steps=options.steps,
        seed=options.seed,
        out=options.out / f"width-{width}-depth-{depth}",
        resume=True,
    )


def sizes_of(options: Namespace) -> list[tuple[int, int]]:
    """Pairs of width and depth, each once, the small ones first."""
    pairs = {(width, DEPTH) for width in options.widths} | {(WIDTH, depth) for depth in options.depths}
    return sorted(pairs, key=lambda pair: pair[0] ** 2 * pair[1])


def table(found: Mapping[tuple[int, int], Any]) -> str:
    lines = [
        "| width | depth | best lr, ASGO | best lr, AdamW | ratio | loss, ASGO | loss, AdamW |",
        "|---|" + "---|" * 6,
    ]
    for (width, depth), searches in found.items():
        asgo, adamw = (searches[name] for name in ("asgo", "adamw"))
        edge = ["" if each["bracketed"] else " (edge)" for each in (asgo, adamw)]
        losses = [min(loss for _, loss in each["tried"] if loss is not None) for each in (asgo, adamw)]
        rates = f"{asgo['lr']:.4g}{edge[0]} | {adamw['lr']:.4g}{edge[1]} | {asgo['lr'] / adamw['lr']:.2g}"
        lines.append(f"| {width} | {depth} | {rates} | {losses[0]:.4f} | {losses[1]:.4f} |")
    return "\n".join(lines)


def picture(found: Mapping[tuple[int, int], Any]) -> bytes:
    """Loss against learning rate: a row for each optimizer, widths on the left and depths on the right."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    sides = (
        ("width", DEPTH, {width: s for (width, depth), s in found.items() if depth == DEPTH}),
        ("depth", WIDTH, {depth: s for (width, depth), s in sorted(found.items()) if width == WIDTH}),
    )
    for column, (what, _, own) in enumerate(sides):
        for axes, name in zip(panels[:, column], ("asgo", "adamw"), strict=True):
            for number, (size, searches) in enumerate(own.items()):
                tried = searches[name]["tried"]
                points = sorted((lr, loss) for lr, loss in tried if loss is not None and math.isfinite(loss))
                color, style, marker = STYLES[number % len(STYLES)]
                axes.plot(
                    *zip(*points, strict=True), color=color, linestyle=style, marker=marker, label=f"{what} {size}"
                )
                axes.axvline(searches[name]["lr"], color=color, linewidth=0.8, alpha=0.6)
            axes.set_xscale("log", base=2)
            axes.set_title(name)
            label(axes, "learning rate", "validation loss")
    return png(figure)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rates", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--corpus", default="shakespeare")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    console, found = Console(), {}
    for pair in sizes_of(options):
        console.print(f"width {pair[0]}, depth {pair[1]}")
        found[pair] = learning_rates(config_of(*pair, options), console)["searches"]
        rows = [{"width": width, "depth": depth, "searches": s} for (width, depth), s in found.items()]
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps({"steps": options.steps, "rows": rows}, indent=1) + "\n")
        (options.out / "table.md").write_text(table(found) + "\n")
        (options.out / "plot.png").write_bytes(picture(found))
    print(table(found))


if __name__ == "__main__":
    main()
