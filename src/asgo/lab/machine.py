"""Devices, processes and mixed precision, by accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from asgo.lab.config import MachineConfig
from asgo.lab.errors import LabError


def accelerator(config: MachineConfig) -> Accelerator:
    """Set the number of threads and find the device and the other processes.

    Raises:
        LabError: for a precision that the device does not have.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # Without cpu=True accelerate would take several processes on CPUs for one each.
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    try:
        found = Accelerator(mixed_precision=config.precision, cpu=cpu)
    except (ValueError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise LabError(
            f"--precision {config.precision} on --device {config.device}: {reason}. Pass --precision no, or "
            "another --device."
        ) from error
    if config.precision == "fp16" and found.device.type == "cpu":
        raise LabError("--precision fp16 needs a GPU and there is none here: pass --precision bf16 or no.")
    return found
