"""Which tensors of two checkpoints can be compared, and what only one of them has.

Roles are joined as for a merge, by two plans: each side is the base once, so that the answer does
not depend on which comes first. Tensors outside the decoder, such as a vision tower's, are paired
by name and shape. Only headers are read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..architectures.arch import BUFFER
from ..architectures.experts import is_expert
from ..architectures.layout import Layout
from ..checkpoints.arranged import Arranged
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.span import Span
from ..mapping.join import make_plan
from ..mapping.kinship import group_of
from ..mapping.plan import Plan

if TYPE_CHECKING:
    from ..hub.remote_file import RemoteFile

LAYER_KINDS = (
    *("q", "k", "v", "o", "gate", "up", "down", "router", "experts", "shared_expert"),
    *("norms", "biases"),
)
"""The kinds of tensors in a layer, in the order they are shown; a stream may follow: `q@vision`."""
SIZE_TRAITS = (
    *("decoder layers", "width", "query rows", "key and value rows", "MLP rows", "experts"),
)
"""The traits that are lengths of matrices, or their number."""
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EACH_EXPERT = re.compile(r"(\.experts)\.[^@]*")


@dataclass(frozen=True, slots=True)
class SpanPair:
    """Spans of both sides with equally many elements, and the tensors that they lie in."""

    spans: tuple[Span | Arranged, Span | Arranged]
    names: tuple[str, str]

    @property
    def elements(self) -> int:
        """Elements on either side."""
        return self.spans[0].elements


@dataclass(frozen=True, slots=True)
class RolePair:
    """One role that both sides have, or one tensor outside the decoder."""

    role: str  # or the tensor's name
    group: str  # its layer (`layers.3`), or `embed`, `norm`, `head`, or such as `vision tower`
    kind: str  # one of LAYER_KINDS, or the group again
    pieces: tuple[SpanPair, ...]
    by_name: bool = False  # outside the decoder

    @property
    def elements(self) -> int:
        """Elements on either side."""
        return sum(piece.elements for piece in self.pieces)

    @property
    def shows_descent(self) -> bool:
        """Whether it is a matrix of the decoder; norms are near one in any model."""
        a, _ = self.pieces[0].spans
        return not self.by_name and (isinstance(a, Arranged) or len(a.shape) > 1)

    def names(self, side: int) -> list[str]:
        """The tensors that hold it in A (0) or B (1)."""
        return list(dict.fromkeys(piece.names[side] for piece in self.pieces))


@dataclass(frozen=True, slots=True)
class TensorTotals:
    """How many tensors, elements and bytes; a tensor that is only partly meant counts too."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Unpaired:
    """What one side has and the other has no counterpart for, and why."""

    what: str
    why: str
    totals: TensorTotals
    in_decoder: bool


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """One side of a comparison."""

    name: str
    path: str  # or its name on the Hub
    arch: str
    whole: TensorTotals
    mapped: TensorTotals  # paired by role
    by_name: TensorTotals  # paired by name
    unpaired: tuple[Unpaired, ...]
    traits: Mapping[str, str]  # dimensions of its decoder, in words
    layers: int


@dataclass(frozen=True, slots=True)
class Pairing:
    """Two checkpoints with their tensors paired."""

    a: CheckpointSummary
    b: CheckpointSummary
    pairs: tuple[RolePair, ...]
    obstacles: tuple[str, ...]  # what a merge of the two would be refused for
    notes: tuple[str, ...]
    remote: Mapping[Path, RemoteFile]  # files that are on the Hub only


def pair_checkpoints(
    a: str | Path | Checkpoint,
    b: str | Path | Checkpoint,
    *,
    make: Callable[..., Plan] = make_plan,
) -> Pairing:
    """Pair the tensors of two checkpoints by their headers, however different they are.

    make: `make_plan`, or the same with more of its options bound. FormatError for a broken or
    quantized checkpoint, MappingError for one without a decoder that is known.
    """
    forth = make(a, b, allow_misfits=True)
    back = make(forth.donor, forth.base, allow_misfits=True)
    by_name = tuple(_pair_by_name(forth))
    names = {pair.role for pair in by_name}
    return Pairing(
        _summarize(forth, back, names),
        _summarize(back, forth, names),
        (*_pair_by_role(forth, back), *by_name),
        tuple(dict.fromkeys(misfit.partition(";")[0] for misfit in forth.misfits)),
        forth.notes,
        forth.base.remote_files() | forth.donor.remote_files(),
    )


def kind_of_role(role: str) -> str:
    """The kind of a role, as in LAYER_KINDS, with its stream unless that is the text's."""
    plain, _, stream = role.partition("@")
    layer = _LAYER.match(plain)
    words = (layer[2] if layer else plain).split(".")
    kind = words[1] if words[0] in ("attn", "mlp") else words[0]
    if words[-1] == "bias":
        kind = "biases"
    elif "norm" in kind:
        kind = "norms" if layer else "norm"
    return f"{kind}@{stream}" if stream and stream != "text" else kind


# Pairs


def _pair_by_role(forth: Plan, back: Plan) -> Iterator[RolePair]:
    """Every pair that either plan blends; what both blend is taken once."""
    pieces: dict[str, list[SpanPair]] = {}
    for role, piece in _blended_pieces(forth):
        pieces.setdefault(role, []).append(piece)
    seen = {(_without_stream(role), p.names) for role, held in pieces.items() for p in held}
    complete = {role for role in pieces if is_expert(role)}  # whatever tensors they lie in
    for role, piece in _blended_pieces(back):
        (b, a), (b_name, a_name) = piece.spans, piece.names
        if role not in complete and (_without_stream(role), (a_name, b_name)) not in seen:
            pieces.setdefault(role, []).append(SpanPair((a, b), (a_name, b_name)))
    for role, held in pieces.items():
        yield RolePair(role, group_of(_without_stream(role)), kind_of_role(role), tuple(held))


