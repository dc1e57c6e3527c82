"""How two checkpoints relate, without merging them: how far apart, where, and of one ancestor or
not.

Leaves to others: joining (`pairing.py`), reading (`likeness.py`), the threshold (`kinship.py`),
drawing (`compare_table.py`, `compare_page.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..checkpoints.span import Span
from ..mapping.kinship import THRESHOLD
from . import similarity as likeness
from .pairing import KINDS, SIZES, Pair, Pairing, Share, Side
from .similarity import SAMPLE, Measure

if TYPE_CHECKING:
    from ..hub.remote_file import RemoteFile
    from ..kernels.reference import Floats

_NAMED = 6  # groups that a reason lists by name
_Key = TypeVar("_Key")
Word = Literal["identical", "same ancestor", "related in part", "unrelated", "not comparable"]


@dataclass(frozen=True, slots=True)
class Run:
    """`length` layers of a from number `a` on that are alike to those of b from `b` on."""

    a: int
    b: int
    length: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the two decoders descend from one, and why that is said.

    same: None where only some layers do, or nothing can be told. lowest: the least alike layer (or
    `embed`, `head`) at its own number, and its cosine. runs: the layers that are alike, where some
    stand at another number than their counterpart; empty otherwise.
    """

    word: Word
    same: bool | None
    reason: str
    lowest: tuple[str, float] | None = None
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints and how they relate.

    sample: how many elements of each pair were read at most; None: all. measures: one a pair.
    """

    pairing: Pairing
    sample: int | None
    measures: tuple[Measure, ...]
    verdict: Verdict

    @property
    def a(self) -> Side:
        """The side distances are relative to."""
        return self.pairing.a

    @property
    def b(self) -> Side:
        """The other side."""
        return self.pairing.b

    @property
    def items(self) -> Iterator[tuple[Pair, Measure]]:
        """Each pair with its measure."""
        return zip(self.pairing.pairs, self.measures, strict=True)

    def by(self, key: Callable[[Pair], _Key], *, by_name: bool = False) -> dict[_Key, Measure]:
        """The measures added up by a key, of the decoder or of what was joined by name."""
        found: dict[_Key, Measure] = {}
        for pair, measure in self.items:
            if pair.by_name == by_name:
                found[key(pair)] = found.get(key(pair), Measure()) + measure
        return found

    @property
    def cells(self) -> dict[tuple[str, str], Measure]:
        """By group and kind, of the decoder."""
        return self.by(lambda pair: (pair.group, pair.kind))

    @property
    def groups(self) -> dict[str, Measure]:
        """By group, of the decoder."""
        return self.by(lambda pair: pair.group)

    @property
    def by_name(self) -> dict[str, Measure]:
        """By kind, of what was joined by name."""
        return self.by(lambda pair: pair.kind, by_name=True)

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that either side has."""
        return sorted({*self.a.layers, *self.b.layers})

    @property
    def kinds(self) -> list[str]:
        """The kinds there are in layers: those of KINDS in their order, then their streams'."""
        found = {pair.kind for pair in self.pairing.pairs if pair.group.startswith("layers.")}
        order = {kind: i for i, kind in enumerate(KINDS)}
        return sorted(
            found, key=lambda kind: ("@" in kind, order.get(kind.partition("@")[0], 99), kind)
        )

    @property
    def singles(self) -> list[str]:
        """The groups of the decoder that are no layers: `embed`, `norm`, `head`."""
        order = {"embed": 0, "norm": 1, "head": 2}
        found = [group for group in self.groups if not group.startswith("layers.")]
        return sorted(found, key=lambda group: (order.get(group, len(order)), group))

    @property
    def obstacles(self) -> tuple[str, ...]:
        """What a merge would be refused for: misfits, then kinship."""
        strange = self.verdict.word in ("related in part", "unrelated") or self.verdict.runs
        kinship = ("the language weights are not alike layer by layer",) if strange else ()
        return (*self.pairing.obstacles, *kinship)

    def to_json(self) -> dict[str, Any]:
        """The document of `compare --json`."""
        a, b = self.a.traits, self.b.traits
        cells = self.cells
        return {
            "a": _side_json(self.a),
            "b": _side_json(self.b),
            "sample": self.sample,
            "verdict": _verdict_json(self.verdict),
            "obstacles": list(self.obstacles),
            "differs": {name: [said, b[name]] for name, said in a.items() if said != b[name]},
            "decoder": self.by(lambda _: "").get("", Measure()).to_json(),
            "kinds": {kind: m.to_json() for kind, m in self.by(lambda pair: pair.kind).items()},
            "groups": {
                group: measure.to_json()
                | {"kinds": {kind: m.to_json() for (g, kind), m in cells.items() if g == group}}
                for group, measure in self.groups.items()
            },
            "by_name": {kind: m.to_json() for kind, m in self.by_name.items()},
            "tensors": [_pair_json(pair) | measure.to_json() for pair, measure in self.items],
            "notes": list(self.pairing.notes),
        }


