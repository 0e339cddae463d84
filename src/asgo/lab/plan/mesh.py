"""How ranks are arranged: data parallel, sharded, tensor parallel, and products of these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from asgo.lab.errors import LabError

SIZES = ("replicate", "fsdp", "tp")
NODE, POD = 8, 64
"""Sizes of shard groups that are compared when no mesh is given: a node, and eight of them."""


class Mesh(NamedTuple):
    """``replicate x fsdp x tp`` ranks. Without shards all hold whole parameters: plain data parallel."""

    replicate: int = 1  # copies of the shard group of ``fsdp x tp`` ranks
    fsdp: int = 1  # ranks over which rows are cut (``fully_shard``)
    tp: int = 1  # ranks over which the rows or columns of a Linear are cut before (tensor parallel)
    zero1: bool = False  # of plain data parallel: the owner alone keeps momentum, statistic and root

    @property
    def ranks(self) -> int:
        """All of them."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(replicate, fsdp, tp)``."""
        return self.replicate, self.fsdp, self.tp

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds whole parameters."""
        return self.fsdp * self.tp == 1

    def __str__(self) -> str:
        if self.is_whole:
            return "zero1" if self.zero1 else "ddp"
        sizes = [(name, size) for name, size in zip(SIZES, self.shape, strict=True) if size > 1]
        return sizes[0][0] if len(sizes) == 1 else _text(dict(sizes))


def _made(sizes: dict[str, int]) -> Mesh:
    return Mesh(**{name: sizes.get(name, 1) for name in SIZES})  # pyright: ignore[reportArgumentType]


def _text(sizes: dict[str, int]) -> str:
    return ",".join(f"{name}={sizes[name]}" for name in SIZES if name in sizes)


def parse(text: str, gpus: int) -> Mesh:
    """The mesh that a word such as ``ddp``, ``zero1``, ``fsdp`` or ``replicate=2,fsdp=8,tp=4`` stands for.

    Raises:
        LabError: for what is not a mesh, or one that does not multiply to `gpus`.
    """
    if text in ("ddp", "zero1"):
        return Mesh(gpus, zero1=text == "zero1")
    if text in SIZES:
        return _made({text: gpus})
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        name, _, size = entry.partition("=")
        if name not in SIZES or name in sizes or not size.isdigit() or int(size) < 1:
            raise LabError(
                f"--mesh {text} is not understood at {entry!r}: pass ddp, zero1, fsdp, tp, or sizes such as "
                "replicate=16,fsdp=64 or fsdp=8,tp=8."
            )
        sizes[name] = int(size)
    ranks = math.prod(sizes.values())
    if ranks != gpus:
        free = next((name for name in SIZES if name not in sizes), None)
        fits = f"pass sizes that multiply to {gpus}"
        if free and gpus % ranks == 0:
            fits = f"pass --gpus {ranks} or --mesh {_text({**sizes, free: gpus // ranks})}"
        raise LabError(f"--mesh {text} has {ranks} ranks, --gpus {gpus}: {fits}.")
    return _made(sizes)


def sensible(gpus: int, tp: Sequence[int]) -> list[Mesh]:
    """What is worth comparing for a number of GPUs, where tensor parallel may have the sizes `tp`."""
    if gpus == 1:
        return [Mesh()]
    found = [Mesh(gpus), Mesh(gpus, zero1=True), Mesh(fsdp=gpus)]
    found += [Mesh(gpus // group, group) for group in (NODE, POD) if gpus % group == 0 and gpus > group]
    inside = [size for size in tp if 1 < size <= NODE and gpus % size == 0 and gpus > size]
    return found + [Mesh(fsdp=gpus // size, tp=size) for size in inside[-1:]]
