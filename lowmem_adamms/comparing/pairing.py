"""What of two checkpoints can be set against each other, and what only one of them has.

Roles are joined as for a merge, by two plans: each side once as the base, so that the answer does
not hang on who comes first. Tensors outside the decoder (vision tower, connector) are joined by
name and shape. Headers only; leaves to others: reading and judging (`compare.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..architectures.layout import BUFFER
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.span import Span
from ..mapping.join import make_plan
from ..mapping.kinship import group_of
from ..mapping.plan import Part, Plan, Step
from ..settings import Embeddings

if TYPE_CHECKING:
    from ..hub.remote_file import RemoteFile

KINDS = ("q", "k", "v", "o", "gate", "up", "down", "norms", "biases")
"""What is told apart in a layer, in the order it is shown; a stream may follow (`q@vision`)."""
SIZES = ("decoder layers", "width", "query rows", "key and value rows", "MLP rows")
"""Those of a side's traits that are lengths of its matrices, or their number."""
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Piece:
    """Spans of both sides with as many elements each, and the tensors they lie in."""

    spans: tuple[Span, Span]
    names: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Pair:
    """One role that both sides have.

    group: the layer (`layers.3`), or `embed`, `norm`, `head`, or what a tensor outside the decoder
    is. kind: one of KINDS, or the group again. by_name: outside the decoder.
    """

    role: str
    group: str
    kind: str
    pieces: tuple[Piece, ...]
    by_name: bool = False

    @property
    def elements(self) -> int:
        """Elements on either side."""
        return sum(piece.spans[0].elements for piece in self.pieces)

    @property
    def tells(self) -> bool:
        """Whether it tells descent: a matrix of the decoder, as norms are near one in any model."""
        return not self.by_name and len(self.pieces[0].spans[0].shape) > 1


@dataclass(frozen=True, slots=True)
class Share:
    """So much of a checkpoint: tensors, those that are in it with a part too; elements; bytes."""

    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Only:
    """What one side has and found nothing for on the other, and why. decoder: it is part of it."""

    what: str
    why: str
    share: Share
    decoder: bool = False


@dataclass(frozen=True, slots=True)
class Side:
    """One checkpoint: what of it was joined by role, what by name, and what was not.

    path: or its name on the Hub. traits: its dimensions, in words. layers: of each layer its
    matrices' spans by role, the role without the layer's number.
    """

    name: str
    path: str
    arch: str
    whole: Share
    mapped: Share
    by_name: Share
    only: tuple[Only, ...]
    traits: Mapping[str, str]
    layers: Mapping[int, Mapping[str, tuple[Span, ...]]]


@dataclass(frozen=True, slots=True)
class Pairing:
    """Two checkpoints joined.

    obstacles: what a merge of them would be refused for. remote: the files that are on the Hub
    only.
    """

    a: Side
    b: Side
    pairs: tuple[Pair, ...]
    obstacles: tuple[str, ...]
    notes: tuple[str, ...]
    remote: Mapping[Path, RemoteFile] = field(default_factory=dict)


def join(
    a: str | Path | Checkpoint,
    b: str | Path | Checkpoint,
    *,
    make: Callable[..., Plan] = make_plan,
) -> Pairing:
    """Join two checkpoints by their headers, however different they are.

    make: `make_plan`, or the same with more of its options bound.
    FormatError for a broken or quantized one, MappingError for one without a known decoder.
    """
    forth = make(a, b, allow_misfits=True)
    # Rows of tokens were joined on the way forth, unless only the way back has a head to join
    heads = ["head" in layout.roles() for layout in (forth.base_layout, forth.donor_layout)]
    embeddings: Embeddings = "merge" if heads == [False, True] else "keep"
    back = make(forth.donor, forth.base, embeddings=embeddings, allow_misfits=True)
    return pair_up(forth, back)


def pair_up(forth: Plan, back: Plan) -> Pairing:
    """Join by two plans, each side once the base; both made so that they note misfits."""
    pairs = (*_by_role(forth, back), *_by_name(forth))
    obstacles = dict.fromkeys(text.partition(";")[0] for text in forth.misfits)
    a, b = _side(forth, back, pairs, 0), _side(back, forth, pairs, 1)
    remote = forth.base.remote_files() | forth.donor.remote_files()
    return Pairing(a, b, pairs, tuple(obstacles), forth.notes, remote)


