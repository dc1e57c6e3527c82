"""A comparison of two checkpoints, and the verdict: whether their decoders have one ancestor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from ..mapping.kinship import THRESHOLD
from .pairing import LAYER_KINDS, SIZE_TRAITS, CheckpointSummary, Pairing, RolePair
from .similarity import SAMPLE_ELEMENTS, Similarity, measure_pairs

MAX_NAMED = 6  # groups that a reason lists by name
_Key = TypeVar("_Key")
Word = Literal["identical", "same ancestor", "related in part", "unrelated", "not comparable"]


@dataclass(frozen=True, slots=True)
class Ancestry:
    """Whether the two decoders descend from one, and why that is said."""

    word: Word
    is_shared: bool | None  # None if only some layers are alike, or nothing can be told
    reason: str
    lowest: tuple[str, float] | None = None  # the least alike group, and its cosine

    def to_json(self) -> dict[str, Any]:
        """The key `verdict` of `compare --json`."""
        lowest = self.lowest
        return {
            "word": self.word,
            "same_ancestor": self.is_shared,
            "reason": self.reason,
            "threshold": THRESHOLD,
            "lowest": {"group": lowest[0], "cosine": lowest[1]} if lowest else None,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints and how they relate. Distances are relative to A."""

    pairing: Pairing
    sample: int  # elements read of each pair, at most
    similarities: tuple[Similarity, ...]  # one for each pair
    ancestry: Ancestry

    @property
    def a(self) -> CheckpointSummary:
        """The first side."""
        return self.pairing.a

    @property
    def b(self) -> CheckpointSummary:
        """The second side."""
        return self.pairing.b

    @property
    def items(self) -> Iterator[tuple[RolePair, Similarity]]:
        """Each pair with its similarity."""
        return zip(self.pairing.pairs, self.similarities, strict=True)

    def sum_by(
        self, key: Callable[[RolePair], _Key], *, by_name: bool = False
    ) -> dict[_Key, Similarity]:
        """Similarities added up by a key: of the decoder, or of what was paired by name."""
        sums: dict[_Key, Similarity] = {}
        for pair, similarity in self.items:
            if pair.by_name == by_name:
                sums[key(pair)] = sums.get(key(pair), Similarity()) + similarity
        return sums

    @property
    def cells(self) -> dict[tuple[str, str], Similarity]:
        """By group and kind, of the decoder."""
        return self.sum_by(lambda pair: (pair.group, pair.kind))

    @property
    def groups(self) -> dict[str, Similarity]:
        """By group, of the decoder."""
        return self.sum_by(lambda pair: pair.group)

    @property
    def by_name(self) -> dict[str, Similarity]:
        """By kind, of what was paired by name."""
        return self.sum_by(lambda pair: pair.kind, by_name=True)

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that either side has."""
        return list(range(max(self.a.layers, self.b.layers)))

    @property
    def layer_kinds(self) -> list[str]:
        """The kinds that occur in layers: in the order of LAYER_KINDS, then their streams'."""
        order = {kind: position for position, kind in enumerate(LAYER_KINDS)}

        def place(kind: str) -> tuple[bool, int, str]:
            return "@" in kind, order.get(kind.partition("@")[0], len(order)), kind

        in_layers = {p.kind for p in self.pairing.pairs if p.group.startswith("layers.")}
        return sorted(in_layers, key=place)

    @property
    def outer_groups(self) -> list[str]:
        """The groups of the decoder that are not layers: `embed`, `norm`, `head`."""
        order = {"embed": 0, "norm": 1, "head": 2}
        outer = [group for group in self.groups if not group.startswith("layers.")]
        return sorted(outer, key=lambda group: (order.get(group, len(order)), group))

    @property
    def rows(self) -> list[tuple[str, Similarity]]:
        """Each kind over all layers, then what is in no layer, then what was paired by name."""
        sums = self.sum_by(lambda pair: pair.kind)
        names = [*self.layer_kinds, *self.outer_groups]
        return [*((name, sums[name]) for name in names), *self.by_name.items()]

    @property
    def obstacles(self) -> tuple[str, ...]:
        """What a merge would be refused for: what does not fit, then kinship."""
        if self.ancestry.word in ("related in part", "unrelated"):
            reason = "the language weights are not alike layer by layer"
            return (*self.pairing.obstacles, reason)
        return self.pairing.obstacles

    def to_json(self) -> dict[str, Any]:
        """The document of `compare --json`."""
        a, b, cells = self.a.traits, self.b.traits, self.cells
        kinds = self.sum_by(lambda pair: pair.kind)
        return {
            "a": _summary_json(self.a),
            "b": _summary_json(self.b),
            "sample": self.sample,
            "verdict": self.ancestry.to_json(),
            "obstacles": list(self.obstacles),
            "differs": {name: [value, b[name]] for name, value in a.items() if value != b[name]},
            "decoder": self.sum_by(lambda _: "").get("", Similarity()).to_json(),
            "kinds": {kind: similarity.to_json() for kind, similarity in kinds.items()},
            "groups": {
                name: group.to_json()
                | {"kinds": {kind: s.to_json() for (of, kind), s in cells.items() if of == name}}
                for name, group in self.groups.items()
            },
            "by_name": {kind: similarity.to_json() for kind, similarity in self.by_name.items()},
            "tensors": [
                {"role": pair.role, "a": pair.names(0), "b": pair.names(1)} | similarity.to_json()
                for pair, similarity in self.items
            ],
            "notes": list(self.pairing.notes),
        }


