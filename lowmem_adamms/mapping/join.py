"""AdaMMS's mapping step (arXiv 2503.23733, section 3.1): two checkpoints -> a plan, by headers.

A role of the base is blended with the same role of the donor, a duplicated role (`q@vision`) with
the weight it was duplicated from, rows of embedding and head with the row of the same token. A role
that only one side has stops the plan, unless the user says that the base's is to be kept.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..architectures.arch import BUFFER, Arch
from ..architectures.block import Block
from ..architectures.experts import is_expert
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.dtypes import DTYPES, DType
from ..checkpoints.span import Span
from ..checkpoints.vocabulary import RowRun
from ..errors import MappingError
from ..settings import Embeddings, Rounding, Unmatched
from ..values import parse_dtype
from .adapter import read_adapter_side
from .arrange import arrange_parts
from .config_differences import describe_differences
from .plan import KEPT, Part, Plan, Step
from .side import Piece, Side, read_side
from .tied_head import describe_ties
from .token_rows import TokenRows, find_token_rows, has_token_rows

SAME_ROLE = "same role"
OWN_STREAM = "vision_expert"
"""The stream of what is no copy of a plain weight, and takes none."""
MAX_NAMED = 4
"""So many tensors that have no counterpart are named."""


_KIND_WORDS = (
    ("norm", re.compile("norm")),
    ("attention", re.compile("attn|attention")),
    ("MLP", re.compile("mlp|feed_forward|expert|moe|^fc")),
)


@dataclass(frozen=True, slots=True)
class Match:
    """What the donor has for one role of the base, and the rule by which it was found.

    runs: of rows that are joined by token, rows of the role and the rows of `donor_name` that
    belong to them, ascending; other rows stay the base's. pieces: of another role, where the donor
    has it; all of it is blended. misfit: what does not fit, if that is why there are neither.
    """

    reason: str
    donor_name: str = ""
    runs: Sequence[RowRun] = ()
    pieces: Sequence[Piece] = ()
    misfit: str | None = None


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause garbage collection, which took nearly half of the time of planning 18,000 experts."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collector_paused()
def make_plan(
    base: str | Path | Checkpoint,
    donor: str | Path | Checkpoint,
    *,
    embeddings: Embeddings = "merge",
    dtype: str | None = None,
    unmatched: Unmatched = "stop",
    rounding: Rounding = "stochastic",
    declared: Sequence[Arch] = (),
    allow_misfits: bool = False,
) -> Plan:
    """Plan the merge of two checkpoints; see `api.make_plan`.

    allow_misfits: leave tensors that do not fit as the base's, and list them in `plan.misfits`,
    where a merge must be refused. For comparing two checkpoints.
    """
    output_dtype = DTYPES[parse_dtype(dtype)] if dtype else None
    ours, lender = read_side(open_checkpoint(base), declared), open_checkpoint(donor)
    if lender.is_adapter:
        theirs = read_adapter_side(lender, ours, declared, keep_unknown=unmatched == "keep")
    else:
        theirs = read_side(lender, declared)
    token_rows = None
    if embeddings == "merge" and not lender.is_adapter and ours.row_shape == theirs.row_shape:
        token_rows = find_token_rows(ours, theirs)
    matches = {
        role: Match("kept, as asked for")
        if embeddings == "keep" and has_token_rows(role)
        else _match_role(role, ours, theirs, token_rows)
        for role in ours.pieces
    }
    alone = [] if lender.is_adapter else _list_unmatched(ours, theirs)
    misfits = tuple(_find_misfits(ours, theirs, matches, alone if unmatched == "stop" else []))
    if misfits and not allow_misfits:
        raise MappingError(misfits[0])
    notes = list(_notes(ours, theirs, token_rows, declared))
    if alone and unmatched == "keep":
        notes.append(f"{_describe_unmatched(alone, ('the base', 'the donor'))}{KEPT}")
    tied_heads = ours.tied_heads
    steps = tuple(
        _make_step(name, ours, theirs, matches, output_dtype)
        for name in ours.tensors
        if name not in tied_heads
    )
    donor_names = {name for step in steps for part in step.parts for name in part.donor_names}
    if not (allow_misfits or donor_names):
        raise MappingError(f"{ours.path} and {theirs.path} have no parameter in common")
    leftover = {
        name: theirs.layout.kinds.get(name, "no counterpart in the base")
        for name in theirs.tensors
        if name not in donor_names
    }
    options = {
        "embeddings": embeddings,
        "dtype": output_dtype.name if output_dtype else None,
        "unmatched": unmatched,
        "rounding": rounding,
    }
    return Plan(
        ours.checkpoint,
        theirs.checkpoint,
        ours.layout,
        theirs.layout,
        steps,
        leftover=leftover,
        notes=tuple(notes),
        options=options,
        declared=tuple(declared),
        misfits=misfits,
    )


# Roles


def _find_misfits(
    base: Side, donor: Side, matches: Mapping[str, Match], alone: Sequence[str]
) -> Iterator[str]:
    """Why the two do not fit: depth and width first. alone: of what only one side has."""
    if donor.checkpoint.is_adapter:
        pass
    elif base.layout.layers != donor.layout.layers:
        yield (
            f"layer counts differ: {base.path} has {base.layout.layers} decoder layers,"
            f" {donor.path} has {donor.layout.layers}; they do not share an ancestor"
        )
    elif base.row_shape != donor.row_shape:
        yield f"widths differ: {_compare_shapes('embed', base, 'embed', donor)}"
    yield from (match.misfit for match in matches.values() if match.misfit)
    if alone:
        yield (
            f"{_describe_unmatched(alone, (str(base.path), str(donor.path)))}; declare with `arch`"
            " how they are spelled if they belong together, or keep the base's with"
            " `unmatched='keep'`"
        )


def _compare_shapes(role: str, base: Side, donor_role: str, donor: Side) -> str:
    base_name, donor_name = base.pieces[role][0][0], donor.pieces[donor_role][0][0]
    return (
        f"{base_name} in {base.path} is {list(base.shape_of(role))},"
        f" {donor_name} in {donor.path} is {list(donor.shape_of(donor_role))}"
    )


def _match_role(role: str, base: Side, donor: Side, token_rows: TokenRows | None) -> Match:
    """Look up what the donor has for one role of the base."""
    found = [rule for rule in _donor_roles(role, donor) if rule[0] in donor.pieces]
    if not found and role.endswith(f"@{OWN_STREAM}"):
        return Match("of visual tokens alone: the base's")
    if not found and donor.checkpoint.is_adapter:
        return Match("not changed by the adapter")
    if not found:
        return Match("no counterpart in the donor")
    donor_role, reason = found[0]
    pieces = donor.pieces[donor_role]
    donor_name, _ = pieces[0]
    donor.require_blendable(donor_name)
    base_shape, donor_shape = base.shape_of(role), donor.shape_of(donor_role)
    if token_rows and has_token_rows(role) and base_shape[1:] == donor_shape[1:]:
        return _match_tokens(base.rows_of(role), pieces[0], token_rows, reason)
    if base_shape != donor_shape:
        misfit = f"shapes differ for {role}: {_compare_shapes(role, base, donor_role, donor)}"
        return Match("another shape in the donor", misfit=misfit)
    return Match(reason, donor_name, pieces=pieces)


def _donor_roles(role: str, donor: Side) -> list[tuple[str, str]]:
    """The donor's roles that may stand for a role, the best first, each with the rule for it."""
    if role == "head" and "head" not in donor.pieces and donor.tied is not False:
        return [("embed", "tied donor lends its embedding")]
    plain, _, stream = role.partition("@")
    if stream == OWN_STREAM:
        return [(role, SAME_ROLE)]
    if stream:
        return [(role, SAME_ROLE), (plain, f"{stream} copy takes the plain weight")]
    return [(role, SAME_ROLE), (f"{role}@text", "takes the donor's text copy")]