def kind_of(role: str) -> str:
    """The kind of a role, as in KINDS, with its stream unless that is the text's."""
    plain, _, stream = role.partition("@")
    layer = _LAYER.match(plain)
    words = (layer[2] if layer else plain).split(".")
    kind = words[1] if words[0] in ("attn", "mlp") else words[0]
    if words[-1] == "bias":
        kind = "biases"
    elif "norm" in kind:
        kind = "norms" if layer else "norm"
    return f"{kind}@{stream}" if stream and stream != "text" else kind


# Pairs --------------------------------------------------------------------------------------------


def _by_role(forth: Plan, back: Plan) -> Iterator[Pair]:
    """Every pair that either plan blends; what both blend is taken once."""
    pieces: dict[str, list[Piece]] = {}
    seen = set()
    for step, part, role in _blended(forth):
        assert part.donor is not None and part.donor_name is not None
        names = (step.name, part.donor_name)
        pieces.setdefault(role, []).append(Piece((part.base, part.donor), names))
        seen.add((names, role.partition("@")[0]))
    for step, part, role in _blended(back):
        assert part.donor is not None and part.donor_name is not None
        names = (part.donor_name, step.name)
        if (names, role.partition("@")[0]) not in seen:
            pieces.setdefault(role, []).append(Piece((part.donor, part.base), names))
    for role, held in pieces.items():
        yield Pair(role, group_of(role.partition("@")[0]), kind_of(role), tuple(held))


def _blended(plan: Plan) -> Iterator[tuple[Step, Part, str]]:
    """The parts of a plan that have a donor, with their role; the text's stream is the plain."""
    for step, part in plan.parts:
        if part.donor is not None and part.role is not None and part.base.nbytes:
            yield step, part, part.role.removesuffix("@text")


def _by_name(plan: Plan) -> Iterator[Pair]:
    """What is outside both decoders, of one kind, name and shape, as siblings' towers are."""
    for name, kind in plan.base_layout.kinds.items():
        a, b = plan.base.tensors[name], plan.donor.tensors.get(name)
        if b is None or plan.donor_layout.kinds.get(name) != kind or kind == BUFFER:
            continue
        if a.shape == b.shape and a.dtype.blendable and b.dtype.blendable and a.nbytes:
            yield Pair(name, kind, kind, (Piece((a, b), (name, name)),), by_name=True)


# Sides --------------------------------------------------------------------------------------------


def _side(plan: Plan, other: Plan, pairs: Iterable[Pair], i: int) -> Side:
    """The base of `plan`, which is side i of each pair."""
    mapped: dict[str, set[Span]] = {}
    named: dict[str, set[Span]] = {}
    for pair in pairs:
        for piece in pair.pieces:
            found = named if pair.by_name else mapped
            found.setdefault(piece.names[i], set()).add(piece.spans[i])
    checkpoint = plan.base
    return Side(
        checkpoint.name,
        checkpoint.ref if checkpoint.repo else str(checkpoint.path),
        plan.base_layout.arch,
        _share({name: [span] for name, span in checkpoint.tensors.items()}),
        _share(mapped),
        _share(named),
        tuple(_only(plan, other, mapped, named)),
        _traits(plan),
        _layers(plan),
    )


def _share(held: Mapping[str, Iterable[Span]]) -> Share:
    spans = [span for group in held.values() for span in group]
    elements = sum(span.elements for span in spans)
    return Share(len(held), elements, sum(span.nbytes for span in spans))


def _only(
    plan: Plan, other: Plan, mapped: Mapping[str, set[Span]], named: Mapping[str, set[Span]]
) -> Iterator[Only]:
    """What of the base is in no pair, alike things together."""
    found: dict[tuple[str, str], dict[str, list[Span]]] = {}
    for what, why, name, span in _unpaired(plan, other, mapped, named):
        found.setdefault((what, why), {}).setdefault(name, []).append(span)
    for (what, why), held in found.items():
        outside = any(name in plan.base_layout.kinds for name in held)
        yield Only(what, why, _share(held), decoder=not outside)