def _blended_pieces(plan: Plan) -> Iterator[tuple[str, SpanPair]]:
    """What a plan blends, base first, with its role; the text's stream counts as none.

    The experts of a layer are one role: one side may have them in one tensor.
    """
    for step, part in plan.parts:
        if part.donor and part.donor_name and part.role and part.base.nbytes:
            piece = SpanPair((part.base, part.donor), (step.name, part.donor_name))
            yield _EACH_EXPERT.sub(r"\1", part.role).removesuffix("@text"), piece


def _pair_by_name(plan: Plan) -> Iterator[RolePair]:
    """What is outside both decoders and has the same kind, name and shape."""
    for name, kind in plan.base_layout.kinds.items():
        a, b = plan.base.tensors[name], plan.donor.tensors.get(name)
        if b is None or plan.donor_layout.kinds.get(name) != kind or kind == BUFFER:
            continue
        if a.shape == b.shape and a.dtype.blendable and b.dtype.blendable and a.nbytes:
            pieces = (SpanPair((a, b), (name, name)),)
            yield RolePair(name, kind, kind, pieces, by_name=True)


def _without_stream(role: str) -> str:
    return role.partition("@")[0]


# One side


def _summarize(plan: Plan, other: Plan, by_name: set[str]) -> CheckpointSummary:
    """Summarize the base of `plan`; `other` is the plan the other way round."""
    checkpoint = plan.base
    whole = {name: [span] for name, span in checkpoint.tensors.items()}
    mapped: dict[str, list[Span]] = {}
    for _, piece in _blended_pieces(plan):
        mapped.setdefault(piece.names[0], []).extend(piece.spans[0].spans)
    return CheckpointSummary(
        checkpoint.name,
        checkpoint.ref if checkpoint.repo else str(checkpoint.path),
        plan.base_layout.arch,
        _total(whole),
        _total(mapped),
        _total({name: whole[name] for name in by_name}),
        tuple(_list_unpaired(plan, other, by_name)),
        _describe_traits(plan),
        plan.base_layout.layers,
    )


def _total(spans_by_name: Mapping[str, Sequence[Span]]) -> TensorTotals:
    spans = [span for held in spans_by_name.values() for span in held]
    elements = sum(span.elements for span in spans)
    return TensorTotals(len(spans_by_name), elements, sum(span.nbytes for span in spans))


def _list_unpaired(plan: Plan, other: Plan, by_name: set[str]) -> Iterator[Unpaired]:
    """What of the base is in no pair, alike things together."""
    found: dict[tuple[str, str], dict[str, list[Span]]] = {}
    for what, why, name, span in _find_unpaired(plan, other, by_name):
        found.setdefault((what, why), {}).setdefault(name, []).append(span)
    for (what, why), held in found.items():
        is_outside = any(name in plan.base_layout.kinds for name in held)
        yield Unpaired(what, why, _total(held), in_decoder=not is_outside)


def _find_unpaired(
    plan: Plan, other: Plan, by_name: set[str]
) -> Iterator[tuple[str, str, str, Span]]:
    """Each unpaired span: what it is, why it has no counterpart, and its tensor's name."""
    kinds = plan.base_layout.kinds
    other_kinds = set(other.base_layout.kinds.values())
    steps = {step.name: step for step in plan.steps}
    for name, span in plan.base.tensors.items():
        if name in by_name:
            continue
        if name in kinds:
            why = "other names or shapes there" if kinds[name] in other_kinds else "none there"
            yield kinds[name], why, name, span
        elif name not in steps:
            yield "head", "a copy of the embedding it is tied to", name, span
        else:
            for part in steps[name].parts:
                if part.role and part.donor is None:
                    is_partial = steps[name].action == "interpolate"
                    yield *_why_unpaired(part.role, other.base_layout, is_partial), name, part.base


def _why_unpaired(role: str, other: Layout, is_partial: bool) -> tuple[str, str]:
    """What an unpaired role is called, and why the other side has no counterpart."""
    plain = _without_stream(role)
    layer = _LAYER.match(plain)
    if is_partial and plain in ("embed", "head"):
        return f"rows of {plain}", "tokens or padding not found there"
    if plain in map(_without_stream, other.roles()):
        return kind_of_role(role), "another shape there"
    if layer and int(layer[1]) >= other.layers:
        return f"layers {other.layers} and up", f"{other.layers} layers there"
    if plain.endswith(("q_norm.weight", "k_norm.weight")):
        return "q and k norms", "none there"
    return kind_of_role(role), "none there"


def _describe_traits(plan: Plan) -> dict[str, str]:
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
    return {
        "decoder layers": str(plan.base_layout.layers),
        "width": str(columns["embed"]),
        "query rows": str(rows["layers.0.attn.q.weight"]),
        "key and value rows": str(rows["layers.0.attn.k.weight"]),
        "MLP rows": str(rows["layers.0.mlp.gate.weight"]),
        "experts": str(_count_experts(plan.base_layout) or "none"),
        "embedding rows": str(rows["embed"]),
        "head": f"{rows['head']} rows" if rows["head"] else "tied to the embedding",
        "attention biases": "yes" if rows["layers.0.attn.q.bias"] else "no",
        "query and key norms": "yes" if rows["layers.0.attn.q_norm.weight"] else "no",
        "dtype": " and ".join(name for name, _ in dtypes.most_common(2)),
    }


def _count_experts(layout: Layout) -> int:
    """How many experts a layer has, at most."""
    experts = (re.search(r"\.experts\.(\d+)\.", role) for role in layout.roles())
    return max((int(expert[1]) + 1 for expert in experts if expert), default=0)
