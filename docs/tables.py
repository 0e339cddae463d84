"""The tables of the pages that follow from the code: ``python -m docs.tables`` writes them between their markers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import asgo
from asgo import presets
from asgo.lab.models.architectures import PRESETS
from asgo.lab.optimizers.table import EXTERNAL, OPTIMIZERS
from asgo.linalg.inverse_root import ROOTS
from asgo.optimizer import hyperparameters
from asgo.views.layouts import LAYOUTS, Layout
from benchmarks.speed.optimizers import BENCH_OPTIMIZERS
from docs import results

MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n\n).*?(\n\n<!-- end of table -->)", re.DOTALL)
ARGUMENT = re.compile(r"^    (\w+): (.*(?:\n+ {8}.*)*)", re.MULTILINE)
RELATIVES = sorted((name for name in presets.__all__ if name != "ASGO"), key=str.lower)
INTERVALS = {"all": "each of `--intervals`", "first": "the first of them", "every": "every step", "none": "-"}


def model_presets() -> str:
    """The shapes of ``--model.preset``."""
    columns = ("`--model.preset`", "family", "layers", "heads", "key heads", "width", "tied head")
    rows = (
        (f"`{name}`", s.family, s.layers, s.heads, s.kv_heads, s.width, "yes" if s.tie_embeddings else "no")
        for name, s in PRESETS.items()
    )
    return table(columns, rows)


def optimizers() -> str:
    """The optimizers that can be trained, with their defaults."""
    columns = ("name", "hidden matrices", "`lr`", "rest: AdamW `lr`", "weight decay")
    rows = (
        (f"`{name}`", s.about, s.lr, "the same as `lr`" if s.adamw_lr is None else s.adamw_lr, s.weight_decay)
        for name, s in OPTIMIZERS.items()
        if name not in EXTERNAL
    )
    return table(columns, rows)


def bench_optimizers() -> str:
    """What ``benchmarks.step`` can time."""
    columns = ("`--optimizers`", "from", "what it does to a matrix", "interval")
    rows = ((f"`{name}`", f"`{s.package}`", s.about, INTERVALS[s.intervals]) for name, s in BENCH_OPTIMIZERS.items())
    return table(columns, rows)


def roots() -> str:
    """The inverse roots."""
    columns = ("name", "how", "at `eps` 1e-6, per matrix of `k x k`")
    return table(columns, ((f'`"{name}"`', root.how, root.note) for name, root in ROOTS.items()))


def layouts() -> str:
    """The fused weights that are known."""
    columns = ("name", "parts", "order", "with", "seen in")
    return table(
        columns, ((_code(row.names), ", ".join(row.parts), row.order, _needs(row), row.seen) for row in LAYOUTS)
    )


def _needs(row: Layout) -> str:
    of_class = [f"class `{row.classes[0]}`" + (" and others" if len(row.classes) > 1 else "")] if row.classes else []
    return ", ".join(
        [*of_class, *(_code(needed.split("|"), " or ") for needed in row.needs), *filter(None, [row.asks])]
    )


def _code(names: Sequence[str], between: str = ", ") -> str:
    return between.join(f"`{name}`" for name in names)


def public_names() -> str:
    """What ``import asgo`` has, the optimizers first."""
    others = [name for name in asgo.__all__ if name not in presets.__all__]
    return f"Public names of `asgo`: {_code(['ASGO', *RELATIVES, *others])}."


def family() -> str:
    """The arguments of the optimizers beside `ASGO`, from their signatures and docstrings."""
    return "\n\n".join(f"### `{name}`\n\n{_arguments(getattr(asgo, name))}" for name in RELATIVES)


def _arguments(optimizer: type[Any]) -> str:
    meanings = dict(ARGUMENT.findall(inspect.cleandoc(optimizer.__doc__ or "").partition("\nArgs:\n")[2]))
    rows = (
        (f"`{name}`", _default(parameter.default), _meaning(meanings[name]))
        for name, parameter in inspect.signature(optimizer).parameters.items()
    )
    return table(("argument", "default", "meaning"), rows)


def _default(value: object) -> str:
    return "" if value is inspect.Parameter.empty else "`{}`".format(repr(value).replace("'", '"'))


def _meaning(text: str) -> str:
    listed = re.sub(r":\n+ *- ", ": ", text, count=1)
    return " ".join(re.sub(r"[,;.]?\n+ *- ", "; ", listed).split()).replace("``", "`").removesuffix(".")


def group_options() -> str:
    """The keys that groups may have."""
    own = [name for name in inspect.signature(asgo.ASGO).parameters if name not in ("params", "adjust_lr_fn", "adamw")]
    others = {
        name
        for preset in (getattr(asgo, name) for name in RELATIVES)
        for name in (preset.constraints if issubclass(preset, asgo.StructuredOptimizer) else ())
    }
    others -= {*asgo.ASGO.constraints, *own}
    return table(
        ("where", "keys"),
        (
            ("a group of `ASGO`", _code([*own, "side", "adamw"])),
            ("a group of another optimizer", f"the arguments of its constructor, among them {_code(sorted(others))}"),
            ("`adamw`, of a group or of the constructor", _code(["lr", *hyperparameters.ADAMW_DEFAULTS])),
        ),
    )


TABLES: dict[str, Callable[[], str]] = {
    "presets": model_presets,
    "optimizers": optimizers,
    "bench-optimizers": bench_optimizers,
    "results": results.summary,
    "results-counts": results.counts,
    "results-added": results.added,
    "results-rates": results.rates,
    "results-transfer": results.transfer,
    "results-long": results.long_runs,
    "results-experts": results.forms_of_experts,
    "results-vectors": results.vectors,
    "results-times": results.times,
    "results-times-units": partial(results.times, "time-to-loss-units"),
    "results-soap": results.beside_soap,
    "results-workloads": results.workloads,
    "public-names": public_names,
    "family": family,
    "group-options": group_options,
    "roots": roots,
    "layouts": layouts,
}


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as a markdown table, all to the left."""
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---").replace("--- |", "---|")
    )


def render(page: str) -> str:
    """A page with its tables made anew.

    Raises:
        KeyError: for a marker of a table that does not exist.
    """
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("*.md")):
        path.write_text(render(path.read_text()))
    for path, picture in results.pictures().items():
        path.write_bytes(picture)
