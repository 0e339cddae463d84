"""Configurations as JSON, as flat dictionaries, and as the words of a command."""

from __future__ import annotations

import dataclasses
import json
import shlex
import types
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from asgo.lab.errors import LabError

T = TypeVar("T")

# Fields whose flags carry no prefix, as their annotations above say.
_BARE = ("data.", "machine.", "cadence.")


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain data: dataclasses as dicts, tuples as lists, paths as strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(kind: type[T], data: dict[str, Any]) -> T:
    """The config that `to_json` wrote; raises `LabError` for a field that this version does not know."""
    hints = get_type_hints(kind)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise LabError(
            f"unknown field {unknown[0]!r} in a saved {kind.__name__}: it was written by another version of "
            "asgo. Start a new run."
        )
    return kind(**{name: _revive(hints[name], value) for name, value in data.items()})


def _revive(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value)  # pyright: ignore[reportArgumentType]
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return None if value is None else _revive(kinds[0], value)
    if hint is Path:
        return Path(value)
    return tuple(value) if get_origin(hint) is tuple else value


def flat(config: Any) -> dict[str, Any]:
    """The fields of a config by dotted name, for example ``{"model.layers": 4}``."""
    found: dict[str, Any] = {}
    for name, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config)):
        is_inner = dataclasses.is_dataclass(value)
        found |= {f"{name}.{inner}": v for inner, v in flat(value).items()} if is_inner else {name: value}
    return found


def flag(name: str) -> str:
    """The flag of a dotted field name: ``data.block_size`` is ``--block-size``."""
    for prefix in _BARE:
        name = name.removeprefix(prefix)
    return "--" + name.replace("_", "-")


def command(program: str, config: Any) -> str:
    """The shell command that runs `config`, as ``asgo train --steps 5``; fields at their defaults are left out."""
    defaults = flat(type(config)())
    words = program.split()
    for name, value in flat(config).items():
        if value == defaults[name]:
            continue
        if isinstance(value, bool) and defaults[name] is not None:
            prefix, dot, leaf = flag(name).rpartition(".") if "." in flag(name) else ("--", "", flag(name)[2:])
            words.append(flag(name) if value else f"{prefix}{dot}no-{leaf}")
        else:
            words += [flag(name), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)
