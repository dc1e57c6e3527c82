"""Which declaration a checkpoint is of: by its config's class, by its names, else by structure.

By structure means: any decoder that some declaration spells, under any prefix. What was taken for
granted then stands in the layout's `assumed`; where that would be a guess, it is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import prod

from ..checkpoints.checkpoint import Checkpoint
from ..errors import MappingError
from .layout import Arch, Layout, find_missing, read_layout

ANOTHER = "another decoder"
"""The kind of what belongs to a decoder that was not taken for the language model."""


def recognise(
    checkpoint: Checkpoint, archs: Sequence[Arch], declared: Sequence[Arch] = ()
) -> Layout:
    """The layout of a checkpoint. `declared`: the user's own declarations, which go before `archs`.

    In this order: a declared class, a known class, names that a declared or a known spelling
    explains altogether, a declared spelling that leaves some unexplained, a known decoder under any
    prefix. MappingError if nothing fits, or if several decoders fit and none stands out.
    """
    announced = _announced_classes(checkpoint)
    if layout := _of_class(checkpoint, declared, announced):
        return replace(layout, declared=True)
    _check_declared_class(checkpoint, declared, announced)
    if layout := _of_class(checkpoint, archs, announced):
        return layout
    config = f"config.json announces {', '.join(sorted(announced))}" if announced else ""
    config = config or "no config.json"
    own = [replace(layout, declared=True) for layout in _fits(checkpoint, declared)]
    by_names = [layout for layout in (*own, *_fits(checkpoint, archs)) if not layout.unknown]
    by_names += sorted(own, key=lambda layout: layout.unknown)
    if by_names:
        layout = by_names[0]
        by = ", declared by --arch," if layout.declared else ""
        return replace(layout, assumed=f"{config}; taken for {layout.arch}{by} by its tensor names")
    layout = _by_structure(checkpoint, (*declared, *archs))
    return replace(layout, assumed=f"{config}; {layout.assumed}")


def _announced_classes(checkpoint: Checkpoint) -> set[str]:
    classes = checkpoint.config.get("architectures")
    classes = classes if isinstance(classes, list) else [classes]
    return {name for name in classes if isinstance(name, str)}


def _fits(checkpoint: Checkpoint, archs: Iterable[Arch]) -> list[Layout]:
    """The layout under each spelling of each declaration whose decoder is all there."""
    return [
        layout
        for arch in archs
        for prefix, head in arch.spellings
        if (layout := read_layout(checkpoint, arch, prefix, head))
    ]


def _of_class(checkpoint: Checkpoint, archs: Iterable[Arch], announced: set[str]) -> Layout | None:
    """Of the declarations of an announced class, the layout that explains most."""
    of_class = [arch for arch in archs if announced & set(arch.classes)]
    return min(_fits(checkpoint, of_class), key=lambda layout: layout.unknown, default=None)


def _check_declared_class(
    checkpoint: Checkpoint, declared: Iterable[Arch], announced: set[str]
) -> None:
    """MappingError where the user declared this very class, but its decoder is not all there."""
    for arch in declared:
        for name in sorted(announced & set(arch.classes)):
            places = [(arch, prefix) for prefix, _ in arch.spellings]
            prefix, missing = _nearest_miss(checkpoint, places)
            raise MappingError(
                f"{checkpoint.path}: config.json announces {name}, which --arch declares as"
                f" {arch.name}, but its decoder is not all there: under {prefix!r} there is no"
                f" {missing}; mend spellings or decoder of the declaration"
            )


# By structure


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A decoder found in a checkpoint. elements: without its head; head: its name or ``."""

    arch: Arch
    layout: Layout
    elements: int
    head: str = ""

    def __str__(self) -> str:
        return (
            f"{self.layout.layers} layers under {self.layout.prefix!r}"
            f" ({self.elements / 1e6:,.0f} million parameters,"
            f" {f'head {self.head}' if self.head else 'no head'})"
        )


def _last_parts(name: str) -> str:
    """The last two dotted parts of a name, such as `lm_head.weight`."""
    return ".".join(name.split(".")[-2:])


def _by_structure(checkpoint: Checkpoint, archs: Sequence[Arch]) -> Layout:
    """The layout of the decoder that stands out; `assumed` says which it was, and what else is."""
    heads = {_last_parts(head) for arch in archs for _, head in arch.spellings if head}
    bare = [replace(arch, name=f"{arch.name}-style", others={}, shared_ids=None) for arch in archs]
    places = [
        (arch, name.removesuffix(arch.embed_name))
        for arch in bare
        for name in checkpoint.tensors
        if name.endswith(arch.embed_name)
    ]
    candidates: list[_Candidate] = []
    for prefix in sorted({prefix for _, prefix in places}, key=len):
        if found := _find_under(checkpoint, prefix, [arch for arch, at in places if at == prefix]):
            candidates.append(found)
    if not candidates:
        raise _no_decoder(checkpoint, places)
    chosen, others = _choose(checkpoint, _assign_heads(checkpoint, candidates, heads))
    layout = read_layout(checkpoint, chosen.arch, chosen.layout.prefix, chosen.head)
    assert layout is not None  # it was read before, without its head
    assumed = f"a {layout.arch} decoder under {layout.prefix!r} by its tensor names"
    kinds = dict(layout.kinds)
    for other in others:
        assumed += f"; another, of {other}, is left alone"
        for name in (*other.layout.blocks, other.head):
            if name in kinds:
                kinds[name] = ANOTHER
    return replace(layout, kinds=kinds, assumed=assumed)


