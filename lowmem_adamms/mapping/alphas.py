"""The donor's weight: one number, or one for each layer or role, and how it is written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from ..values import parse_alpha

if TYPE_CHECKING:
    from .plan import Plan

UNLAYERED = ("embed", "norm", "head")
"""The roles that belong to no layer."""
ANY_LAYER = "layers.*"
LAYER_PARTS = {
    "attn": f"{ANY_LAYER}.attn",
    "mlp": f"{ANY_LAYER}.mlp",
    "router": f"{ANY_LAYER}.mlp.router",
    "experts": f"{ANY_LAYER}.mlp.experts",
    "shared_expert": f"{ANY_LAYER}.mlp.shared_expert",
}
"""What parts of all layers may be called in `--alpha-layers`; `mlp` includes the three below it."""
COMPUTED_DECIMALS = 12
"""Computed alphas are rounded to so many, or 0.1 + 0.2 would not be 0.3."""
MAX_LINES = 40
"""What is shown to people is cut after so many lines; adamms.json holds all."""
NO_LAYER = -2  # no neighbour of layer 0


@dataclass(frozen=True, slots=True)
class Alphas:
    """The donor's weight by layer or role.

    Args:
        default: Weight, 0 to 1, of everything that `values` does not name.
        values: Weights by role, or by the leading parts of roles, such as "layers.3",
            "layers.3.attn" or "embed"; "layers.*.mlp.router" is of all layers. The longest name
            that fits a role counts.

    Raises:
        RecipeError: A weight is not in 0..1.

    Example:
        >>> from lowmem_adamms import Alphas
        >>> alpha = Alphas(0.3, {"layers.0": 0.0, "layers.1": 0.0, "layers.1.mlp": 0.5})
        >>> alpha.of("layers.1.mlp.up.weight")
        0.5
        >>> print(alpha)
        0.3; layers 0-1: 0; layer 1 mlp: 0.5
    """

    default: float
    values: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checked = {}
        for name in sorted(self.values, key=_by_layer_number):
            try:
                checked[name] = parse_alpha(self.values[name])
            except RecipeError as error:
                raise RecipeError(f"{name}: {error}") from None
        object.__setattr__(self, "default", parse_alpha(self.default))
        object.__setattr__(self, "values", MappingProxyType(checked))

    def of(self, role: str | None) -> float:
        """The weight of one role; `default` for None.

        A stream (`…@vision`) has the plain role's weight unless it is named itself.
        """
        fitting = (self.values[name] for name in _names_for(role or "") if name in self.values)
        return next(fitting, self.default)

    def __str__(self) -> str:
        return "; ".join([f"{self.default:g}", *format_lines(self)])


OneAlpha = float | Alphas
"""One weight for everything, or one by layer or role."""
Alpha = OneAlpha | tuple[OneAlpha, ...]
"""What a plan takes: one of them, or one for each of several donors."""


def as_tuple(alpha: Alpha) -> tuple[OneAlpha, ...]:
    """The alphas, also where there is one."""
    return alpha if isinstance(alpha, tuple) else (alpha,)


def alpha_of(alpha: OneAlpha, role: str | None) -> float:
    """The weight of one role."""
    return alpha.of(role) if isinstance(alpha, Alphas) else alpha


def _by_layer_number(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _names_for(role: str) -> Iterator[str]:
    """Every name that fits a role, the longest first."""
    yield role
    name = role.partition("@")[0]
    while name:
        yield name
        yield re.sub(r"^layers\.\d+", ANY_LAYER, name)
        name = name.rpartition(".")[0]


# Alphas of a plan


def resolve(alpha: Alpha, plan: Plan) -> Alpha:
    """Bring equal weights, however they are spelled, into one form: a float where all are equal.

    So they give equal bytes, journals and model cards. A tied head has the embedding's weight.
    RecipeError for a weight outside 0..1, a name that fits no role of the plan, or another number
    of weights than the plan takes.
    """
    given = as_tuple(alpha)
    if len(given) != plan.coefficients:
        raise RecipeError(
            f"found {len(given)} alphas, expected {plan.coefficients}: one for"
            f" {'each donor' if plan.coefficients > 1 else 'the merge'}"
        )
    resolved = tuple(_resolve_one(each, plan) for each in given)
    plan.check_alphas(resolved)
    return resolved if len(resolved) > 1 else resolved[0]


def _resolve_one(alpha: OneAlpha, plan: Plan) -> OneAlpha:
    if not isinstance(alpha, Alphas):
        return parse_alpha(alpha)
    roles = {part.role for _, part in plan.parts if part.role}
    # A tied base has no head of its own, which is no reason to refuse one that is named
    known = {name for role in (*roles, *UNLAYERED) for name in _names_for(role)}
    for name in alpha.values:
        if name not in known:
            raise RecipeError(
                f"alpha of {name}: {plan.base.path} has no such role; expected"
                f" layers.0 to layers.{plan.base_layout.layers - 1}, {', '.join(UNLAYERED)}"
                " or a longer name such as layers.0.attn.q"
            )
    return from_roles({role: alpha.of(role) for role in blended_roles(plan)}, alpha.default)


def blended_roles(plan: Plan) -> dict[str, tuple[str, str]]:
    """The roles that a plan blends, each with the base's and the donor's tensor."""
    return {
        part.role: (step.name, part.donor_name or "")
        for step, part in plan.parts
        if part.role and part.donor
    }


def from_roles(by_role: Mapping[str, float], default: float | None = None) -> OneAlpha:
    """Turn one weight for each role into a float where all are equal, else into short Alphas.

    default: of the result; the commonest weight unless given.
    """
    weights = Counter(by_role.values())
    if len(weights) == 1:
        return parse_alpha(next(iter(weights)))
    if default is None:
        default = weights.most_common(1)[0][0]
    values = {name: alpha for name, alpha in _shorten(by_role).items() if alpha != default}
    short = Alphas(default, values)
    # A stream that has the default beside a plain role that has not must be named after all
    lost = {role: alpha for role, alpha in by_role.items() if short.of(role) != alpha}
    return Alphas(default, values | lost)


def _shorten(by_role: Mapping[str, float], length: int = 1) -> dict[str, float]:
    """Cut names to as few leading parts as have one weight for every role that begins so."""
    groups: dict[str, dict[str, float]] = {}
    for role, alpha in by_role.items():
        name = ".".join(role.split(".")[:length])
        groups.setdefault(name, {})[role] = alpha
    shortened: dict[str, float] = {}
    for name, members in groups.items():
        weights = set(members.values())
        shortened |= {name: weights.pop()} if len(weights) == 1 else _shorten(members, length + 1)
    return shortened


# Lists over depth, and --alpha-layers


def relative_depth(layer: int, layers: int) -> float:
    """0 for the first layer, 1 for the last; 1 for the only one, as in mergekit."""
    return layer / (layers - 1) if layers > 1 else 1.0


def interpolate(values: Sequence[float], depth: float) -> float:
    """The weight at a relative depth, of weights that are spread evenly over all depths."""
    position = depth * (len(values) - 1)
    before = int(position)
    after = min(before + 1, len(values) - 1)
    weight = values[before] + (position - before) * (values[after] - values[before])
    return round(weight, COMPUTED_DECIMALS)


def parse_alpha_layers(text: str, layers: int, alpha: float | None = None) -> Alphas:
    """Read `--alpha-layers` for a decoder of `layers` layers; RecipeError if it makes no sense.

    `0.1,0.3,0.5` is interpolated over depth; the embedding has the first weight, final norm and
    head have the last, or all three have `alpha`. `0-9:0.2,10-27:0.5,embed:0,router:0` names
    layers, ends included, what is outside of them, and LAYER_PARTS; the rest has `alpha`. `=` may
    stand for `:`.
    """
    words = [word.strip().replace("=", ":") for word in text.split(",")]
    try:
        if any(":" in word for word in words):
            return _parse_ranges(words, layers, alpha)
        weights = [parse_alpha(word) for word in words]
    except RecipeError as error:
        raise RecipeError(f"`alpha_layers` {text!r}: {error}") from None
    first, last = (weights[0], weights[-1]) if alpha is None else (alpha, alpha)
    values = {f"layers.{i}": interpolate(weights, relative_depth(i, layers)) for i in range(layers)}
    return Alphas(first, values | {"embed": first, "norm": last, "head": last})


def _parse_ranges(words: Sequence[str], layers: int, alpha: float | None) -> Alphas:
    values: dict[str, float] = {}
    for word in words:
        where, _, weight = word.partition(":")
        for name in _names_in(where.strip(), layers):
            if name in values:
                raise RecipeError(f"{name} is named twice")
            values[name] = parse_alpha(weight)
    if alpha is None:
        for name in (*(f"layers.{i}" for i in range(layers)), *UNLAYERED):
            if name not in values:
                raise RecipeError(f"says nothing of {name}; give `alpha` for the rest")
        alpha = 0.0
    return Alphas(alpha, values)


def _names_in(where: str, layers: int) -> list[str]:
    """The names that `3`, `0-9`, `embed` or `router` stands for."""
    if where in UNLAYERED:
        return [where]
    if where in LAYER_PARTS:
        return [LAYER_PARTS[where]]
    bounds = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", where)
    first, last = (int(bounds[1]), int(bounds[2] or bounds[1])) if bounds else (0, -1)
    if not first <= last < layers:
        raise RecipeError(
            f"{where!r} is neither one of {', '.join((*UNLAYERED, *LAYER_PARTS))} nor within layers"
            f" 0-{layers - 1}; expected 0.1,0.3,0.5 (over depth) or 0-9:0.2,10-27:0.5"
        )
    return [f"layers.{i}" for i in range(first, last + 1)]


# Files and people


def alpha_to_json(alpha: Alpha) -> dict[str, Any]:
    """`alpha`, and `alphas` beside it where layers have their own; of several donors lists of both.

    A donor that has one weight for everything has no entry in its place in `alphas`.
    """
    if isinstance(alpha, tuple):
        each = [alpha_to_json(one) for one in alpha]
        document: dict[str, Any] = {"alpha": [one["alpha"] for one in each]}
        by_role = [one.get("alphas", {}) for one in each]
        return document | ({"alphas": by_role} if any(by_role) else {})
    if not isinstance(alpha, Alphas):
        return {"alpha": alpha}
    return {"alpha": alpha.default, "alphas": dict(alpha.values)}


def alpha_from_json(document: Mapping[str, Any]) -> Alpha:
    """Read what `alpha_to_json` wrote; RecipeError for a weight outside 0..1."""
    values, alpha = document.get("alphas"), document["alpha"]
    if isinstance(alpha, list):
        each = zip(alpha, values or [None] * len(alpha), strict=True)
        return tuple(Alphas(one, by_role) if by_role else parse_alpha(one) for one, by_role in each)
    return Alphas(alpha, values) if values else parse_alpha(alpha)


def format_alpha(alpha: Alpha) -> str:
    """Say an alpha for people, in a line: `0.3`, or `0.2 and 0.3` of two donors."""
    return " and ".join(
        f"{one:g}" if isinstance(one, float) else f"({one})" for one in as_tuple(alpha)
    )


def format_lines(alpha: Alphas) -> list[str]:
    """Say for people what differs from the default, consecutive layers in one line."""
    weights = {_split_name(name): value for name, value in alpha.values.items()}
    lines: list[str] = []
    for (role, layer), value in sorted(weights.items()):
        if layer == NO_LAYER:
            lines.append(f"{role}: {value:g}")
        elif weights.get((role, layer - 1)) != value:  # else the line of the layer before says it
            last = layer
            while weights.get((role, last + 1)) == value:
                last += 1
            layers = f"layer {layer}" if layer == last else f"layers {layer}-{last}"
            lines.append(f"{layers} {role}".strip() + f": {value:g}")
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"and {len(lines) - MAX_LINES} more"]
    return lines


def _split_name(name: str) -> tuple[str, int]:
    """The role within a layer ("" is all of it), and the layer or NO_LAYER."""
    in_layer = re.fullmatch(r"layers\.(\d+)(?:\.(.+))?", name)
    return (in_layer[2] or "", int(in_layer[1])) if in_layer else (name, NO_LAYER)