def _list_unmatched(base: Side, donor: Side) -> list[str]:
    """The tensors of the decoder that only the base has, and those that only the donor has.

    Two texts that name some of each; no text if there are none. A head is not among them (a tied
    side has none), nor what only images or sounds use.
    """
    base_only: list[str] = []
    taken: set[str] = set()
    for role in base.pieces:
        candidates = [name for name, _ in _donor_roles(role, donor)]
        taken.update(candidates)
        if _needs_match(role) and donor.pieces.keys().isdisjoint(candidates):
            base_only.append(role)
    donor_only = [role for role in donor.pieces if _needs_match(role) and role not in taken]
    texts = [_name_some(side, roles) for side, roles in ((base, base_only), (donor, donor_only))]
    return texts if any(texts) else []


def _describe_unmatched(texts: Sequence[str], sides: tuple[str, str]) -> str:
    """A sentence of what `_list_unmatched` gives. sides: what to call base and donor."""
    others = reversed(sides)
    return "; ".join(
        f"{side} has {text}, {other} lacks that"
        for side, text, other in zip(sides, texts, others, strict=True)
        if text
    )


def _needs_match(role: str) -> bool:
    return not role.startswith("head") and role.partition("@")[2] in ("", "text")


def _name_some(side: Side, roles: Sequence[str]) -> str:
    """The first tensors of these roles, alike ones of other layers left out, and how many more.

    Of a tensor that holds several roles, the role is named as well.
    """
    found: dict[str, str] = {}
    for role in roles:
        name, _ = side.pieces[role][0]
        is_shared = len(side.blocks[name]) > 1
        found.setdefault(name, f"{role} in {name}" if is_shared else name)
    kinds = {re.sub(r"\.\d+\.", ".#.", name): found[name] for name in reversed(found)}
    shown = list(reversed(kinds.values()))[:MAX_NAMED]
    more = len(found) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _match_tokens(base_rows: int, piece: Piece, token_rows: TokenRows, reason: str) -> Match:
    """Match the rows of embedding or head; a head may have fewer than its embedding."""
    donor_name, donor_block = piece
    runs: list[RowRun] = []
    for run in token_rows.runs:
        length = min(run.length, base_rows - run.base, donor_block.stop - run.donor)
        if length > 0:
            runs.append(replace(run, length=length))
    shared = sum(run.length for run in runs)
    moved = sum(run.length for run in runs if run.base != run.donor)
    joined_by = "position" if token_rows.assumption else "token"
    how = f"rows by {joined_by}: {shared} shared, {moved} of them moved, {base_rows - shared} kept"
    return Match(how if reason == SAME_ROLE else f"{reason}; {how}", donor_name, runs)


