"""A comparison as one HTML page that needs nothing but itself: no server, no network, no scripts."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from asgo.lab.statistics import PairedTest
from asgo.lab.summary import HEAD, Row, cells

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #888; }
img { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: .8rem; font-size: .85rem; white-space: pre-wrap; }
figure { margin: 1rem 0; }
.note { color: #555; font-size: .9rem; }
"""


def page(results: Mapping[str, Any], rows: Sequence[Row], tests: Sequence[PairedTest], picture: bytes) -> str:
    """The whole page.

    Args:
        results: what ``results.json`` holds.
        rows: the table.
        tests: the paired tests.
        picture: the plot, as PNG.
    """
    sections = [
        f"<h1>Optimizers compared: {escape(', '.join(row.optimizer for row in rows))}</h1>",
        _opening(results),
        _image(picture),
        "<h2>Table</h2>",
        table(HEAD, [cells(row) for row in rows]),
        _table_notes(results),
        "<h2>Differences of the final validation loss</h2>",
        _tests(tests),
        *_tuning(results["tuning"]),
        "<h2>Commands</h2>",
        "<p>The whole comparison:</p>",
        f"<pre>{escape(results['command'])}</pre>",
        "<p>Each run by itself:</p>",
        f"<pre>{escape(_run_commands(results))}</pre>",
        "<h2>Configuration</h2>",
        "<details><summary>Every field</summary>",
        f"<pre>{escape(json.dumps(results['config'], indent=2))}</pre></details>",
        "<h2>Machine and versions</h2>",
        _environment(results["environment"]),
    ]
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>asgo compare</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; text is escaped."""
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{titles}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _opening(results: Mapping[str, Any]) -> str:
    config = results["config"]
    finished = [run for own in results["runs"].values() for run in own if run["status"] == "finished"]
    data = finished[0]["data"] if finished else config["data"]["corpus"]["name"]
    size = f" of {finished[0]['parameters']:,} parameters" if finished else ""
    return (
        f"<p>Model {escape(config['model']['preset'])}{size}, {config['steps']} steps, seeds "
        f"{', '.join(map(str, config['seeds']))}. Within a seed all optimizers start from the same weights "
        f"and see the same batches. Data: {escape(data)}. {escape(results['date'])}.</p>"
    )


def _image(picture: bytes) -> str:
    encoded = base64.b64encode(picture).decode()
    text = "Validation loss against steps and against training time, one line per optimizer"
    caption = "Lines are means over seeds, bands go from lowest to highest seed; the thin line is the target."
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}"><figcaption class="note">{caption}'
        "</figcaption></figure>"
    )


def _table_notes(results: Mapping[str, Any]) -> str:
    target = results["target"]
    how = "the worst last loss of a finished run" if results["config"]["target"] == "auto" else "as asked"
    aim = f"The target is a validation loss of {target:.4f} ({how}). " if target is not None else ""
    return (
        f'<p class="note">Losses are nats per token: mean ± standard deviation over seeds. {aim}Steps and '
        "seconds to target are those of the first evaluation at or below it. Time is training time: "
        "evaluation and saving do not count; opt. share is the part of a step inside the optimizer.</p>"
    )


def _tests(tests: Sequence[PairedTest]) -> str:
    if not tests:
        return "<p>One optimizer: nothing to compare with.</p>"
    lines = "".join(f"<li>{escape(str(test))}</li>" for test in tests)
    return (
        f'<ul>{lines}</ul><p class="note">Mean over seeds of the difference on the same seed; two-sided '
        f"paired t-test, not corrected for making {len(tests)} of them. Below 3 seeds there is no test.</p>"
    )


def _tuning(tuning: Mapping[str, Any]) -> list[str]:
    if not tuning:
        return []
    rows = []
    for name, found in tuning.items():
        tried = ", ".join(f"{lr:.4g}: {loss:.4f}" for lr, loss in found["tried"])
        rows.append((name, f"{found['lr']:.4g}", "yes" if found["bracketed"] else "no", tried))
    head = ("optimizer", "chosen", "worse on both sides", "learning rate: final loss, in the order tried")
    return ["<h2>Learning rates</h2>", "<p>Chosen on a seed that is not compared.</p>", table(head, rows)]


def _environment(session: Mapping[str, Any]) -> str:
    facts = {"python": session["python"], **session["packages"]}
    facts |= {key: session[key] for key in ("platform", "device", "threads")}
    facts["commit"] = session["commit"] or "not run from a git checkout"
    return table(("what", "which"), list(facts.items()))


def _run_commands(results: Mapping[str, Any]) -> str:
    return "\n".join(run["command"] for own in results["runs"].values() for run in own if "command" in run)
