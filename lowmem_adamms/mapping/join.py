"""AdaMMS's mapping step (arXiv 2503.23733, section 3.1): two checkpoints -> a plan, by headers.

A role of the base is blended with the same role of the donor, a duplicated role (`q@vision`) with
the weight it was duplicated from, rows of embedding and head with the row of the same token. What
has no counterpart stays the base's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..architectures.layout import BUFFER, Arch, Block
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.dtypes import DTYPES, DType
from ..errors import MappingError
from ..settings import Embeddings
from ..values import parse_dtype
from .config_differences import describe_differences
from .plan import Part, Plan, Step, count_rows
from .side import Piece, Side, read_side
from .tied_head import describe_ties
from .token_rows import TOKEN_ROLES, TokenRows, find_token_rows

if TYPE_CHECKING:
    import torch

SAME_ROLE = "same role"


@dataclass(frozen=True, slots=True)
class Match:
    """What the donor has for one role of the base, and the rule it was found by.

    pieces: where the role's rows are in the donor; none if it stays the base's. misfit: what does
    not fit, where that is why.
    """

    pieces: Sequence[Piece]
    reason: str
    misfit: str | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """Both sides, the match of each of the base's roles, and which rows hold the same tokens."""

    base: Side
    donor: Side
    matches: Mapping[str, Match]
    token_rows: TokenRows


def make_plan(
    base: str | Path | Checkpoint,
    donor: str | Path | Checkpoint,
    *,
    embeddings: Embeddings = "merge",
    dtype: str | DType | torch.dtype | None = None,
    declared: Sequence[Arch] = (),
    allow_misfits: bool = False,
) -> Plan:
    """Plan the merge of two checkpoints.

    Reads headers, configs and tokenizers: a second or less, whatever the size.

    Args:
        base: Checkpoint whose architecture, vision encoder and tokenizer the output keeps: a
            folder, a safetensors file, a Hub id `org/name[@revision]`, or one that is open.
        donor: Checkpoint whose language weights are blended in, given likewise.
        embeddings: "merge" joins the rows of embedding and head by token, "keep" leaves the
            base's.
        dtype: Of the output's floating-point tensors, such as "bf16", "fp16" or "fp32"; None
            keeps the dtype of each base tensor.
        declared: Declarations of families that are not built in; they go before those that are.
        allow_misfits: Leave tensors that do not fit as the base's, and list them in
            `plan.misfits`, where a merge must be refused. For comparing two checkpoints.

    Raises:
        FormatError: A checkpoint is damaged, incomplete or quantized.
        HubError: A repository cannot be read.
        MappingError: A checkpoint has no decoder that is known, or the two do not fit.
        RecipeError: `dtype` is none that can be written.

    Example:
        >>> from pathlib import Path
        >>> from lowmem_adamms import demo, make_plan
        >>> pair = demo.export(Path("demo"))
        >>> plan = make_plan(pair.base, pair.donor)
        >>> plan.counts
        {'interpolate': 75, 'copy': 22}
    """
    output_dtype = None if dtype is None else _find_dtype(dtype)
    base_opened, donor_opened = _open(base), _open(donor)
    base_side, donor_side = read_side(base_opened, declared), read_side(donor_opened, declared)
    matches = {
        role: _match_role(role, base_side, donor_side, embeddings)
        for role in base_side.pieces
        if not (role == "head" and base_side.tied)  # then it is the embedding
    }
    misfits = list(_find_misfits(base_side, donor_side, matches))
    if misfits and not allow_misfits:
        raise MappingError(misfits[0])
    by_token = any(matches[role].pieces for role in TOKEN_ROLES if role in matches)
    token_rows = find_token_rows(base_side, donor_side) if by_token else TokenRows()
    join = Join(base_side, donor_side, matches, token_rows)
    tied_heads = [name for name in base_side.tensors if _is_tied_head(base_side, name)]
    steps = tuple(
        _make_step(join, name, output_dtype) for name in base_side.tensors if name not in tied_heads
    )
    if not allow_misfits and all(step.action == "copy" for step in steps):
        raise MappingError(f"{base_side.path} and {donor_side.path} have no parameter in common")
    return Plan(
        base_opened,
        donor_opened,
        base_side.layout,
        donor_side.layout,
        steps,
        _find_leftover(join),
        tuple(_notes(join, tied_heads, declared)),
        {"embeddings": embeddings, "dtype": output_dtype.name if output_dtype else None},
        tuple(declared),
        tuple(misfits),
    )


