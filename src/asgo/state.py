"""The state of one parameter: what is in it, in which precision, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from asgo import adamw
from asgo._types import State
from asgo.distributed.placement import Placement, entries_of, keeps, local
from asgo.structures import Structure


def state_dtype(param: Tensor) -> torch.dtype:
    """The precision of a parameter's state: float64 for float64, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def part_key(key: str, part: int) -> str:
    """The name in ``optimizer.state[p]`` of a key of one part: bare for the first, ``gram.1`` for the second."""
    return key if part == 0 else f"{key}.{part}"


def init_state(
    param: Tensor,
    placement: Placement,
    owners: Sequence[int | None],
    structure: Structure | None,
    group: Mapping[str, Any],
) -> State:
    """The state of a parameter before its first step: its steps and, part by part, momentum, the structure's own,
    failures; without a structure that of AdamW. What of a part another rank keeps has no matrices here.
    """
    dtype, device, view = state_dtype(param), param.device, placement.view
    state = {"step": torch.zeros((), device=_device_of_step(param, group))}
    if view is None or structure is None:
        return state | adamw.init(entries_of(param, placement, local(param.detach())), dtype)
    whole = tuple(param.shape) if placement.kind == "owned" else tuple(local(param).shape)
    pieces = [piece.shape for piece in view.cut(torch.empty(whole, device="meta"))]
    for part, (_, m, n) in enumerate(view.shapes(tuple(param.shape) if placement.cut else whole)):
        if keeps(placement, owners[part]):
            momentum = view.stack(part, torch.zeros(pieces[part], dtype=dtype, device=device))
        else:
            momentum = torch.zeros(0, m, n, dtype=dtype, device=device)
        own = {"exp_avg": momentum} | (structure.fixed(m, n) if placement.cut else structure).init(momentum)
        own["failures"] = torch.zeros(len(momentum), dtype=torch.int64, device=device)
        if placement.cut and owners[part] not in (None, placement.me):
            own |= {key: own[key][:0].clone() for key in placement.cut.owned}
        state |= {part_key(key, part): tensor for key, tensor in own.items()}
    return state


def follow(state: State, param: Tensor, group: Mapping[str, Any]) -> State:
    """Move the state of a parameter to where the parameter is now: models move after construction."""
    dtype = state_dtype(param)
    if state["exp_avg"].device != param.device or state["exp_avg"].dtype != dtype:
        for key, tensor in state.items():
            if key == "step":
                state[key] = tensor.to(_device_of_step(param, group))
            else:
                state[key] = tensor.to(param.device, dtype if tensor.is_floating_point() else tensor.dtype)
    return state


def _device_of_step(param: Tensor, group: Mapping[str, Any]) -> torch.device:
    """On the host, which reads it to know whose turn it is; the fused AdamW and a captured graph read it on device."""
    return param.device if group["view"] is None or group["capturable"] else torch.device("cpu")
