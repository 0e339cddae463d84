"""The samples of ``asgo inspect gradients`` as table, CSV, arrays and pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asgo.diagnostics import Sample
from asgo.lab import tables
from asgo.lab.figures import STYLES, label, png

METRICS = {
    "stable_rank": ("stable rank", "log"),
    "effective_rank": ("effective rank", "log"),
    "nuclear_over_frobenius": ("nuclear / Frobenius norm", "linear"),
    "noise_share": ("noise (share of ||G||²)", "linear"),
    "condition": ("condition of the statistic", "log"),
    "residual": ("residual of the root", "log"),
    "update_rms": ("update (root mean square)", "log"),
    "failed_share": ("failed steps (share)", "linear"),
}
"""What is drawn of a sample, its title and the scale of its axis."""
COLUMNS = (
    *("kind", "matrices", "shape", "stable rank", "effective rank", "nuclear /Frob.", "noise %", "condi- tion"),
    *("root residual", "update RMS", "failed %"),
)


def kind_of(sample: Sample) -> tuple[str, int]:
    """What a matrix is called in every layer, and in which layer it stands: ``("attn.c_attn[0]", 3)``.

    The layer is the first part of the name that is a number; a name without one is a kind of its own in layer 0.
    """
    words = sample.name.removesuffix(".weight").split(".")
    place = next((i for i, word in enumerate(words) if re.fullmatch(r"\d+", word)), None)
    if place is None or place == len(words) - 1:
        kind, layer = ".".join(words), 0
    else:
        kind, layer = ".".join(words[place + 1 :]), int(words[place])
    return f"{kind}[{sample.part}]", layer


def kinds(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples by kind, in order; ``[0]`` is left out where a kind has one part."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(kind_of(sample)[0], []).append(sample)
    bare = [name.rpartition("[")[0] for name in found]
    return {(b if bare.count(b) == 1 else name): own for b, (name, own) in zip(bare, found.items(), strict=True)}


def mean(samples: Sequence[Sample], metric: str) -> float | None:
    """The mean over samples in which it could be measured."""
    known = [value for sample in samples if (value := getattr(sample, metric)) is not None]
    return fmean(known) if known else None


# ---- text ------------------------------------------------------------------------------------------------------


def cells(samples: Sequence[Sample]) -> list[list[str]]:
    """A line for every kind at the last sampled step, in the order of `COLUMNS`."""
    last = [sample for sample in samples if sample.step == samples[-1].step]
    return [_line(name, own) for name, own in kinds(last).items()]


def _line(name: str, own: Sequence[Sample]) -> list[str]:
    shapes = dict.fromkeys(f"{sample.rows}x{sample.columns}" for sample in own)

    def shown(metric: str, form: str, scale: float = 1.0) -> str:
        value = mean(own, metric)
        return "-" if value is None else form.format(scale * value)

    numbers = [shown(metric, "{:.1f}") for metric in ("stable_rank", "effective_rank", "nuclear_over_frobenius")]
    numbers += [shown("noise_share", "{:.0f}", 100), shown("condition", "{:.0e}"), shown("residual", "{:.1e}")]
    return [
        name,
        str(len(own)),
        " ".join(shapes),
        *numbers,
        shown("update_rms", "{:.1e}"),
        shown("failed_share", "{:.2g}", 100),
    ]


def notes(samples: Sequence[Sample]) -> list[str]:
    """What could not be measured, in words."""
    counts: dict[tuple[str, str], int] = {}
    for sample in samples:
        if sample.note:
            counts[sample.name, sample.note] = counts.get((sample.name, sample.note), 0) + 1
    return [f"not measurable: {name}, {count} times: {note}" for (name, note), count in counts.items()]


def csv_text(samples: Sequence[Sample]) -> str:
    """Every matrix at every sampled step, without its spectrum."""
    columns = [field.name for field in fields(Sample) if field.name != "singular_values"]
    return tables.csv_text([{name: getattr(sample, name) for name in columns} for sample in samples], columns)


def spectra(samples: Sequence[Sample]) -> bytes:
    """Singular values as a ``.npz`` file: ``steps``, and for each part of a parameter ``(steps, matrices, k)``.

    NaN where a gradient could not be measured.
    """
    steps = sorted({sample.step for sample in samples})
    arrays: dict[str, np.ndarray] = {"steps": np.array(steps)}
    for sample in samples:
        key = f"{sample.name}[{sample.part}]"
        if key not in arrays:
            count = 1 + max(s.index for s in samples if (s.name, s.part) == (sample.name, sample.part))
            arrays[key] = np.full((len(steps), count, min(sample.rows, sample.columns)), np.nan)
        if sample.singular_values:
            arrays[key][steps.index(sample.step), sample.index] = sample.singular_values
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


# ---- pictures --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """Samples by kind, for pictures."""

    kinds: Mapping[str, Sequence[Sample]]  # as many as there are styles to tell them apart
    left_out: int = 0  # how many more there are

    @staticmethod
    def of(samples: Sequence[Sample]) -> Series:
        """The first kinds of the samples."""
        found = kinds(samples)
        kept = dict(list(found.items())[: len(STYLES)])
        return Series(kept, len(found) - len(kept))

    def by_step(self) -> bytes:
        """Every metric against steps: mean over layers and heads, band from least to most."""
        return self._panels("optimizer steps", lambda sample: sample.step)

    def by_layer(self) -> bytes:
        """Every metric against layers at the last sampled step: mean over heads, band from least to most."""
        last = max(sample.step for own in self.kinds.values() for sample in own)
        kinds = {kind: [sample for sample in own if sample.step == last] for kind, own in self.kinds.items()}
        return Series(kinds, self.left_out)._panels(f"layer (step {last})", lambda sample: kind_of(sample)[1])

    def _panels(self, title: str, place: Callable[[Sample], int]) -> bytes:
        figure = Figure(figsize=(15, 7), layout="constrained")
        grid = figure.subplots(2, 4)
        for axes, (metric, (name, scale)) in zip(grid.flat, METRICS.items(), strict=True):
            for (kind, own), style in zip(self.kinds.items(), STYLES, strict=False):
                _band(axes, kind, own, metric, place, style)
            axes.set_yscale(scale if axes.lines else "linear")
            label(axes, title, name, legend=False)
        self._legend(figure, grid.flat)
        return png(figure)

    def spectra(self) -> bytes:
        """Singular values over the largest: every layer at the last sample, and dotted at the first."""
        columns = min(4, len(self.kinds))
        rows = -(-len(self.kinds) // columns)
        figure = Figure(figsize=(3.8 * columns, 3.2 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(self.kinds) :]:
            axes.set_visible(False)
        for axes, (kind, own) in zip(grid.flat, self.kinds.items(), strict=False):
            _spectra(axes, own)
            axes.set_title(kind, fontsize=10)
            axes.set_yscale("log")
            axes.set_ylim(1e-5, 2)
            label(axes, "index / number of singular values", "singular value / largest")
        return png(figure)

    def _legend(self, figure: Figure, panels: Sequence[Axes]) -> None:
        lines = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        title = f"{self.left_out} more kinds are in gradients.csv" if self.left_out else None
        place = "outside upper center"
        figure.legend(lines.values(), lines.keys(), loc=place, ncols=4, frameon=False, handlelength=3.5, title=title)


def _band(
    axes: Axes,
    kind: str,
    own: Sequence[Sample],
    metric: str,
    place: Callable[[Sample], int],
    style: tuple[object, object, object],
) -> None:
    points: dict[int, list[float]] = {}
    for sample in own:
        value = getattr(sample, metric)
        if value is not None:
            points.setdefault(place(sample), []).append(value)
    if not points:
        return
    x = sorted(points)
    color, line, marker = style
    means, low, high = ([f(points[at]) for at in x] for f in (fmean, min, max))
    axes.plot(x, means, color=color, linestyle=line, marker=marker, markersize=4, label=kind)  # pyright: ignore[reportArgumentType]
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)  # pyright: ignore[reportArgumentType]


def _spectra(axes: Axes, own: Sequence[Sample]) -> None:
    steps = sorted({sample.step for sample in own})
    layers = sorted({kind_of(sample)[1] for sample in own})
    for step, line in {steps[0]: ":", steps[-1]: "-"}.items():
        for number, layer in enumerate(layers):
            some = [s for s in own if s.step == step and kind_of(s)[1] == layer and s.singular_values]
            if some:
                curves = np.array([np.array(s.singular_values) / s.singular_values[0] for s in some])
                x = (np.arange(curves.shape[1]) + 1) / curves.shape[1]
                shade = 0.85 * (1 - (number + 1) / len(layers))
                name = f"layer {layer}, step {step}" if layer in (layers[0], layers[-1]) else None
                axes.plot(x, curves.mean(0), color=(shade, shade, shade), linestyle=line, linewidth=1.2, label=name)