def _summary_json(side: CheckpointSummary) -> dict[str, Any]:
    return {
        "name": side.name,
        "path": side.path,
        "arch": side.arch,
        "traits": dict(side.traits),
        "whole": asdict(side.whole),
        "mapped": asdict(side.mapped),
        "by_name": asdict(side.by_name),
        "only": [
            {"what": left.what, "why": left.why} | asdict(left.totals) for left in side.unpaired
        ],
    }


def compare(pairing: Pairing, *, sample: int = SAMPLE_ELEMENTS) -> Comparison:
    """Measure and judge two paired checkpoints by so many elements of each pair."""
    similarities = measure_pairs(pairing.pairs, sample, remote=pairing.remote)
    return Comparison(pairing, sample, similarities, judge_ancestry(pairing, similarities))


# The verdict


def judge_ancestry(pairing: Pairing, similarities: Iterable[Similarity]) -> Ancestry:
    """Judge by the cosine of every layer's matrices, of embedding and head."""
    groups: dict[str, Similarity] = {}
    all_equal = True
    for pair, similarity in zip(pairing.pairs, similarities, strict=True):
        if pair.shows_descent:
            groups[pair.group] = groups.get(pair.group, Similarity()) + similarity
        all_equal = all_equal and (pair.by_name or similarity.is_identical)
    layers_first = sorted(groups, key=lambda group: (not group.startswith("layers."), group))
    cosines = {group: groups[group].cosine for group in layers_first}
    known = {group: cosine for group, cosine in cosines.items() if cosine is not None}
    if not known:
        return Ancestry("not comparable", None, _why_not_comparable(pairing, groups))
    lowest = min(known.items(), key=lambda item: item[1])
    if all_equal:
        has_more = any(left.in_decoder for side in (pairing.a, pairing.b) for left in side.unpaired)
        reason = "every element that was read is equal on both sides"
        return Ancestry("same ancestor" if has_more else "identical", True, reason, lowest)
    word, is_shared, reason = _find_word(known)
    return Ancestry(word, is_shared, reason, lowest)


def _find_word(cosines: Mapping[str, float]) -> tuple[Word, bool | None, str]:
    unlike = [group for group, cosine in cosines.items() if cosine < THRESHOLD]
    scale = "descendants of one model lie near 1, strangers near 0"
    if len(unlike) == len(cosines):
        highest = max(cosines.values())
        reason = f"cosine is {highest:.3f} or less in {_list_groups(cosines)}; {scale}"
        return "unrelated", False, reason
    if not unlike:
        lowest, cosine = min(cosines.items(), key=lambda item: item[1])
        reason = f"cosine is {cosine:.3f} or more in {_list_groups(cosines)}, lowest in {lowest}"
        return "same ancestor", True, f"{reason}; {scale}"
    named = ", ".join(unlike[:MAX_NAMED]) + (", …" if len(unlike) > MAX_NAMED else "")
    reason = f"cosine is below {THRESHOLD} in {named}, of {_list_groups(cosines)}"
    return "related in part", None, reason


def _list_groups(groups: Iterable[str]) -> str:
    """Such as "28 layers, embed and head"."""
    layers = [group for group in groups if group.startswith("layers.")]
    words = [f"{len(layers)} layer{'s' if len(layers) != 1 else ''}"] if layers else []
    *most, last = [*words, *(group for group in groups if group not in layers)]
    return f"{', '.join(most)} and {last}" if most else last


def _why_not_comparable(pairing: Pairing, groups: Mapping[str, Similarity]) -> str:
    if groups:
        return "no matrix has an element that is finite on both sides"
    a, b = pairing.a.traits, pairing.b.traits
    different = [name for name in SIZE_TRAITS if a[name] != b[name]]
    sizes = ", ".join(f"{name} {a[name]} against {b[name]}" for name in different)
    return f"no matrix has the same shape on both sides: {sizes}"
