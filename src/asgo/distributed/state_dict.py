"""State as the whole world sees it: tensors of one process's shapes, wherever their entries are.

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

from asgo._types import State
from asgo.distributed.dtensor import is_dtensor
from asgo.distributed.placement import Placement, ShardSpec
from asgo.state_keys import is_own

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement as TorchPlacement


def export(state: State, param: Tensor, placement: Placement, owners: Sequence[int | None]) -> State:
    """The state of a parameter as the whole world sees it, on the same memory.

    Args:
        state: what this rank keeps.
        param: the parameter.
        placement: where its entries are.
        owners: the owner of each part.
    """
    return {key: _exported(key, tensor, param, placement, owners) for key, tensor in state.items()}


def _exported(key: str, tensor: Tensor, param: Tensor, placement: Placement, owners: Sequence[int | None]) -> Tensor:
    name, _, part = key.partition(".")
    if not is_own(key):
        return tensor
    if key in ("spike_sq", "residual") or (placement.kind == "elementwise" and name.startswith("exp_avg")):
        return _entries(key, tensor, param, placement)
    if key == "step" or placement.kind in ("local", "root_sharing", "elementwise"):
        return tensor
    if placement.kind == "whole_slices" and is_dtensor(param):
        share = [math.prod(hi - lo for lo, hi in box) for box in placement.boxes]
        matrices = len(tensor) * sum(share) // share[placement.group_rank]
        return _world(tensor, param.device_mesh, _along(0, param), (matrices, *tensor.shape[1:]))
    from torch.distributed.tensor import Replicate

    number = int(part or 0)
    stack = placement.view.shapes(param.shape)[number]  # pyright: ignore[reportOptionalMemberAccess]
    if placement.cut is not None and name not in placement.cut.owner_keys:
        return _shard(name, tensor, param, placement.cut, stack)
    mesh = _mesh(param.device.type, (placement.ranks[owners[number] or 0],))
    return _world(tensor, mesh, (Replicate(),), (stack[0], *tensor.shape[1:]))


def _entries(key: str, tensor: Tensor, param: Tensor, placement: Placement) -> Tensor:
    """A tensor with an entry for each of the parameter's, held as those are."""
    if is_dtensor(param):
        return _world(tensor, param.device_mesh, param.placements, param.shape)
    if placement.rows and key != "spike_sq":
        from torch.distributed.tensor import Shard

        return _world(tensor, _mesh(param.device.type, placement.ranks), (Shard(0),), param.shape)
    return tensor


def _shard(name: str, tensor: Tensor, param: Tensor, cut: ShardSpec, stack: tuple[int, int, int]) -> Tensor:
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
