"""The join: base x donor -> Plan, from headers alone.

Roles are joined by AdaMMS's mapping step (arXiv 2503.23733, section 3.1): a role takes its like, a
duplicated role (`q@vision`) the weight it was duplicated from, and what has no counterpart stays
the base's. Embedding and head rows are joined by token. Leaves to others: which roles a tensor
holds (`recognise.py`), vocabularies (`tokens.py`), the arithmetic (`merge.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from ..architectures import families as archs
from ..architectures.layout import BUFFER, Arch, Block, Layout, block_span
from ..architectures.recognise import recognise
from ..checkpoints import vocabulary
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.dtypes import DType
from ..checkpoints.span import Span
from ..errors import FormatError, MappingError
from . import config_differences as settings
from .plan import Part, Plan, Step, count_rows
from .tied_head import is_tied

_T = TypeVar("_T")
Embeddings = Literal["merge", "keep"]
_Pieces = list[tuple[str, Block]]
_Rows = tuple[int, int]


def make_plan(
    base: str | Path | Checkpoint,
    donor: str | Path | Checkpoint,
    *,
    embeddings: Embeddings = "merge",
    dtype: DType | None = None,
    declared: Sequence[Arch] = (),
    misfits: list[str] | None = None,
) -> Plan:
    """Plan the merge of two checkpoints from their headers.

    embeddings: "merge" joins the rows of embed and head by token, "keep" leaves the base's.
    dtype: of the output's floating tensors; None keeps each base tensor's own.
    declared: the user's own declarations (`declare.read`), which go before the known ones.
    misfits: takes what would be a MappingError for the two; such tensors then stay the base's.
    Raises FormatError for a broken or quantized input, MappingError where the two do not fit.
    """
    base, donor = _opened(base), _opened(donor)
    base_layout, donor_layout = (
        recognise(checkpoint, archs.ARCHS, declared) for checkpoint in (base, donor)
    )
    join = _Join(base, donor, base_layout, donor_layout, embeddings)
    join.misfits = misfits
    join.fitting(join.check_sizes, None)
    steps = tuple(step for name in base.tensors if (step := join.step(name, dtype)) is not None)
    if misfits is None and not any(step.action == "interpolate" for step in steps):
        raise MappingError(f"{base.path} and {donor.path} have no parameter in common")
    return Plan(
        base,
        donor,
        base_layout,
        donor_layout,
        steps,
        join.leftover(),
        (
            *join.notes,
            *settings.differences(base, donor),
            *_unused(declared, base_layout, donor_layout),
        ),
        {"embeddings": embeddings, "dtype": dtype.name if dtype else None},
        tuple(declared),
    )


def _unused(declared: Sequence[Arch], *layouts: Layout) -> list[str]:
    """A note for each of the user's declarations that neither checkpoint is of."""
    taken = {layout.arch for layout in layouts if layout.declared}
    return [
        f"--arch {arch.name}: neither checkpoint is taken for it, by its classes"
        f" ({', '.join(arch.classes) or 'none'}) or by its tensor names"
        for arch in declared
        if arch.name not in taken
    ]


def _opened(ref: str | Path | Checkpoint) -> Checkpoint:
    return ref if isinstance(ref, Checkpoint) else open_checkpoint(ref)


