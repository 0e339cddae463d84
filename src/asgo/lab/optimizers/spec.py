"""Optimizers written in one word: ``adamw``, or ``adamw:lr=0.003,weight_decay=0.1,betas=0.9/0.95``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from asgo.lab.config.checks import entry_name
from asgo.lab.config.runs import OptimizerConfig
from asgo.lab.errors import LabError
from asgo.lab.optimizers.registry import parse_options, resolve

_NUMBERS = ("lr", "weight_decay", "adamw_lr")
_OF_THE_RUN = ("steps_factor", "tail_average", "lookahead")


@dataclass(frozen=True)
class Entry:
    """One optimizer of a comparison.

    Args:
        name: what reports call it: as it was written, or what its key ``name`` says.
        optimizer: what it describes, without open fields.
        steps_factor: it runs this many times the steps of the comparison, with a schedule of that length.
        tail_average: as for a run; None: the value of the comparison.
        lookahead: as for a run; None: the value of the comparison.
        given: the keys that were written.
    """

    name: str
    optimizer: OptimizerConfig
    steps_factor: float
    tail_average: float | None
    lookahead: float | None
    given: frozenset[str]

    def of_the_run(self) -> dict[str, float]:
        """The settings of a run that the entry states."""
        own = {"tail_average": self.tail_average, "lookahead": self.lookahead}
        return {name: value for name, value in own.items() if value is not None}


def parse_entry(text: str) -> Entry:
    """The entry that `text` describes: as `parse_spec`, with ``name`` and the settings of a run besides.

    Raises:
        LabError: as `parse_spec`, and for a factor that is not above 0, a share that is not from 0 to 1 or a lookahead
            below 0.
    """
    name, _, rest = text.partition(":")
    words = [word.partition("=") for word in filter(None, rest.split(","))]
    own = {key: _number(text, f"{key}={value}", value) for key, _, value in words if key in _OF_THE_RUN}
    factor, tail, lookahead = own.get("steps_factor", 1.0), own.get("tail_average"), own.get("lookahead")
    if not 0 < factor < 1e6:
        raise LabError(f"optimizer {text!r}: steps_factor must be above 0. Write it as in adamw:steps_factor=2.")
    if tail is not None and not 0 <= tail <= 1:
        raise LabError(f"optimizer {text!r}: tail_average must be a share of the steps, from 0 to 1.")
    if lookahead is not None and not 0 <= lookahead <= 1e3:
        raise LabError(f"optimizer {text!r}: lookahead must be from 0 to 1000, as in asgo:lookahead=0.6.")
    shown = entry_name(text)
    if shown != text and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", shown):
        raise LabError(f"optimizer {text!r}: a name has letters, digits and any of _.- in it, as in asgo:name=tuned.")
    left = ["".join(word) for word in words if word[0] not in (*own, "name")]
    optimizer = parse_spec(f"{name}:{','.join(left)}" if left else name)
    return Entry(shown, optimizer, factor, tail, lookahead, frozenset(word.partition("=")[0] for word in left))


def parse_spec(text: str) -> OptimizerConfig:
    """The optimizer that `text` describes, without open fields.

    ``lr``, ``weight_decay``, ``adamw_lr`` and ``betas`` (two numbers joined by ``/``) are its fields; every
    other key is an option of its constructor.

    Raises:
        LabError: for a name, key or number that does not exist.
    """
    name, _, rest = text.partition(":")
    fields: dict[str, Any] = {}
    options = []
    for entry in filter(None, rest.split(",")):
        key, equals, value = entry.partition("=")
        if not equals:
            raise LabError(f"optimizer {text!r}: {entry!r} is not key=value. Write it as in adamw:lr=0.003.")
        if key in _NUMBERS:
            fields[key] = _number(text, entry, value)
        elif key == "betas":
            fields["betas"] = _betas(text, entry, value)
        else:
            options.append(entry)
    config = resolve(replace(OptimizerConfig(name=name), **fields, options=tuple(options)))
    parse_options(config)
    return config


def _betas(text: str, entry: str, value: str) -> tuple[float, float]:
    numbers = tuple(_number(text, entry, part) for part in value.split("/"))
    if len(numbers) != 2:
        raise LabError(f"optimizer {text!r}: {entry!r} needs two numbers. Write them as in betas=0.9/0.95.")
    return numbers


def _number(text: str, entry: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise LabError(f"optimizer {text!r}: {entry!r} is not a number. Write it as in lr=0.003.") from None
