"""Process groups by the ranks in them, so that everything else can keep plain data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from asgo.parts import Wait

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_groups: WeakValueDictionary[tuple[object, tuple[int, ...]], ProcessGroup] = WeakValueDictionary()
"""Weak: the threads of a group that is held do not end with it, and may abort a process that ends before them."""


def ensure_group(
    ranks: tuple[int, ...] | None, mesh: DeviceMesh | None = None, dim: int | None = None
) -> tuple[int, ...]:
    """Make sure that a group of these ranks can be found; all of them must call this in the same order.

    Args:
        ranks: global ranks; None: the ranks of the mesh along `dim`.
        mesh: which may have such a group already.
        dim: one of its dimensions.
    """
    if mesh is not None and (dim is not None or mesh.ndim == 1):
        group = mesh.get_group(dim or 0)
        ranks = tuple(dist.get_process_group_ranks(group))
        _groups[_key(ranks)] = group
    elif ranks is not None and _key(ranks) not in _groups:
        world = ranks == tuple(range(dist.get_world_size()))
        made = dist.group.WORLD if world else dist.new_group(list(ranks), use_local_synchronization=True)
        _groups[_key(ranks)] = made  # pyright: ignore[reportArgumentType]
    return ranks or ()


def register_group(group: ProcessGroup | None) -> tuple[int, ...]:
    """The ranks of a group, by which it is found from now on; None is the default group."""
    group = group or dist.group.WORLD
    ranks = tuple(dist.get_process_group_ranks(group))
    _groups[_key(ranks)] = group  # pyright: ignore[reportArgumentType]
    return ranks


def group_of(ranks: tuple[int, ...]) -> ProcessGroup:
    """The group of these ranks."""
    return _groups[_key(ranks)]


def background() -> ProcessGroup | None:
    """A group of all ranks for what another thread sends on the host meanwhile; None on a process without groups."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    key = (id(dist.group.WORLD), (-1,))
    if key not in _groups:
        _groups[key] = dist.new_group(backend="gloo")  # pyright: ignore[reportArgumentType]
    return _groups[key]


def _key(ranks: tuple[int, ...]) -> tuple[object, tuple[int, ...]]:
    return id(dist.group.WORLD), tuple(ranks)


def all_to_all(
    ranks: tuple[int, ...],
    me: int,
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Tensor]],
    like: Tensor,
) -> Wait:
    """Start to send tensors to every rank of a group; returns a function that waits, and fills `incoming` in place.

    One collective that sends the tensors for other ranks and no more. What a rank sends itself is copied.

    Args:
        ranks: of the group; all of them must call this in the same order.
        group_rank: this rank's place among them.
        outgoing: the tensors for every rank, in its order.
        incoming: where those from every rank go, in the order in which it sends them.
        like: a tensor of the dtype and device of all of them.
    """
    for mine, to in zip(outgoing[me], incoming[me], strict=True):
        to.copy_(mine)
    sent = [[] if i == me else list(tensors) for i, tensors in enumerate(outgoing)]
    awaited = [[] if i == me else list(tensors) for i, tensors in enumerate(incoming)]
    away, home = ([sum(t.numel() for t in tensors) for tensors in side] for side in (sent, awaited))
    packed = [tensor.reshape(-1) for tensors in sent for tensor in tensors]
    buffer = torch.cat(packed) if packed else like.new_empty(0)
    arrived = like.new_empty(sum(home))
    work = dist.all_to_all_single(arrived, buffer, home, away, group=group_of(ranks), async_op=True)
    return partial(_unpack, work, buffer, arrived, [tensor for tensors in awaited for tensor in tensors])


def _unpack(work: Any, buffer: Tensor, arrived: Tensor, targets: Sequence[Tensor]) -> None:
    """Wait and put everything into its place; `buffer` is an argument so that it lives until then."""
    work.wait()
    for target, piece in zip(targets, arrived.split([target.numel() for target in targets]), strict=True):
        target.copy_(piece.view(target.shape))


def all_reduce_and(flags: Tensor, ranks: Sequence[tuple[int, ...]]) -> Tensor:
    """The flags that hold on all ranks.

    Args:
        flags: ``(n,)`` bool.
        ranks: the global ranks that must agree on each of them; empty: no other rank.
    """
    for some in sorted(set(ranks)):
        if some:
            index = torch.tensor([i for i, of in enumerate(ranks) if of == some], device=flags.device)
            shared = flags[index].float()
            dist.all_reduce(shared, op=dist.ReduceOp.MIN, group=group_of(some))
            flags = flags.index_copy(0, index, shared > 0)
    return flags


def all_reduce_norm(norms: Tensor, ranks: tuple[int, ...]) -> Wait:
    """Start to all-reduce norms of shards to norms of matrices, in place: ``sqrt(sum of squares)``."""
    found = [torch.empty_like(norms) for _ in ranks]
    work = dist.all_gather(found, norms, group=group_of(ranks), async_op=True)

    def arrive() -> None:
        work.wait()  # pyright: ignore[reportOptionalMemberAccess]
        torch.linalg.vector_norm(torch.stack(found), dim=0, out=norms)

    return arrive


def all_reduce_sum(tensor: Tensor, ranks: tuple[int, ...]) -> Wait:
    """Start to add up a tensor over ranks, in place."""
    work = dist.all_reduce(tensor, group=group_of(ranks), async_op=True)

    def arrive() -> None:
        work.wait()  # pyright: ignore[reportOptionalMemberAccess]

    return arrive


def all_gather(norms: Tensor, ranks: tuple[int, ...], most: int) -> Tensor:
    """The norms of the matrices of every parameter wherever they are, ``(members, ranks * most)``, zeros in between.

    Args:
        norms: ``(members, slices)`` of this rank.
        ranks: of the group.
        most: the largest number of slices that a rank has.
    """
    mine = torch.nn.functional.pad(norms, (0, most - norms.shape[1])).contiguous()
    found = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(found, mine, group=group_of(ranks))
    return torch.cat(found, 1)