def _open(checkpoint: str | Path | Checkpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)


def _find_dtype(dtype: str | DType | torch.dtype) -> DType:
    return DTYPES[parse_dtype(dtype.name if isinstance(dtype, DType) else dtype)]


# Roles


def _match_role(role: str, base: Side, donor: Side, embeddings: Embeddings) -> Match:
    """Look up what the donor has for one role of the base."""
    if role in TOKEN_ROLES and embeddings == "keep":
        return Match((), "--embeddings keep")
    found = [rule for rule in _candidates(role, donor) if rule[0] in donor.pieces]
    if not found:
        return Match((), "no counterpart in the donor")
    donor_role, reason = found[0]
    pieces = donor.pieces[donor_role]
    for name, _ in pieces:
        donor.require_blendable(name)
    base_shape, donor_shape = base.shape_of(role), donor.shape_of(donor_role)
    first_axis = 1 if role in TOKEN_ROLES else 0  # however many tokens each side has
    if base_shape[first_axis:] != donor_shape[first_axis:]:
        misfit = (
            f"shapes differ for {role}: {base.pieces[role][0][0]} in {base.path} is"
            f" {list(base_shape)}, {pieces[0][0]} in {donor.path} is {list(donor_shape)}"
        )
        return Match((), "another shape in the donor", misfit)
    return Match(pieces, reason)


def _candidates(role: str, donor: Side) -> list[tuple[str, str]]:
    """The donor's roles that may stand for a role, the best first, each with the rule for it."""
    if role == "head" and (donor.tied or (donor.tied is None and "head" not in donor.pieces)):
        return [("embed", "tied donor lends its embedding")]
    plain, _, stream = role.partition("@")
    if stream:
        return [(role, SAME_ROLE), (plain, f"{stream} copy takes the plain weight")]
    return [(role, SAME_ROLE), (f"{role}@text", "takes the donor's text copy")]


def _find_misfits(base: Side, donor: Side, matches: Mapping[str, Match]) -> Iterator[str]:
    """Why the two cannot be merged: depth or width of the decoder, then single roles."""
    if base.layout.layers != donor.layout.layers:
        yield (
            f"layer counts differ: {base.path} has {base.layout.layers} decoder layers,"
            f" {donor.path} has {donor.layout.layers}; they do not share an ancestor"
        )
    elif base.shape_of("embed")[1:] != donor.shape_of("embed")[1:]:
        base_name, donor_name = base.pieces["embed"][0][0], donor.pieces["embed"][0][0]
        yield (
            f"widths differ: {base_name} in {base.path} is {list(base.shape_of('embed'))},"
            f" {donor_name} in {donor.path} is {list(donor.shape_of('embed'))}"
        )
    yield from (match.misfit for match in matches.values() if match.misfit)


# Steps


def _is_tied_head(base: Side, name: str) -> bool:
    """Whether a tensor is the head of a tied base.

    The output does not have it: once it differs from the blended embedding, transformers refuses to
    tie the two.
    """
    return bool(base.tied) and any(block.role == "head" for block in base.blocks.get(name, ()))


def _make_step(join: Join, name: str, dtype: DType | None) -> Step:
    """Say what becomes of one tensor of the base."""
    if name not in join.base.blocks:
        return _copy_tensor(join.base, name, dtype)
    join.base.require_blendable(name)
    span, blocks = join.base.tensors[name], join.base.blocks[name]
    parts: list[Part] = []
    reasons: list[str] = []
    for block in blocks:
        block_parts, reason = _join_block(join, name, block)
        parts += block_parts
        reasons.append(reason)
    kind, reason = kind_of_role(blocks[0].role), "; ".join(dict.fromkeys(reasons))
    return Step(name, dtype or span.dtype, span.shape, kind, reason, tuple(parts))


def _copy_tensor(base: Side, name: str, dtype: DType | None) -> Step:
    """Copy a tensor outside the decoder; a rotary buffer keeps its dtype as well."""
    span, kind = base.tensors[name], base.layout.kinds[name]
    part = Part((0, span.shape[0] if span.shape else 1), None, span)
    if kind == BUFFER:
        return Step(name, span.dtype, span.shape, kind, "rotary buffer: never blended", (part,))
    output_dtype = dtype if dtype and span.dtype.blendable else span.dtype
    return Step(name, output_dtype, span.shape, kind, f"base's {kind}", (part,))