# Steps


def _make_step(
    name: str, base: Side, donor: Side, matches: Mapping[str, Match], dtype: DType | None
) -> Step:
    """Say what becomes of one tensor of the base."""
    if name not in base.blocks:
        return _copy_tensor(base, name, dtype)
    base.require_blendable(name)
    span, blocks = base.tensors[name], base.blocks[name]
    lent = {block.role: matches[block.role].pieces for block in blocks}
    if all(block.is_plain for block in (*blocks, *(b for held in lent.values() for _, b in held))):
        parts = [
            part
            for block in blocks
            for part in _split_block(span, block, matches[block.role], donor)
        ]
    elif donor.checkpoint.is_adapter and any(lent.values()):
        raise MappingError(
            f"{donor.path}: changes {name}, which {base.path} has in another order than the"
            " adapter; merge the adapter into its model first and give that"
        )
    else:
        parts = list(arrange_parts(name, base, donor, lent))
    reasons = dict.fromkeys(matches[block.role].reason for block in blocks)
    kind = step_kind(blocks[0].role)
    return Step(name, dtype or span.dtype, span.shape, kind, "; ".join(reasons), tuple(parts))


def _copy_tensor(base: Side, name: str, dtype: DType | None) -> Step:
    """Copy a tensor outside the decoder; a rotary buffer keeps its dtype as well."""
    span, kind = base.tensors[name], base.layout.kinds[name]
    part = Part((0, span.shape[0] if span.shape else 1), None, span)
    if kind == BUFFER:
        return Step(name, span.dtype, span.shape, kind, "rotary buffer: never blended", (part,))
    output_dtype = dtype if dtype and span.dtype.blendable else span.dtype
    return Step(name, output_dtype, span.shape, kind, f"base's {kind}", (part,))


