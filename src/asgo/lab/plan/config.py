"""The flags of ``asgo plan`` and their ranges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from asgo.lab.config import flag
from asgo.lab.errors import LabError
from asgo.lab.plan.hardware import GpuName


@dataclass(frozen=True)
class PlanConfig:
    """Memory and time of ASGO's step on many GPUs, on paper: nothing is trained and no weights are read.

    Args:
        model: a preset (gpt2-124m, llama-124m, ...), llama-1b, llama-8b, llama-70b, olmoe-7b, a folder with
            config.json, or OWNER/NAME on the Hugging Face Hub.
        gpus: how many.
        mesh: how they are arranged: ddp, zero1, fsdp, tp, or sizes that multiply to --gpus, as fsdp=8,tp=8 or
            replicate=16,fsdp=64. Several may be given; none: the sensible ones for that number.
        replicas: with replicate and fsdp: share: each matrix has one owner among all ranks, who sends its update to
            all of them, as asgo does; repeat: what if every shard group did all of the optimizer's work.
        intervals: steps between refreshes of the roots (precondition_frequency).
        stagger: which roots are due when. model: every step of an interval refreshes about as much of the whole
            model, as asgo does; rank: what if every rank spread its own, so that all refresh at the same steps.
        per_head: queries and keys as one matrix for each head.
        packed_state: statistics and roots as triangles, in half their memory.
        root: how roots are computed.
        products: matrix products of a root; None: the root's own number.
        eps: damping, which decides that number.
        param_dtype: precision of parameters and gradients; forward and backward always count as bfloat16.
        state_dtype: precision of the state. asgo itself keeps float32; bfloat16 says what that would save.
        tokens: for each GPU and step; None: what makes 524,288 for all GPUs, and at least 8,192.
        block_size: tokens of a sequence; None: the model's own longest, at most 4096.
        gpu: whose published peaks are used. They are upper bounds: see --utilization.
        bf16_tflops: dense bfloat16 products in 1e12 operations per second, instead of the published number.
        tf32_tflops: the same for TF32.
        fp32_tflops: the same for float32.
        memory_gb: memory in 1e9 bytes.
        memory_gbs: bandwidth of the memory in 1e9 bytes per second.
        nvlink_gbs: from a GPU to its node, in one direction, in 1e9 bytes per second.
        network_gbs: from a GPU to other nodes, likewise.
        gpus_per_node: how many are joined by NVLink.
        utilization: share of those peaks that is reached, the same for products, memory and links.
        state_share: share of a GPU's memory that parameters, gradients and state may take; the rest is left for
            activations and what a step needs meanwhile.
        target: the overhead to stay within, as a share of forward and backward.
        out: folder for table.md, table.csv, plot.png and results.json; None: they are only shown.
    """

    model: tyro.conf.Positional[str] = "gpt2-124m"
    gpus: int = 8
    mesh: tuple[str, ...] = ()
    replicas: Literal["share", "repeat"] = "share"
    intervals: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    stagger: Literal["model", "rank"] = "model"
    per_head: bool = False
    packed_state: bool = False
    root: Literal["minimax", "minimax_fast", "minimax_bf16x3", "minimax_tf32"] = "minimax"
    products: float | None = None
    eps: float = 1e-6
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    tokens: int | None = None
    block_size: int | None = None
    gpu: GpuName = "H100"
    bf16_tflops: float | None = None
    tf32_tflops: float | None = None
    fp32_tflops: float | None = None
    memory_gb: float | None = None
    memory_gbs: float | None = None
    nvlink_gbs: float | None = None
    network_gbs: float | None = None
    gpus_per_node: int = 8
    utilization: float = 0.5
    state_share: float = 0.8
    target: float = 0.03
    out: Path | None = None


# field: smallest value, largest value, what it is
_SPEED = (1e-6, 1e9, "a number above 0")
_RANGES: dict[str, tuple[float, float, str]] = {
    "gpus": (1, 16_384, "a number of GPUs"),
    "intervals": (1, 1000, "numbers of steps"),
    "products": (1, 1e4, "a number of products"),
    "eps": (1e-12, 1, "a share of the norm"),
    "tokens": (1, 1e9, "a number of tokens"),
    "gpus_per_node": (1, 1e5, "a number of GPUs"),
    "utilization": (1e-3, 1, "a share"),
    "state_share": (1e-3, 1, "a share"),
    "target": (1e-6, 1e3, "a share"),
    **dict.fromkeys(("bf16_tflops", "tf32_tflops", "fp32_tflops"), _SPEED),
    **dict.fromkeys(("memory_gb", "memory_gbs", "nvlink_gbs", "network_gbs"), _SPEED),
}


def check(config: PlanConfig) -> None:
    """Refuse values out of range, an interval given twice or never, and an output folder that is in use.

    Raises:
        LabError: naming the flag, the value and what would fit.
    """
    for name, (low, high, meaning) in _RANGES.items():
        value = getattr(config, name)
        for entry in value if isinstance(value, tuple) else () if value is None else (value,):
            if not low <= entry <= high:
                raise LabError(f"{flag(name)} {entry:g} is out of range: pass {meaning}, from {low:g} to {high:g}.")
    for name in ("intervals", "mesh"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise LabError(f"{flag(name)} {' '.join(map(str, values))} repeats an entry: pass each once.")
    if not config.intervals:
        raise LabError("--intervals is empty: pass at least one.")
    out = config.out
    if out is not None and out.is_file():
        raise LabError(f"--out {out} is a file: pass a folder.")
    if out is not None and out.is_dir() and any(out.iterdir()):
        raise LabError(f"--out {out} is not empty, and nothing is overwritten: pass another --out.")
