"""Optimizers written in one word: ``adamw``, or ``adamw:lr=0.003,weight_decay=0.1,betas=0.9/0.95``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asgo.lab.config.runs import OptimizerConfig
from asgo.lab.errors import LabError
from asgo.lab.optimizers.registry import parse_options, resolve

_NUMBERS = ("lr", "weight_decay", "adamw_lr")


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
