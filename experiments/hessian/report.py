"""The table of ``experiments.hessian``, and what it says of the paper's claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from experiments.hessian.config import Curvature
from experiments.hessian.estimates import Estimate
from experiments.hessian.matrices import Matrix
from experiments.hessian.pairs import Pairs

HALF = 0.5
"""Block-diagonal is what is nearer to it than to a structureless matrix, in share of the squared norm."""

QUERY_KEY, VALUE_OUTPUT = ("query", "key"), ("value", "output")
"""What the paper finds block-diagonal by head, and what it keeps whole."""

ERRORS = 2.0
"""Standard errors by which left and right must differ for one to be favoured."""


@dataclass(frozen=True)
class Row:
    """What is known of the block of one matrix.

    Args:
        step: training steps done.
        curvature: hessian or ggn.
        matrix: which.
        method: exact or probed; empty where it could not be measured.
        reason: why it could not.
        products: how many it took.
        shares: the numbers of `experiments.hessian.estimates`, by name.
    """

    step: int
    curvature: Curvature
    matrix: Matrix
    method: str = ""
    reason: str = ""
    products: int = 0
    shares: Mapping[str, Estimate] = field(default_factory=dict)

    @staticmethod
    def of(step: int, curvature: Curvature, matrix: Matrix, found: Mapping[str, Any]) -> Row:
        """From the result of a job."""
        if "shares" not in found:
            return Row(step, curvature, matrix, reason=found.get("reason", "not measured"))
        shares = {name: Estimate(*pair) for name, pair in found["shares"].items()}
        return Row(step, curvature, matrix, found["method"], "", found["products"], shares)

    def of_same(self, other: Row | Pairs) -> bool:
        """Whether it is of the same curvature at the same step."""
        return (self.step, self.curvature) == (other.step, other.curvature)

    @property
    def structureless(self) -> dict[str, float]:
        """What a symmetric matrix of independent entries has of each share."""
        m, n = self.matrix.shape
        heads = {"groups": 1 / self.matrix.heads, "coupling": 1.0}
        return {"rows": 1 / m, **heads, "left": 1 / n, "right": 1 / m, "scalar": 1 / (m * n)}

    def excess(self, name: str) -> Estimate | None:
        """How far a share is on the way from structureless (0) to block-diagonal (1); None if there is none."""
        share, base = self.shares.get(name), self.structureless[name]
        return (
            None
            if share is None or base == 1
            else Estimate((share.value - base) / (1 - base), share.error / (1 - base))
        )

    @property
    def favours(self) -> str:
        """The side that describes the block better, ``neither`` within the error, empty if not measured."""
        if not self.shares:
            return ""
        left, right = self.shares["left"], self.shares["right"]
        if abs(left.value - right.value) <= ERRORS * math.hypot(left.error, right.error):
            return "neither"
        return "left" if left.value > right.value else "right"

    def flat(self) -> dict[str, Any]:
        """A line of ``table.csv``."""
        m, n = self.matrix.shape
        line: dict[str, Any] = {
            "step": self.step,
            "curvature": self.curvature,
            "matrix": self.matrix.name,
            "label": self.matrix.label,
            "role": self.matrix.role,
            "rows": m,
            "columns": n,
            "heads": self.matrix.heads,
            "method": self.method,
            "products": self.products,
        }
        for name, title in TITLES.items():
            share = self.shares.get(name)
            line |= {
                title: None if share is None else share.value,
                f"{title}_error": None if share is None else share.error,
            }
            if name in self.structureless:
                line[f"{title}_structureless"] = self.structureless[name]
        return line | {"favours": self.favours, "reason": self.reason}


TITLES = {
    "norm": "norm",
    "groups": "by_head",
    "coupling": "coupling_of_heads",
    "rows": "by_neuron",
    "left": "left",
    "right": "right",
    "scalar": "scalar",
}
COLUMNS = ("matrix", "step", "curvature", "by head", "by neuron", "left", "right", "favours")


def cells(row: Row) -> list[str]:
    """A line of the table for reading."""
    start = [row.matrix.label, str(row.step), row.curvature]
    shares = [_text(row.shares.get(name)) for name in ("groups", "rows", "left", "right")]
    return [*start, *shares, row.favours or "not measured"]


def _text(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.2f}" + (f"±{estimate.error:.2f}" if estimate.error else "")


# ---- in words ------------------------------------------------------------------------------------


def says(rows: Sequence[Row], pairs: Pairs) -> list[str]:
    """What one curvature at one step says of the paper's claims.

    Args:
        rows: all matrices.
        pairs: the blocks between them.
    """
    where = f"step {pairs.step}, {pairs.curvature}"
    failed = [row for row in rows if row.reason]
    lines = [
        _coupling(pairs),
        _by_head(rows, QUERY_KEY, True),
        _by_head(rows, VALUE_OUTPUT, False),
        _mlp(rows),
        _sides(rows),
    ]
    if len(failed) == len(rows):
        return [f"{where}: not measurable: {failed[0].reason}"]
    lines += [f"{row.matrix.label} is not measurable: {row.reason}" for row in failed]
    return [f"{where}: {line}" for line in lines if line]


def _coupling(pairs: Pairs) -> str:
    """How strongly different matrices interact."""
    places = {"within a layer": pairs.typical(True), "between layers": pairs.typical(False)}
    parts = [f"{value:.2f} {where}" for where, value in places.items() if value is not None]
    return (
        f"coupling of two matrices, median: {', '.join(parts)} (0 is block-diagonal, 1 structureless)" if parts else ""
    )


def _by_head(rows: Sequence[Row], roles: Sequence[str], expected: bool) -> str:
    """Whether matrices are block-diagonal by head, as the paper has it of some and not of others."""
    claim = f"{' and '.join(roles)} {'block-diagonal by head' if expected else 'whole'}, as the paper has them"
    found = {role: excess for role in roles if (excess := _mean_excess(rows, role, "groups")) is not None}
    if not found:
        return f"{claim}: cannot be judged, there is none with several heads"
    holds = all((excess.value >= HALF) == expected for excess in found.values())
    coupling = {role: _mean([row.shares["coupling"] for row in rows if _has_heads(row, role)]) for role in found}
    numbers = ", ".join(f"{role} {_text(excess)}" for role, excess in coupling.items())
    return f"{claim}: {_verdict(holds)}, by head {_list(found)}; coupling of heads {numbers}"


def _mlp(rows: Sequence[Row]) -> str:
    """Whether the other matrices are block-diagonal by output neuron."""
    own = [row for row in rows if row.matrix.role == "other" and row.shares]
    kinds = dict.fromkeys(row.matrix.kind for row in own)
    found = {kind: _mean_excess([row for row in own if row.matrix.kind == kind], "other", "rows") for kind in kinds}
    known = {kind: excess for kind, excess in found.items() if excess is not None}
    if not known:
        return ""
    holds = all(excess.value < HALF for excess in known.values())
    return f"MLP whole, as the paper has it: {_verdict(holds)}, by output neuron {_list(known)}"


def _list(found: Mapping[str, Estimate]) -> str:
    numbers = ", ".join(f"{name} {_text(excess)}" for name, excess in found.items())
    return f"{numbers} (0 is structureless, 1 block-diagonal)"


def _verdict(holds: bool) -> str:
    return "yes" if holds else "no"


def _mean_excess(rows: Sequence[Row], role: str, name: str) -> Estimate | None:
    found = [excess for row in rows if row.matrix.role == role and (excess := row.excess(name)) is not None]
    return _mean(found) if found else None


def _has_heads(row: Row, role: str) -> bool:
    return row.matrix.role == role and "coupling" in row.shares


def _mean(found: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates."""
    return Estimate(fmean(each.value for each in found), math.sqrt(sum(e.error**2 for e in found)) / len(found))


def _sides(rows: Sequence[Row]) -> str:
    sides = {side: [row.matrix.label for row in rows if row.favours == side] for side in ("left", "right", "neither")}
    return "favours " + "; ".join(f"{side}: {', '.join(names) or 'none'}" for side, names in sides.items())


def by_parameter(rows: Sequence[Row], step: int, curvature: Curvature) -> dict[str, dict[str, float]]:
    """Relative norms ``left`` and ``right`` of every parameter; of one with several matrices, of all together."""
    own: dict[str, list[Row]] = {}
    for row in rows:
        if row.shares and (row.step, row.curvature) == (step, curvature):
            own.setdefault(row.matrix.parameter, []).append(row)
    return {name: {side: _together(several, side) for side in ("left", "right")} for name, several in own.items()}


def _together(rows: Sequence[Row], side: str) -> float:
    squares = [row.shares["norm"].value ** 2 for row in rows]
    kept = sum(square * row.shares[side].value ** 2 for square, row in zip(squares, rows, strict=True))
    return math.sqrt(kept / sum(squares))
