"""The tables of ``docs/results.md``, from the records of `asgo compare` in ``benchmarks/evidence``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from asgo.lab.compare.paired_test import VERDICTS, all_pairs
from asgo.lab.tables import markdown

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
EVIDENCE = BENCHMARKS / "evidence"
_BESIDE = ("asgo", "soap")
_FURTHER = "-peers"
_NAMED = {"adamw:steps_factor=2": "adamw-twice"}
"""Names of entries whose hyperparameters are written out."""
PICTURES = Path(__file__).parent / "pictures"


def records() -> dict[str, Mapping[str, Any]]:
    """The comparisons by the name of their folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(EVIDENCE.glob("*/results.json"))}


def pictures() -> dict[Path, bytes]:
    """The picture of every comparison, and of learning rates over width and depth, by where the page has it."""
    found = {PICTURES / f"results-{name}.png": EVIDENCE / name / "plot.png" for name in records()}
    found[PICTURES / "transfer.png"] = BENCHMARKS / "transfer" / "plot.png"
    return {path: record.read_bytes() for path, record in found.items()}


def searches() -> dict[str, list[Mapping[str, Any]]]:
    """The comparisons by workload and search; the peers of a folder ``NAME-peers`` belong to those of ``NAME``."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, record in records().items():
        found.setdefault(name.removesuffix(_FURTHER), []).append(record)
    return found


def summary() -> str:
    """Every optimizer on every workload against the reference."""
    found = searches()
    rows = [[f"`{entry}`", *(_against(some, entry) for some in found.values())] for entry in _entries(found)]
    return markdown(["", *(f"`{name}`" for name in found)], rows)


def _entries(found: Mapping[str, list[Mapping[str, Any]]]) -> Iterable[str]:
    rows = (row["optimizer"] for some in found.values() for record in some for row in record["rows"])
    return dict.fromkeys(entry for entry in rows if entry not in _NAMED.values())


def counts() -> str:
    """Wins, ties and losses of every optimizer over all comparisons."""
    rows, found = [], searches()
    for entry in _entries(found):
        verdicts = [test["verdict"] for some in found.values() if (test := _first_test(some, entry))]
        if verdicts:
            rows.append([f"`{entry}`", *(str(verdicts.count(key)) for key in ("win", "tie", "loss"))])
    return markdown(["against the reference", "better", "not significant", "worse"], rows)


def beside_soap() -> str:
    """The difference of ASGO and SOAP on every workload that has both."""
    rows = []
    for name, record in records().items():
        losses = {entry: {run["seed"]: run["val_loss"] for run in record["runs"].get(entry, ())} for entry in _BESIDE}
        if all(losses.values()):
            (test,) = all_pairs(losses)
            interval = f"{test.difference:+.4f} ({test.low:+.4f} to {test.high:+.4f})"
            rows.append([f"`{name}`", interval, _p(test.p), VERDICTS[test.verdict]])
    return markdown(["", "loss of `asgo` less that of `soap`", "p", "`asgo`"], rows)


def rates() -> str:
    """The learning rates of the matrices that searches chose, for those that stand beside AdamW."""
    rows = []
    for name, record in records().items():
        chosen = {entry: found["values"]["lr"] for entry, found in record["search"].items()}
        if "adamw" in chosen:
            cells = [f"{chosen[entry]:.4g}" if entry in chosen else "" for entry in ("asgo", "muon", "soap", "adamw")]
            rows.append([f"`{name}`", *cells, f"{chosen['asgo'] / chosen['adamw']:.1f}"])
    return markdown(["", "`asgo`", "`muon`", "`soap`", "`adamw`", "`asgo` / `adamw`"], rows)


def transfer() -> str:
    """The best learning rates over width and depth."""
    return (BENCHMARKS / "transfer" / "table.md").read_text()


def added() -> str:
    """What was tried on top of ASGO, on byte pairs, with the hyperparameters of ASGO's search."""
    return _table(_record("levers"))


def long_runs() -> str:
    """Shakespeare in three times the steps, with what the searches chose for the short runs."""
    return _table(_record("long"))


def forms_of_experts() -> str:
    """ASGO's other forms with experts."""
    return _table(_record("experts-forms"))


