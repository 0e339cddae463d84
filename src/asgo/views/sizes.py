"""How many rows belong to each part of a fused weight: from the module, its config, its neighbours and its shape.

Nothing is guessed. What is known must add up to the rows of the weight, else the result is ``None`` and the weight
stays one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from torch import Tensor, nn

HEADS = (
    *(
        "num_heads",
        "num_attention_heads",
        "n_heads",
        "n_head",
        "num_attn_heads",
        "heads",
        "nhead",
        "nheads",
        "n_headers",
    ),
    *("num_q_heads", "n_q_heads", "num_query_heads", "num_heads_q", "n_attn_heads", "n_h", "h", "head_num"),
    *("decoder_self_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "index_n_heads"),
)
"""What modules and configs call the number of (query) heads."""

KEY_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "kv_n_heads", "num_heads_kv"),
    *("n_heads_kv", "n_query_groups", "num_query_groups", "num_groups_kv", "num_multi_query_groups_per_partition"),
    *("n_local_kv_heads", "n_local_heads", "num_k_heads", "index_kv_heads"),
)
"""What they call the number of key and value heads."""

HEAD_DIM = (
    *("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head", "dim_head"),
    *("dim_per_head", "d_kv", "d_qkv", "attention_head_dim", "hidden_size_per_attention_head", "kv_channels", "d_k"),
    *("head_width", "size_per_head", "index_head_dim", "head_channels"),
)
"""What they call the rows of one head of query or key."""

OUTPUTS = (
    *(
        "o_proj",
        "out_proj",
        "c_proj",
        "proj",
        "dense",
        "wo",
        "Wo",
        "to_out",
        "out",
        "proj_out",
        "o",
        "out_lin",
        "linear_out",
    ),
    *("output", "projection", "resid_proj", "W_o", "fc_o"),
)
"""What attention modules call their output projection, whose columns are the rows of the (expanded) values."""


def number(owner: object, names: Sequence[str]) -> int:
    """The first positive integer among the attributes of these names, else 0."""
    values = (_number_of(owner, name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), 0)


def _number_of(owner: object, name: str) -> object:
    try:
        return getattr(owner, name, None)
    except Exception:  # configs compute attributes, and refuse some with errors of their own
        return None


def linear(module: object) -> nn.Module | None:
    """The layer with a weight of two axes or more: the module itself, or the only such layer inside a wrapper."""
    while isinstance(module, nn.Module):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2:
            return module
        inner = [child for child in module.children() if isinstance(getattr(child, "weight", None), Tensor)]
        inner = [child for child in inner if child.weight.ndim >= 2] or [*module.children()][:1]  # pyright: ignore
        module = inner[0] if inner else None
    return None


def width(module: object, side: str) -> int:
    """``out_features`` or ``in_features`` of a layer, by its attribute or the shape of its weight; 0 if unknown."""
    layer = linear(module)
    if layer is None:
        return 0
    given = number(layer, (f"{side}_features", f"{side}_channels"))
    shape: tuple[int, ...] = tuple(layer.get_parameter("weight").shape[-2:]) if not given else ()
    is_transposed = isinstance(getattr(layer, "nf", None), int)
    return given or shape[(side == "in") != is_transposed]


@dataclass(frozen=True)
class Place:
    """A weight of some module and the sizes that can be known there.

    Args:
        module: the module that holds the layer, such as an attention module.
        slot: the layer's attribute there, or the parameter's own name.
        rows: output features.
        columns: input features.
    """

    module: nn.Module
    slot: str
    rows: int
    columns: int

    @cached_property
    def owners(self) -> list[object]:
        """Where sizes may stand: the module first, then its config and what is nested there."""
        found: list[object] = [self.module]
        for name in ("config", "cfg", "args"):
            config = getattr(self.module, name, None)
            if config is not None and not isinstance(config, (int, str)):
                found += [config, getattr(config, "attn_config", None)]
        return [owner for owner in found if owner is not None]

    def number(self, *names: str) -> int:
        """The first positive integer of these names, of the module or its config; 0 if there is none."""
        return next((found for owner in self.owners if (found := number(owner, names))), 0)

    def has(self, name: str) -> bool:
        """Whether the module has this attribute, and it is not None, False or 0."""
        value = getattr(self.module, name, None)
        return bool(value) if isinstance(value, (bool, int)) else value is not None

    @property
    def classes(self) -> set[str]:
        """Names of the module's classes."""
        return {kind.__name__ for kind in type(self.module).__mro__}

    @cached_property
    def heads(self) -> int:
        """The number of query heads."""
        return self.number(*HEADS)

    @cached_property
    def key_heads(self) -> int:
        """The number of key and value heads, where the module or its config has it."""
        return self.number(*KEY_HEADS)

    @cached_property
    def output_width(self) -> int:
        """The columns of the output projection."""
        found = {name: width(getattr(self.module, name), "in") for name in OUTPUTS if hasattr(self.module, name)}
        return next(iter(found.values()), 0) if len(set(found.values())) == 1 else 0

    @cached_property
    def head_dim(self) -> int:
        """The rows of one query head: as given, perhaps as two terms, or the output's columns divided by the heads."""
        with_and_without_position = (self.number("qk_nope_head_dim"), self.number("qk_rope_head_dim"))
        given = self.number("qk_head_dim") or (all(with_and_without_position) and sum(with_and_without_position))
        given = given or self.number(*HEAD_DIM)
        if given or not self.heads:
            return given
        return self.output_width // self.heads if self.output_width % self.heads == 0 else 0

    def sibling(self, *names: str) -> int:
        """The output features of the first neighbour of these names; 0 if there is none."""
        return next((width(getattr(self.module, name), "out") for name in names if hasattr(self.module, name)), 0)


