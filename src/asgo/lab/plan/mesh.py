"""How ranks may be arranged: the words of ``--mesh``, and what is compared without any."""

from __future__ import annotations

import math
from collections.abc import Sequence

from asgo.distributed.planned_part import SIZES, Mesh
from asgo.lab.errors import LabError

NODE, POD = 8, 64
"""Sizes of shard groups that are compared when no mesh is given: a node, and eight of them."""


def parse(text: str, gpus: int) -> Mesh:
    """The mesh that a word such as ``ddp``, ``zero1``, ``fsdp`` or ``replicate=2,fsdp=8,tp=4`` stands for.

    Raises:
        LabError: for what is not a mesh, or one that does not multiply to `gpus`.
    """
    if text in ("ddp", "zero1"):
        return Mesh(gpus, zero1=text == "zero1")
    if text in SIZES:
        return Mesh()._replace(**{text: gpus})
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
            sizes[free] = gpus // ranks
            other = ",".join(f"{name}={sizes[name]}" for name in SIZES if name in sizes)
            fits = f"pass --gpus {ranks} or --mesh {other}"
        raise LabError(f"--mesh {text} has {ranks} ranks, --gpus {gpus}: {fits}.")
    return Mesh()._replace(**sizes)


def sensible(gpus: int, tp: Sequence[int]) -> list[Mesh]:
    """What is worth comparing for a number of GPUs, where tensor parallel may have the sizes `tp`."""
    if gpus == 1:
        return [Mesh()]
    found = [Mesh(gpus), Mesh(gpus, zero1=True), Mesh(fsdp=gpus)]
    found += [Mesh(gpus // group, group) for group in (NODE, POD) if gpus % group == 0 and gpus > group]
    inside = [size for size in tp if 1 < size <= NODE and gpus % size == 0 and gpus > size]
    return found + [Mesh(fsdp=gpus // size, tp=size) for size in inside[-1:]]
