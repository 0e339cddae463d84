"""The state of one parameter: what is in it, in which precision, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from asgo._types import State
from asgo.optimizer import adamw
from asgo.optimizer.rounding import BITS, init_residual
from asgo.parts import Strategy
from asgo.state_keys import is_own, part_key, split_key
from asgo.structures import Structure
from asgo.views import View


def state_dtype(param: Tensor) -> torch.dtype:
    """The precision of a parameter's state: float64 for float64, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _residual(param: Tensor, strategy: Strategy, group: Mapping[str, Any]) -> State:
    """What rounding loses of a parameter, if it is to be kept."""
    if group["rounding"] != "compensated" or param.dtype not in BITS:
        return {}
    return {"residual": init_residual(strategy.entries(param, param.detach()))}


def is_made(state: Mapping[str, Any]) -> bool:
    """Whether a parameter has state of this library, whatever a wrapper has put beside it."""
    return "step" in state and "exp_avg" in state


def init_state(
    param: Tensor,
    strategy: Strategy,
    owners: Sequence[int | None],
    structure: Structure,
    group: Mapping[str, Any],
) -> State:
    """The state of a parameter before its first step: its steps and, part by part, momentum, the structure's own,
    failures; without a view that of AdamW. State owned by another rank has length 0 here.
    """
    dtype, device, view = state_dtype(param), param.device, strategy.view
    state = {"step": torch.zeros((), dtype=torch.float32, device=_device_of_step(param, group, view))}
    state |= _residual(param, strategy, group)
    if view is None:
        return state | adamw.init(strategy.entries(param, param.detach()), dtype)
    pieces = [piece.shape for piece in view.cut(torch.empty(strategy.worked_shape(param), device="meta"))]
    for index, (_, m, n) in enumerate(strategy.stacks(param)):
        if strategy.holds_state(owners[index]):
            momentum = view.stack(index, torch.zeros(pieces[index], dtype=dtype, device=device))
        else:
            momentum = torch.zeros(0, m, n, dtype=dtype, device=device)
        own = {"exp_avg": momentum} | strategy.local_structure(structure, m, n).init(momentum)
        own["failures"] = torch.zeros(len(momentum), dtype=torch.int64, device=device)
        own = strategy.initial(own, owners[index])
        state |= {part_key(key, index): tensor for key, tensor in own.items()}
    return state


def move_state_to_param(
    state: State, param: Tensor, group: Mapping[str, Any], view: View | None, strategy: Strategy
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
    held = strategy.held(param.detach())
    if "residual" not in state:
        state |= _residual(param, strategy, group)
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
    caller: str, name: str | None, param: Tensor, state: State, strategy: Strategy, owners: Sequence[int | None]
) -> bool:
    """Whether the state is of a parameter of this shape, or was never used.

    Args:
        caller: the optimizer, for messages.
        name: of the parameter.
        param: the parameter.
        state: its state.
        strategy: where its entries are.
        owners: the owner of each of its parts.

    Returns:
        False if it is of another shape, but was never used.

    Raises:
        ValueError: it is of another shape and was used.
    """
    wanted, found = _momentum_shapes(param, strategy, owners), _found_shapes(state)
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
    caller: str, name: str | None, param: Tensor, state: State, strategy: Strategy, structure: Structure
) -> bool:
    """Whether the state is of this structure, or was never used; shards of a matrix are not looked at.

    Args:
        caller: the optimizer, for messages.
        name: of the parameter.
        param: the parameter.
        state: its state.
        strategy: where its entries are.
        structure: that its group describes now.

    Returns:
        False if it is of another structure, but was never used.

    Raises:
        ValueError: it is of another structure and was used.
    """
    if strategy.sums_statistics:
        return True
    for part, (_, m, n) in enumerate(_momentum_shapes(param, strategy, [None] * len(_found_shapes(state)))):
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
    return [tuple(tensor.shape) for key, tensor in state.items() if split_key(key)[0] == "exp_avg"]


def _momentum_shapes(param: Tensor, strategy: Strategy, owners: Sequence[int | None]) -> list[tuple[int, ...]]:
    if strategy.view is None:
        return [tuple(strategy.entries(param, param.detach()).shape)]
    stacks = strategy.view.shapes(strategy.worked_shape(param))
    return [
        stack if strategy.holds_state(owner) else (0, *stack[1:]) for stack, owner in zip(stacks, owners, strict=True)
    ]


def _device_of_step(param: Tensor, group: Mapping[str, Any], view: View | None) -> torch.device:
    """On the host, which reads it to know which roots are due; fused AdamW and captured graphs read it on device."""
    return param.device if view is None or group["capturable"] else torch.device("cpu")