def attention_blocks(place: Place, queries: int = 1, keys: int = 2) -> tuple[int, ...] | None:
    """The rows of the query-like and the key-like parts of one weight, in blocks.

    The query's rows are heads times head size where both are known, else follow from the numbers of heads of both
    kinds, else are the output projection's columns. What is left is shared by the keys, which must be whole heads,
    as many as are stated, each shared by equally many queries. Where none of this is known, equal parts need
    rows that are a multiple of the input's.
    """
    h, kv, d, rows = place.heads, place.key_heads, place.number(*HEAD_DIM), place.rows
    if rows == (queries + keys) * place.columns and not (d and h) and not (kv and h and kv != h):
        return (place.columns,) * (queries + keys)
    if h and d:
        q = h * d
    elif h and kv:
        q, rest = divmod(rows * h, queries * h + keys * kv)
        q = 0 if rest else q
    else:
        q = 0 if rows == 2 * place.output_width else place.output_width  # q|k|v of half heads, or k|v: nobody knows
    k, rest = divmod(rows - queries * q, keys)
    d = d or (q // h if h and q % h == 0 else 1)
    fits = q > 0 and k > 0 and rest == 0 and q % k == 0 and k % d == 0 and (not (h and kv) or k * h == q * kv)
    return (q,) * queries + (k,) * keys if fits else None


def attention_in_projection(place: Place) -> tuple[int, ...] | None:
    """Of an attention module; state spaces and short convolutions call theirs the same."""
    others = ("A_log", "x_proj", "dt_proj", "dt_bias", "conv", "conv1d", "conv_kernel")
    return attention_blocks(place) if place.heads and not any(map(place.has, others)) else None


def keys_and_values(place: Place) -> tuple[int, ...] | None:
    """The rows of a fused key and value: halves that are whole heads, or divide the query or the output."""
    k, rest = divmod(place.rows, 2)
    h, kv, d = place.heads, place.key_heads, place.number(*HEAD_DIM)
    query = (
        place.sibling("q", "to_q", "q_proj", "query", "q_attn", "wq", "Wq", "linear_q", "queries") or place.output_width
    )
    if d and h:
        fits = k % d == 0 and (k == kv * d if kv else h % (k // d) == 0)
    elif query:
        fits = query % k == 0 if k else False
    else:
        fits = place.rows == 2 * place.columns
    return (k, k) if fits and not rest and k else None


def per_head(place: Place, *sizes: int) -> tuple[int, ...] | None:
    """`sizes` if heads of them make up all rows; with one size left open (0), what is left for it."""
    h, known = place.heads, sum(sizes)
    if not h or place.rows % h:
        return None
    unit = place.rows // h
    if 0 in sizes:
        sizes = tuple(size or unit - known for size in sizes)
    return sizes if sum(sizes) == unit and min(sizes) > 0 else None


def add_up(place: Place, *sizes: int) -> tuple[int, ...] | None:
    """`sizes` if all are known and together the rows of the weight."""
    return sizes if min(sizes) > 0 and sum(sizes) == place.rows else None


# ---- of families -------------------------------------------------------------------------------------------

Sizes: TypeAlias = Callable[[Place], Sequence[int] | None]
"""The rows of every part, in all or in each repetition; ``None`` where they are not known or do not add up."""


def query_rows_per_group(place: Place) -> tuple[int, ...] | None:
    """Of one group of queries that share a key: the queries, the key, the value."""
    h, kv = place.heads, place.number("num_kv_heads", "num_key_value_heads") or place.key_heads
    d = place.number(*HEAD_DIM)
    if not (h and kv and d) or h % kv:
        return None
    unit = (h // kv * d, d, d)
    return unit if sum(unit) * kv == place.rows else None


def queries_of_one_key(place: Place) -> tuple[int, ...] | None:
    """The same, where the module tells how many queries share a key, and not how many there are."""
    d = place.number(*HEAD_DIM)
    unit = (place.number("heads_per_kv") * d, d, d)
    return unit if all(unit) and place.rows % sum(unit) == 0 else None


def one_key(place: Place) -> tuple[int, ...] | None:
    """A query of all heads and one key and value that they share."""
    d = place.number(*HEAD_DIM)
    return add_up(place, place.heads * d, d, d)


def thirds_per_head(place: Place) -> tuple[int, ...] | None:
    """Equal query, key and value of every head, as many keys as queries, of a known head size."""
    h, d = place.heads, place.number(*HEAD_DIM)
    third, rest = divmod(place.rows, 3)
    if not h or rest or third % h or place.key_heads not in (0, h) or place.output_width not in (0, third):
        return None
    return (third // h,) * 3 if d in (0, third // h) else None


def key_dims_per_head(place: Place) -> tuple[int, ...] | None:
    """Queries and keys of `key_dim` rows and values of `attn_ratio` times as many."""
    d = place.number("key_dim")
    return per_head(place, d, d, place.number("val_dim", "value_dim")) if d else None


def key_dims_and_values(place: Place) -> tuple[int, ...] | None:
    """Keys of `key_dim` rows, and what is left for the values, of every head."""
    d = place.number("key_dim")
    return per_head(place, d, 0) if d else None


def codegen(place: Place) -> tuple[int, ...] | None:
    """CodeGen was trained on four devices, each with its own block of query, value and key."""
    part, rest = divmod(place.rows, 12)
    return None if rest else (part,) * 3


def multiples(count: int, place: Place) -> tuple[int, ...] | None:
    """`count` parts as wide as the input."""
    return (place.columns,) * count if place.rows == count * place.columns else None


def chunks(place: Place) -> tuple[int, ...] | None:
    """Equal chunks as wide as the input, two to twelve."""
    count, rest = divmod(place.rows, place.columns)
    return (place.columns,) * count if rest == 0 and 2 <= count <= 12 else None


def halves_of(*names: str) -> Sizes:
    """Two parts of the size that the module calls by one of these names."""
    return lambda place: add_up(place, place.number(*names), place.number(*names))


def mamba2(place: Place) -> tuple[int, ...] | None:
    """Gate, input, B, C and the step of every head."""
    inner = place.number("intermediate_size", "d_inner", "d_ssm")
    state = place.number("n_groups", "ngroups") * place.number("ssm_state_size", "d_state")
    return add_up(place, inner, inner, state, state, place.number("num_heads", "nheads", "n_mamba_heads"))


def mamba_selection(place: Place) -> tuple[int, ...] | None:
    """The low-rank step, B and C."""
    state = place.number("ssm_state_size", "d_state")
    return add_up(place, place.number("time_step_rank", "dt_rank"), state, state)


def delta_net(place: Place) -> tuple[int, ...] | None:
    """Queries, keys and values of a gated delta net."""
    k, v = place.number("key_dim"), place.number("value_dim")
    return add_up(place, k, k, v)


def delta_net_by_key_head(place: Place) -> tuple[int, ...] | None:
    """Query, key, values and gates that share a key's head."""
    h, v = place.number("num_k_heads"), place.number("num_v_heads")
    k_dim, v_dim = place.number("head_k_dim"), place.number("head_v_dim")
    unit = (k_dim, k_dim, v // h * v_dim, v // h * v_dim) if h and v % h == 0 else (0,)
    return unit if min(unit) > 0 and sum(unit) * h == place.rows else None


def scalars_by_key_head(place: Place) -> tuple[int, ...] | None:
    """The two gates of every value head, by key head."""
    h, v = place.number("num_k_heads"), place.number("num_v_heads")
    return (v // h, v // h) if h and v % h == 0 and 2 * v == place.rows else None


def gated_query(place: Place) -> tuple[int, ...] | None:
    """A query and its gate of equal size in each head: twice the rows that heads times head size have."""
    h, d = place.heads, place.number(*HEAD_DIM)
    return (d, d) if h and d and place.rows == 2 * h * d else None


def gated_query_by_group(place: Place) -> tuple[int, ...] | None:
    """The queries that share a key, then their gates."""
    h, kv, d = place.heads, place.key_heads, place.number(*HEAD_DIM)
    unit = h // kv * d if h and kv and h % kv == 0 else 0
    return (unit, unit) if unit and 2 * unit * kv == place.rows else None


def hyper_connection(place: Place) -> tuple[int, ...] | None:
    """What collapses, expands and, in most, mixes the streams of a hyper-connection."""
    n = place.number("hc_mult")
    return add_up(place, n, n, n * n) or add_up(place, n, n)


def one_query(place: Place) -> tuple[int, ...] | None:
    """A query of one number, and keys and values as wide as the input."""
    return add_up(place, 1, place.columns, place.columns)


def focal(place: Place) -> tuple[int, ...] | None:
    """A query and a context as wide as the input, and a gate for every level."""
    return add_up(place, place.columns, place.columns, place.number("focal_level") + 1)


def index(place: Place) -> tuple[int, ...] | None:
    """Queries and keys of a sparse attention's index."""
    d = place.number("index_head_dim")
    return add_up(place, place.number("index_n_heads") * d, place.number("index_kv_heads") * d)


def latent(place: Place) -> tuple[int, ...] | None:
    """The compressed key and value, and the key's rotary part."""
    return add_up(place, place.number("kv_lora_rank"), place.number("qk_rope_head_dim"))


def latent_keys(place: Place) -> tuple[int, ...] | None:
    """Key without position, and value, of every head."""
    return per_head(place, *known(place, "qk_nope_head_dim", "v_head_dim"))


def query_and_gate(place: Place) -> tuple[int, ...] | None:
    """Query, and the gate of its output, of every head."""
    return per_head(place, *known(place, "qk_head_dim", "v_head_dim"))


def known(place: Place, *names: str) -> tuple[int, ...]:
    """The sizes of these names; -1, which adds up to nothing, for one that is not known."""
    return tuple(place.number(name) or -1 for name in names)
