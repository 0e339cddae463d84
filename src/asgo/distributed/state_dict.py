"""State as every rank sees it: tensors with the shapes of a single process, wherever their entries are.

In the optimizer, state is plain tensors of what this rank keeps. Outside, each is a tensor of the shape that a single
process has: plain where this rank holds all of it, else a `DTensor` on the same memory, placed like its parameter or on
the one rank that keeps it. So every rank has the same keys, and what was saved in one layout loads in any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asgo.distributed.dtensor import is_dtensor
from asgo.distributed.placement import Placement, ShardSpec
from asgo.state_keys import is_own

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement as TorchPlacement


def like_param(key: str, tensor: Tensor, param: Tensor, placement: Placement) -> Tensor:
    """A tensor with an entry for each of the parameter's, held as those are."""
    if is_dtensor(param):
        return _world(tensor, param.device_mesh, param.placements, param.shape)
    if placement.rows and key != "spike_sq":
        from torch.distributed.tensor import Shard

        return _world(tensor, _mesh(param.device.type, placement.ranks), (Shard(0),), param.shape)
    return tensor


def slices(tensor: Tensor, param: Tensor, placement: Placement) -> Tensor:
    """A tensor of matrices of which every rank holds some."""
    if not is_dtensor(param):
        return tensor
    share = [math.prod(hi - lo for lo, hi in box) for box in placement.boxes]
    matrices = len(tensor) * sum(share) // share[placement.group_rank]
    return _world(tensor, param.device_mesh, _along(0, param), (matrices, *tensor.shape[1:]))


def on_owner(tensor: Tensor, param: Tensor, rank: int, matrices: int) -> Tensor:
    """A tensor of this many matrices that one rank holds."""
    from torch.distributed.tensor import Replicate

    return _world(tensor, _mesh(param.device.type, (rank,)), (Replicate(),), (matrices, *tensor.shape[1:]))


def shard(name: str, tensor: Tensor, param: Tensor, cut: ShardSpec, stack: tuple[int, int, int]) -> Tensor:
    """A tensor of a matrix of which ranks have rows or columns, cut as those are or whole on every rank."""
    if not is_dtensor(param) or (name != "exp_avg" and name not in cut.sharded_keys):
        return tensor
    shape = [*tensor.shape[: cut.axis], stack[cut.axis], *tensor.shape[cut.axis + 1 :]]
    return _world(tensor, param.device_mesh, _along(cut.axis, param), shape)


def _along(axis: int, param: DTensor) -> tuple[TorchPlacement, ...]:
    """Shards of an axis of a stack, by the ranks that have shards of the parameter."""
    from torch.distributed.tensor import Replicate, Shard

    return tuple(Shard(axis) if placed.is_shard() else Replicate() for placed in param.placements)


def _world(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[TorchPlacement], shape: Sequence[int]) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


@lru_cache(maxsize=4096)
def _mesh(device: str, ranks: tuple[int, ...]) -> DeviceMesh:
    """A mesh that says where entries are; nothing travels along it, so it needs no process group."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh(device, list(ranks), _init_backend=False)


def assign(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Write what was saved into state that `export` gave, in place.

    Args:
        own: of one parameter.
        saved: tensors of the same shapes: whole ones, or such as `export` gives in the same layout. What is not in it
            stays.
    """
    for key, target in own.items():
        if key not in saved or not is_own(key):
            continue
        source = saved[key]
        held = target.to_local() if is_dtensor(target) else target
        if is_dtensor(source):
            held.copy_(source.to_local())
        elif is_dtensor(target):
            if held.numel():
                held.copy_(source[_box(target)])
        else:
            held.copy_(source)


def _box(target: DTensor) -> tuple[slice, ...]:
    """The indices of the entries that this rank holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    lengths, begin = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    return tuple(slice(start, start + length) for start, length in zip(begin, lengths, strict=True))


def compact(tensor: Tensor) -> Tensor:
    """A copy without the rest of the memory that a tensor is a part of; the tensor itself if it is all of it.

    `torch.distributed.checkpoint` cannot stage a `DTensor` that begins within its memory.
    """
    held = tensor.to_local() if is_dtensor(tensor) else tensor
    if held.untyped_storage().nbytes() == held.numel() * held.element_size():
        return tensor
    if not is_dtensor(tensor):
        return held.clone()
    return _world(held.clone(), tensor.device_mesh, tensor.placements, tensor.shape)
