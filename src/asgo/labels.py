"""What views are called: the names of groups."""

from __future__ import annotations

from asgo.gated import ALTERNATING_GATES, EXPERT_GATES, GATES, TRANSPOSED_GATES
from asgo.views import MATRIX, STACK, TRANSPOSED, View, blocks, fused_qkv, head_columns, heads, whole

KINDS: dict[object, str] = {
    MATRIX.pattern: "matrix",
    TRANSPOSED.pattern: "transposed matrix",
    STACK.pattern: "stack",
    heads(2).pattern: "heads",
    "n (h d) -> h d n": "transposed heads",
    head_columns(2).pattern: "head columns",
    blocks(2, 2).pattern: "blocks",
    GATES: "gates",
    **dict.fromkeys((EXPERT_GATES, TRANSPOSED_GATES, ALTERNATING_GATES), "stack of gates"),
    **{fused_qkv(1, 1, 1, 1, t).pattern: "fused qkv" for t in (False, True)},
    **{whole(fused_qkv(1, 1, 1, 1, t)).pattern: "fused qkv" for t in (False, True)},
    fused_qkv(1, 1, 1, 1, True).pattern[1:]: "fused kv",
}


def label(view: View | None) -> str:
    """The kind of a view and its numbers, such as ``heads (h=4)``; the pattern of one that has no name."""
    if view is None:
        return "adamw"
    kind = KINDS.get(view.pattern, "")
    if " k0" in view.pattern:
        kind = f"conv{str(view.pattern).count(' k') // 2}d"
    notes = [f"{axis}={size}" for axis, size in view.sizes if (axis, size) != ("g", 1)]
    notes += ["+".join(map(str, view.split))] if view.split else []
    return kind + (f" ({', '.join(notes)})" if notes else "") if kind else str(view)
