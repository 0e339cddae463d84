"""Checkpoints of several ranks: a folder that each writes its part of, which any number of ranks can load.

The folder is of `torch.distributed.checkpoint`, with one more file for what is the same on all ranks. All of it is
written beside its final place and renamed when it is whole, so a run that dies while it saves leaves no half of one.
"""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim import Optimizer

from asgo.checkpoint import by_name, files
from asgo.distributed.collectives import background
from asgo.distributed.state_dict import compact
from asgo.optimizer.loading import same_reading
from asgo.optimizer.param_groups import names_of_group, views_of
from asgo.views import View

T = TypeVar("T")
ABOUT = "about.pt"
"""The file of a folder with what is the same on all ranks."""


def save(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, extra: Mapping[str, Any] | None = None
) -> None:
    """Save a model and its optimizer from all ranks, whatever their layout; all ranks must call it.

    Args:
        path: the folder; it must not exist yet, and all ranks must see the same file system.
        model: plain, in `DistributedDataParallel`, or sharded.
        optimizer: with named parameters.
        extra: plain data and tensors that are the same on all ranks, e.g. the step; rank 0 writes it.

    Raises:
        ValueError: the folder exists, or parameters have no names.
        OSError: what the file system says to any rank, on all of them; earlier folders are untouched.
    """
    target, state, about = _prepare(path, model, optimizer, extra)
    try:
        with _one_process_is_meant():
            dcp.save(state, checkpoint_id=_aside(target), no_dist=_alone())
    except CheckpointException as error:
        raise _unwritten(target, error) from error
    _all_or_none(partial(_finish, target, about))


def save_async(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, extra: Mapping[str, Any] | None = None
) -> Future[None]:
    """As `save`, but only copies to host memory before it returns. Wait for one before the next.

    Returns:
        A future that is done when the folder is whole, on rank 0 also at its place; its ``result()`` raises what went
        wrong.
    """
    target, state, about = _prepare(path, model, optimizer, extra)
    state["optimizer"] = {
        name: {key: compact(tensor) for key, tensor in tensors.items()} for name, tensors in state["optimizer"].items()
    }
    written: Any = dcp.async_save(state, checkpoint_id=_aside(target), process_group=background(), no_dist=_alone())
    done: Future[None] = Future()

    def finish(future: Future[Any]) -> None:
        try:
            future.result()
            _finish(target, about)
            done.set_result(None)
        except CheckpointException as error:
            done.set_exception(_unwritten(target, error))
        except BaseException as error:  # for the caller of result()
            done.set_exception(error)

    written.add_done_callback(finish)
    return done


