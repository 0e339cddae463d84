"""The one check of ranges: a constraint stands on the field of a configuration, its message is written here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any, get_type_hints

from asgo.lab.config.codec import flag
from asgo.lab.errors import LabError


@dataclasses.dataclass(frozen=True)
class Range:
    """What numbers a field may have, as in ``steps: Annotated[int, Range(1, 1e12, "a number of steps")]``.

    It holds for each entry of a tuple, and not for None.
    """

    least: float  # the smallest
    most: float = math.inf  # the largest
    meaning: str = "a number"  # what it is

    def check(self, name: str, value: float) -> None:
        """Raise `LabError` for a value of the field `name` that is out of range, NaN or infinite."""
        if not self.least <= value <= self.most or not math.isfinite(value):
            span = f"{self.least:g} or more" if self.most == math.inf else f"from {self.least:g} to {self.most:g}"
            raise LabError(f"{flag(name)} {value} is out of range: pass {self.meaning}, {span}.")


BLOCKS = Range(0, 1e12, "a number of validation blocks; 0 means all")
NOT_NEGATIVE = Range(0)
SEED = Range(0, 2**63 - 1, "a seed")
THREADS = Range(1, 4096, "a number of CPU threads")
TOKENS = Range(1, meaning="a number of tokens")
STEPS = Range(1, 1e12, "a number of steps")


def check_ranges(config: Any) -> None:
    """Raise `LabError` for a number of a configuration, or of one within it, that is out of its range."""
    for name, value, allowed in _constraints(config, ""):
        for entry in value if isinstance(value, tuple) else () if value is None else (value,):
            allowed.check(name, entry)


def _constraints(config: Any, prefix: str) -> Iterator[tuple[str, Any, Range]]:
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _constraints(value, f"{name}.")
        yield from (
            (name, value, each) for each in getattr(hints[field.name], "__metadata__", ()) if isinstance(each, Range)
        )


def check_distinct(name: str, values: Collection[object], empty: bool = False) -> None:
    """Raise `LabError` for a list with an entry twice, or without any unless it may be `empty`."""
    if not values and not empty:
        raise LabError(f"{flag(name)} is empty: pass at least one.")
    if len(set(values)) < len(values):
        raise LabError(f"{flag(name)} {' '.join(map(str, values))} repeats an entry: pass each once.")


def check_known(name: str, values: Collection[str], known: Collection[str]) -> None:
    """Refuse names that do not exist.

    Raises:
        LabError: naming the flag, the name and the names that exist.
    """
    for value in values:
        if value not in known:
            raise LabError(f"{flag(name)} {value} does not exist: choose from {', '.join(known)}.")
