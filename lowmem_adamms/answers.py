"""One answer of a model: its text, its tokens, and how sure the model was of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to one prompt.

    tokens: the end token included. log_probability: mean over the tokens of the natural logarithm
    of each one's probability. entropy: mean over the tokens of the entropy of the distribution that
    each was chosen from, in nats. Both to 6 decimals; None where they are not known.
    """

    text: str
    tokens: tuple[int, ...] = ()
    log_probability: float | None = None
    entropy: float | None = None


def round_confidence(mean: float) -> float | None:
    """As an `Answer` has it; None of a model whose logits are NaN or infinite."""
    return round(mean, 6) + 0.0 if isfinite(mean) else None  # + 0.0 turns -0.0 into 0.0