def compare(
    pairing: Pairing,
    *,
    sample: int | None = SAMPLE,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Measure two joined checkpoints and judge them.

    sample: elements read of each pair; None reads all, which `progress` is told of in bytes.
    """
    if sample is None:
        measures = likeness.streamed(pairing.pairs, remote=pairing.remote, progress=progress)
    else:
        measures = likeness.sampled(pairing.pairs, sample, remote=pairing.remote)
    return Comparison(pairing, sample, measures, judge(pairing, measures))


def bytes_read(pairing: Pairing) -> int:
    """Bytes of both sides that a comparison in full reads."""
    spans = (span for pair in pairing.pairs for piece in pair.pieces for span in piece.spans)
    return sum(span.nbytes for span in spans)


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    lowest = verdict.lowest
    return {
        "word": verdict.word,
        "same_ancestor": verdict.same,
        "reason": verdict.reason,
        "threshold": THRESHOLD,
        "lowest": {"group": lowest[0], "cosine": lowest[1]} if lowest else None,
        "layers": [[run.a, run.b, run.length] for run in verdict.runs],
    }


def _pair_json(pair: Pair) -> dict[str, Any]:
    a, b = (list(dict.fromkeys(piece.names[i] for piece in pair.pieces)) for i in (0, 1))
    return {"role": pair.role, "a": a, "b": b}


def _side_json(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "path": side.path,
        "arch": side.arch,
        "traits": dict(side.traits),
        "whole": _share_json(side.whole),
        "mapped": _share_json(side.mapped),
        "by_name": _share_json(side.by_name),
        "only": [
            {"what": only.what, "why": only.why} | _share_json(only.share) for only in side.only
        ],
    }


def _share_json(share: Share) -> dict[str, int]:
    return {"tensors": share.tensors, "elements": share.elements, "bytes": share.nbytes}


# The verdict --------------------------------------------------------------------------------------


def judge(pairing: Pairing, measures: Iterable[Measure]) -> Verdict:
    """Of one ancestor or not: by the cosine of every layer's matrices, of embedding and head."""
    groups: dict[str, Measure] = {}
    equal = True
    for pair, measure in zip(pairing.pairs, measures, strict=True):
        if pair.tells:
            groups[pair.group] = groups.get(pair.group, Measure()) + measure
        equal = equal and (pair.by_name or measure.identical)
    order = sorted(groups, key=lambda group: (not group.startswith("layers."), group))
    cosines = {group: c for group in order if (c := groups[group].cosine) is not None}
    low = [group for group, cosine in cosines.items() if cosine < THRESHOLD]
    uneven = len(pairing.a.layers) != len(pairing.b.layers)
    runs = find_runs(pairing) if low or uneven else ()
    if all(run.a == run.b for run in runs):
        runs = ()
    if not cosines:
        return Verdict("not comparable", None, _incomparable(pairing, groups))
    lowest = min(cosines.items(), key=lambda item: item[1])
    # A number is accounted for if either side's layer of it is somewhere on the other
    moved = {f"layers.{i + n}" for run in runs for i in (run.a, run.b) for n in range(run.length)}
    strange = [group for group in low if group not in moved]
    word, same, reason = _word(cosines, strange, runs)
    if equal:
        alone = any(only.decoder for side in (pairing.a, pairing.b) for only in side.only)
        word = "same ancestor" if alone else "identical"
        reason = "every element that was read is equal on both sides"
    return Verdict(word, same, reason, lowest, runs)


def _word(
    cosines: Mapping[str, float], strange: Sequence[str], runs: Sequence[Run]
) -> tuple[Word, bool | None, str]:
    """The verdict in a word, whether that is one ancestor, and why."""
    near = "descendants of one model lie near 1, strangers near 0"
    if len(strange) == len(cosines) and not runs:
        highest = max(cosines.values())
        reason = f"cosine is {highest:.3f} or less in {_groups(cosines)}; {near}"
        return "unrelated", False, reason
    moved = [
        f"layers {_range(run.a, run.length)} of A are alike to layers"
        f" {_range(run.b, run.length)} of B"
        for run in runs
    ]
    if not strange and moved:
        return "same ancestor", True, "; ".join(moved)
    if not strange:
        lowest, cosine = min(cosines.items(), key=lambda item: item[1])
        reason = f"cosine is {cosine:.3f} or more in {_groups(cosines)}, lowest in {lowest}; {near}"
        return "same ancestor", True, reason
    few = ", ".join(strange[:_NAMED]) + (", …" if len(strange) > _NAMED else "")
    reason = f"cosine is below {THRESHOLD} in {few}, of {_groups(cosines)}"
    return "related in part", None, "; ".join([reason, *moved])


def _groups(names: Iterable[str]) -> str:
    """Such as "28 layers, embed and head"."""
    layers = [name for name in names if name.startswith("layers.")]
    words = [f"{len(layers)} layer{'s' if len(layers) != 1 else ''}"] if layers else []
    *most, last = [*words, *(name for name in names if name not in layers)]
    return f"{', '.join(most)} and {last}" if most else last


def _range(first: int, length: int) -> str:
    return f"{first} to {first + length - 1}" if length > 1 else str(first)


def _incomparable(pairing: Pairing, groups: Mapping[str, Measure]) -> str:
    """Why there is no cosine at all."""
    if groups:
        return "no matrix has an element that is finite on both sides"
    a, b = pairing.a.traits, pairing.b.traits
    differs = [f"{name} {a[name]} against {b[name]}" for name in SIZES if a[name] != b[name]]
    return f"no matrix has the same shape on both sides: {', '.join(differs)}"


def find_runs(pairing: Pairing) -> tuple[Run, ...]:
    """Which layers of a are alike to which of b, whatever their numbers, as runs of neighbours.

    Every layer is set against every other by a small sample of the matrices that have one shape.
    """
    import numpy as np

    a, b = pairing.a.layers, pairing.b.layers
    if not (a and b):
        return ()
    shapes = [
        {(role, _rows(spans)) for role, spans in layer.items()}
        for side in (a, b)
        for layer in side.values()
    ]
    roles = sorted(role for role, _ in set.intersection(*shapes))
    if not roles:
        return ()
    unit = [_directions(side, roles, pairing.remote) for side in (a, b)]
    alike = unit[0] @ unit[1].T >= THRESHOLD
    found = []
    for i, j in zip(*map(np.ndarray.tolist, np.nonzero(alike)), strict=True):
        if i and j and alike[i - 1, j - 1]:
            continue
        length = 1
        while i + length < len(a) and j + length < len(b) and alike[i + length, j + length]:
            length += 1
        found.append(Run(i, j, length))
    return tuple(found)


def _rows(spans: Sequence[Span]) -> tuple[int, tuple[int, ...]]:
    """Rows of a role and the shape of one."""
    return sum(span.shape[0] for span in spans), spans[0].shape[1:]


def _directions(
    layers: Mapping[int, Mapping[str, Sequence[Span]]],
    roles: Sequence[str],
    remote: Mapping[Path, RemoteFile],
) -> Floats:
    """Samples of each layer, one row each, of length one; what is not finite counts as zero."""
    import numpy as np

    spans = (layers[i][role] for i in sorted(layers) for role in roles)
    samples = likeness.middles(spans, remote=remote)
    rows = np.array(
        [np.concatenate(samples[i : i + len(roles)]) for i in range(0, len(samples), len(roles))]
    )
    rows = np.where(np.isfinite(rows), rows, 0.0)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Floats = rows / np.where(length > 0, length, 1.0)
    return unit
