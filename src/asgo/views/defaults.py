"""How a parameter is read that no rule matches: the first row of `DEFAULTS` that knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

from torch import Tensor, nn

from asgo.views.adapters import adapter
from asgo.views.gates import beside, gated, gated_convolution
from asgo.views.head_axes import with_head_axes
from asgo.views.layouts import read
from asgo.views.model_scan import Site
from asgo.views.patterns import GATES, MATRIX, STACK, TRANSPOSED, conv, default_view, per_expert
from asgo.views.projections import Reading
from asgo.views.roles import EXACT, LAYERS, named_table, table_or_gain
from asgo.views.sizes import HEAD_DIM, HEADS, Place, number
from asgo.views.view import View
from asgo.views.vocabulary import words

NAMED_TABLES = {
    *(
        "lm_head",
        "embed_out",
        "output_projection",
        "embed_tokens",
        "embed_positions",
        "embed_in",
        "shared",
        "wte",
        "wpe",
    ),
    *("tok_emb", "tok_embed", "tok_embedding", "tok_embeddings", "token_embedding", "token_embeddings", "embed", "emb"),
    *("embedding", "embeddings", "pos_emb", "pos_embed", "pos_embedding", "position_embedding", "position_embeddings"),
    *("word_embeddings", "token_type_embeddings", "patch_positions", "relative_attention_bias", "positional_embedding"),
    *("unembed", "to_logits", "position", "positions", "rel_pos_bias", "cls_token", "mask_token", "dist_token"),
}
"""Exact names of tables and heads, for parameters whose module is not known."""

NAMED_GAINS = {"norm", "norm1", "norm2", "layer_norm", "layernorm", "input_layernorm", "post_attention_layernorm", "ln"}
"""Exact names of normalizations, for parameters whose module is not known."""

FUSED_WORDS = {"qkv", "qkvz", "qkvg", "qkvo", "fused"}
"""Words in the names of layers that hold several matrices: if no layout is known, that is said."""

_CONVS = LAYERS[5:]


def default_reading(site: Site) -> Reading:
    """How a parameter is read that no rule matches."""
    return next(found for row in DEFAULTS if (found := row(site)) is not None)


def view_of(site: Site, per_head: bool = False) -> View | None:
    """The view of a parameter that no rule matches."""
    reading = default_reading(site)
    return reading.by_head if per_head else reading.view


def default_views(named_params: Iterable[tuple[str, Tensor]]) -> list[View | None]:
    """The views of ``(name, parameter)`` pairs without the module that they belong to.

    Vectors, and parameters with an exact name of a table of embeddings or positions, a vocabulary head or a
    gain (``lm_head.weight``, ``h.0.wte.weight``, ``pos_embed``) are AdamW's; others go by their number of axes,
    as in `asgo.views.default_view`. Fused projections and experts need the module, not only a name: use `asgo.route`.
    """
    return [None if _is_named_table(name) else default_view(param.ndim) for name, param in named_params]


def _is_named_table(name: str) -> bool:
    *_, slot, leaf = ["", *name.split(".")]
    known = NAMED_TABLES | NAMED_GAINS
    return leaf in EXACT or leaf in known or leaf == "bias" or (leaf == "weight" and slot in known)


def _adamw(how: str) -> Reading:
    return Reading(None, None, how)


# ---- the rows ----------------------------------------------------------------------------------------------


def _vector(site: Site) -> Reading | None:
    if site.param.ndim < 2:
        return _adamw("vector")
    is_gain = site.leaf.endswith("_g") and hasattr(site.module, f"{site.leaf[:-2]}_v")
    return _adamw("gain of weight_norm") if is_gain else None


def _head(site: Site) -> Reading | None:
    """A vocabulary head: of the layer kinds that can be one, with a vocabulary's length on one side."""
    module, shape = site.module, site.shape
    slots = [site.leaf, site.slot, *(slot for _, slot in site.ancestors[1:3])]
    if isinstance(module, _CONVS):
        shape = shape[:2] if prod(shape[2:]) == 1 else (0, 0)
    elif isinstance(module, LAYERS) and not isinstance(module, nn.Linear):
        shape = (0, 0)
    out, inner = list(shape[-2:])[:: -1 if is_transposed(module) else 1]
    if not site.vocabulary.is_output(module, slots) and _is_hidden(site, out, inner):
        return None
    either = len(shape) > 2 and site.vocabulary.is_head(module, slots, inner, out)
    return _adamw("vocabulary head") if either or site.vocabulary.is_head(module, slots, out, inner) else None


