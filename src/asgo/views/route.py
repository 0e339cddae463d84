"""Which parameter is read how: named groups for any `torch.nn.Module`.

The defaults look at module types, tied weights and exact attributes of attention modules, never at parts of a
name: a Linear called ``embed_norm`` is a matrix. The first row of `DEFAULTS` that knows a parameter decides:

- AdamW for vectors and scalars, embeddings, vocabulary heads and gains;
- one matrix each for query, key and value inside a fused projection (`asgo.views.layouts`), and with ``per_head``
  one per head for queries and keys, also with grouped queries; where the heads are unknown or do not divide the
  rows, the weight stays whole;
- one matrix each for gate and up inside a fused projection (`asgo.views.layouts`);
- one matrix, or a stack of them, for other layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from asgo.views.layouts import GATE_UP, gated_view, head_view
from asgo.views.model_scan import TABLES, Site, find_sites
from asgo.views.patterns import GATES, MATRIX, STACK, TRANSPOSED, conv, whole
from asgo.views.patterns import default_view as axes_view
from asgo.views.view import View

Predicate: TypeAlias = Callable[[str, nn.Module, nn.Parameter], bool]
Found: TypeAlias = "View | Literal['adamw'] | None"

ADAMW: Literal["adamw"] = "adamw"
DEFAULT = "default"
"""The view of a `Rule` that changes options only: the view stays what it would be without the rule."""


@dataclass(frozen=True)
class Rule:
    """How the parameters that match are read and stepped.

    Args:
        match: a module class or a tuple of them, for the module's own parameters with two or more axes (with
            ``view=None``, for all of its own); a pattern for the whole name, as in `fnmatch`, such as
            ``"h.*.mlp.*.weight"``, which any name of a tied parameter may match; or a function
            ``(name, module, parameter) -> bool``.
        view: a `View`, an einops pattern, the dict of `View.to_dict`, or ``None`` for AdamW. By default the
            view stays what it would be without the rule.
        options: hyperparameters of the group, such as ``lr`` or ``weight_decay``.
        name: the group's name; parameters of equal options share a group unless their names differ.
        parameter: with a module class, the one parameter that is meant, e.g. ``"weight_hh_l0"``.

    Raises:
        TypeError: if `match` is none of these.
        ValueError: a view that is not understood, a reserved option, `parameter` without a module class.
    """

    match: type[nn.Module] | tuple[type[nn.Module], ...] | str | Predicate
    view: View | str | Mapping[str, Any] | None = DEFAULT
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    parameter: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be a rule, and read the view."""
        is_function = callable(self.match) and not isinstance(self.match, (type, nn.Module))
        if not (self.types or isinstance(self.match, str) or is_function):
            raise TypeError(
                f"match must be a module class, a name pattern or a function; got {self.match!r}. "
                "For a single module pass the pattern of its names."
            )
        if self.parameter is not None and not self.types:
            raise ValueError(f"parameter={self.parameter!r} needs a module class to match; got {self.match!r}.")
        reserved = sorted({"params", "param_names", "view", "views", "name"} & set(self.options))
        if reserved:
            raise ValueError(f"options may not set {', '.join(reserved)}: the rule has arguments for view and name.")
        if self.view != DEFAULT:
            object.__setattr__(self, "view", View.of(self.view))

    @property
    def types(self) -> tuple[type[nn.Module], ...]:
        """The module classes that `match` names; empty for a pattern or a function."""
        types = self.match if isinstance(self.match, tuple) else (self.match,)
        modules = tuple(each for each in types if isinstance(each, type) and issubclass(each, nn.Module))
        return modules if len(modules) == len(types) else ()

    def matches(self, site: Site) -> bool:
        """Whether the rule is for this parameter."""
        if isinstance(self.match, str):
            return any(fnmatchcase(name, self.match) for name in site.names)
        if not self.types:
            return bool(self.match(site.names[0], site.module, site.param))  # pyright: ignore
        if self.parameter is not None:
            return isinstance(site.module, self.types) and site.leaf == self.parameter
        return isinstance(site.module, self.types) and (self.view is None or site.param.ndim >= 2)

    def __str__(self) -> str:
        """The rule's name, or what it matches."""
        shown = repr(self.match) if not self.types else " | ".join(each.__name__ for each in self.types)
        return f"rule {self.name or shown}"


