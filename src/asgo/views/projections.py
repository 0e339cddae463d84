"""Queries and keys with projections of their own: their names, and how many heads they have."""

from __future__ import annotations

from dataclasses import dataclass

from asgo.views.patterns import fused, heads
from asgo.views.sizes import HEAD_DIM, Place
from asgo.views.view import View

QUERY_KEY = (
    ("q_proj", "k_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, GPT-J, GPT-Neo, BART, Whisper, CLIP, wav2vec 2.0
    ("q_proj", "kv_b_proj"),  # DeepSeek's latent attention without a low-rank query,
    ("q_b_proj", "kv_b_proj"),  # and with one
    ("wq", "wkv_b"),  # the same as DeepSeek wrote it
    ("wq_b", "wkv_b"),
    ("q_b_proj", "kv_proj"),  # DeepSeek-V4
    ("query", "key"),  # BERT, RoBERTa, ELECTRA, ALBERT, ViT, Swin
    ("query_proj", "key_proj"),  # DeBERTa-v2
    ("q_lin", "k_lin"),  # DistilBERT, XLM
    ("q", "k"),  # T5
    ("linear_q", "linear_k"),  # Conformers
    ("to_q", "to_k"),  # diffusers, x-transformers
    ("to_q", "to_kv"),  # GraniteSpeech, Evolla, lucidrains
    ("add_q_proj", "add_k_proj"),  # the text stream of diffusers' joint attention
    ("Wq", "Wk"),  # CTRL
    ("wq", "wk"),  # Llama as Meta wrote it
    ("w_q", "w_k"),
    ("W_q", "W_k"),
    ("w_qs", "w_ks"),
    ("lin_q", "lin_k"),
    ("q_linear", "k_linear"),
    ("project_q", "project_k"),  # CPM-Ant
    ("q_head", "k_head"),  # Funnel
    ("layout_query", "layout_key"),  # LiLT
    ("query_global", "key_global"),  # Longformer
    ("w2e_query", "key"),  # LUKE
    ("e2w_query", "key"),
    ("e2e_query", "key"),
    ("projection_query", "projection_key"),  # CvT
    ("queries", "keys_values"),  # LeViT
    ("q", "kv"),  # PVT, MPViT
    ("q_attn", "c_attn"),  # GPT-2's cross attention, where c_attn holds key and value
    ("q_proj_weight", "k_proj_weight"),  # torch.nn.MultiheadAttention with kdim or vdim
)
"""Names of the query's and the key's projection in one attention module, and where they were seen."""

_QUERIES = {query: [key for q, key in QUERY_KEY if q == query] for query, _ in QUERY_KEY}
_FUSED_KEYS = {"kv_b_proj", "wkv_b", "kv_proj", "to_kv", "keys_values", "kv", "c_attn"}
_KEYS = {key: [query for query, k in QUERY_KEY if k == key] for _, key in QUERY_KEY if key not in _FUSED_KEYS}


@dataclass(frozen=True)
class Reading:
    """What a weight was found to be: its view with and without heads, and why."""

    view: View | None
    by_head: View | None
    how: str
    known: bool = True


def by_head_of(place: Place, ndim: int, transposed: bool) -> Reading | None:
    """A query's or key's projection of its own: heads if their size or number is known and all adds up."""
    is_query = any(hasattr(place.module, key) for key in _QUERIES.get(place.slot, ()))
    queries = [query for query in _KEYS.get(place.slot, ()) if hasattr(place.module, query)]
    if not (is_query or queries):
        return None
    d, rows = place.head_dim, place.rows
    query = place.sibling(queries[0]) if queries else rows
    h = place.heads or (query // d if d and query % d == 0 else 0)
    if not h or not rows:
        return Reading(None, None, f"{place.slot}: the number of heads is not known")
    if place.slot.startswith("layout_"):
        d //= place.number("channel_shrink_ratio") or 1
    if place.has("key_dim") and rows == h * place.number("key_dim"):
        d = place.number("key_dim")
    if not place.number(*HEAD_DIM) and query % h == 0 and query < h * d:
        d = query // h  # values, which the output reads, have larger heads
    if queries:
        given, d = d, d or query // h
        count = rows // d if d and rows % d == 0 else 0
        fits = count > 0 and h % count == 0 and (given > 0 or count == (place.key_heads or count))
    else:
        d, count = d or rows // h, h
        fits = rows == h * d
    if not fits:
        return Reading(None, None, f"{place.slot}: {rows} rows are not the heads that the module tells", known=False)
    by_head = heads(count, transposed) if count > 1 else None
    if by_head is not None and ndim > 2:
        by_head = fused(parts={"q": rows}, ndim=ndim, head_dim=rows // count, heads=("q",))
    return Reading(None, by_head, f"{place.slot}: {count} heads")
