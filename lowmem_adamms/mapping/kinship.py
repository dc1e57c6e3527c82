"""Whether two language models descend from one: cosine similarity of sampled weights, by layer.

Names and shapes cannot tell (Qwen2-7B and Qwen2.5-7B look alike). Descendants of one model lie near
cosine 1, strangers near 0. Only matrices count: norm weights are all near one in any model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.sampled_reads import SampledReader
from ..errors import MappingError
from .plan import Part, Plan

THRESHOLD = 0.5
"""Below this in any layer the two are taken for strangers."""
RUN_ELEMENTS = 512
"""Each mapped matrix is sampled in its middle: some 3600 elements a layer."""


@dataclass(frozen=True, slots=True)
class Kinship:
    """Cosine similarity of base and mapped donor for each layer (`layers.3`, `embed`, `head`).

    blank: matrices, as file and role, that hold no finite number where they were sampled.
    """

    cosines: dict[str, float]
    blank: tuple[tuple[Path, str], ...] = ()

    @property
    def lowest(self) -> tuple[str, float]:
        """The least similar group and its cosine."""
        return min(self.cosines.items(), key=lambda item: item[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know that is no reason to refuse the pair."""
        if not self.blank:
            return ()
        (path, role), *others = self.blank
        more = f", and so are {len(others)} more" if others else ""
        return (
            f"{path}: {role} is NaN or infinite wherever it was sampled{more}: a damaged file?",
        )


def measure(plan: Plan) -> Kinship:
    """Sample every interpolated matrix of a plan; a second or less on cold 7B checkpoints."""
    sums: dict[str, list[float]] = {}
    blank: list[tuple[Path, str]] = []
    parts = [
        part for _, part in plan.parts if part.donor and part.role and len(part.base.shape) > 1
    ]
    with SampledReader(plan.base.remote_files() | plan.donor.remote_files()) as reads:
        products = reads.map(lambda part: _products(part, reads), parts)
        for part, (found, lost) in zip(parts, products, strict=True):
            total = sums.setdefault(group_of(part.role or ""), [0.0, 0.0, 0.0])
            for i, value in enumerate(found):
                total[i] += value
            blank += [(path, part.role or "") for path in lost]
    cosines = {group: cosine_of(*total) for group, total in sums.items()}
    return Kinship(cosines, tuple(blank))


def check(plan: Plan) -> Kinship:
    """The measured kinship; MappingError where some layer lies below THRESHOLD."""
    kinship = measure(plan)
    if not kinship.cosines:
        return kinship
    group, cosine = kinship.lowest
    if cosine < THRESHOLD:
        raise MappingError(
            f"{plan.base.path} and {plan.donor.path} look unrelated: cosine similarity of {group}"
            f" is {cosine:.3f}, expected {THRESHOLD} or more for descendants of one language model."
            " Merge models of one ancestor, or --force"
        )
    return kinship


def group_of(role: str) -> str:
    """What a role is judged with: its layer (`layers.3`), else itself."""
    layer = re.match(r"layers\.\d+", role)
    return layer[0] if layer else role


def cosine_of(dot: float, base_square: float, donor_square: float) -> float:
    """Of a . b, a . a and b . b: two all-zero samples count as alike, one alone as unlike."""
    if base_square == 0 or donor_square == 0:
        return 1.0 if base_square == donor_square else 0.0
    return float(dot / (base_square * donor_square) ** 0.5)


def _products(part: Part, reads: SampledReader) -> tuple[tuple[float, float, float], list[Path]]:
    """Base . donor, base . base and donor . donor over the sampled elements that are finite.

    With it the files, of the two, whose sample has none.
    """
    import numpy as np

    assert part.donor is not None
    count = part.base.elements
    take = min(count, RUN_ELEMENTS)
    middles = (span.flat_slice((count - take) // 2, take) for span in (part.base, part.donor))
    base, donor = map(reads.read_floats, middles)
    samples = ((part.base.path, np.isfinite(base)), (part.donor.path, np.isfinite(donor)))
    lost = [path for path, finite in samples if take and not finite.any()]
    both = samples[0][1] & samples[1][1]
    base, donor = base[both], donor[both]
    return (float(base @ donor), float(base @ base), float(donor @ donor)), lost
