"""A plan: what the merge of two checkpoints does at any alpha, as pure data.

A plan has a step for each output tensor, a step has parts, a part has the base's bytes and the
donor's to blend in. No alpha, no tensor bytes. Leaves to others: making one (`join.py`), carrying
it out (`merge.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..architectures.layout import Arch, Layout
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.dtypes import DType
from ..checkpoints.span import Span

MANY_RUNS = 16
"""Above this many separate runs of rows `plan --json` says "tokens" and their count."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one output tensor: the base's bytes, and the donor's to blend in (None: copy)."""

    rows: tuple[int, int]
    role: str | None
    base: Span
    donor: Span | None = None
    donor_name: str | None = None
    donor_rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor: its parts in order. `kind` groups steps for people to read."""

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


@dataclass(frozen=True, slots=True)
class Plan:
    """What a merge of `base` and `donor` does at any alpha, in the order of the base's bytes."""

    base: Checkpoint
    donor: Checkpoint
    base_layout: Layout
    donor_layout: Layout
    steps: tuple[Step, ...]
    leftover: Mapping[str, str]
    notes: tuple[str, ...]
    options: Mapping[str, str | None]
    declared: tuple[Arch, ...] = ()

    @property
    def parts(self) -> Iterator[tuple[Step, Part]]:
        """Every part of every step."""
        return ((step, part) for step in self.steps for part in step.parts)

    @property
    def spans(self) -> Iterator[Span]:
        """All input bytes that a merge reads, in the order it reads them."""
        for _, part in self.parts:
            yield part.base
            if part.donor:
                yield part.donor

    @property
    def dtypes(self) -> set[tuple[str, str, str]]:
        """The triples of dtypes, of base, donor and output, that are blended."""
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

    def token_rows(self) -> dict[str, dict[str, int]]:
        """Of embedding and head, by name: rows shared with the donor, moved among these, kept."""
        ends = (step for step in self.steps if step.kind in ("embedding", "head"))
        return {step.name: count_rows(step.parts) for step in ends}

    def identity(self) -> list[Any]:
        """Plain data that tells this plan on these files, as they are now, from any other."""
        shards = [side.identity() for side in (self.base, self.donor)]
        declared = [arch.to_json() for arch in self.declared]
        rows = hashlib.sha256()  # the document of a step only counts the rows that are many
        for _, part in self.parts:
            donor = part.donor and (part.donor.start, part.donor.stop)
            rows.update(repr((part.base.start, part.base.stop, donor)).encode())
        return [shards, [_step_json(step) for step in self.steps], rows.hexdigest(), declared]

    def to_json(self) -> dict[str, Any]:
        """The document of `plan --json`."""
        actions = [step.action for step in self.steps]
        return {
            "base": self.base.ref if self.base.repo else str(self.base.path),
            "donor": self.donor.ref if self.donor.repo else str(self.donor.path),
            "base_arch": self.base_layout.arch,
            "donor_arch": self.donor_layout.arch,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "counts": {word: actions.count(word) for word in ("interpolate", "copy")},
            "tokens": self.token_rows(),
            "steps": [_step_json(step) for step in self.steps],
            "leftover": dict(self.leftover),
            "notes": list(self.notes),
        }


def count_rows(parts: Iterable[Part]) -> dict[str, int]:
    """How many rows of embedding or head take a row of the donor's, another's, or none."""
    count = {"shared": 0, "moved": 0, "kept": 0}
    for part in parts:
        rows = part.rows[1] - part.rows[0]
        count["shared" if part.donor else "kept"] += rows
        count["moved"] += rows if part.donor and part.rows != part.donor_rows else 0
    return count


def _step_json(step: Step) -> dict[str, Any]:
    blended = [part for part in step.parts if part.donor]
    parts: list[dict[str, Any]]
    if len(blended) > MANY_RUNS and step.kind in ("embedding", "head"):
        count = sum(part.rows[1] - part.rows[0] for part in blended)
        donor = {"name": blended[0].donor_name, "rows": "tokens"}
        parts = [{"rows": "tokens", "count": count, "role": blended[0].role, "donor": donor}]
    else:
        parts = [_part_json(part) for part in step.parts]
    return {
        "name": step.name,
        "dtype": step.dtype.name,
        "shape": list(step.shape),
        "action": step.action,
        "reason": step.reason,
        "parts": parts,
    }


def _part_json(part: Part) -> dict[str, Any]:
    donor = {"name": part.donor_name, "rows": list(part.donor_rows)} if part.donor_rows else None
    return {"rows": list(part.rows), "role": part.role, "donor": donor}