def vectors() -> str:
    """AdamW's second beta of 0.99 in place of 0.95 for what is no matrix, on every workload."""
    paths = {"bpe": BENCHMARKS / "levers" / "results.json"}
    paths |= {path.parent.name: path for path in sorted((BENCHMARKS / "vectors").glob("*/results.json"))}
    rows = []
    for name, path in sorted(paths.items()):
        record = json.loads(path.read_text())
        row = next(row for row in record["rows"] if row["optimizer"] == "vectors-0.99")
        rows.append([f"`{name}`", *_row(record, row)[2:-2]])
    return markdown(["", "difference from `asgo`", "p", "", "steps of `asgo` / its steps"], rows)


def times(name: str = "time-to-loss") -> str:
    """The time to the target of runs one after the other, the optimizers in ABBA order."""
    record = _record(name)
    reference = record["reference"]
    ratios = {ratio["first"]: ratio["text"].partition(": ")[2] for ratio in record["seconds_ratios"]}
    rows = []
    for row in record["rows"]:
        name, step = row["optimizer"], f"{1e3 * row['seconds_per_step']:.1f}"
        rows.append([f"`{name}`", step, _ratio(record, name), ratios.get(name, "reference")])
    columns = ["", "ms per step", f"steps of `{reference}` / its steps", f"seconds of `{reference}` / its seconds"]
    return markdown(columns, rows)


def workloads() -> str:
    """A heading, the command and the table of every workload."""
    return "\n\n".join(_workload(name, record) for name, record in records().items())


def _record(name: str) -> Mapping[str, Any]:
    return json.loads((BENCHMARKS / name / "results.json").read_text())


def _workload(name: str, record: Mapping[str, Any]) -> str:
    reference = record["reference"]
    chosen = [
        f"- `{best['entry']}`, of {best['trials']} trials"
        + (f"; at the edge of what was tried: {', '.join(best['edges'])}" if best["edges"] else "")
        for best in record["search"].values()
    ]
    again = "\n".join(record["again"].values())
    machine, date = record["environment"]["device"], record["date"][:10]
    return "\n\n".join(
        [
            f"## {name}",
            f"```bash\n{record['command']}\n```",
            f"{record['config']['steps']} steps; target {record['target']:.4f}, the worst last loss of `{reference}`; "
            f"{machine}, torch {record['environment']['packages']['torch']}, {date}.",
            _table(record),
            f"![losses on {name} against steps and seconds](pictures/results-{name}.png)",
            "What the search chose:",
            "\n".join(chosen),
            f"One run of each row again:\n\n```bash\n{again}\n```",
        ]
    )


def _table(record: Mapping[str, Any]) -> str:
    """Every entry against the reference."""
    reference, seeds = record["reference"], record["config"]["seeds"]
    columns = ["", f"validation loss, {len(seeds)} seeds", f"difference from `{reference}`", "p", ""]
    columns += [f"steps of `{reference}` / its steps", "ms per step", "failed roots"]
    return markdown(columns, [_row(record, row) for row in record["rows"]])


def _row(record: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    loss = "diverged" if row["val_loss"] is None else f"{row['val_loss']:.4f} ± {row['spread'] or 0:.4f}"
    test = _test(record, row["optimizer"])
    cost = [f"{1e3 * row['seconds_per_step']:.0f}" if row["seconds_per_step"] else "-", str(row["failed_roots"])]
    if test is None:
        return [f"`{row['optimizer']}`", loss, "", "", "reference", "", *cost]
    difference = f"{test['difference']:+.4f} ({test['low']:+.4f} to {test['high']:+.4f})"
    return [
        f"`{row['optimizer']}`",
        loss,
        difference,
        _p(test["p"]),
        VERDICTS[test["verdict"]],
        _ratio(record, row["optimizer"]),
        *cost,
    ]


def _against(some: Sequence[Mapping[str, Any]], entry: str) -> str:
    if entry == some[0]["reference"]:
        return "reference"
    test = _first_test(some, entry)
    return "" if test is None else f"{test['difference']:+.4f}, {VERDICTS[test['verdict']]}"


def _first_test(some: Sequence[Mapping[str, Any]], entry: str) -> Mapping[str, Any] | None:
    """Of the first of some comparisons that has the entry, under either of its names."""
    names = (entry, _NAMED.get(entry))
    return next((test for record in some for name in names if name and (test := _test(record, name))), None)


def _test(record: Mapping[str, Any], entry: str) -> Mapping[str, Any] | None:
    return next((test for test in record["tests"] if test["first"] == entry), None)


def _ratio(record: Mapping[str, Any], entry: str) -> str:
    found = {ratio["first"]: ratio["text"].partition(": ")[2] for ratio in record["steps_ratios"]}
    return found.get(entry, "reference")


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"
