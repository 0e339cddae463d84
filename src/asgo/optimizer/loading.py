"""Whether a saved state is of this optimizer, and which part of it belongs to which parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from asgo._types import State
from asgo.distributed.dtensor import is_dtensor
from asgo.linalg.packed_symmetric import rectangle
from asgo.optimizer.param_groups import names_of, names_of_group
from asgo.state_keys import PARAMETER_KEYS, base_key, is_own, part_key, split_key
from asgo.structures import Structure
from asgo.views import View


@dataclass(frozen=True)
class Saved:
    """What was saved of one parameter.

    Args:
        state: by key.
        view: as plain data; absent (``...``) where none was saved.
    """

    state: Mapping[str, Any]
    view: Any


def saved_by_param(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[Tensor, Saved]:
    """The saved state of every parameter: by name where a saved group has the names of its group, else by place.

    Raises:
        ValueError: groups of other sizes, or of another library's optimizer.
    """
    caller, groups, saved = type(optimizer).__name__, optimizer.param_groups, state_dict.get("param_groups", [])
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
        raise ValueError(
            f"{caller}: the saved state has groups of {[len(g['params']) for g in saved]} parameters, this optimizer "
            f"of "
            f"{[len(g['params']) for g in groups]}. Build it with the same groups, or load by "
            "name with asgo.checkpoint.load_named_state_dict."
        )
    if not all(old.keys() & {"view", "views"} for old in saved):
        raise ValueError(f"{caller}: a saved group has no views: it is of another optimizer; build the one it is of.")
    found: dict[Tensor, Saved] = {}
    for old, group in zip(saved, groups, strict=True):
        for param, place in zip(group["params"], _places(old, group), strict=True):
            state = _with_tensor_step(state_dict["state"].get(old["params"][place], {}))
            found[param] = Saved(state, _saved_view(old, place))
    return found


def _with_tensor_step(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved state whose step is a tensor; other software saves it as a number, and torch takes both."""
    number = isinstance(state.get("step"), (int, float))
    return {**state, "step": torch.tensor(float(state["step"]), dtype=torch.float32)} if number else state


def _places(old: Mapping[str, Any], group: Mapping[str, Any]) -> Sequence[int]:
    """Where in a saved group each parameter of a group stands."""
    names: Sequence[str] = old.get("param_names") or ()
    own = [name for name, _ in names_of_group(group)]
    places = {name: place for place, name in enumerate(names)}
    if len(places) == len(names) == len(own) and places.keys() == set(own):
        return [places[name] for name in own if name is not None]
    return range(len(own))


def _saved_view(old: Mapping[str, Any], place: int) -> Any:
    if "views" in old:
        return old["views"][place] if len(old["views"]) == len(old["params"]) else ...
    return old.get("view", ...)


def check_saved(
    optimizer: Optimizer,
    saved: Mapping[Tensor, Saved],
    own: Mapping[Tensor, Mapping[str, Tensor]],
    views: Mapping[Tensor, View | None],
    added: Mapping[str, float],
) -> None:
    """Raise `ValueError` unless every saved state fits; one that holds nothing fits.

    Args:
        optimizer: of the parameters.
        saved: what is to be loaded.
        own: the state that every parameter has, as `state_dict` gives it.
        views: of every parameter.
        added: keys that states of earlier versions lack, parts aside.
    """
    caller, names = type(optimizer).__name__, names_of(optimizer)
    for param, found in saved.items():
        view = views[param]
        if found.state and found.view is not ... and not same_reading(View.of(found.view), view, tuple(param.shape)):
            raise ValueError(
                f"{caller}: the saved state of {names[param]!r} {tuple(param.shape)} is of the view "
                f"{View.of(found.view) or 'None (AdamW)'}, this optimizer reads it as {view or 'None (AdamW)'}. "
                "Build this one as the saved one was built."
            )
        if found.state:
            check_tensors(caller, names[param], found.state, own[param], added)


def same_reading(a: View | None, b: View | None, shape: tuple[int, ...]) -> bool:
    """Whether two views read a parameter of this shape alike, however they are written."""
    if a is None or b is None or a == b:
        return a == b
    try:
        if a.shapes(shape) != b.shapes(shape):
            return False
    except ValueError:
        return False
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    return all(map(torch.equal, a.matrices(places), b.matrices(places)))


def check_tensors(
    caller: str, name: str, saved: Mapping[str, Any], own: Mapping[str, Tensor], added: Mapping[str, float]
) -> None:
    """Raise `ValueError` unless `saved` holds the same keys and shapes as `own`, beside what wrappers keep."""
    for key in filter(is_own, own.keys() | saved.keys()):
        if key not in saved and base_key(key) in added:
            continue
        got = tuple(saved[key].shape) if key in saved else None
        wanted = tuple(own[key].shape) if key in own else None
        if got != wanted:
            raise ValueError(
                f"{caller}: the saved state of {name!r} has {_shape(got)} under {key!r}, this optimizer "
                f"{_shape(wanted)}."
                f" {_remedy(got or (), wanted or ())}"
            )


def converted(saved: Mapping[str, Any], structure: Structure) -> Mapping[str, Any]:
    """A saved state in the form that a structure keeps, part by part; a sharded one stays as it is."""
    if any(is_dtensor(value) for value in saved.values()):
        return saved
    parts: dict[int, State] = {}
    rest: dict[str, Any] = {}
    for key, value in saved.items():
        name, part = split_key(key)
        if is_own(key) and name not in PARAMETER_KEYS:
            parts.setdefault(part, {})[name] = value
        else:
            rest[key] = value
    found = {part: structure.converted(state) for part, state in parts.items()}
    return rest | {part_key(name, part): value for part, state in found.items() for name, value in state.items()}


def completed(saved: Mapping[str, Any], own: Mapping[str, Tensor], added: Mapping[str, float]) -> Mapping[str, Any]:
    """A saved state with what states of earlier versions lack; nothing for one of which nothing was saved."""
    lacking = [key for key in own if key not in saved and base_key(key) in added] if saved else []
    return {**saved, **{key: torch.full_like(own[key], added[base_key(key)]) for key in lacking}}


def foreign(saved: Mapping[str, Any]) -> State:
    """What a wrapper keeps in a saved state."""
    return {key: value for key, value in saved.items() if not is_own(key)}


def _remedy(saved: Sequence[int], own: Sequence[int]) -> str:
    for shape, other, packed in ((saved, own, False), (own, saved, True)):
        if len(shape) > 2 and shape[-1] == shape[-2] and tuple(other) == (*shape[:-2], *rectangle(shape[-1])):
            return f"It was saved with packed_state={packed}: build this optimizer with that too."
    return "It is of another model, view or optimizer; build both the same way."


def _shape(shape: Sequence[int] | None) -> str:
    return "nothing" if shape is None else f"a tensor {tuple(shape)}"