def load(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load what `save` wrote, on any number of ranks in any layout; all ranks must call it.

    Args:
        path: the folder.
        model: of the same parameters.
        optimizer: of the same class and views, however its parameters are grouped.

    Returns:
        The `extra` that was saved.

    Raises:
        ValueError: no whole checkpoint, or one of another model, optimizer or view; on all ranks, whichever of them
            found it, and nothing has changed then. Or a file of it is damaged.
    """
    path = Path(path)
    about, state = _all_or_none(partial(_fitting, path, model, optimizer))
    try:
        with _one_process_is_meant():
            dcp.load(state, checkpoint_id=path, no_dist=_alone())
    except CheckpointException as error:
        raise ValueError(f"{path} is damaged ({_first_failure(error)}); use another one.") from error
    set_model_state_dict(model, state["model"])
    by_name.take_hyperparameters(optimizer, about["groups"])
    return about["extra"]


def read_about(path: Path) -> dict[str, Any]:
    """What a folder holds that is the same on all ranks: ``format``, ``optimizer``, ``groups`` and ``extra``.

    Raises:
        ValueError: no whole checkpoint.
    """
    if not (path / ABOUT).exists() or not (path / ".metadata").exists():
        raise ValueError(f"{path} is not a whole checkpoint: it lacks {ABOUT} or .metadata; use another one.")
    return files.load(path / ABOUT)


def _prepare(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, extra: Mapping[str, Any] | None
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The final folder, what ranks write together, and what rank 0 writes; what a kill left half-way is removed."""
    target = Path(path)
    named = _all_or_none(partial(_named_for, target, optimizer))
    about = {
        "format": by_name.FORMAT,
        "optimizer": type(optimizer).__name__,
        "groups": named["groups"],
        "extra": dict(extra or {}),
    }
    if _first():
        shutil.rmtree(_aside(target), ignore_errors=True)
    if not _alone():
        dist.barrier()
    return target, _state(model, named), about


def _named_for(target: Path, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state by name, for a folder that is new."""
    if target.exists():
        raise ValueError(f"{target} exists, and a checkpoint is never written over another: pass a new folder.")
    return by_name.named_state_dict(optimizer)


def _state(model: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": named["state"]}


def _fitting(path: Path, model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a folder says about itself, and the state that it will be loaded into."""
    about = read_about(path)
    state = _state(model, by_name.named_state_dict(optimizer))
    _check(path, about, optimizer, state)
    return about, state


def _check(path: Path, about: Mapping[str, Any], optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise `ValueError` naming the first thing that the checkpoint and this run do not share."""
    caller = type(optimizer).__name__
    if (about.get("format"), about.get("optimizer")) != (by_name.FORMAT, caller):
        raise ValueError(
            f"{caller}: {path} has format {about.get('format')!r} and is of {about.get('optimizer')}; known is format "
            f"{by_name.FORMAT}. Build the optimizer it was saved from."
        )
    try:
        found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a damaged pickle raises
        raise ValueError(f"{path} is not a whole checkpoint: its .metadata is damaged; use another one.") from error
    _check_views(path, caller, about["groups"], optimizer)
    saved = {key: tuple(of.size) for key, of in found.items() if isinstance(of, TensorStorageMetadata)}
    own = {f"model.{name}": tuple(tensor.shape) for name, tensor in state["model"].items()}
    for name, tensors in state["optimizer"].items():
        own |= {f"optimizer.{name}.{key}": tuple(tensor.shape) for key, tensor in tensors.items()}
    for key in sorted(own.keys() | saved.keys()):
        if own.get(key) != saved.get(key):
            raise ValueError(
                f"{caller}: {key} is {saved.get(key, 'not there')} in {path}, here {own.get(key, 'not there')}. It "
                f"is of "
                "another model, view or optimizer; build both the same way."
            )


def _check_views(path: Path, caller: str, groups: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> None:
    """Raise `ValueError` naming the first parameter that was read through another view when it was saved."""
    saved = {name: view for group in groups for name, view in by_name.views_of_saved(group) if view is not ...}
    for group in optimizer.param_groups:
        for (name, param), view in zip(names_of_group(group), views_of(group), strict=True):
            shape = tuple(param.shape)
            if name in saved and not same_reading(View.of(saved[name]), view, shape):
                raise ValueError(
                    f"{caller}: {name} {shape} is read as {View.of(saved[name]) or 'None (AdamW)'} in {path}, here as "
                    f"{view or 'None (AdamW)'}. Build the optimizer with the views it was saved with."
                )


def _finish(target: Path, about: dict[str, Any]) -> None:
    """Complete the folder and put it to its place, on rank 0."""
    if _first():
        files.save(about, _aside(target) / ABOUT)
        os.replace(_aside(target), target)


def _aside(target: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return target.with_name(f".{target.name}.tmp")


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


def _first() -> bool:
    return _alone() or dist.get_rank() == 0


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without torch's warning that it takes one process for what was meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _all_or_none(step: Callable[[], T]) -> T:
    """Do something on every rank; if one of them fails, all raise its error, so that none waits for it for ever."""
    if _alone():
        return step()
    result, own = None, None
    try:
        result = step()
    except (OSError, ValueError) as error:
        own = error
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    failed = [error for error in found if error is not None]
    if failed:
        raise failed[0] from own
    return result  # pyright: ignore[reportReturnType]


def _unwritten(target: Path, error: CheckpointException) -> OSError:
    return OSError(errno.EIO, _first_failure(error), str(target))


def _first_failure(error: CheckpointException) -> str:
    """The first of the ranks that failed, and the first line of what it says."""
    rank, (failure, _) = min(error.failures.items(), key=lambda each: each[0])
    return f"rank {rank} failed: {(str(failure) or type(failure).__name__).splitlines()[0]}"
