"""Devices, processes and mixed precision, by accelerate."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from asgo.lab.config.runs import MachineConfig
from asgo.lab.errors import LabError

LAUNCHERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""Variables by which ``accelerate launch`` says that it divides the model."""


def accelerator(config: MachineConfig) -> Accelerator:
    """Set the number of threads and find the device and the other processes.

    Of what ``accelerate launch`` may be configured with, only the processes are taken; the run's flags say the rest.

    Raises:
        LabError: for a precision that the device does not have, or a launcher that would divide the model itself.
    """
    for variable, name in LAUNCHERS.items():
        if os.environ.get(variable, "").lower() == "true":
            raise LabError(
                f"accelerate is configured to divide the model by {name}, which asgo train does itself: start it with "
                "accelerate launch --multi_gpu and pass --parallel fsdp2."
            )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if config.device != "cpu" and 0 < torch.accelerator.device_count() < here:
        raise LabError(
            f"{here} processes were started here, and there are {torch.accelerator.device_count()} devices: start one "
            "for each device, or pass --device cpu."
        )
    # Without cpu=True accelerate would take several processes on CPUs for one each.
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    try:
        steps = GradientAccumulationPlugin(num_steps=1)  # the run divides its losses itself
        found = Accelerator(mixed_precision=config.precision, cpu=cpu, gradient_accumulation_plugin=steps)
    except (ValueError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise LabError(
            f"--precision {config.precision} on --device {config.device}: {reason}. Pass --precision no, or "
            "another --device."
        ) from error
    if config.precision == "fp16" and found.device.type == "cpu":
        raise LabError("--precision fp16 needs a GPU and there is none here: pass --precision bf16 or no.")
    return found
