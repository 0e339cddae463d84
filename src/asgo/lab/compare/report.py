"""A comparison as one HTML page that needs nothing but itself: no server, no network, no scripts."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from asgo.lab.compare.paired_test import PairedTest
from asgo.lab.compare.summary import COLUMNS, Row, cells

TUNING_COLUMNS = ("optimizer", "chosen", "worse on both sides", "learning rate: final loss, in the order tried")


def page(results: Mapping[str, Any], rows: Sequence[Row], tests: Sequence[PairedTest], picture: bytes) -> str:
    """The whole page, from ``report.html.j2``; text is escaped.

    Args:
        results: what ``results.json`` holds.
        rows: the table.
        tests: the paired tests.
        picture: the plot, as PNG.
    """
    from jinja2 import Environment, PackageLoader  # noqa: PLC0415 (only a finished comparison needs it)

    runs = [run for own in results["runs"].values() for run in own]
    template = Environment(loader=PackageLoader("asgo.lab.compare", ""), autoescape=True).get_template("report.html.j2")
    return template.render(
        results=results,
        rows=rows,
        run=next((run for run in runs if run["status"] == "finished"), None),
        columns=COLUMNS,
        cells=[cells(row) for row in rows],
        tests=[str(test) for test in tests],
        tuning_columns=TUNING_COLUMNS,
        tuning=[_tuned(name, found) for name, found in results["tuning"].items()],
        commands=[run["command"] for run in runs if "command" in run],
        config=json.dumps(results["config"], indent=2),
        machine=list(_machine(results["environment"]).items()),
        picture=base64.b64encode(picture).decode(),
    )


def _tuned(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    tried = ", ".join(f"{lr:.4g}: {loss:.4f}" for lr, loss in found["tried"])
    return name, f"{found['lr']:.4g}", "yes" if found["bracketed"] else "no", tried


def _machine(session: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"python": session["python"], **session["packages"]}
    facts |= {key: session[key] for key in ("platform", "device", "threads")}
    return facts | {"commit": session["commit"] or "not run from a git checkout"}
