"""The donor's weight: one number, or one for each layer or role (`Alphas`), and how it is written.

Whoever takes an alpha takes either. `resolve` brings both into the one form that a plan has for
them, so that equal weights give equal bytes, journals and papers however they were spelled. Leaves
to others: mergekit's YAML (`recipe.py`), choosing (`search.py`, `refine.py`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError

if TYPE_CHECKING:
    from .plan import Plan

OUTSIDE = ("embed", "norm", "head")
"""The roles that belong to no layer."""
DECIMALS = 12
"""Of alphas that were computed: enough to drop the arithmetic's own dust, as in 0.1 + 0.2."""
_SHOWN = 40  # lines; who has more reads adamms.json


@dataclass(frozen=True, slots=True)
class Alphas:
    """The donor's weight by role, each in 0..1; RecipeError otherwise.

    values: names a role, or its leading parts: `layers.3`, `layers.3.attn`, `embed`. Of several
    that fit a role the longest counts; default: where none does.
    """

    default: float
    values: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checked = {role: check_alpha(self.values[role], role) for role in self.values}
        ordered = {role: checked[role] for role in sorted(checked, key=_order)}
        object.__setattr__(self, "default", check_alpha(self.default))
        object.__setattr__(self, "values", MappingProxyType(ordered))

    def of(self, role: str | None) -> float:
        """The weight of one role; a stream (`…@vision`) takes the plain role's unless it is named.

        None, what has no role, takes the default.
        """
        name = role or ""
        if name not in self.values:
            name = name.partition("@")[0]
        while name and name not in self.values:
            name = name.rpartition(".")[0]
        return self.values.get(name, self.default)

    def __str__(self) -> str:
        return "; ".join([f"{self.default:g}", *lines(self)])


Alpha = float | Alphas
"""One weight for everything, or one by role."""


def check_alpha(alpha: float, of: str | None = None) -> float:
    """The donor's weight as a float in 0..1; RecipeError otherwise (NaN included)."""
    alpha = float(alpha)
    if math.isnan(alpha) or not 0 <= alpha <= 1:
        whose = f"alpha of {of}" if of else "alpha"
        raise RecipeError(f"{whose} is {alpha}; expected 0 (the base) to 1 (the donor)")
    return alpha


def at(alpha: Alpha, role: str | None) -> float:
    """The weight of one role."""
    return alpha.of(role) if isinstance(alpha, Alphas) else alpha


def resolve(alpha: Alpha, plan: Plan) -> Alpha:
    """The form of `alpha` that all spellings of the same weights share on this plan.

    That is a float where all that is blended has one weight. A tied head is the embedding and has
    its weight. RecipeError for a weight outside 0..1 and a name that fits no role of the plan.
    """
    if not isinstance(alpha, Alphas):
        return check_alpha(alpha)
    roles = {part.role for _, part in plan.parts if part.role}
    # A tied base has no head of its own, which is no reason to refuse one that is named
    names = {name for role in (*roles, *OUTSIDE) for name in _names(role)}
    for name in alpha.values:
        if name not in names:
            raise RecipeError(
                f"alpha of {name}: {plan.base.path} has no such role; expected"
                f" layers.0 to layers.{plan.base_layout.layers - 1}, {', '.join(OUTSIDE)}"
                " or a longer name such as layers.0.attn.q"
            )
    blended = {role: alpha.of(role) for role in blended_roles(plan)}
    return from_roles(blended, alpha.default)


def blended_roles(plan: Plan) -> dict[str, tuple[str, str]]:
    """The roles that alpha is for, with the names of the base's and the donor's tensor."""
    return {
        part.role: (step.name, part.donor_name or "")
        for step, part in plan.parts
        if part.role and part.donor
    }


def from_roles(by_role: Mapping[str, float], default: float | None = None) -> Alpha:
    """One weight for each role, in short: by layer where a layer has one, as a float where all do.

    default: the commonest unless given.
    """
    weights = Counter(by_role.values())
    if len(weights) == 1:
        return check_alpha(next(iter(weights)))
    usual = weights.most_common(1)[0][0] if default is None else default
    values = {name: alpha for name, alpha in _shortened(by_role).items() if alpha != usual}
    short = Alphas(usual, values)
    # A stream at the default, beside a plain role that is not, must be named after all.
    lost = {role: alpha for role, alpha in by_role.items() if short.of(role) != alpha}
    return Alphas(usual, values | lost)


def _shortened(by_role: Mapping[str, float], parts: int = 1) -> dict[str, float]:
    """Names cut to as few leading parts as have one weight for all that begins so."""
    groups: dict[str, dict[str, float]] = {}
    for role, alpha in by_role.items():
        groups.setdefault(".".join(role.split(".")[:parts]), {})[role] = alpha
    out: dict[str, float] = {}
    for name, inside in groups.items():
        first, *others = set(inside.values())
        out |= _shortened(inside, parts + 1) if others else {name: first}
    return out


def _names(role: str) -> Iterator[str]:
    """Every name that fits a role."""
    yield role
    name = role.partition("@")[0]
    while name:
        yield name
        name = name.rpartition(".")[0]


def _order(role: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in role.split(".")]


# What people and files say


