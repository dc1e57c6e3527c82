"""Which rows of the donor's embedding and head belong to which rows of the base's.

Rows are joined by token where both sides have a tokenizer that can be read, else by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoints.vocabulary import FORMS, RowRun, join_rows, read_vocabulary
from .side import Side

_TOKEN_ROLES = ("embed", "head", "head.bias", "embed_tokens_per_layer.weight")


def has_token_rows(role: str) -> bool:
    """Whether a role has a row for each token."""
    return role in _TOKEN_ROLES


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Runs of base rows that belong to rows of the donor, ascending.

    assumption: what the user must know where they are joined by position, not by token.
    """

    runs: Sequence[RowRun]
    assumption: str | None = None


def find_token_rows(base: Side, donor: Side) -> TokenRows:
    """Join the rows by the tokenizers beside the two checkpoints, as far as there are any."""
    base_rows, donor_rows = (
        max(side.rows_of(role) for role in _TOKEN_ROLES if role in side.pieces)
        for side in (base, donor)
    )
    base_tokens, donor_tokens = (read_vocabulary(side.checkpoint.folder) for side in (base, donor))
    if base_tokens is not None and donor_tokens is not None:
        return TokenRows(join_rows(base_tokens, donor_tokens, base_rows, donor_rows))
    declared = [base.layout.shared_ids, donor.layout.shared_ids]
    shared = min([base_rows, donor_rows, *(ids for ids in declared if ids)])
    return TokenRows(
        [RowRun(0, 0, shared)],
        f"no tokenizer that can be read on both sides ({', '.join(FORMS)}): the first {shared} rows"
        f" of embedding and head are assumed to be the same tokens, {base_rows - shared} are kept",
    )
