"""DistributedDataParallel, ZeRO-1 and FSDP2 on one rank of NCCL, against the same steps without any of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from asgo import ASGO, route
from asgo.structures.square_root import EPS as SQUARE_ROOT_EPS
from benchmarks.gpu.device import Device
from benchmarks.gpu.model import GPT, TINY, make_model
from benchmarks.gpu.part import Part, check

STEPS, LR, EPS = 3, 1e-2, 1e-6
LIMIT = timedelta(seconds=60)
"""For a collective."""
Options = Mapping[str, Any]
ROOTS: dict[str, Options] = {"": {"eps": EPS}, ", square root": {"root": "square_root"}}
"""What the rows add to their names, and options; the square-root form has an eps of its own."""


def run(part: Part) -> None:
    """A row for each way; the process group lives as long as they take."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            for root, options in ROOTS.items():
                for name, wrap in WAYS.items():
                    row = f"processes: {name}{root}"
                    part.attempt(row, partial(_compare, part, wrap, options, Path(folder) / "store"))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _start(device: Device, store: Path) -> None:
    """One rank, whose collectives work."""
    if dist.is_initialized():
        return
    if device.is_cuda:
        torch.cuda.set_device(device.torch)
    file = dist.FileStore(str(store), 1)
    dist.init_process_group(device.backend, store=file, rank=0, world_size=1, timeout=LIMIT)
    one = torch.ones(1, device=device.torch)
    dist.all_reduce(one)
    check(abs(float(one) - 1), 0.0, "the difference that a sum over one rank makes")


def _data_parallel(model: GPT, options: Options, shard_state: bool | None) -> tuple[nn.Module, ASGO]:
    wrapped = DistributedDataParallel(model)
    optimizer = ASGO(route(wrapped), lr=LR, **options)
    if shard_state is not None:
        optimizer.distribute(shard_state=shard_state)
    return wrapped, optimizer


def _fsdp(model: GPT, options: Options) -> tuple[nn.Module, ASGO]:
    mesh = init_device_mesh(next(model.parameters()).device.type, (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, ASGO(route(model), lr=LR, **options)


Wrap = Callable[[GPT, Options], tuple[nn.Module, ASGO]]
WAYS: dict[str, Wrap] = {
    "DDP": partial(_data_parallel, shard_state=None),
    "DDP, roots divided": partial(_data_parallel, shard_state=False),
    "ZeRO-1": partial(_data_parallel, shard_state=True),
    "FSDP2": _fsdp,
}


def _compare(part: Part, wrap: Wrap, options: Options, store: Path) -> Mapping[str, Any]:
    """How far the parameters are after some steps from those without the wrapper.

    In float64, so that the bound is tight. One rank computes the same sums, in another order at most. A sum of n
    products then differs by ``n u`` relative to its size; where that is the statistic, damping it by eps bounds what
    becomes of it by ``eps^(-1/2)``. Two norms are divided by (a factor of 4, as in `check_steps`), and each step adds
    as much again and begins where the last one ended (STEPS^2).
    """
    _start(part.device, store)
    alone = make_model(TINY, 0, part.device.torch).double()
    start = [param.detach().clone() for param in alone.parameters()]
    _train(part, alone, ASGO(route(alone), lr=LR, **options))
    model = make_model(TINY, 0, part.device.torch).double()
    wrapped, optimizer = wrap(model, options)
    _train(part, wrapped, optimizer)
    rounding = 4 * TINY.width * torch.finfo(torch.float64).eps / 2
    bound = 4 * STEPS**2 * rounding * options.get("eps", SQUARE_ROOT_EPS[torch.float64]) ** -0.5
    pairs = zip(start, alone.parameters(), model.parameters(), strict=True)
    differences = [_difference(old, wanted, found) for old, wanted, found in pairs]
    check(max(differences), bound, "the largest difference")
    return {"largest difference": max(differences), "bound": bound, "backend": part.device.backend}


def _train(part: Part, model: nn.Module, optimizer: ASGO) -> None:
    dice = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens = torch.randint(256, (4, TINY.context + 1), generator=dice).to(part.device.torch)
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def _difference(old: Tensor, wanted: Tensor, found: Tensor) -> float:
    """Of what two trainings made of a parameter, relative to how far it went."""
    here = found.full_tensor() if isinstance(found, DTensor) else found
    moved = (wanted.detach() - old).norm()
    return float((here.detach() - wanted.detach()).norm() / moved) if moved > 0 else float((here - wanted).norm())