def at_depth(values: Sequence[float], depth: float) -> float:
    """A list of weights, evenly spread over depth 0..1 and interpolated linearly between them."""
    scaled = depth * (len(values) - 1)
    first = min(int(scaled), len(values) - 1)
    last = min(first + 1, len(values) - 1)
    return round(values[first] + (scaled - first) * (values[last] - values[first]), DECIMALS)


def depth_of(layer: int, layers: int) -> float:
    """Of layer 0 it is 0, of the last 1; of a lone layer 1, as in mergekit."""
    return layer / (layers - 1) if layers > 1 else 1.0


def parse_layers(text: str, layers: int, alpha: float | None = None) -> Alphas:
    """What `--alpha-layers` says, for a decoder of so many layers; RecipeError if it cannot be.

    `0.1,0.3,0.5`: interpolated over depth; the embedding takes the first, final norm and head the
    last, or all three `alpha`. `0-9:0.2,10-27:0.5,embed:0`: layers by number, both ends included,
    and what is outside them by name; the rest takes `alpha`.
    """
    words = [word.strip() for word in text.split(",")]
    if all(":" in word for word in words):
        return _explicit(text, words, layers, alpha)
    if any(":" in word for word in words):
        raise _unclear(text, "it mixes a list over depth with ranges of layers")
    values = [_weight(text, word) for word in words]
    ends = dict(zip(OUTSIDE, (values[0], values[-1], values[-1]), strict=True))
    if alpha is not None:
        ends = dict.fromkeys(OUTSIDE, check_alpha(alpha))
    spread = {f"layers.{i}": at_depth(values, depth_of(i, layers)) for i in range(layers)}
    return Alphas(ends["embed"], ends | spread)


def _explicit(text: str, words: Sequence[str], layers: int, alpha: float | None) -> Alphas:
    values: dict[str, float] = {}
    for word in words:
        where, _, weight = word.rpartition(":")
        for name in _named(text, where.strip(), layers):
            if name in values:
                raise _unclear(text, f"{_spoken(name)} is named twice")
            values[name] = _weight(text, weight)
    everything = [*(f"layers.{i}" for i in range(layers)), *OUTSIDE]
    missing = [name for name in everything if name not in values]
    if missing and alpha is None:
        raise RecipeError(
            f"--alpha-layers {text!r}: says nothing of {_some(missing)}; give --alpha for the rest"
        )
    return Alphas(0.0 if alpha is None else alpha, values)


def _named(text: str, where: str, layers: int) -> list[str]:
    if where in OUTSIDE:
        return [where]
    bounds = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", where)
    if bounds is None:
        raise _unclear(text, f"{where!r} is neither a layer nor one of {', '.join(OUTSIDE)}")
    first, last = int(bounds[1]), int(bounds[2] or bounds[1])
    if not first <= last < layers:
        raise _unclear(text, f"{where} is not within the decoder's layers 0-{layers - 1}")
    return [f"layers.{i}" for i in range(first, last + 1)]


def _weight(text: str, word: str) -> float:
    try:
        return check_alpha(float(word))
    except ValueError:
        raise _unclear(text, f"{word!r} is not a number") from None
    except RecipeError as error:
        raise RecipeError(f"--alpha-layers {text!r}: {error}") from None


def _unclear(text: str, why: str) -> RecipeError:
    return RecipeError(
        f"--alpha-layers {text!r}: {why}; expected 0.1,0.3,0.5 (over depth) or 0-9:0.2,10-27:0.5"
    )


def _spoken(name: str) -> str:
    return name.replace("layers.", "layer ")


def _some(names: Sequence[str]) -> str:
    words = list(map(_spoken, names))
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def to_json(alpha: Alpha) -> dict[str, Any]:
    """`alpha`, and `alphas` beside it where there is more than one."""
    if not isinstance(alpha, Alphas):
        return {"alpha": alpha}
    return {"alpha": alpha.default, "alphas": dict(alpha.values)}


def from_json(document: Mapping[str, Any]) -> Alpha:
    """What `to_json` wrote. RecipeError for a weight outside 0..1, TypeError for no number."""
    values = document.get("alphas")
    return Alphas(document["alpha"], values) if values else check_alpha(document["alpha"])


def lines(alpha: Alphas) -> list[str]:
    """For people: what differs from the default, consecutive layers in one line."""
    out: list[str] = []
    spelled = [(*_layer(name), value) for name, value in alpha.values.items()]
    spelled.sort(key=lambda item: (item[1], item[0] is None, item[0] or 0))
    runs = groupby(enumerate(spelled), key=lambda item: (item[1][1:], (item[1][0] or 0) - item[0]))
    for ((rest, value), _), run in runs:
        layers = [layer for _, (layer, _, _) in run]
        if layers[0] is None:
            out.append(f"{rest}: {value:g}")
            continue
        out.append(f"{span(layers[0], layers[-1] or 0)}{rest and ' ' + rest}: {value:g}")
    return out if len(out) <= _SHOWN else [*out[:_SHOWN], f"and {len(out) - _SHOWN} more"]


def span(first: int, last: int) -> str:
    """`layer 3`, `layers 3-5`."""
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _layer(name: str) -> tuple[int | None, str]:
    """`layers.3.attn` as (3, "attn"), `embed` as (None, "embed")."""
    found = re.fullmatch(r"layers\.(\d+)(?:\.(.+))?", name)
    return (int(found[1]), found[2] or "") if found else (None, name)
