"""Ranks hold boxes of a parameter's entries, and of each part one of them keeps the state and computes the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from asgo._types import Stack, State
from asgo.distributed import state_dict
from asgo.distributed.collectives import all_to_all
from asgo.distributed.placement import Region, overlap, part_regions, pieces, sizes, within
from asgo.distributed.planned_part import STATE_BYTES, PlannedPart
from asgo.distributed.strategies import ROOT_PRODUCTS, Placed, per_rank
from asgo.parts import ParameterPart, StackedParts, Wait
from asgo.state_keys import PARAMETER_KEYS, split_key
from asgo.structures import Structure


class OwnerComputes(Placed):
    """Parts are in boxes on several ranks; for each of them one rank keeps the state and computes the update.

    It gathers the gradients of its parts, does with them what a single process does with all, and sends every rank its
    box of the updates: two collectives a bucket. What it holds meanwhile are whole gradients of its own parts.
    """

    kind: ClassVar[str] = "owner_computes"
    counts_all: ClassVar[bool] = False

    def bucket_key(self, param: Tensor) -> tuple[object, ...]:
        """One dtype: collectives send one."""
        return self.kind, self.ranks, param.dtype

    def worked_shape(self, param: Tensor) -> tuple[int, ...]:
        """All of the parameter."""
        return tuple(param.shape)

    def holds_state(self, owner: int | None) -> bool:
        """On the owner alone."""
        return owner == self.group_rank

    @staticmethod
    def has_owners(structure: Structure) -> bool:
        """Always."""
        return True

    @staticmethod
    def owner_cost(structure: Structure, shape: tuple[int, int, int]) -> float:
        """All of its work."""
        b, m, n = shape
        return b * (ROOT_PRODUCTS * structure.root_flops(m, n) + structure.step_flops(m, n) + m * n)

    def keep_own(self, state: State, param: Tensor, owners: Sequence[int | None]) -> None:
        """The state of parts that another rank owns has length 0 here."""
        for key, tensor in state.items():
            name, index = split_key(key)
            if name not in PARAMETER_KEYS and not self.holds_state(owners[index]):
                state[key] = tensor[:0].clone()

    def export_part(self, name: str, index: int, tensor: Tensor, param: Tensor, owners: Sequence[int | None]) -> Tensor:
        """On the owner."""
        matrices = self.matrix_view.shapes(param.shape)[index][0]
        return state_dict.on_owner(tensor, param, self.ranks[owners[index] or 0], matrices)

    def gather_gradients(self, bucket: StackedParts) -> Wait | None:
        """Gather the gradients of this rank's parts: every entry from one rank that holds it."""
        me, layout = self.group_rank, bucket_layout(bucket)
        outgoing, incoming = per_rank(self.ranks), per_rank(self.ranks)
        grads = [part.strategy.gradient(part.param) for part in bucket.all_parts]
        layout.arrived = [grads[0].new_empty(bucket.shape) for _ in bucket.parts]
        targets = iter(layout.arrived)
        for part, places, grad in zip(bucket.all_parts, layout.places, grads, strict=True):
            wanted = pieces(bucket.view, next(targets)) if part.is_owner else [None] * len(places)
            for place, target in zip(places, wanted, strict=True):
                for box, source in place.sources.items():
                    if source == me:
                        outgoing[part.owner or 0].append(grad[within(box, held_region(part))])
                    if target is not None:
                        incoming[source].append(target[within(box, place.box)])
        if layout.sends:
            return all_to_all(self.ranks, me, outgoing, incoming, grads[0])
        for mine, target in zip(outgoing[me], incoming[me], strict=True):
            target.copy_(mine)
        return None

    def gradients(self, bucket: StackedParts) -> list[Tensor]:
        """What `gather_gradients` brought."""
        layout = bucket_layout(bucket)
        arrived, layout.arrived = layout.arrived, []
        return arrived

    def scatter_updates(
        self, bucket: StackedParts, update: Stack | None, decay: float | Tensor, rounding: Any
    ) -> Wait | None:
        """Send every rank its boxes of the updates, and add those that arrive to the parameters."""
        me = self.group_rank
        outgoing, incoming = per_rank(self.ranks), per_rank(self.ranks)
        updates, written, buffers = iter(bucket.pieces(update)), [], []
        like = torch.empty(0, dtype=bucket.dtype, device=bucket.all_parts[0].param.device)
        for part, places in zip(bucket.all_parts, bucket_layout(bucket).places, strict=True):
            given = pieces(bucket.view, next(updates)) if part.is_owner else [None] * len(places)
            for place, piece in zip(places, given, strict=True):
                for rank, box in place.holders.items() if piece is not None else ():
                    outgoing[rank].append(piece[within(box, place.box)])  # pyright: ignore[reportOptionalSubscript]
                if me in place.holders:
                    written.append((part, partial(_at, within(place.holders[me], held_region(part)))))
                    buffers.append(like.new_empty(sizes(place.holders[me])))
                    incoming[part.owner or 0].append(buffers[-1])
        wait = all_to_all(self.ranks, me, outgoing, incoming, like)

        def arrive() -> None:
            wait()
            bucket.write(written, buffers, decay, rounding)

        return arrive

    @classmethod
    def kept(cls, part: PlannedPart) -> dict[str, Tensor]:
        """On the owner."""
        return dict.fromkeys(part.state, part.is_owner)

    @classmethod
    def sent(cls, part: PlannedPart, itemsize: int) -> Tensor:
        """Gradients to the owner, and updates from it."""
        return part.to_owner(part.on_ranks * itemsize) + part.from_owner(part.on_ranks * STATE_BYTES)


def _at(index: tuple[slice, ...], tensor: Tensor) -> Tensor:
    return tensor[index]


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