@dataclass(frozen=True)
class Decision:
    """How one parameter is read, and why.

    Args:
        name: the parameter's name, with the prefix.
        shape: its shape.
        view: how it is read; ``None`` for AdamW.
        how: what decided: a rule, or the row of the defaults.
    """

    name: str
    shape: tuple[int, ...]
    view: View | None
    how: str


def route(
    model: nn.Module, rules: Sequence[Rule] = (), per_head: bool = False, prefix: str = ""
) -> list[dict[str, Any]]:
    """Named groups of all trainable parameters, each in exactly one: ``ASGO(route(model), lr=1e-2)``.

    There are few groups: ``"matrices"``, ``"adamw"``, and one for every distinct name and options of the rules.
    The view belongs to the parameter, not to the group.

    The first rule that matches decides, then the defaults (see `asgo.views.route`). Frozen parameters are left
    out; tied ones appear once, and a weight tied to an embedding is an embedding. Names are those without
    wrappers (`DistributedDataParallel`, `torch.compile`, checkpoint wrappers, also nested), so that checkpoints
    fit the bare model too.

    Args:
        model: any module.
        rules: what should differ from the defaults.
        per_head: read queries and keys as one matrix per head (the paper's transformer form, whose roots are
            cheaper by the square of the number of heads) instead of one matrix in all. Off by default because
            whole ones trained better in every run recorded in ``benchmarks/defaults``.
        prefix: put before every name, with a dot, as in `torch.nn.Module.named_parameters`: two models can share
            an optimizer. Rules match names without it.

    Returns:
        Groups ``{"params": [(name, parameter), ...], "views": [dict | None, ...], "name": str, **options}`` for a
        `torch.optim.Optimizer`, in the order of their first parameter; ``views`` has one entry per parameter,
        plain data of `View.to_dict`, ``None`` for AdamW.

    Raises:
        TypeError: if `model` is not a module, or `rules` not a sequence of rules.
        ValueError: a view that does not fit, a rule that decides no parameter, a model with nothing to train,
            a parameter without a shape of its own (lazy, or flattened by `FullyShardedDataParallel`).
    """
    groups: dict[str, dict[str, Any]] = {}
    for site, decision, rule in _decide(model, rules, per_head, prefix):
        title = rule.name or ", ".join(f"{key}={value}" for key, value in rule.options.items())
        title = title or ("adamw" if decision.view is None else "matrices")
        key = repr((title, sorted(rule.options.items())))
        group = groups.setdefault(key, {"params": [], "views": [], "name": title, **rule.options})
        group["params"].append((decision.name, site.param))
        group["views"].append(None if decision.view is None else decision.view.to_dict())
    return list(groups.values())


def explain(model: nn.Module, rules: Sequence[Rule] = (), per_head: bool = False, prefix: str = "") -> list[Decision]:
    """What `route` decides for every trainable parameter, and why; arguments and errors as there."""
    return [decision for _, decision, _ in _decide(model, rules, per_head, prefix)]


