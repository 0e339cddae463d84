"""Which ranks hold which entries of the parts of a bucket, and which of them sends those to the owner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from asgo.distributed.placement import Region, overlap, part_regions
from asgo.parts import ParameterPart, StackedParts


def held_region(part: ParameterPart) -> Region:
    """The entries of a parameter that this rank holds."""
    return part.strategy.placement.box  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class BucketLayout:
    """Where the parts of a bucket lie, worked out once, and gradients that have been gathered for this step.

    Args:
        places: the boxes of every part.
        sends: whether any gradient is on another rank than its owner.
        arrived: gradients of this rank's parts.
    """

    places: list[list[PartRegion]]
    sends: bool
    arrived: list[Tensor]


def bucket_layout(bucket: StackedParts) -> BucketLayout:
    """That of a bucket, worked out when it is first asked for."""
    if bucket.layout is None:
        places = [_regions(part) for part in bucket.all_parts]
        sends = any(
            source != part.owner
            for part, some in zip(bucket.all_parts, places, strict=True)
            for place in some
            for source in place.sources.values()
        )
        bucket.layout = BucketLayout(places, sends, [])
    return bucket.layout


@dataclass(frozen=True)
class PartRegion:
    """A box of a part.

    Args:
        box: its entries in the parameter.
        holders: which ranks hold entries of it, and which.
        sources: the rank that sends each box: the owner if it holds it, else the one of the owner's replica.
    """

    box: Region
    holders: dict[int, Region]
    sources: dict[Region, int]


def _regions(part: ParameterPart) -> list[PartRegion]:
    boxes: Sequence[Region] = part.strategy.placement.boxes  # pyright: ignore[reportAttributeAccessIssue]
    found = []
    for box in part_regions(part.strategy.matrix_view, tuple(part.param.shape))[part.index]:
        holders = {rank: both for rank, held in enumerate(boxes) if (both := overlap(held, box)) is not None}
        found.append(PartRegion(box, holders, _sources(part.owner, holders)))
    return found


def _sources(owner: int | None, held: Mapping[int, Region]) -> dict[Region, int]:
    by_box: dict[Region, list[int]] = {}
    for rank, box in held.items():
        by_box.setdefault(box, []).append(rank)
    twins = [] if owner is None or owner not in held else by_box[held[owner]]
    replica = twins.index(owner) if owner in twins else 0
    return {box: ranks[replica % len(ranks)] for box, ranks in by_box.items()}
