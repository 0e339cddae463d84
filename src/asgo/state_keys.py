"""The keys of ``optimizer.state[p]``: a name, and the number of the part of the parameter that it is of."""

STATE_KEYS = frozenset(
    [
        "step",
        "exp_avg",
        "exp_avg_sq",
        "failures",
        "gram",
        "root",
        "cross",
        "cross_weight",
        "sqrt",
        "left",
        "left_root",
        "right",
        "right_root",
        "weight",
        "momentum_weight",
        "previous",
        "P",
        "Q",
        "whitened",
        "used",
        "failed",
        "basis",
        "before",
        "floor",
        "spike_sq",
        "residual",
    ]
)
"""What the optimizers of this library call their state, parts aside; anything else in it is a wrapper's own."""


def part_key(key: str, part: int) -> str:
    """The name in ``optimizer.state[p]`` of a key of one part: bare for the first, ``gram.1`` for the second."""
    return key if part == 0 else f"{key}.{part}"


def split_key(key: str) -> tuple[str, int]:
    """The name of a key without the number of its part, and that number: ``gram.1`` is ``("gram", 1)``."""
    base, _, part = key.partition(".")
    return base, int(part) if part.isdigit() else 0


def base_key(key: str) -> str:
    """A key of a state without the number of its part."""
    return split_key(key)[0]


def is_own(key: str) -> bool:
    """Whether a key of a state is one of this library's, not a wrapper's."""
    return base_key(key) in STATE_KEYS