def _find_under(checkpoint: Checkpoint, prefix: str, archs: Iterable[Arch]) -> _Candidate | None:
    """The decoder under a prefix: of those that are all there, the one that explains most.

    MappingError if two explain as much, but not the same; or if the only one's sizes do not fit.
    """
    found: list[_Candidate] = []
    misfit: MappingError | None = None
    for arch in archs:
        try:
            layout = read_layout(checkpoint, arch, prefix, "")
        except MappingError as error:
            misfit = misfit or error
            continue
        if layout:
            elements = sum(prod(checkpoint.tensors[name].shape) for name in layout.blocks)
            found.append(_Candidate(arch, layout, elements))
    if not found:
        if misfit:
            raise misfit
        return None
    best = min(found, key=lambda candidate: candidate.layout.unknown)
    for other in found:
        if other.layout.unknown == best.layout.unknown:
            _check_same(checkpoint, best.layout, other.layout)
    return best


def _check_same(checkpoint: Checkpoint, first: Layout, second: Layout) -> None:
    for name, blocks in first.blocks.items():
        if second.blocks.get(name) != blocks:
            raise MappingError(
                f"{checkpoint.path}: fits a {first.arch} and a {second.arch} decoder, which differ"
                f" in what {name} holds; declare which it is with --arch"
            )


def _assign_heads(
    checkpoint: Checkpoint, candidates: Sequence[_Candidate], heads: Collection[str]
) -> list[_Candidate]:
    """Each decoder with its head: of those that lie nearest to it, the nearest.

    A head lies near a decoder by the dotted parts that its name shares with the prefix; a head that
    is equally near to several decoders belongs to the largest. heads: how its name may end.
    """

    def nearness(name: str, candidate: _Candidate) -> tuple[int, int]:
        return _shared_parts(name, candidate.layout.prefix), candidate.elements

    possible = [_possible_heads(checkpoint, candidate, heads) for candidate in candidates]
    nearest: dict[str, tuple[int, int]] = {}
    for candidate, names in zip(candidates, possible, strict=True):
        for name in names:
            nearest[name] = max(nearness(name, candidate), nearest.get(name, (0, 0)))
    headed = []
    for candidate, names in zip(candidates, possible, strict=True):
        own = [name for name in names if nearness(name, candidate) == nearest[name]]
        head = max(own, key=lambda name: _shared_parts(name, candidate.layout.prefix), default="")
        headed.append(replace(candidate, head=head))
    return headed


def _possible_heads(
    checkpoint: Checkpoint, candidate: _Candidate, heads: Collection[str]
) -> list[str]:
    """What is named like a head and as wide as the embedding, with most of its rows."""
    layout = candidate.layout
    rows, *width = checkpoint.tensors[layout.prefix + candidate.arch.embed_name].shape
    return [
        name
        for name, span in checkpoint.tensors.items()
        if name not in layout.blocks
        and _last_parts(name) in heads
        and len(span.shape) == 2
        and [*span.shape[1:]] == width
        and 2 * span.shape[0] > rows
    ]


def _shared_parts(name: str, prefix: str) -> int:
    """How many leading dotted parts a name shares with a prefix."""
    pairs = zip(name.split("."), prefix.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _choose(
    checkpoint: Checkpoint, candidates: Sequence[_Candidate]
) -> tuple[_Candidate, list[_Candidate]]:
    """The language model among several decoders, and the others.

    If the config ties heads, or none has one, it is more than twice as large as any other; else it
    has a head, is more than twice as large as any other that has one, and none without is larger.
    MappingError names those between which it would be a guess.
    """

    def has_head(candidate: _Candidate) -> bool:
        return bool(candidate.head) or checkpoint.tied is True

    chosen, *others = sorted(candidates, key=lambda it: (has_head(it), it.elements), reverse=True)
    for other in others:
        alike = has_head(other) == has_head(chosen)
        if other.elements > (chosen.elements / 2 if alike else chosen.elements):
            prefix, head = chosen.layout.prefix, chosen.head or "lm_head.weight"
            raise MappingError(
                f"{checkpoint.path}: which decoder is the language model? {chosen} or {other};"
                f' declare it with --arch, such as spellings = [["{prefix}", "{head}"]]'
            )
    return chosen, others


# What is missing


def _no_decoder(checkpoint: Checkpoint, places: Sequence[tuple[Arch, str]]) -> MappingError:
    found = (
        f"{checkpoint.path}: no decoder found among its {len(checkpoint.tensors)} tensors"
        f" (first: {next(iter(checkpoint.tensors))})"
    )
    if not places:
        return MappingError(
            f"{found}; expected names such as model.embed_tokens.weight or those of a known family"
            " (see `archs`), or a declaration with --arch"
        )
    prefix, missing = _nearest_miss(checkpoint, places)
    return MappingError(
        f"{found}; what comes nearest, under {prefix!r}, has no {missing}; get the files that"
        " lack, or declare with --arch how it is spelled"
    )


def _nearest_miss(checkpoint: Checkpoint, places: Sequence[tuple[Arch, str]]) -> tuple[str, str]:
    """Of (declaration, prefix), the prefix that has most of a decoder, and what it lacks first."""
    misses = [(*find_missing(checkpoint, arch, prefix), prefix) for arch, prefix in places]
    _, missing, prefix = max(misses, key=lambda miss: miss[0])
    return prefix, missing
