"""The keys of ``optimizer.state[p]``: a name, and the number of the part of the parameter that it is of."""

from __future__ import annotations

from asgo.structures.base import STATE_KEYS

PARAMETER_KEYS = frozenset({"step", "residual", "spike_sq"})
"""Keys of a whole parameter: of the step, of `asgo.optimizer.rounding` and of `asgo.SPAM`."""

PART_KEYS = frozenset({"exp_avg", "exp_avg_sq", "failures"})
"""Keys that every part has beside the state of its structure: of momentum and failures, and of AdamW."""


def part_key(name: str, part: int) -> str:
    """The key of a part's tensor: the name alone for the first part, ``gram.1`` for the second."""
    return name if part == 0 else f"{name}.{part}"


def split_key(key: str) -> tuple[str, int]:
    """The name and the number of the part: ``gram.1`` is ``("gram", 1)``."""
    name, _, part = key.partition(".")
    return (name, int(part)) if part.isdigit() else (key, 0)


def base_key(key: str) -> str:
    """A key without the number of its part."""
    return split_key(key)[0]


def is_own(key: str) -> bool:
    """Whether a key of a state is one of this library's, not a wrapper's."""
    name = base_key(key)
    return name in PARAMETER_KEYS or name in PART_KEYS or name in STATE_KEYS
