"""The state of one parameter: what is in it, in which precision, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from asgo._types import State
from asgo.distributed.placement import Placement, entries_of, holds_state, local
from asgo.optimizer import adamw
from asgo.optimizer.rounding import BITS, init_residual
from asgo.state_keys import is_own, part_key
from asgo.structures import Structure
from asgo.views import View


def state_dtype(param: Tensor) -> torch.dtype:
    """The precision of a parameter's state: float64 for float64, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _residual(param: Tensor, placement: Placement, group: Mapping[str, Any]) -> State:
    """What rounding loses of a parameter, if it is to be kept."""
    if group["rounding"] != "compensated" or param.dtype not in BITS:
        return {}
    return {"residual": init_residual(entries_of(param, placement, local(param.detach())))}


def is_made(state: Mapping[str, Any]) -> bool:
    """Whether a parameter has state of this library, whatever a wrapper has put beside it."""
    return "step" in state and "exp_avg" in state


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
    state = {"step": torch.zeros((), dtype=torch.float32, device=_device_of_step(param, group, view))}
    state |= _residual(param, placement, group)
    if view is None or structure is None:
        return state | adamw.init(entries_of(param, placement, local(param.detach())), dtype)
    whole = tuple(param.shape) if placement.kind == "owner_computes" else tuple(local(param).shape)
    pieces = [piece.shape for piece in view.cut(torch.empty(whole, device="meta"))]
    for part, (_, m, n) in enumerate(view.shapes(tuple(param.shape) if placement.cut else whole)):
        if holds_state(placement, owners[part]):
            momentum = view.stack(part, torch.zeros(pieces[part], dtype=dtype, device=device))
        else:
            momentum = torch.zeros(0, m, n, dtype=dtype, device=device)
        own = {"exp_avg": momentum} | (structure.with_side_of(m, n) if placement.cut else structure).init(momentum)
        own["failures"] = torch.zeros(len(momentum), dtype=torch.int64, device=device)
        if placement.cut and owners[part] not in (None, placement.group_rank):
            own |= {key: own[key][:0].clone() for key in placement.cut.owner_keys}
        state |= {part_key(key, part): tensor for key, tensor in own.items()}
    return state


def move_state_to_param(
    state: State, param: Tensor, group: Mapping[str, Any], view: View | None, placement: Placement
) -> None:
    """Bring the state of a parameter to where the parameter is now and, entry by entry, into its memory order.

    Models move, are cast and change their memory format after construction.
    """
    dtype, before = state_dtype(param), state["exp_avg"].dtype
    for key, tensor in state.items() if _is_elsewhere(state, param, dtype) else ():
        if not is_own(key):
            continue
        if key == "step":
            state[key] = tensor.to(_device_of_step(param, group, view), torch.float32)
        else:
            state[key] = tensor.to(param.device, dtype if tensor.dtype == before else tensor.dtype)
    held = local(param.detach())
    if "residual" not in state:
        state |= _residual(param, placement, group)
    if view is None and state["exp_avg"].shape == held.shape and state["exp_avg"].stride() != held.stride():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.empty_like(held, dtype=dtype).copy_(state[key])


def _is_elsewhere(state: State, param: Tensor, dtype: torch.dtype) -> bool:
    return state["exp_avg"].device != param.device or state["exp_avg"].dtype != dtype


def renew(state: State, fresh: State) -> None:
    """Put fresh state in the place of what this library keeps in another; what wrappers keep stays."""
    for key in [key for key in state if is_own(key) and key != "spike_sq"]:
        del state[key]
    state |= fresh


def check_shape(
    caller: str, name: str | None, param: Tensor, state: State, placement: Placement, owners: Sequence[int | None]
) -> bool:
    """Whether the state is of a parameter of this shape, or was never used.

    Args:
        caller: the optimizer, for messages.
        name: of the parameter.
        param: the parameter.
        state: its state.
        placement: where its entries are.
        owners: the owner of each of its parts.

    Returns:
        False if it is of another shape, but was never used.

    Raises:
        ValueError: it is of another shape and was used.
    """
    wanted, found = _momentum_shapes(param, placement, owners), _found_shapes(state)
    if wanted == found:
        return True
    if float(state["step"]) == 0:
        return False
    raise ValueError(
        f"{caller}: {name or 'a parameter'!r} has the shape {tuple(param.shape)} now, its momentum {found}. Its "
        f"state is "
        "of its old shape: replace the parameter by a new one, or delete optimizer.state[parameter]."
    )


def check_form(
    caller: str, name: str | None, param: Tensor, state: State, placement: Placement, structure: Structure
) -> bool:
    """Whether the state is of this structure, or was never used; shards of a matrix are not looked at.

    Args:
        caller: the optimizer, for messages.
        name: of the parameter.
        param: the parameter.
        state: its state.
        placement: where its entries are.
        structure: that its group describes now.

    Returns:
        False if it is of another structure, but was never used.

    Raises:
        ValueError: it is of another structure and was used.
    """
    if placement.cut is not None:
        return True
    for part, (_, m, n) in enumerate(_momentum_shapes(param, placement, [None] * len(_found_shapes(state)))):
        for key, like in structure.init(torch.empty(1, m, n, device="meta")).items():
            found = state.get(part_key(key, part))
            if found is not None and found.shape[1:] == like.shape[1:]:
                continue
            if float(state["step"]) == 0:
                return False
            raise ValueError(
                f"{caller}: the state of {name or 'a parameter'!r} does not fit its group: an option that decides its "
                "form (root='square_root', packed_state, side, cross_normalize) was changed after the first step. "
                "Build an optimizer with the new option; it loads the state_dict where the form can be converted."
            )
    return True


def _found_shapes(state: State) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for key, tensor in state.items() if key.partition(".")[0] == "exp_avg"]


def _momentum_shapes(param: Tensor, placement: Placement, owners: Sequence[int | None]) -> list[tuple[int, ...]]:
    view = placement.view
    if view is None:
        return [tuple(entries_of(param, placement, local(param.detach())).shape)]
    whole = tuple(param.shape) if placement.kind == "owner_computes" else tuple(local(param).shape)
    stacks = view.shapes(whole)
    return [
        stack if holds_state(placement, owner) else (0, *stack[1:]) for stack, owner in zip(stacks, owners, strict=True)
    ]


def _device_of_step(param: Tensor, group: Mapping[str, Any], view: View | None) -> torch.device:
    """On the host, which reads it to know whose turn it is; the fused AdamW and a captured graph read it on device."""
    return param.device if view is None or group["capturable"] else torch.device("cpu")
