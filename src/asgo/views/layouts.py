"""Which rows of an attention module's weights belong to which head, by its attributes.

The Hessians of query and key are block-diagonal by head ("ASGO: Adaptive Structured Gradient Optimization",
An et al., 2025), so their projections are read as one matrix per head; values stay whole. Layers are known by
the exact names of attributes, one row per family, and only if the module also tells its number of heads.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from asgo.views.patterns import ALTERNATING_GATES, EXPERT_GATES, GATES, TRANSPOSED_GATES, fused_qkv, heads
from asgo.views.view import View

QUERY_KEY = (
    (
        "q_proj",
        "k_proj",
    ),  # Llama, Mistral, Qwen, Gemma, OPT, GPT-J, GPT-Neo, BART, Whisper, CLIP, wav2vec 2.0
    ("q_proj", "kv_b_proj"),  # DeepSeek's latent attention, without
    ("q_b_proj", "kv_b_proj"),  # and with a low-rank query; the fused key-value expansion stays whole
    ("query", "key"),  # BERT, RoBERTa, ELECTRA, ALBERT, ViT, Swin
    ("query_proj", "key_proj"),  # DeBERTa-v2
    ("q_lin", "k_lin"),  # DistilBERT, XLM
    ("q", "k"),  # T5
    ("linear_q", "linear_k"),  # Conformers
    ("to_q", "to_k"),  # diffusion transformers
    ("Wq", "Wk"),  # CTRL
    ("q_attn", "c_attn"),  # GPT-2's cross attention, where c_attn holds key and value
    ("q_proj_weight", "k_proj_weight"),  # torch.nn.MultiheadAttention with kdim or vdim
)
"""Names of the query's and the key's projection in one attention module."""

FUSED = {
    "c_attn": True,  # GPT-2, ImageGPT
    "qkv": True,  # timm, SAM, BLIP, Qwen-VL's vision tower
    "Wqkv": True,  # ModernBERT, MPT, DBRX
    "att_proj": True,  # Bark
    "in_proj_weight": True,  # torch.nn.MultiheadAttention
    "qkv_proj": False,  # CodeGen, MiniMax
    "query_key_value": False,  # GPT-NeoX, BLOOM, Falcon, Persimmon: query, key and value alternate by head
}
"""Projections that hold query, key and value: whether all of q come first, then all of k, then all of v.

Where they do not, or nobody knows, every slice of ``head_dim`` rows is still one head of query, key or value,
and each is a matrix.
"""

OTHERWISE = {"Phi3Attention", "Phi4MultimodalAttention", "GPTBigCodeAttention", "AttentionCl"}
"""Classes for which the opposite of the entry in `FUSED` holds (the last is MaxViT's in timm)."""

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")
HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


def head_view(attention: nn.Module, slot: str, shape: Sequence[int], transposed: bool = False) -> View | None:
    """The view of the weight of a query, key or fused projection; ``None`` if it is none or no heads fit.

    Args:
        attention: the module that holds the projection.
        slot: the projection's attribute there.
        shape: the weight's shape, ``(out, in)``, or ``(in, out)`` if `transposed`.
        transposed: whether the layer stores (in, out).
    """
    pairs = [pair for pair in QUERY_KEY if slot in pair and all(hasattr(attention, name) for name in pair)]
    if slot not in FUSED and not pairs:
        return None
    h = _number(attention, HEADS) or _number(getattr(attention, "config", None), HEADS)
    d, rows = _number(attention, HEAD_DIM), shape[1 if transposed else 0]
    if not h or not rows:
        return None
    if slot in FUSED:
        d = d or rows // (3 * h)
        if FUSED[slot] != bool(OTHERWISE & {kind.__name__ for kind in type(attention).__mro__}):
            return _in_blocks(rows, h, d, transposed, hasattr(attention, "q_attn"))
        return per_head(rows // d, transposed) if d and rows % d == 0 else None
    query, key = pairs[0]
    if slot == query:
        return per_head(h, transposed) if rows % (h * max(d, 1)) == 0 else None
    layer = getattr(attention, query)
    d = d or getattr(getattr(layer, "module", layer), "out_features", 0) // h
    return per_head(rows // d) if key != "kv_b_proj" and _are_heads(rows, h, d) else None


def per_head(h: int, transposed: bool = False) -> View | None:
    """The view of `h` heads; none of its own for a single head, which is the whole matrix."""
    return heads(h, transposed) if h > 1 else None


def _in_blocks(rows: int, h: int, d: int, transposed: bool, is_cross: bool) -> View | None:
    """All queries, then all keys, then all values; in cross attention without the queries."""
    q = 0 if is_cross else h * d
    k = (rows - q) // 2
    if q + 2 * k != rows or not _are_heads(k, h, d):
        return None
    view = fused_qkv(q, k, k, d, transposed)
    return View(view.pattern[1:], view.sizes, (k, k), view.split_dim) if is_cross else view


def _are_heads(rows: int, h: int, d: int) -> bool:
    """Whether `rows` are heads of `d` rows, each shared by equally many of `h` query heads."""
    return d > 0 and rows > 0 and rows % d == 0 and h % (rows // d) == 0


def _number(owner: object, names: Sequence[str]) -> int:
    """The first positive integer among the attributes of these names, else 0."""
    values = (getattr(owner, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), 0)


# ---- gated MLPs ----

GATE_UP = "gate_up_proj"
"""What the fused projection is called: Phi-3, GLM, and the experts of Mixtral, OLMoE, Qwen-MoE, DeepSeek, Llama 4."""

INTERLEAVED = {"GptOssExperts"}
"""Classes in which gate and up alternate; in all others the gate is the first half."""


def gated_view(mlp: nn.Module, shape: Sequence[int]) -> View | None:
    """Gate and up as a matrix each, of every expert if there are several; None if the shapes are not those of an MLP.

    The neighbour ``down_proj`` tells which axis holds both: it has their number of rows once.

    Args:
        mlp: the module that holds both projections, as layers or as parameters.
        shape: of the fused weight: ``(2 f, n)``, ``(e, 2 f, n)``, or stored as (in, out) ``(e, n, 2 f)``.
    """
    down = getattr(mlp, "down_proj", None)
    down = down.weight if isinstance(down, nn.Linear) else down
    if not isinstance(down, Tensor) or down.ndim != len(shape) or tuple(down.shape[:-2]) != tuple(shape[:-2]):
        return None
    rows, columns = shape[-2:]
    if (rows, columns) == (2 * down.shape[-1], down.shape[-2]):
        return View(GATES if len(shape) == 2 else EXPERT_GATES, {"g": 2})
    if len(shape) == 3 and (rows, columns) == (down.shape[-1], 2 * down.shape[-2]):
        alternate = bool(INTERLEAVED & {kind.__name__ for kind in type(mlp).__mro__})
        return View(ALTERNATING_GATES if alternate else TRANSPOSED_GATES, {"g": 2})
    return None