def _is_hidden(site: Site, out: int, inner: int) -> bool:
    """Whether a layer beside this one, itself no output, takes what this gives back to what it reads, as in an MLP."""
    if site.parent is None or isinstance(site.parent, (nn.ModuleList, nn.ModuleDict)):
        return False
    others = [(name, layer) for name, layer in site.parent.named_children() if layer is not site.module]
    return any(
        isinstance(layer, nn.Linear)
        and (layer.out_features, layer.in_features) == (inner, out)
        and not site.vocabulary.is_output(layer, (name,))
        for name, layer in others
    )


def _table_or_gain(site: Site) -> Reading | None:
    why = table_or_gain(site)
    return None if why is None else _adamw(why)


def _attention(site: Site) -> Reading | None:
    """A projection of query, key or value, or of several of them, and other fused weights whose layout is known."""
    shape, transposed = site.shape, is_transposed(site.module)
    is_own = not (is_dense(site) or (site.leaf == "weight" and len(shape) >= 2))
    if isinstance(site.module, _CONVS) and (site.module.groups != 1 or prod(shape[2:]) != 1):
        return None
    if len(shape) > 3 and not isinstance(site.module, _CONVS):
        return None
    is_stack = len(shape) == 3 and not isinstance(site.module, _CONVS)
    axes = list(shape[-2:] if is_stack else shape[:2])
    rows, columns = axes[::-1] if transposed else axes
    for module, slot in [(site.module, site.leaf)] if is_own else site.places():
        found = read(Place(module, slot, rows, columns), 2 if is_stack else len(shape), transposed)
        if found is not None:
            return _filled(site, found, is_stack)
    return None


def _filled(site: Site, found: Reading, is_stack: bool) -> Reading:
    """The reading of a layout, with the whole matrix where it has no view."""
    plain = TRANSPOSED if is_transposed(site.module) else MATRIX
    if isinstance(site.module, _CONVS):
        plain = conv(site.param.ndim)
    view = found.view or plain
    by_head = found.by_head or view
    if is_stack:
        view, by_head = per_expert(view), per_expert(by_head)
    return Reading(view, by_head, found.how, found.known)


def _gated(site: Site) -> Reading | None:
    shape, module = site.shape, site.module
    if site.parent is not None and isinstance(module, _CONVS):
        view = gated_convolution(site.parent, module)
    elif is_dense(site) or (site.leaf == "weight" and len(shape) == 3 and not isinstance(module, LAYERS)):
        above = site.ancestors[1][0] if len(site.ancestors) > 1 else None
        view = None if is_transposed(module) or site.parent is None else gated(site.parent, site.slot, shape, above)
    else:
        view = gated(module, site.leaf, shape) if len(shape) in (2, 3) and not isinstance(module, LAYERS) else None
    return None if view is None else Reading(view, view, "gate and up, by the shape of the neighbour behind them")


def _groups_in_rows(site: Site) -> Reading | None:
    """Experts or groups stacked along the rows: their number and the rows of each are attributes of the module."""
    if site.param.ndim != 2 or site.leaf == "bias" or type(site.module) in LAYERS:
        return None
    rows, module = site.shape[0], site.module
    grouped = isinstance(module, nn.Linear) and number(module, ("n_groups", "num_groups", "groups"))
    if grouped and rows % grouped == 0 and grouped > 1:
        return _experts(grouped, "groups")
    count = number(module, ("num_experts", "moe_num_experts", "n_experts", "num_local_experts", "n_routed_experts"))
    each = rows // count if count > 1 and rows % count == 0 else 0
    numbers = [value for value in vars(module).values() if isinstance(value, int) and not isinstance(value, bool)]
    return _experts(count, "experts") if each > 1 and each in numbers else None


def _experts(count: int, what: str) -> Reading:
    view = View("(e m) n -> e m n", {"e": count})
    return Reading(view, view, f"{count} {what} along the rows")


