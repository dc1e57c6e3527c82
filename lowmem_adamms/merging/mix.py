"""How a stretch of one output tensor is mixed: its inputs, and the numbers for the kernel."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..mapping.mixture import MixedPart, Mixture, Shares
from ..mapping.plan import Step
from .first_pass import Found, find
from .stretch import Stretch

if TYPE_CHECKING:
    from ..kernels.reference import Mixing, Term


@dataclass(frozen=True, slots=True)
class Mix(Stretch):
    """What is mixed of several models.

    sides: those of the models in `shares`, then the ancestor's if the method has one.
    """

    mixture: Mixture
    shares: Shares


def make_mix(mixture: Mixture, step: Step, offset: int, part: MixedPart, shares: Shares) -> Mix:
    """A whole part as what is to be mixed."""
    models = (part.base, *part.donors)
    used = [models[model] for model in shares.models]
    if mixture.method.relative:
        used.append(part.ancestor)
    sides = tuple(side for side in used if side)
    assert len(sides) == len(used)
    nbytes = step.dtype.nbytes(part.base.elements)
    return Mix(step, offset, nbytes, sides, mixture, shares)


def mix_pieces(pieces: Sequence[tuple[Mix, Sequence[Any]]]) -> None:
    """Mix stretches, each with the buffers of its sides and of the output."""
    from ..kernels.select import mix

    calls: dict[tuple[tuple[str, ...], Mixing], list[tuple[Mix, Sequence[Any]]]] = {}
    for piece, buffers in pieces:
        mixing = make_mixing(piece.mixture, piece.step, piece.shares)
        calls.setdefault((piece.dtypes, mixing), []).append((piece, buffers))
    for (dtypes, mixing), call in calls.items():
        firsts = [piece.first for piece, _ in call]
        mix([buffers for _, buffers in call], dtypes, mixing, firsts)


def make_mixing(mixture: Mixture, step: Step, shares: Shares) -> Mixing:
    """The numbers by which a tensor is mixed; makes the first pass over it if none was made."""
    from ..kernels.reference import Mixing

    method = mixture.method
    found = find(mixture, step)
    if method.measure == "products":
        return _make_slerp(mixture, shares, found)
    terms = tuple(
        _make_term(mixture, step, model, weight, found)
        for model, weight in zip(shares.models, shares.weights, strict=True)
    )
    total = math.fsum(term.factor for term in terms)
    return Mixing(
        terms,
        shares.scale,
        method.relative,
        method.elect,
        method.mean,
        keeps_equal=method.relative or abs(total - 1) < 1e-12,
        stochastic=mixture.rounds_stochastically,
    )


def _make_term(mixture: Mixture, step: Step, model: int, weight: float, found: Found) -> Term:
    from ..kernels.reference import ALL_KEPT, Term

    method = mixture.method
    low, high = found.bounds.get(model, (0.0, math.inf))
    if method.smallest >= 0:
        low = math.nextafter(method.smallest, math.inf)
    factor = weight * found.factors.get(model, 1.0)
    if not method.by_chance:
        return Term(factor, weight, low, high)
    density = mixture.densities[model]
    name = f"{mixture.mask_seed} {model} {step.name}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
    return Term(factor / density, weight, low, high, round(density * ALL_KEPT), key)


def _make_slerp(mixture: Mixture, shares: Shares, found: Found) -> Mixing:
    """Base and donor by the share of the angle between them; linear where they are collinear."""
    from ..kernels.reference import Mixing, Term

    weights = dict(zip(shares.models, shares.weights, strict=True))
    if found.angle is not None:
        sine = math.sin(found.angle)
        weights = {
            model: math.sin(weight * found.angle) / sine for model, weight in weights.items()
        }
    terms = tuple(Term(weight) for weight in weights.values())
    is_linear = found.angle is None
    return Mixing(terms, keeps_equal=is_linear, stochastic=mixture.rounds_stochastically)
