"""What rounding makes of alpha: how far a bf16 merge really goes towards the donor.

    python bench/rounding.py BASE DONOR

Of the first million elements of each blended tensor: how many steps of their dtype base and donor
lie apart, and the effective alpha, which is the part of the way from base to donor that the merged
weights have gone (the projection on donor - base), rounded to nearest and stochastically. Prints a
table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lowmem_adamms.kernels import reference

from lowmem_adamms import make_plan
from lowmem_adamms.checkpoints.arranged import view_side
from lowmem_adamms.checkpoints.mapped_files import MappedFiles
from lowmem_adamms.mapping.plan import Plan

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
SAMPLE = 1 << 20
STEPS = 4
"""Differences of so many steps or more are counted together."""


def main() -> None:
    """Measure one pair."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("base", type=Path)
    options.add_argument("donor", type=Path)
    given = options.parse_args()
    counts, squares = np.zeros(STEPS + 1), 0.0
    products = np.zeros((len(ALPHAS), 2))
    for base, donor, dtype in read_pairs(make_plan(given.base, given.donor)):
        # Weights of one sign lie as far apart as their bits
        apart = np.abs(base.astype(np.int64) - donor.astype(np.int64))
        counts += np.bincount(np.minimum(apart, STEPS), minlength=STEPS + 1)
        ours = reference.widen(base, dtype)
        difference = reference.widen(donor, dtype) - ours
        squares += float(difference @ difference)
        for i, alpha in enumerate(ALPHAS):
            for j, stochastic in enumerate((False, True)):
                out = reference.blend(base, donor, (dtype,) * 3, alpha, stochastic)
                products[i, j] += (reference.widen(out, dtype) - ours) @ difference
    shares, effective = counts / counts.sum(), products / squares
    apart_by = ", ".join(f"{share:.0%} {steps}" for steps, share in enumerate(shares))
    print(f"steps apart: {apart_by} or more")
    print("alpha  to nearest  stochastically")
    for alpha, (nearest, stochastic) in zip(ALPHAS, effective, strict=True):
        print(f"{alpha:5} {nearest:11.3f} {stochastic:15.3f}")
    rows = {str(alpha): row.tolist() for alpha, row in zip(ALPHAS, effective, strict=True)}
    print(json.dumps({"benchmark": "rounding", "steps": shares.tolist(), "effective": rows}))


def read_pairs(plan: Plan) -> Iterator[tuple[reference.Bits, reference.Bits, str]]:
    """The sampled bits of base and donor, where both have the dtype of the output."""
    with MappedFiles() as files:
        for step, part in plan.parts:
            if not part.donor or len({side.dtype for side in part.sides} | {step.dtype}) > 1:
                continue
            count, kind = min(SAMPLE, part.base.elements), reference.STORAGE[step.dtype.name]
            cut = (side.flat_slice(0, count) for side in (part.base, part.donor))
            base, donor = (view_side(side, files.view).view(kind) for side in cut)
            yield base, donor, step.dtype.name


if __name__ == "__main__":
    main()