def _join_block(join: Join, name: str, block: Block) -> tuple[list[Part], str]:
    """The parts of one block of a base tensor, in the order of its rows, and the reason."""
    match = join.matches[block.role]
    if not match.pieces:
        return [_copy_rows(join, name, block.role, block.start, block.stop)], match.reason
    if block.role in TOKEN_ROLES:
        parts = list(_join_tokens(join, name, block, match.pieces[0]))
        count = count_rows(parts)
        reason = (
            f"rows by {join.token_rows.joined_by}: {count['shared']} shared,"
            f" {count['moved']} of them moved, {count['kept']} kept"
        )
        return parts, reason if match.reason == SAME_ROLE else f"{match.reason}; {reason}"
    return list(_join_pieces(join, name, block, match.pieces)), match.reason


def _join_pieces(join: Join, name: str, block: Block, pieces: Sequence[Piece]) -> Iterator[Part]:
    """One part for each piece of the donor's that holds rows of a base block's."""
    for donor_name, piece in pieces:
        first, last = max(block.first, piece.first), min(block.last, piece.last)
        if first < last:
            row, donor_row = block.start + first - block.first, piece.start + first - piece.first
            yield _blend_rows(join, name, block.role, row, donor_name, donor_row, last - first)


def _join_tokens(join: Join, name: str, block: Block, piece: Piece) -> Iterator[Part]:
    """The rows of embedding or head: runs that the donor has too, and the base's between them."""
    donor_name, donor_block = piece
    position = 0
    for run in join.token_rows.within(block.stop, donor_block.stop):
        if run.base > position:
            yield _copy_rows(join, name, block.role, position, run.base)
        yield _blend_rows(join, name, block.role, run.base, donor_name, run.donor, run.length)
        position = run.base + run.length
    if position < block.stop:
        yield _copy_rows(join, name, block.role, position, block.stop)


def _copy_rows(join: Join, name: str, role: str, start: int, stop: int) -> Part:
    return Part((start, stop), role, join.base.tensors[name].rows(start, stop))


def _blend_rows(
    join: Join, name: str, role: str, row: int, donor_name: str, donor_row: int, count: int
) -> Part:
    """Blend `count` rows of a donor tensor into as many of a base tensor."""
    rows, donor_rows = (row, row + count), (donor_row, donor_row + count)
    base = join.base.tensors[name].rows(*rows)
    donor = join.donor.tensors[donor_name].rows(*donor_rows)
    return Part(rows, role, base, donor, donor_name, donor_rows)


def kind_of_role(role: str) -> str:
    """The group a role is shown under: embedding, head, attention, MLP or norm."""
    plain = role.partition("@")[0]
    first = re.sub(r"^layers\.\d+\.", "", plain).split(".")[0]
    kinds = {"embed": "embedding", "head": "head", "attn": "attention", "mlp": "MLP"}
    return kinds.get(first, "norm")


# What the plan says


def _find_leftover(join: Join) -> dict[str, str]:
    """The donor's tensors that nothing takes, and what they are."""
    used = {name for match in join.matches.values() for name, _ in match.pieces}
    kinds = join.donor.layout.kinds
    return {
        name: kinds.get(name, "no counterpart in the base")
        for name in join.donor.tensors
        if name not in used
    }


def _notes(join: Join, tied_heads: Iterable[str], declared: Iterable[Arch]) -> Iterator[str]:
    """What a user should know of the two checkpoints before merging them."""
    base, donor = join.base, join.donor
    for label, side in (("base", base), ("donor", donor)):
        if side.layout.assumed:
            yield f"{label}: {side.layout.assumed}"
        elif side.layout.declared:
            yield f"{label}: {side.layout.arch}, as --arch declares it"
    for side in (base, donor):
        yield from describe_ties(side.checkpoint, side.layout, side.tied)
    if join.token_rows.assumption:
        yield join.token_rows.assumption
    for name in tied_heads:
        yield f"{name} is left out: the base ties its head to the embedding"
    yield from describe_differences(base.checkpoint, donor.checkpoint)
    used = {side.layout.arch for side in (base, donor) if side.layout.declared}
    for arch in declared:
        if arch.name not in used:
            yield (
                f"--arch {arch.name}: neither checkpoint is taken for it, by its classes"
                f" ({', '.join(arch.classes) or 'none'}) or by its tensor names"
            )