def _split_block(span: Span, block: Block, match: Match, donor: Side) -> Iterator[Part]:
    """Split a block of a base tensor into rows to blend, one part a run, and rows to copy."""
    shift = block.start - block.first  # from rows of the role to rows of the tensor

    def copy(start: int, stop: int) -> Part:
        rows = (start + shift, stop + shift)
        return Part(rows, block.role, span.rows(*rows))

    position = block.first
    runs = match.runs or [RowRun(b.first, b.start, b.rows) for _, b in match.pieces]
    for run in runs:
        start, stop = max(run.base, block.first), min(run.base + run.length, block.last)
        if start >= stop:
            continue
        if start > position:
            yield copy(position, start)
        rows = (start + shift, stop + shift)
        first = run.donor + start - run.base
        donor_rows = (first, first + stop - start)
        donor_rows = rows if donor_rows == rows else donor_rows  # one tuple in memory
        lent = donor.lend(match.donor_name, donor_rows, span.rows(*rows))
        yield Part(rows, block.role, span.rows(*rows), lent, match.donor_name, donor_rows)
        position = stop
    if position < block.last:
        yield copy(position, block.last)


def step_kind(role: str) -> str:
    """The group a role is shown under: experts, router, attention, MLP, norm and so on."""
    if has_token_rows(role):
        return "head" if role.startswith("head") else "embedding"
    plain = role.partition("@")[0]
    if is_expert(plain):
        return "experts"
    if ".mlp.router." in plain:
        return "router"
    name = re.sub(r"^layers\.\d+\.", "", plain)
    first = name.split(".")[0]
    for kind, words in _KIND_WORDS:
        if words.search(first):
            return kind
    return "norm" if "norm" in name else "other decoder"


def _notes(
    base: Side, donor: Side, token_rows: TokenRows | None, declared: Iterable[Arch]
) -> Iterator[str]:
    """What a user should know of the two checkpoints before merging them."""
    if donor.checkpoint.is_adapter:
        trained_for = donor.checkpoint.config.get("base_model_name_or_path")
        yield f"{donor.path}: a LoRA adapter for {trained_for}, added to the base's own weights"
        outside = sum(name not in donor.blocks for name in donor.tensors)
        if outside:
            yield f"{donor.path}: {outside} tensors outside of the language model are left out"
    for label, side in (("base", base), ("donor", donor)):
        if side.layout.assumed:
            yield f"{label}: {side.layout.assumed}"
        elif side.layout.declared:
            yield f"{label}: {side.layout.arch}, as `arch` declares it"
    for side in (base,) if donor.checkpoint.is_adapter else (base, donor):
        yield from describe_ties(side.checkpoint, side.layout, side.tied)
    if token_rows and token_rows.assumption:
        yield token_rows.assumption
    if any(is_expert(role) and not role.endswith(OWN_STREAM) for role in base.pieces):
        yield (
            "averaging experts can change which of them a token is sent to (HARC, arXiv"
            " 2606.03391): look at the answers; `alpha_layers='router:0'` keeps the base's routers"
        )
    for name in base.tied_heads:
        yield f"{name} is left out: the base ties its head to the embedding"
    if not donor.checkpoint.is_adapter:
        yield from describe_differences(base.checkpoint, donor.checkpoint)
    used = {side.layout.arch for side in (base, donor) if side.layout.declared}
    for arch in declared:
        if arch.name not in used:
            yield (
                f"`arch` {arch.name}: neither checkpoint is taken for it, by its classes"
                f" ({', '.join(arch.classes) or 'none'}) or by its tensor names"
            )
