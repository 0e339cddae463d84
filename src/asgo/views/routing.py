"""Which parameter is read how: named groups for any `torch.nn.Module`.

The first rule that matches a parameter decides, then the first row of `asgo.views.defaults.DEFAULTS` that knows it:

- AdamW for vectors, tables, vocabulary heads and gains (`asgo.views.roles`, `asgo.views.vocabulary`);
- one matrix for each part of a fused weight whose layout is known (`asgo.views.layouts`), with ``per_head`` one
  for each head of queries and keys; gate and up by the shape of their neighbour (`asgo.views.gates`);
- one matrix, or a stack of them, for other layers.

Where sizes are not known, or do not add up, a weight stays one matrix, and `route` warns once, naming it.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from asgo.views.defaults import default_reading
from asgo.views.model_scan import Site, find_sites
from asgo.views.projections import Reading
from asgo.views.view import View

Predicate: TypeAlias = Callable[[str, nn.Module, nn.Parameter], bool]
DEFAULT = "default"
"""The view of a `Rule` that changes options only: the view stays what it would be without the rule."""

SHOWN = 8
"""How many unknown kinds of parameters a warning names."""


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
        how: what decided: a rule, a layout and its sizes, the module's type, a shape, a name.
        known: whether something did; if not, the parameter is read by its number of axes.
    """

    name: str
    shape: tuple[int, ...]
    view: View | None
    how: str
    known: bool = True


def route(
    model: nn.Module, rules: Sequence[Rule] = (), per_head: bool = False, prefix: str = ""
) -> list[dict[str, Any]]:
    """Named groups of all trainable parameters, each in exactly one: ``ASGO(route(model), lr=1e-2)``.

    There are few groups: ``"matrices"``, ``"adamw"``, and one for every distinct name and options of the rules.
    The view belongs to the parameter, not to the group.

    The first rule that matches decides, then the defaults (see `asgo.views.routing`). Frozen parameters are left
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

    Warns:
        UserWarning: once, if nothing tells what some parameters are, naming them and the rule to write.

    Raises:
        TypeError: if `model` is not a module, or `rules` not a sequence of rules.
        ValueError: a view that does not fit, a rule that decides no parameter, a model with nothing to train,
            a parameter without a shape of its own (lazy, or flattened by `FullyShardedDataParallel`).
    """
    groups: dict[str, dict[str, Any]] = {}
    decided = _decide(model, rules, per_head, prefix)
    _warn([decision for _, decision, _ in decided])
    for site, decision, rule in decided:
        title = rule.name or ", ".join(f"{key}={value}" for key, value in rule.options.items())
        title = title or ("adamw" if decision.view is None else "matrices")
        key = repr((title, sorted(rule.options.items())))
        group = groups.setdefault(key, {"params": [], "views": [], "name": title, **rule.options})
        group["params"].append((decision.name, site.param))
        group["views"].append(None if decision.view is None else decision.view.to_dict())
    return list(groups.values())


def explain(model: nn.Module, rules: Sequence[Rule] = (), per_head: bool = False, prefix: str = "") -> list[Decision]:
    """What `route` decides for every trainable parameter, and why; arguments and errors as there, without a warning."""
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
        reading = _ruled(rule, View.of(rule.view)) if rule.view != DEFAULT else default_reading(site)
        view = reading.by_head if per_head else reading.view
        if view is not None:
            view.check(site.names[0], site.shape)
        name = f"{prefix.removesuffix('.')}.{site.names[0]}" if prefix else site.names[0]
        found.append((site, Decision(name, site.shape, view, reading.how, reading.known), rule))
    for rule in rules:
        if not any(rule is winner for winner in winners):
            raise ValueError(_unused(rule, sites))
    return found


def _ruled(rule: Rule, view: View | None) -> Reading:
    return Reading(view, view, str(rule))


def _warn(decisions: Sequence[Decision]) -> None:
    """One warning that names what may be fused or a table and is not known."""
    unknown = [decision for decision in decisions if not decision.known]
    if not unknown:
        return
    kinds = {(re.sub(r"\.\d+\.", ".*.", each.name), each.how): each for each in unknown}
    lines = [f"  {name} {each.shape}: {how}" for (name, how), each in [*kinds.items()][:SHOWN]]
    lines += [f"  and {len(kinds) - SHOWN} more kinds; asgo.explain lists them"] * (len(kinds) > SHOWN)
    warnings.warn(
        f"{len(unknown)} parameters may hold several matrices, or none, and nothing tells; each is read by its axes:\n"
        + "\n".join(lines)
        + "\nSay what they are with a rule: Rule('NAME', None) for a table or gain, "
        "Rule('NAME', fused(q=..., k=..., v=..., order='by head')) for a fused weight, "
        "Rule('NAME', 'm n -> 1 m n') for one matrix.",
        stacklevel=3,
    )


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
