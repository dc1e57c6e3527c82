"""A plan: what the merge of two checkpoints does at any alpha, as pure data.

A plan has a step for each output tensor, a step has parts, and a part has a span of the base and
the span of the donor to blend into it. There is no alpha in it and no tensor data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..architectures.arch import Arch
from ..architectures.layout import Layout
from ..checkpoints.arranged import Arranged
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.dtypes import DType
from ..checkpoints.span import Span
from ..values import format_size

_EXPERT_NUMBER = re.compile(r"(\bexperts\.)\d+\b")
MAX_LISTED_PARTS = 16
"""An embedding or head with more blended parts is summed up in `plan --json`, not listed."""
SUMMARY_HEADINGS = ("base's", "tensors", "size", "action", "why")


KEPT = ": the base's are kept"
"""How the note ends on weights of the language model that only one of two checkpoints has."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one output tensor, all treated alike.

    rows: first row and the row behind the last, in the output (a scalar has one row; of stacked
    experts, the rows of each come after those of the one before).
    role: what the rows are to the decoder; None outside of it. Of a part that holds several, the
    leading parts that their names share, such as `layers.3.mlp.experts`.
    donor: what is blended in, as many elements as `base`; None copies the base. Then
    donor_name and donor_rows, which say where it is from, are None too.
    donor_rows: None also where the donor has these elements in another order.
    """

    rows: tuple[int, int]
    role: str | None
    base: Span
    donor: Span | Arranged | None = None
    donor_name: str | None = None
    donor_rows: tuple[int, int] | None = None

    @property
    def donor_names(self) -> tuple[str, ...]:
        """The donor's tensors that are blended in."""
        if isinstance(self.donor, Arranged):
            return self.donor.names
        return (self.donor_name,) if self.donor_name else ()

    @property
    def sides(self) -> tuple[Span | Arranged, ...]:
        """What it is made of: the base's span first."""
        return (self.base, self.donor) if self.donor else (self.base,)


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor, its parts in the order of its rows.

    kind: the group it is shown under, such as "attention". reason: why it is blended or copied.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    kind: str
    reason: str
    parts: tuple[Part, ...]

    @property
    def action(self) -> str:
        """`interpolate` if any part has a donor, else `copy`."""
        return "interpolate" if any(part.donor for part in self.parts) else "copy"

    @property
    def elements(self) -> int:
        """Number of elements of the output tensor."""
        return sum(part.base.elements for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensor."""
        return self.dtype.nbytes(self.elements)


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """What a merge of `base` and `donor` does at any alpha, from `make_plan`.

    steps: one for each output tensor, in the order of the base's bytes.
    leftover: the donor's tensors that are not used, and what they are.
    notes: what a user should know before merging.
    options: the arguments `embeddings`, `unmatched`, `rounding` and `dtype` (a name such as "BF16")
        it was made with.
    declared: the user's own declarations.
    misfits: why some tensors stay the base's that a merge would refuse; see `make_plan`.
    """

    base: Checkpoint
    donor: Checkpoint
    base_layout: Layout
    donor_layout: Layout
    steps: tuple[Step, ...]
    leftover: Mapping[str, str]
    notes: tuple[str, ...]
    options: Mapping[str, str | None]
    declared: tuple[Arch, ...] = ()
    misfits: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"<Plan: {self.donor.name} into {self.base.name},"
            f" {self.counts['interpolate']} tensors interpolated, {self.counts['copy']} copied,"
            f" {format_size(self.bytes_written)}>"
        )

    @property
    def summary(self) -> list[tuple[str, str, str, str, str]]:
        """Steps of one kind, action and reason together: kind, tensors, size, action, reason."""
        alike: dict[tuple[str, str, str], list[Step]] = {}
        for step in self.steps:
            alike.setdefault((step.kind, step.action, step.reason), []).append(step)
        return [
            (kind, str(len(steps)), format_size(sum(s.nbytes for s in steps)), action, reason)
            for (kind, action, reason), steps in alike.items()
        ]

    @property
    def counts(self) -> dict[str, int]:
        """How many output tensors are blended (`interpolate`) and how many are not (`copy`)."""
        actions = [step.action for step in self.steps]
        return {action: actions.count(action) for action in ("interpolate", "copy")}

    @property
    def parts(self) -> Iterator[tuple[Step, Part]]:
        """Every part of every step."""
        return ((step, part) for step in self.steps for part in step.parts)

    @property
    def spans(self) -> Iterator[Span]:
        """All input bytes that a merge reads, in the order it reads them."""
        for _, part in self.parts:
            yield from dict.fromkeys(span for side in part.sides for span in side.spans)

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """All inputs, by the name that adamms.json gives them."""
        return {"base": self.base, "donor": self.donor}

    @property
    def coefficients(self) -> int:
        """How many alphas it takes."""
        return 1

    @property
    def rounds_stochastically(self) -> bool:
        """How blended values are rounded; else to nearest."""
        return self.options["rounding"] == "stochastic"

    @property
    def starts_at_base(self) -> bool:
        """Whether alpha 0 is the base."""
        return True

    @property
    def donors(self) -> tuple[Checkpoint, ...]:
        """The models that are blended in."""
        return tuple(plan.donor for plan in self.donor_plans)

    @property
    def donor_plans(self) -> tuple[Plan, ...]:
        """The base with each donor."""
        return (self,)

    @property
    def pairs(self) -> tuple[Plan, ...]:
        """The base with each other model."""
        return (self,)

    def check_alphas(self, alphas: Sequence[Any]) -> None:
        """RecipeError where alphas do not go together; one always does."""

    @property
    def dtypes(self) -> set[tuple[str, str, str]]:
        """The dtypes that are blended, as triples of base, donor and output."""
        return {
            (part.base.dtype.name, part.donor.dtype.name, step.dtype.name)
            for step, part in self.parts
            if part.donor
        }

    @property
    def bytes_read(self) -> int:
        """Bytes of base and donor that a merge reads."""
        return sum(span.nbytes for span in self.spans)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensors that a merge writes."""
        return sum(step.nbytes for step in self.steps)

    def identity(self) -> list[Any]:
        """Plain data that differs between any two plans, or after either checkpoint changed."""
        steps = hashlib.sha256()  # of each by itself: their documents together take much memory
        for step in self.steps:
            steps.update(json.dumps(_step_to_json(step)).encode())
            for part in step.parts:  # which the document may sum up
                sides = [
                    (side.start, side.stop) if type(side) is Span else side for side in part.sides
                ]
                steps.update(repr(sides).encode())
        return [
            [checkpoint.identity() for checkpoint in self.checkpoints.values()],
            steps.hexdigest(),
            [arch.to_json() for arch in self.declared],
            self.options["rounding"],
        ]

    def to_json(self) -> dict[str, Any]:
        """The document of `plan --json`."""
        return {
            "base": self.base.ref if self.base.repo else str(self.base.path),
            "donor": self.donor.ref if self.donor.repo else str(self.donor.path),
            "base_arch": self.base_layout.arch,
            "donor_arch": self.donor_layout.arch,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "counts": self.counts,
            "tokens": {
                step.name: _count_rows(step.parts) for step in self.steps if _has_token_rows(step)
            },
            "steps": _steps_to_json(self.steps),
            "leftover": _leftover_to_json(self.leftover),
            "notes": list(self.notes),
        }


def _count_rows(parts: Iterable[Part]) -> dict[str, int]:
    """Count rows of an embedding or head.

    `shared`: blended with a row of the donor; `moved`: those of them that the donor has at another
    id; `kept`: the base's own.
    """
    count = {"shared": 0, "moved": 0, "kept": 0}
    for part in parts:
        rows = part.rows[1] - part.rows[0]
        count["shared" if part.donor else "kept"] += rows
        if part.donor and part.rows != part.donor_rows:
            count["moved"] += rows
    return count


def _has_token_rows(step: Step) -> bool:
    return step.kind in ("embedding", "head")


def _step_to_json(step: Step) -> dict[str, Any]:
    parts = [_part_to_json(part) for part in step.parts]
    blended = [part for part in step.parts if part.donor]
    if _has_token_rows(step) and len(blended) > MAX_LISTED_PARTS:
        donor = {"name": blended[0].donor_name, "rows": "tokens"}
        shared = _count_rows(step.parts)["shared"]
        parts = [{"rows": "tokens", "count": shared, "role": blended[0].role, "donor": donor}]
    elif len(parts) > MAX_LISTED_PARTS and _any_expert(parts[0]["role"] or "") != parts[0]["role"]:
        parts = _sum_up_experts(parts)
    return {
        "name": step.name,
        "dtype": step.dtype.name,
        "shape": list(step.shape),
        "action": step.action,
        "reason": step.reason,
        "parts": parts,
    }


def _part_to_json(part: Part) -> dict[str, Any]:
    donor: dict[str, Any] | None = None
    if part.donor:
        donor = {"name": part.donor_name, "rows": part.donor_rows and list(part.donor_rows)}
        if isinstance(part.donor, Arranged):
            donor["names"] = list(part.donor_names)
    return {"rows": list(part.rows), "role": part.role, "donor": donor}


# Experts, which may be tens of thousands


def _any_expert(name: str) -> str:
    """A tensor's name or a role with `*` for the number of its expert."""
    return _EXPERT_NUMBER.sub(r"\1*", name)


def _sum_up_experts(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One part for all that differ in nothing but expert and rows."""
    counts: dict[str, dict[str, Any]] = {}
    for part in parts:
        alike = json.loads(_any_expert(json.dumps(part | {"rows": "experts"})))
        if alike["donor"]:
            alike["donor"]["rows"] = "experts"
        counts.setdefault(json.dumps(alike), {**alike, "count": 0})["count"] += 1
    return list(counts.values())


def _steps_to_json(steps: Iterable[Step]) -> list[dict[str, Any]]:
    """Each step; of more than MAX_LISTED_PARTS that differ in nothing but the expert, one for all.

    Such a step has `*` for the expert in its names, and `tensors` says for how many it stands.
    """
    alike: dict[tuple[Any, ...], list[Step]] = {}
    for step in steps:
        key = _any_expert(step.name), step.action, step.reason, step.dtype, step.shape
        alike.setdefault(key, []).append(step)
    documents: list[dict[str, Any]] = []
    for (pattern, *_), group in alike.items():
        if pattern == group[0].name or len(group) <= MAX_LISTED_PARTS:
            documents += map(_step_to_json, group)
            continue
        parts = [
            {**part, "rows": "experts"} for step in group for part in _step_to_json(step)["parts"]
        ]
        documents.append(
            _step_to_json(group[0])
            | {"name": pattern, "tensors": len(group), "parts": _sum_up_experts(parts)}
        )
    return documents


def _leftover_to_json(leftover: Mapping[str, str]) -> dict[str, str]:
    """What the donor's tensors are that are not used; many experts under one name."""
    patterns = Counter(map(_any_expert, leftover))
    return {
        name if patterns[pattern := _any_expert(name)] <= MAX_LISTED_PARTS else pattern: kind
        for name, kind in leftover.items()
    }