def _dense(site: Site) -> Reading | None:
    if not is_dense(site):
        return None
    plain, how = TRANSPOSED if is_transposed(site.module) else MATRIX, type(site.module).__name__
    rows, columns = site.shape
    if FUSED_WORDS.intersection(words(site.slot)):
        return Reading(plain, plain, f"{how}, fused by its name, {site.slot}", known=False)
    if rows == 3 * columns and site.parent is not None and _looks_fused(site.parent, site.slot, rows):
        return Reading(plain, plain, f"{how} of three times its input's width, perhaps fused", known=False)
    return Reading(plain, plain, how)


def _convolution(site: Site) -> Reading | None:
    if site.leaf != "weight" or not isinstance(site.module, _CONVS) or site.param.ndim < 3:
        return None
    groups, transposed, ndim = site.module.groups, site.module.transposed, site.param.ndim
    view = conv(ndim, groups, transposed)
    if groups > 1 and transposed and site.shape[0] == groups:  # depthwise: one matrix, channels x kernel
        view = View(str(conv(ndim, 1, transposed=True).pattern).replace("-> g o (i", "-> 1 (g o) (i"), {"g": groups})
    elif site.shape[1] == 1 or site.shape[0] == groups:
        view = conv(ndim, 1, transposed)
    return Reading(view, view, type(site.module).__name__)


def _recurrent(site: Site) -> Reading | None:
    module = site.module
    if isinstance(module, nn.Bilinear) and site.param.ndim == 3:
        return Reading(STACK, STACK, "Bilinear")
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or site.param.ndim != 2:
        return None
    gates = 4 if isinstance(module, (nn.LSTM, nn.LSTMCell)) else 3
    is_stacked = site.shape[0] == gates * module.hidden_size
    view = View(GATES, {"g": gates}) if is_stacked else MATRIX
    return Reading(view, view, type(module).__name__)


def _head_axes(site: Site) -> Reading | None:
    if isinstance(site.module, LAYERS) or site.leaf == "weight":
        return None
    return with_head_axes(Place(site.module, site.leaf, 0, 0), site.shape)


def _bare(site: Site) -> Reading:
    """A parameter of a module that is not known: by the last known word of its name, else by its shape.

    Three axes are a stack of matrices (experts), which may hold (in, out) as well as (out, in), unless they are single
    rows; those, as kernels over channels, are one matrix, and more axes are a convolution.
    """
    shape, table = site.shape, named_table(site)
    if table or sum(length != 1 for length in shape) < 2:
        return _adamw(f"table or gain by its name, {site.leaf}" if table else "one axis longer than 1")
    known = table is not None
    if not known and len(shape) > 2 and shape[0] == 1:
        return Reading(None, None, f"nothing known of {site.leaf}; a first axis of 1", known=False)
    view = MATRIX if len(shape) == 2 else STACK if len(shape) == 3 and shape[1] > 1 else conv(len(shape))
    return Reading(
        view, view, f"{len(shape)} axes, by its name, {site.leaf}" if known else f"nothing known of {site.leaf}", known
    )


DEFAULTS: tuple[Callable[[Site], Reading | None], ...] = (
    _vector,
    _table_or_gain,
    _head,
    adapter,
    _groups_in_rows,
    _head_axes,
    _attention,
    _gated,
    _dense,
    _convolution,
    _recurrent,
    _bare,
)
"""The defaults in order: each row says how the parameter is read, or ``None`` if it does not apply."""


def _looks_fused(module: nn.Module, slot: str, rows: int) -> bool:
    """Whether a module has heads, no blocks, and nothing beside this layer that reads all of its rows."""
    h = number(module, HEADS)
    has_blocks = any(isinstance(child, nn.ModuleList) for child in module.children())
    is_read = any(other[-1] == rows for other in beside(module, slot))
    return h > 0 and rows != h * number(module, HEAD_DIM) and not has_blocks and not is_read


def is_transposed(module: nn.Module) -> bool:
    """Whether this is Hugging Face's ``Conv1D``, known without importing transformers."""
    kinds = type(module).__mro__
    return any((kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D") for kind in kinds)


def is_dense(site: Site) -> bool:
    """Whether this is the weight of a dense layer: a Linear, a Conv1D, or of a class with the same attributes."""
    if site.leaf != "weight" or site.param.ndim != 2:
        return False
    features = (number(site.module, ("out_features",)), number(site.module, ("in_features",)))
    return isinstance(site.module, nn.Linear) or is_transposed(site.module) or features == site.shape