class _Join:
    """The join under way: looks up counterparts and remembers which donor tensors were used."""

    def __init__(
        self,
        base: Checkpoint,
        donor: Checkpoint,
        base_layout: Layout,
        donor_layout: Layout,
        embeddings: Embeddings,
    ) -> None:
        self.base, self.donor = base, donor
        self.base_layout, self.donor_layout = base_layout, donor_layout
        self.embeddings = embeddings
        self.base_roles, self.donor_roles = base_layout.pieces(), donor_layout.pieces()
        self.used: set[str] = set()
        self.misfits: list[str] | None = None
        self.notes = [
            f"{side}: {layout.assumed or f'{layout.arch}, as --arch declares it'}"
            for side, layout in (("base", base_layout), ("donor", donor_layout))
            if layout.assumed or layout.declared
        ]
        # In a .bin two names may share bytes, as Phi-3-vision's second name of its embedding does
        self._same_bytes = {
            _place(base.tensors[name]): blocks for name, blocks in base_layout.blocks.items()
        }
        self.base_tied, self.donor_tied = (
            self._tied(*side) for side in ((base, base_layout), (donor, donor_layout))
        )
        self._runs: tuple[list[vocabulary.RowRun], str] | None = None

    def _tied(self, checkpoint: Checkpoint, layout: Layout) -> bool | None:
        tied = is_tied(checkpoint, layout)
        if checkpoint.tied_flags[:1] == [True] and not tied:
            self.notes.append(
                f"{checkpoint.path}: config.json ties the head to the embedding, but the two differ"
                " on disk: taken for two, as transformers does"
            )
        if tied is False and "head" not in layout.roles():
            self.notes.append(
                f"{checkpoint.path}: holds no head; if its embedding is one, say"
                " tie_word_embeddings: true in its config.json"
            )
        return tied

    def fitting(self, try_this: Callable[[], _T], instead: _T) -> _T:
        """A result; where the two do not fit, `instead`, if misfits are noted and not raised."""
        try:
            return try_this()
        except MappingError as error:
            if self.misfits is None:
                raise
            self.misfits.append(str(error))
            return instead

    def check_sizes(self) -> None:
        """Depth and width must agree before anything is joined; MappingError names the tensors."""
        sides = ((self.base, self.base_layout), (self.donor, self.donor_layout))
        (base_depth, donor_depth) = (layout.layers for _, layout in sides)
        if base_depth != donor_depth:
            raise MappingError(
                f"layer counts differ: {self.base.path} has {base_depth} decoder layers,"
                f" {self.donor.path} has {donor_depth}; they do not share an ancestor"
            )
        (base_name, base_span), (donor_name, donor_span) = (
            (name, block_span(checkpoint, name, block))
            for checkpoint, layout in sides
            for name, block in (layout.roles()["embed"],)
        )
        if base_span.shape[1:] != donor_span.shape[1:]:
            raise MappingError(
                f"widths differ: {base_name} in {self.base.path} is {list(base_span.shape)},"
                f" {donor_name} in {self.donor.path} is {list(donor_span.shape)}"
            )

    def step(self, name: str, dtype: DType | None) -> Step | None:
        """The step of one base tensor; None for the head of a tied base, which must not be written.

        transformers refuses to tie a head that is on disk and differs from the embedding.
        """
        span = self.base.tensors[name]
        blocks = self.base_layout.blocks.get(name, self._same_bytes.get(_place(span)))
        if blocks is None:
            kind = self.base_layout.kinds[name]
            out = dtype if dtype and span.dtype.blendable and kind != BUFFER else span.dtype
            reason = "rotary buffer: never blended" if kind == BUFFER else f"base's {kind}"
            return Step(name, out, span.shape, kind, reason, (Part(_rows(span), None, span),))
        if blocks[0].role == "head" and self.base_tied:
            self.notes.append(f"{name} is left out: the base ties its head to the embedding")
            return None
        if not span.dtype.blendable:
            raise FormatError(
                f"{self.base.path}: {name} is {span.dtype.name}; expected BF16, F16 or F32"
            )
        parts: list[Part] = []
        reasons: list[str] = []
        for block in blocks:
            alone = [self._part(name, block.role, (block.start, block.stop))]
            found, reason = self.fitting(
                partial(self._parts, name, block, alone), (alone, "another shape in the donor")
            )
            parts += found
            if reason not in reasons:
                reasons.append(reason)
        kind = kind_of(blocks[0].role)
        return Step(name, dtype or span.dtype, span.shape, kind, "; ".join(reasons), tuple(parts))

    def leftover(self) -> dict[str, str]:
        """The donor's tensors that nothing takes, and what they are."""
        kinds = self.donor_layout.kinds
        return {
            name: kinds.get(name, "no counterpart in the base")
            for name in self.donor.tensors
            if name not in self.used
        }

    def _part(
        self,
        name: str,
        role: str,
        rows: _Rows,
        donor: str | None = None,
        theirs: _Rows | None = None,
    ) -> Part:
        """Rows of a base tensor, and those of the donor's to blend into them, if any."""
        base = self.base.tensors[name].rows(*rows)
        lent = self.donor.tensors[donor].rows(*theirs) if donor and theirs else None
        return Part(rows, role, base, lent, donor, theirs)

    def _parts(self, name: str, block: Block, alone: list[Part]) -> tuple[list[Part], str]:
        """The parts of one block of a base tensor, and why they are what they are.

        alone: what they are if nothing is blended in.
        """
        if block.role in ("embed", "head") and self.embeddings == "keep":
            return alone, "--embeddings keep"
        found = self._counterpart(block.role)
        if found is None:
            return alone, "no counterpart in the donor"
        pieces, reason = found
        for donor_name, _ in pieces:
            donor_span = self.donor.tensors[donor_name]
            if not donor_span.dtype.blendable:
                raise FormatError(
                    f"{self.donor.path}: {donor_name} is {donor_span.dtype.name};"
                    " expected BF16, F16 or F32"
                )
            self.used.add(donor_name)
        if block.role in ("embed", "head"):
            return self._token_parts(name, block, *pieces[0], reason)
        self._check_shapes(block.role, pieces)
        return list(self._overlaps(name, block, pieces)), reason

    def _check_shapes(self, role: str, pieces: _Pieces) -> None:
        """MappingError unless a role has the same shape on both sides, in however many pieces."""
        ours, theirs = self.base_roles[role], pieces
        base_shape, donor_shape = _shape(self.base, ours), _shape(self.donor, theirs)
        if base_shape != donor_shape:
            raise MappingError(
                f"shapes differ for {role}: {ours[0][0]} in {self.base.path} is"
                f" {list(base_shape)}, {theirs[0][0]} in {self.donor.path} is {list(donor_shape)}"
            )

    def _overlaps(self, name: str, block: Block, pieces: _Pieces) -> Iterator[Part]:
        """One part for each piece of the donor's that holds rows of a base block's."""
        for donor_name, theirs in pieces:
            first, last = max(block.first, theirs.first), min(block.last, theirs.last)
            if first < last:
                shift, donor_shift = block.start - block.first, theirs.start - theirs.first
                rows = (first + shift, last + shift)
                donor_rows = (first + donor_shift, last + donor_shift)
                yield self._part(name, block.role, rows, donor_name, donor_rows)

    def _counterpart(self, role: str) -> tuple[_Pieces, str] | None:
        """The donor's tensors and blocks for a base role, by the design's joining rules."""
        plain, _, stream = role.partition("@")
        candidates = [(role, "same role")]
        if stream:
            candidates.append((plain, f"{stream} copy takes the plain weight"))
        else:
            candidates.append((f"{plain}@text", "takes the donor's text copy"))
        tied = self.donor_tied
        if role == "head" and (tied or (tied is None and "head" not in self.donor_roles)):
            candidates = [("embed", "tied donor lends its embedding")]
        for candidate, reason in candidates:
            if candidate in self.donor_roles:
                return self.donor_roles[candidate], reason
        return None

    def _token_parts(
        self, name: str, block: Block, donor_name: str, donor_block: Block, reason: str
    ) -> tuple[list[Part], str]:
        """Rows of embed or head, joined by token; rows between the runs stay the base's."""
        base_span, donor_span = self.base.tensors[name], self.donor.tensors[donor_name]
        if base_span.shape[1:] != donor_span.shape[1:]:
            raise MappingError(
                f"shapes differ for {block.role}: {name} in {self.base.path} is"
                f" {list(base_span.shape)}, {donor_name} is {list(donor_span.shape)}"
            )
        runs, by = self._token_runs(block.stop, donor_block.stop)
        parts: list[Part] = []
        position = 0
        for run in runs:
            if run.base > position:
                parts.append(self._part(name, block.role, (position, run.base)))
            position = run.base + run.length
            rows, partner = (run.base, position), (run.donor, run.donor + run.length)
            parts.append(self._part(name, block.role, rows, donor_name, partner))
        if position < block.stop:
            parts.append(self._part(name, block.role, (position, block.stop)))
        count = count_rows(parts)
        how = (
            f"rows by {by}: {count['shared']} shared, {count['moved']} of them moved,"
            f" {count['kept']} kept"
        )
        return parts, how if reason == "same role" else f"{reason}; {how}"

    def _token_runs(self, base_rows: int, donor_rows: int) -> tuple[list[vocabulary.RowRun], str]:
        """Runs of shared rows and by what they were found; worked out once for embed and head."""
        if self._runs is None:
            self._runs = self._find_runs(*map(_most_rows, (self.base_layout, self.donor_layout)))
        runs, by = self._runs
        return [
            vocabulary.RowRun(run.base, run.donor, length)
            for run in runs
            if (length := min(run.length, base_rows - run.base, donor_rows - run.donor)) > 0
        ], by

    def _find_runs(self, base_rows: int, donor_rows: int) -> tuple[list[vocabulary.RowRun], str]:
        known: vocabulary.KnownVocabularies = {}
        base_ids = vocabulary.read_vocabulary(self.base.folder, known)
        donor_ids = (
            None if base_ids is None else vocabulary.read_vocabulary(self.donor.folder, known)
        )
        if base_ids is not None and donor_ids is not None:
            return vocabulary.join_rows(base_ids, donor_ids, base_rows, donor_rows), "token"
        declared = [self.base_layout.shared_ids, self.donor_layout.shared_ids]
        shared = min([base_rows, donor_rows, *(ids for ids in declared if ids)])
        self.notes.append(
            f"no tokenizer that can be read on both sides ({', '.join(vocabulary.FORMS)}): the"
            f" first {shared} rows of embedding and head are assumed to be the same tokens,"
            f" {base_rows - shared} are kept"
        )
        return [vocabulary.RowRun(0, 0, shared)], "position"


def _shape(checkpoint: Checkpoint, pieces: _Pieces) -> tuple[int, ...]:
    """The shape of a role: of its pieces one behind the other."""
    name, block = pieces[0]
    whole = block_span(checkpoint, name, block).shape
    return (sum(block.stop - block.start for _, block in pieces), *whole[1:]) if whole else ()


def kind_of(role: str) -> str:
    """The group a role is shown under: embedding, head, attention, MLP or norm."""
    rest = re.sub(r"^layers\.\d+\.", "", role.partition("@")[0])
    kinds = {"embed": "embedding", "head": "head", "attn": "attention", "mlp": "MLP"}
    return kinds.get(rest.split(".")[0], "norm")


def _most_rows(layout: Layout) -> int:
    """Rows of the larger of embedding and head."""
    blocks = (blocks[0] for blocks in layout.blocks.values())
    return max(block.stop for block in blocks if block.role in ("embed", "head"))


def _place(span: Span) -> tuple[object, ...]:
    """Where a span's bytes lie and as what; of one without bytes it tells nothing."""
    return (span.path, span.start, span.stop, span.shape, span.dtype.name)


def _rows(span: Span) -> tuple[int, int]:
    return (0, span.shape[0] if span.shape else 1)
