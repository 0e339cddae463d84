"""How several processes divide a run: all hold the model (ddp, zero1), or each a part of it (fsdp2)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from asgo.checkpoint import sharded
from asgo.lab.config.runs import MachineConfig
from asgo.lab.data.sampling import Batches, IndexedBatches
from asgo.lab.errors import LabError
from asgo.lab.files import writing
from asgo.lab.optimizers.registry import failed_roots
from asgo.lab.training.run_folder import RunFolder
from asgo.lab.training.stopping import StopSignal
from asgo.optimizer.step import structured
from asgo.state_keys import base_key

LOST = ("gloo", "NCCL", "onnection", "DistBackendError")
"""Words of an error that says that another process can no longer be reached."""


class Parallel:
    """One run on one or several processes.

    Args:
        accelerator: that found them.
        config: how they divide the run, and in which precision it computes.
    """

    def __init__(self, accelerator: Accelerator, config: MachineConfig) -> None:
        self.accelerator, self.config = accelerator, config
        self.processes = accelerator.num_processes
        self.kind = config.parallel if self.processes > 1 else "alone"
        if self.kind == "fsdp2" and config.precision == "fp16":
            raise LabError(
                "--parallel fsdp2 with --precision fp16 needs a scaler of shards: pass --precision bf16 or no."
            )

    def place(self, model: nn.Module) -> nn.Module:
        """The model on its device, in shards if it is divided: every block by itself, and the rest together."""
        model = model.to(self.accelerator.device)
        if self.kind != "fsdp2":
            return model
        mesh = init_device_mesh(self.accelerator.device.type, (self.processes,))
        low = torch.bfloat16 if self.config.precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
        for block in blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model

    def share(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer, whose work or state the processes share where all of them hold the model."""
        own = structured(optimizer)
        if self.kind == "zero1" and own is None:
            raise LabError(f"--parallel zero1 cannot divide {type(optimizer).__name__}: pass --parallel ddp.")
        if self.kind in ("ddp", "zero1") and own is not None:
            own.distribute(shard_state=self.kind == "zero1")
        return optimizer

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to call in place of the model."""
        if self.kind == "fsdp2":
            return model
        return self.accelerator.prepare_model(model)  # pyright: ignore[reportArgumentType]

    def collecting(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward pass: only the last one of a step sends its gradients."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(model)

    def clip(self, model: nn.Module, limit: float) -> Tensor:
        """Clip the norm of all gradients; what it was."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm  # pyright: ignore[reportReturnType]

    def all_finite(self, model: nn.Module) -> bool:
        """Whether every parameter is finite, on all processes."""
        held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        bad = torch.stack([~p.isfinite().all() for p in held]).any().float()
        return not float(self.accelerator.reduce(bad, "sum"))  # pyright: ignore[reportArgumentType]

    def failed_roots(self, optimizer: Optimizer) -> int:
        """Failed roots of all processes; a matrix that several of them hold counts once."""
        if self.kind not in ("zero1", "fsdp2"):
            return failed_roots(optimizer)
        failed = own_failures(optimizer, self.accelerator.is_main_process)
        counted = torch.tensor(float(failed), device=self.accelerator.device)
        return int(self.accelerator.reduce(counted, "sum"))  # pyright: ignore[reportArgumentType]

    def save(self, folder: RunFolder, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
        """A checkpoint: one file by one process where it holds everything, else a folder by all."""
        if self.kind in ("zero1", "fsdp2"):
            folder.save_together(state, model, optimizer)
        else:
            folder.save({**state, "model": thawed(model), "optimizer": optimizer.state_dict()})

    def export(self, model: Any, path: Path) -> None:
        """Save the model as Hugging Face does, by one process; of a model with an adapter the adapter alone."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options) if self.kind == "fsdp2" else model.state_dict()
        if self.accelerator.is_main_process:
            with writing(path):
                model.save_pretrained(path, state_dict=state)

    def restore(self, folder: RunFolder, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
        """Load the last checkpoint, which is of any number of processes and any division."""
        if "model" not in state:
            try:
                sharded.load(folder.saved()[-1], model, optimizer)
            except ValueError as error:
                raise LabError(str(error)) from error
            return
        if self.kind == "fsdp2":
            set_model_state_dict(model, state["model"], options=StateDictOptions(full_state_dict=True))
        else:
            model.load_state_dict({**model.state_dict(), **state["model"]})
        optimizer.load_state_dict(state["optimizer"])


def thawed(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without parameters that are frozen: those are as they were loaded."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def own_failures(optimizer: Optimizer, first: bool) -> int:
    """The failures that this process alone has counted, and on the first one those too that all count alike."""
    if structured(optimizer) is None:
        return 0
    states = optimizer.state_dict()["state"].values()
    counts = [tensor for state in states for key, tensor in state.items() if base_key(key) == "failures"]
    own = [count.to_local() if isinstance(count, DTensor) else count for count in counts]
    apart = [isinstance(count, DTensor) for count in counts]
    return sum(int(count.sum()) for count, alone in zip(own, apart, strict=True) if alone or first)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the longest list of modules: the blocks of a transformer."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=nn.ModuleList()))


def shares(batches: Batches, parts: int, world: int, rank: int, processes: int) -> list[tuple[int, Batches]]:
    """What one process trains on in a step: numbers of batches, and which part of each.

    A step takes `parts` batches, each cut for `world` processes: what the run began with. Any number of processes that
    divides them takes the same blocks.

    Raises:
        LabError: where they do not divide, or the data can be read for one place only.
    """
    if processes == world:
        return [(part, batches) for part in range(parts)]
    if parts * world % processes:
        raise LabError(
            f"the checkpoint's steps are {parts * world} batches over {world} processes, which {processes} processes "
            f"cannot share: start a number that divides {parts * world}."
        )
    if not isinstance(batches, IndexedBatches):
        raise LabError(f"the checkpoint is of {world} processes, and a streamed corpus needs as many to continue.")
    units = [(part, place) for part in range(parts) for place in range(world)][rank::processes]
    return [(part, batches.at(place, world)) for part, place in units]


@contextmanager
def reporting(out: Path, stop: StopSignal) -> Iterator[None]:
    """Around code in which processes communicate: if one of them has died, the others report it and stop.

    Raises:
        LabError: what happened, what is left and how to go on.
    """
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_initialized() and dist.get_world_size() > 1 and lost(error)):
            raise
        stop.hold()
        first = (str(error) or type(error).__name__).splitlines()[0]
        reason = re.sub(r"^(\[[^]]*\] *)+", "", first).split(". ")[0].rstrip(".")
        saved = RunFolder(out).saved()
        kept = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise LabError(
            f"another process of this run has ended ({reason}); {kept}. Repeat the command with --resume to go on, on "
            "as many processes or fewer."
        ) from error


def lost(error: RuntimeError) -> bool:
    """Whether an error says that another process can no longer be reached."""
    return any(word in f"{type(error).__name__} {error}" for word in LOST)
