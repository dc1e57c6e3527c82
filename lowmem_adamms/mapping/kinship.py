"""Whether two language models descend from one: cosine similarity of sampled weights, by layer.

Names and shapes cannot tell (Qwen2-7B and Qwen2.5-7B look alike). Descendants of one model lie near
cosine 1, strangers near 0. Only matrices count: norm weights are all near one in any model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..architectures.experts import is_expert
from ..checkpoints.arranged import take_alike
from ..checkpoints.sampled_reads import SampledReader, evenly_spread
from ..errors import MappingError
from .plan import Part, Plan

THRESHOLD = 0.5
"""Two models with a layer below this cosine are taken for unrelated."""
RUN_ELEMENTS = 512
"""Elements sampled from the middle of each matrix: some 3600 a layer."""
EXPERT_PARTS = 6
"""Of a layer's experts, which may be hundreds, so many matrices or stacks are sampled."""


@dataclass(frozen=True, slots=True)
class Kinship:
    """How alike base and mapped donor are: cosines by layer (`layers.3`), `embed` and `head`."""

    cosines: dict[str, float]

    @property
    def lowest(self) -> tuple[str, float]:
        """The least similar group and its cosine."""
        return min(self.cosines.items(), key=lambda item: item[1])


def measure(plan: Plan) -> Kinship:
    """Sample every interpolated matrix of a plan; a second or less on cold 7B checkpoints."""
    sums: dict[str, Any] = {}
    parts = list(_choose_parts(plan))
    with SampledReader(plan.base.remote_files() | plan.donor.remote_files()) as reader:
        samples = reader.map(lambda part: _sample(part, reader), parts)
        for part, products in zip(parts, samples, strict=True):
            group = group_of(part.role or "")
            sums[group] = sums.get(group, 0) + products
    return Kinship({group: cosine_of(*total) for group, total in sums.items()})


def _choose_parts(plan: Plan) -> Iterator[Part]:
    """Every interpolated matrix, but of a layer's experts no more than EXPERT_PARTS parts."""
    experts: dict[str, list[Part]] = {}
    for _, part in plan.parts:
        if part.donor and len(part.base.shape) > 1:
            if is_expert(part.role or ""):
                experts.setdefault(group_of(part.role or ""), []).append(part)
            else:
                yield part
    for parts in experts.values():
        yield from (parts[i] for i in evenly_spread(len(parts), 1, EXPERT_PARTS))


def check(plan: Plan) -> Kinship:
    """Measure the kinship; MappingError where some layer lies below THRESHOLD."""
    kinship = measure(plan)
    if not kinship.cosines:
        return kinship
    group, cosine = kinship.lowest
    if cosine < THRESHOLD:
        raise MappingError(
            f"{plan.base.path} and {plan.donor.path} look unrelated: cosine similarity of {group}"
            f" is {cosine:.3f}, expected {THRESHOLD} or more for descendants of one language model."
            " Merge models of one ancestor, or set `force=True`"
        )
    return kinship


def group_of(role: str) -> str:
    """What a role is judged with: its layer (`layers.3`), else itself."""
    layer = re.match(r"layers\.\d+", role)
    return layer[0] if layer else role


def cosine_of(dot: float, base_square: float, donor_square: float) -> float:
    """The cosine from a . b, a . a and b . b; two all-zero samples are alike, one alone is not."""
    if base_square == 0 or donor_square == 0:
        return 1.0 if base_square == donor_square else 0.0
    return float(dot / (base_square * donor_square) ** 0.5)


def _sample(part: Part, reader: SampledReader) -> Any:
    """Read the middle of a part on both sides.

    Gives base . donor, base . base and donor . donor over what is finite on both sides.
    """
    import numpy as np

    assert part.donor is not None
    count = min(part.base.elements, RUN_ELEMENTS)
    first = (part.base.elements - count) // 2
    spans = take_alike((part.base, part.donor), first, count)
    values = [reader.read_floats(span) for span in spans]
    finite = np.isfinite(values[0]) & np.isfinite(values[1])
    base, donor = (side[finite] for side in values)
    return np.array([base @ donor, base @ base, donor @ donor])
