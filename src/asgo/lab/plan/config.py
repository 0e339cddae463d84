"""The flags of ``asgo plan``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from asgo.lab.config.ranges import Range, check_distinct, check_ranges
from asgo.lab.errors import LabError
from asgo.lab.files import check_new


@dataclass(frozen=True)
class PlanConfig:
    """Memory of every rank and bytes sent in a step of ASGO on many GPUs: nothing is trained and no weights are read.

    Args:
        model: a preset (gpt2-124m, llama-124m, ...), llama-1b, llama-8b, llama-70b, olmoe-7b, a folder with
            config.json, or OWNER/NAME on the Hugging Face Hub.
        gpus: how many.
        mesh: how they are arranged: ddp, zero1, fsdp, tp, or sizes that multiply to --gpus, as fsdp=8,tp=8 or
            replicate=16,fsdp=64. Several may be given; none: the sensible ones for that number.
        intervals: steps between refreshes of the roots (precondition_frequency).
        per_head: queries and keys as one matrix for each head.
        packed_state: statistics and roots as triangles, in half their memory.
        root: auto: statistics and their inverse roots; square_root: the square root alone, in half precision, renewed
            at every step whatever --intervals says.
        param_dtype: precision of parameters and gradients; the state is float32.
        memory_gb: memory of a GPU in 1e9 bytes.
        state_share: share of it that parameters, gradients and state may take; the rest is left for activations and
            what a step needs meanwhile.
        out: folder for table.md, table.csv and results.json; None: they are only shown.
    """

    model: tyro.conf.Positional[str] = "gpt2-124m"
    gpus: Annotated[int, Range(1, 16_384, "a number of GPUs")] = 8
    mesh: tuple[str, ...] = ()
    intervals: Annotated[tuple[int, ...], Range(1, 1000, "numbers of steps")] = (1, 10)
    per_head: bool = False
    packed_state: bool = False
    root: Literal["auto", "square_root"] = "auto"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    memory_gb: Annotated[float, Range(1e-6, 1e9, "a number above 0")] = 80.0
    state_share: Annotated[float, Range(1e-3, 1, "a share")] = 0.8
    out: Path | None = None


def check(config: PlanConfig) -> None:
    """Raise `LabError` for values out of range, entries given twice, and an output folder that is in use."""
    check_ranges(config)
    check_distinct("mesh", config.mesh, empty=True)
    check_distinct("intervals", config.intervals)
    if config.root == "square_root" and config.packed_state:
        raise LabError("--packed-state is for statistics and roots: leave it out with --root square_root.")
    if config.out is not None:
        check_new(config.out)