def _unpaired(
    plan: Plan, other: Plan, mapped: Mapping[str, set[Span]], named: Mapping[str, set[Span]]
) -> Iterator[tuple[str, str, str, Span]]:
    """What it is, why it has no counterpart, its tensor and its span."""
    kinds = plan.base_layout.kinds
    there = set(other.base_layout.kinds.values())
    roles = {role.partition("@")[0] for role in other.base_layout.roles()}
    steps = {step.name: step for step in plan.steps}
    for name, span in plan.base.tensors.items():
        if name in named:
            continue
        if name in kinds:
            why = "other names or shapes there" if kinds[name] in there else "none there"
            yield kinds[name], why, name, span
        elif name not in steps:
            yield "head", "a copy of the embedding it is tied to", name, span
        else:
            used = mapped.get(name, set())
            for part in steps[name].parts:
                if part.role in ("embed", "head") and used:
                    why = "tokens or padding not found there"
                    yield from (
                        (f"rows of {part.role}", why, name, row) for row in _gaps(span, used)
                    )
                    break
                if part.role and part.base not in used:
                    yield *_reason(part.role, roles, other.base_layout.layers), name, part.base


def _gaps(whole: Span, used: Iterable[Span]) -> Iterator[Span]:
    """The stretches of a span that none of the used ones covers."""
    position = 0
    row = whole.row_bytes
    for span in sorted(used, key=lambda span: span.start):
        first = (span.start - whole.start) // row
        if first > position:
            yield whole.rows(position, first)
        position = max(position, first + span.nbytes // row)
    if position < whole.shape[0]:
        yield whole.rows(position, whole.shape[0])


def _reason(role: str, roles: Iterable[str], layers: int) -> tuple[str, str]:
    """What an unpaired role is, and why it has no counterpart among the other side's roles."""
    plain = role.partition("@")[0]
    layer = _LAYER.match(plain)
    if plain in roles:
        return kind_of(role), "another shape there"
    if layer and int(layer[1]) >= layers:
        return f"layers {layers} and up", f"{layers} layers there"
    of_heads = plain.endswith(("q_norm.weight", "k_norm.weight"))
    return "q and k norms" if of_heads else kind_of(role), "none there"


def _traits(plan: Plan) -> dict[str, str]:
    """The dimensions by which two decoders can differ."""
    rows: Counter[str] = Counter()
    columns: dict[str, int] = {}
    dtypes: Counter[str] = Counter()
    for _, part in plan.parts:
        role = (part.role or "").removesuffix("@text")
        rows[role] += part.rows[1] - part.rows[0]
        columns[role] = part.base.shape[-1] if part.base.shape else 1
        if role:
            dtypes[part.base.dtype.name] += part.base.nbytes
    tied = "head" not in rows
    return {
        "decoder layers": str(plan.base_layout.layers),
        "width": str(columns["embed"]),
        "query rows": str(rows["layers.0.attn.q.weight"]),
        "key and value rows": str(rows["layers.0.attn.k.weight"]),
        "MLP rows": str(rows["layers.0.mlp.gate.weight"]),
        "embedding rows": str(rows["embed"]),
        "head": "tied to the embedding" if tied else f"{rows['head']} rows",
        "attention biases": "yes" if rows["layers.0.attn.q.bias"] else "no",
        "query and key norms": "yes" if rows["layers.0.attn.q_norm.weight"] else "no",
        "dtype": " and ".join(name for name, _ in dtypes.most_common(2)),
    }


def _layers(plan: Plan) -> dict[int, dict[str, tuple[Span, ...]]]:
    """Of each layer the spans of its matrices by role; a stream other than the text's is left out.

    Needed to look for a layer elsewhere than at its own number.
    """
    found: dict[int, dict[str, tuple[Span, ...]]] = {}
    for _, part in plan.parts:
        layer = _LAYER.fullmatch((part.role or "").removesuffix("@text"))
        if layer and "@" not in layer[2] and len(part.base.shape) > 1:
            held = found.setdefault(int(layer[1]), {})
            held[layer[2]] = (*held.get(layer[2], ()), part.base)
    return found
