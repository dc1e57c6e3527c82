"""Plans in short form, to be held against what is written by hand."""

from __future__ import annotations

from collections import Counter
from typing import TypeAlias

from lowmem_adamms.mapping.plan import Plan, Step

Rows: TypeAlias = "tuple[int, int]"
Described: TypeAlias = "tuple[Rows, str | None, str | None, Rows | None]"

NO_TAKER = "no counterpart in the base"


def step_of(plan: Plan, name: str) -> Step:
    (step,) = (step for step in plan.steps if step.name == name)
    return step


def described(plan: Plan, name: str) -> list[Described]:
    """Each part of a step: rows, role, donor tensor, donor rows."""
    parts = step_of(plan, name).parts
    return [(part.rows, part.role, part.donor_name, part.donor_rows) for part in parts]


def whole(role: str, rows: int, donor: str) -> list[Described]:
    """A tensor that is blended with all of another."""
    return [((0, rows), role, donor, (0, rows))]


def leftover(plan: Plan) -> dict[str, int]:
    """How many tensors of the donor are not used, by what they are."""
    return dict(Counter(plan.leftover.values()))
