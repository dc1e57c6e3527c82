"""Which rows of the donor's embedding and head belong to which rows of the base's.

Rows are joined by token where both sides have a tokenizer that can be read, else by position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..checkpoints import vocabulary
from ..checkpoints.vocabulary import RowRun
from .side import Side

TOKEN_ROLES = ("embed", "head")
"""The roles that have a row for each token."""


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Runs of base rows that have a counterpart, ascending, each with the donor's rows.

    joined_by: "token" or "position". assumption: what the user must know about the latter.
    """

    runs: Sequence[RowRun] = ()
    joined_by: str = "token"
    assumption: str | None = None

    def within(self, base_rows: int, donor_rows: int) -> Iterator[RowRun]:
        """The runs of two tensors with so many rows: a head may have fewer than its embedding."""
        for run in self.runs:
            length = min(run.length, base_rows - run.base, donor_rows - run.donor)
            if length > 0:
                yield RowRun(run.base, run.donor, length)


def find_token_rows(base: Side, donor: Side) -> TokenRows:
    """Join the rows of embedding and head, from the tokenizers beside the two checkpoints."""
    base_rows, donor_rows = _count_rows(base), _count_rows(donor)
    known: vocabulary.KnownVocabularies = {}  # a vocabulary that both have is read once
    base_tokens = vocabulary.read_vocabulary(base.checkpoint.folder, known)
    if base_tokens is not None:
        donor_tokens = vocabulary.read_vocabulary(donor.checkpoint.folder, known)
        if donor_tokens is not None:
            runs = vocabulary.join_rows(base_tokens, donor_tokens, base_rows, donor_rows)
            return TokenRows(runs, "token")
    declared = [base.layout.shared_ids, donor.layout.shared_ids]
    shared = min([base_rows, donor_rows, *(ids for ids in declared if ids)])
    return TokenRows(
        [RowRun(0, 0, shared)],
        "position",
        f"no tokenizer that can be read on both sides ({', '.join(vocabulary.FORMS)}): the first"
        f" {shared} rows of embedding and head are assumed to be the same tokens,"
        f" {base_rows - shared} are kept",
    )


def _count_rows(side: Side) -> int:
    """Rows of embedding or head, whichever has more."""
    return max(side.shape_of(role)[0] for role in TOKEN_ROLES if role in side.pieces)
