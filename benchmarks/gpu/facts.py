"""What the results were measured with."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.cuda import nccl

from benchmarks.gpu import ROOT
from benchmarks.gpu.device import Device

PACKAGES = ("torch", "einops", "triton", "heavyball", "transformers", "pytest", "matplotlib")


def facts(device: Device) -> Mapping[str, Any]:
    """Versions, the device and the commit."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "packages": _packages()}
    found |= {"commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"), "executable": sys.implementation.name}
    return {**found, "threads": torch.get_num_threads(), **(_gpu(device) if device.is_cuda else _cpu())}


def _gpu(device: Device) -> dict[str, Any]:
    asked = "--query-gpu=name,driver_version,clocks.max.sm,power.limit,memory.total"
    return {
        "device": torch.cuda.get_device_name(device.torch),
        "capability": list(torch.cuda.get_device_capability(device.torch)),
        "memory": torch.cuda.mem_get_info(device.torch)[1],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": _nccl(),
        "nvidia-smi": _output("nvidia-smi", asked, "--format=csv,noheader"),
    }


def _cpu() -> dict[str, Any]:
    return {"device": f"CPU, {platform.processor() or platform.machine()}"}


def _nccl() -> str | None:
    try:
        return ".".join(map(str, nccl.version()))
    except (AttributeError, RuntimeError, TypeError):
        return None


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
