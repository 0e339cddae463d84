"""Rules of `asgo.route` in a file: what ``asgo inspect advise`` writes and ``asgo:rules=FILE`` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asgo.lab.errors import LabError
from asgo.lab.files import write_json
from asgo.views import View
from asgo.views.routing import Rule


def write_rules(path: Path, rules: Sequence[Rule]) -> None:
    """Write rules that match by names, as plain data."""
    write_json(path, [{"match": r.match, "view": _plain(r), "options": dict(r.options)} for r in rules])


def read_rules(path: str | None) -> list[Rule]:
    """The rules of a file; none without one.

    Raises:
        LabError: for a file that cannot be read, or holds something else.
    """
    if path is None:
        return []
    try:
        found = json.loads(Path(str(path)).read_text())
        return [Rule(rule["match"], rule["view"], _options(rule["options"])) for rule in found]
    except OSError as error:
        raise LabError(
            f"rules={path} cannot be read: {error.strerror}. Pass the rules.json of asgo inspect advise."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise LabError(
            f"rules={path} holds no rules ({type(error).__name__}: {error}). Pass what asgo inspect advise wrote."
        ) from error


def _plain(rule: Rule) -> dict[str, Any] | None:
    view = View.of(rule.view)
    return None if view is None else view.to_dict()


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples, and betas are one."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