def _decide(model: nn.Module, rules: Sequence[Rule], per_head: bool, prefix: str) -> list[tuple[Site, Decision, Rule]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"route needs a torch.nn.Module; got {type(model).__name__}.")
    if not isinstance(rules, Sequence) or not all(isinstance(rule, Rule) for rule in rules):
        raise TypeError("rules must be a list of asgo.Rule, e.g. [Rule(torch.nn.Linear, 'm n -> 1 m n')].")
    sites, otherwise = find_sites(model), Rule("*")
    winners = [next((rule for rule in rules if rule.matches(site)), otherwise) for site in sites]
    found = []
    for site, rule in zip(sites, winners, strict=True):
        view, how = default_view(site, per_head), "default" if rule is otherwise else str(rule)
        if rule.view != DEFAULT:
            view = View.of(rule.view)
        if view is not None:
            view.check(site.names[0], site.shape)
        name = f"{prefix.removesuffix('.')}.{site.names[0]}" if prefix else site.names[0]
        found.append((site, Decision(name, site.shape, view, how), rule))
    for rule in rules:
        if not any(rule is winner for winner in winners):
            raise ValueError(_unused(rule, sites))
    return found


def default_view(site: Site, per_head: bool = False) -> View | None:
    """The view of a parameter that no rule matches: the first answer of `DEFAULTS`."""
    found = next(answer for row in DEFAULTS if (answer := row(site)) is not None)
    if not isinstance(found, View):
        return None
    return found if per_head else whole(found)


def default_views(named_params: Iterable[tuple[str, Tensor]]) -> list[View | None]:
    """The views of ``(name, parameter)`` pairs without the module that they belong to.

    Vectors, and parameters with an exact name of a table of embeddings or positions, a vocabulary head or a
    gain (``lm_head.weight``, ``h.0.wte.weight``, ``pos_embed``) are AdamW's; others go by their number of axes,
    as in `asgo.views.default_view`. Fused projections and experts cannot be told by a name alone: use `route`.
    """
    return [None if _is_named_table(name) else axes_view(param.ndim) for name, param in named_params]


def _is_named_table(name: str) -> bool:
    *_, slot, leaf = ["", *name.split(".")]
    return leaf in _ELEMENTWISE or leaf in NAMED_TABLES or (leaf == "weight" and slot in NAMED_TABLES)


def _unused(rule: Rule, sites: Sequence[Site]) -> str:
    if any(rule.matches(site) for site in sites):
        return f"{rule} decides nothing: earlier rules match all of its parameters. Move it up or remove it."
    names = [name for site in sites for name in site.names]
    close, hint = names[:3], "Its function was False for all of them"
    if isinstance(rule.match, str):
        close = difflib.get_close_matches(rule.match, names, 3, 0.5) or close
        hint = "A pattern must match the whole name; '*' stands for any part"
    elif rule.parameter is not None:
        close = sorted({site.leaf for site in sites if isinstance(site.module, rule.types)}) or close
        hint = f"parameter={rule.parameter!r} must be the name of a module's own parameter"
    elif rule.types:
        close = sorted({type(site.module).__name__ for site in sites})
        hint = "A class matches a module's own parameters with two or more axes, with view=None all of them"
    return f"{rule} matches no trainable parameter; the model has {', '.join(map(repr, close))}. {hint}."


# ---- the defaults ------------------------------------------------------------------------------------------

