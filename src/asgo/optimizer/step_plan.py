"""How a step treats the parameters of a group, worked out once and kept while they stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from asgo.optimizer.bucket import Bucket
from asgo.parts import Strategy


@dataclass(frozen=True)
class StepPlan:
    """How a step treats the parameters of a group that have gradients.

    Args:
        signature: see `signature_of`; the plan is valid while it is unchanged.
        entries: the parameters without a view.
        strategies: where these live.
        places: a number for each of them that it has on all ranks and no other has.
        viewed: the parameters with a view.
        buckets: the stacks of the parameters with a view.
    """

    signature: object
    entries: list[Tensor]
    strategies: list[Strategy]
    places: list[int]
    viewed: list[Tensor]
    buckets: list[Bucket]


def signature_of(group: Mapping[str, Any]) -> object:
    """What a plan depends on: it is rebuilt when this changes."""
    return (
        group["precondition_frequency"],
        group["rounding"],
        [group.get(key) for key in ("root", "side", "packed_state", "cross_normalize")],
        [(id(p), p.shape, p.stride(), p.dtype, p.device) for p in group["params"] if p.grad is not None],
    )
