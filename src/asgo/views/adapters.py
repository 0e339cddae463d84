"""Low-rank adapters (LoRA): the factors of an update are read as what they adapt."""

from __future__ import annotations

from torch import nn

from asgo.views.gates import gated
from asgo.views.layouts import read
from asgo.views.model_scan import Site
from asgo.views.patterns import MATRIX
from asgo.views.projections import Reading
from asgo.views.sizes import Place, number, width
from asgo.views.view import View


def adapter(site: Site) -> Reading | None:
    """The reading of a factor in a layer of PEFT; None for other parameters.

    The rows of the second factor of a fused layer are its parts. Adapters of stacked experts store
    ``(e r, in)`` and ``(out, r e)``: a matrix for every expert. Other factors are one matrix, whatever shapes stand
    beside them: the first factor of a layer with twice as many outputs as inputs has the shape of what follows a gate.
    """
    if len(site.ancestors) < 3 or site.param.ndim != 2:
        return None
    (owner, factor), (parent, slot) = site.ancestors[1:3]
    base = getattr(owner, "base_layer", None)
    if factor not in ("lora_A", "lora_B") or not isinstance(base, nn.Module):
        return None
    count = number(owner, ("num_experts",))
    if count > 1 and site.shape[factor == "lora_B"] % count == 0:
        view = View("(e m) n -> e m n" if factor == "lora_A" else "m (n e) -> e m n", {"e": count})
        return Reading(view, view, f"{factor} of {count} experts")
    fused = _of_fused(site.shape[0], width(base, "in"), parent, slot) if factor == "lora_B" else None
    return fused or Reading(MATRIX, MATRIX, f"{factor} of {slot}")


def _of_fused(rows: int, columns: int, parent: nn.Module, slot: str) -> Reading | None:
    found = read(Place(parent, slot, rows, columns))
    if found is not None:
        view = found.view or MATRIX
        return Reading(view, found.by_head or view, f"lora_B of {found.how}", found.known)
    view = gated(parent, slot, (rows, columns))
    return None if view is None else Reading(view, view, "lora_B of gate and up")