_GAINS = (nn.LayerNorm, nn.RMSNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ELEMENTWISE = {
    *("pos_embed", "pos_embedding", "position_embedding", "position_embeddings", "positional_embedding"),
    *("position_enc", "wpe", "pe", "level_embed", "seg_embed", "rel_pos_h", "rel_pos_w", "attention_biases"),
    *("relative_position_bias_table", "relative_attention_bias", "position_bias", "pos_bias_u", "pos_bias_v"),
    *("bias_u", "bias_v", "r_w_bias", "r_r_bias", "r_s_bias", "A_log"),
}
"""Exact names of parameters that are no matrices though they have two axes: positions, biases, decays."""


NAMED_TABLES = {
    *("lm_head", "embed_out", "output_projection", "embed_tokens", "embed_positions", "embed_in", "shared"),
    *("wte", "wpe", "tok_emb", "tok_embed", "tok_embedding", "tok_embeddings", "token_embedding", "token_embeddings"),
    *("embed", "embedding", "embeddings", "pos_emb", "word_embeddings", "token_type_embeddings", "patch_positions"),
    *("relative_attention_bias", "cls_token", "mask_token", "dist_token", "class_embedding"),
}
"""Exact names of tables and heads, for parameters whose module is not known."""


def _vector(site: Site) -> Found:
    return ADAMW if site.param.ndim < 2 else None


def _embedding_head_or_gain(site: Site) -> Found:
    return ADAMW if site.is_head or isinstance(site.module, (*TABLES, *_GAINS)) else None


def _attention(site: Site) -> Found:
    if isinstance(site.module, nn.MultiheadAttention):
        view = head_view(site.module, site.leaf, site.shape)
        return view or (MATRIX if site.param.ndim == 2 else None)
    if site.parent is None or not _is_dense(site):
        return None
    return head_view(site.parent, site.slot, site.shape, _is_transposed(site.module))


def _gated(site: Site) -> Found:
    if site.leaf == GATE_UP and site.param.ndim == 3:
        return gated_view(site.module, site.shape)
    if site.slot != GATE_UP or site.parent is None or not _is_dense(site) or _is_transposed(site.module):
        return None
    return gated_view(site.parent, site.shape)


def _dense(site: Site) -> Found:
    if _is_dense(site):
        return TRANSPOSED if _is_transposed(site.module) else MATRIX
    return None


def _convolution(site: Site) -> Found:
    if site.leaf != "weight" or not isinstance(site.module, _CONVS) or site.param.ndim < 3:
        return None
    groups, transposed = site.module.groups, site.module.transposed
    if groups > 1 and site.shape[1] == 1 and transposed:
        return View(str(conv(site.param.ndim, 1, True).pattern).replace("-> g o", "-> o g"), {"g": groups})
    if site.shape[1] == 1 or site.shape[0] == groups:
        groups = 1  # a depthwise layer is one matrix, not a stack of single rows
    return conv(site.param.ndim, groups, transposed)


def _recurrent(site: Site) -> Found:
    if not isinstance(site.module, (nn.RNNBase, nn.RNNCellBase)) or site.param.ndim != 2:
        return None
    gates = 4 if isinstance(site.module, (nn.LSTM, nn.LSTMCell)) else 3
    is_stacked = site.shape[0] == gates * site.module.hidden_size
    return View(GATES, {"g": gates}) if is_stacked else MATRIX


def _bare(site: Site) -> Found:
    """A parameter of a module that is not known.

    A vector with extra axes of length 1, a parameter with an axis for the batch, a bias per expert and a
    table of positions go to AdamW. Three axes are a stack of matrices (experts, `torch.nn.Bilinear`): which
    side is preconditioned goes by size, so it may hold (in, out) as well as (out, in).
    """
    shape, base = site.shape, site.leaf.removesuffix("_bias")
    if sum(length != 1 for length in shape) < 2 or (len(shape) > 2 and shape[0] == 1):
        return ADAMW
    has_weight = any(hasattr(site.module, name) for name in (base, f"{base}_weight"))
    is_bias = site.leaf == "bias" or (base != site.leaf and has_weight)
    if is_bias or site.leaf in _ELEMENTWISE:
        return ADAMW
    if len(shape) == 2:
        return MATRIX
    return STACK if len(shape) == 3 else conv(len(shape))


DEFAULTS: tuple[Callable[[Site], Found], ...] = (
    _vector,
    _embedding_head_or_gain,
    _attention,
    _gated,
    _dense,
    _convolution,
    _recurrent,
    _bare,
)
"""The defaults in order: each row gives a view, "adamw", or ``None`` if the parameter is not its business."""


def _is_transposed(module: nn.Module) -> bool:
    """Whether this is Hugging Face's ``Conv1D``, known without importing transformers."""
    kinds = type(module).__mro__
    return any((kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D") for kind in kinds)


def _is_dense(site: Site) -> bool:
    is_layer = isinstance(site.module, nn.Linear) or _is_transposed(site.module)
    return is_layer and site.leaf == "weight" and site.param.ndim == 2
