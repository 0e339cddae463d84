"""What a checkpoint must match before it is loaded, and the random states in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asgo.lab.errors import LabError

FORMAT = 1
"""Version of the checkpoint's layout."""

IDENTITY = {
    "format": "layout",
    "model_fingerprint": "model",
    "data_fingerprint": "corpus, tokens or blocks",
    "optimizer_name": "optimizer",
}
"""Entries that say what a checkpoint is of, and what to call each."""


def check_identity(state: dict[str, Any], own: dict[str, Any], where: Path) -> None:
    """Refuse a checkpoint of something else.

    Args:
        state: the checkpoint.
        own: the entries of `IDENTITY` that this run has.
        where: the checkpoint's file, for the message.

    Raises:
        LabError: naming what differs; nothing has been loaded then.
    """
    for key, what in IDENTITY.items():
        if state.get(key) != own[key]:
            raise LabError(
                f"checkpoint {where} is of another {what} ({state.get(key)}, this run has {own[key]}): put "
                "the right file back, or start a new run in another --out."
            )


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators on the CPU and on `device`."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put the generators back to what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
