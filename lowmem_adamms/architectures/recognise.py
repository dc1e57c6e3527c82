"""Which declaration a checkpoint is of: by its config's class, by its names, else by structure.

By structure means: any decoder that some declaration spells, under any prefix. What was taken for
granted then stands in the layout's `assumed`; where that would be a guess, it is an error. Leaves
to others: reading the names with one declaration (`arch.py`), the declarations (`archs.py`, and
`declare.py` for a user's own).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count, takewhile
from math import prod

from ..checkpoints.checkpoint import Checkpoint
from ..errors import MappingError
from .layout import ESSENTIAL, UNKNOWN, Arch, Layout, embed_name, read_layout

ANOTHER = "another decoder"
"""The kind of what belongs to a decoder that was not taken for the language model."""

_LAYER = re.compile(r"\.(?:0|[1-9][0-9]{0,5})\.")
_NOT_STRUCTURE = frozenset(("name", "source", "classes", "spellings", "others", "shared_ids"))


def recognise(
    checkpoint: Checkpoint, archs: Sequence[Arch], declared: Sequence[Arch] = ()
) -> Layout:
    """The layout of a checkpoint. `declared`: the user's own declarations, which go before `archs`.

    In this order: a declared class, a known class, names that a declared or a known spelling
    explains altogether, a declared spelling that leaves some unexplained, a known decoder under any
    prefix. MappingError if nothing fits, or if several decoders fit and none stands out.
    """
    announced = _announced(checkpoint)
    own = [(arch, replace(fit, declared=True)) for arch, fit in _fits(checkpoint, declared)]
    if named := _of_class(own, announced):
        return named
    _check_declared(checkpoint, declared, announced)
    named_so = [arch for arch in archs if announced & set(arch.classes)]
    if named := _of_class(_fits(checkpoint, named_so), announced):
        return named
    known = _fits(checkpoint, archs)
    says = (
        f"config.json announces {', '.join(sorted(announced))}" if announced else "no config.json"
    )
    layouts = [layout for _, layout in (*own, *known) if not _unexplained(layout)]
    layouts += sorted((layout for _, layout in own), key=_unexplained)
    for layout in layouts:
        by = ", declared by --arch," if layout.declared else ""
        return replace(layout, assumed=f"{says}; taken for {layout.arch}{by} by its tensor names")
    layout = _by_structure(checkpoint, _structures((*declared, *archs)))
    return replace(layout, assumed=f"{says}; {layout.assumed}")


def _announced(checkpoint: Checkpoint) -> set[str]:
    spoken = checkpoint.config.get("architectures")
    spoken = spoken if isinstance(spoken, list) else [spoken]
    return {name for name in spoken if isinstance(name, str)}


def _fits(checkpoint: Checkpoint, archs: Iterable[Arch]) -> list[tuple[Arch, Layout]]:
    """The layout under each spelling of each declaration whose decoder is all there."""
    return [
        (arch, layout)
        for arch in archs
        for prefix, head in arch.spellings
        if (layout := read_layout(checkpoint, arch, prefix, head)) is not None
    ]


def _of_class(fits: Iterable[tuple[Arch, Layout]], announced: set[str]) -> Layout | None:
    named = [layout for arch, layout in fits if announced & set(arch.classes)]
    return min(named, key=_unexplained) if named else None


def _unexplained(layout: Layout) -> int:
    return sum(kind == UNKNOWN for kind in layout.kinds.values())


def _check_declared(checkpoint: Checkpoint, declared: Iterable[Arch], announced: set[str]) -> None:
    """MappingError where the user declared this very class, but its decoder is not all there."""
    for arch in declared:
        for name in sorted(announced & set(arch.classes)) if arch.spellings else ():
            prefix, lost = _nearest(checkpoint, [(arch, prefix) for prefix, _ in arch.spellings])
            raise MappingError(
                f"{checkpoint.path}: config.json announces {name}, which --arch declares as"
                f" {arch.name}, but its decoder is not all there: under {prefix!r} there is no"
                f" {lost}; mend spellings or decoder of the declaration"
            )


# By structure


@dataclass(frozen=True, slots=True)
class _Structure:
    """A decoder that some declaration spells. heads: how names of its head may end."""

    arch: Arch
    heads: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A decoder found in a checkpoint. elements: without its head; head: its name or ``."""

    structure: _Structure
    layout: Layout
    elements: int
    head: str = ""

    def __str__(self) -> str:
        return (
            f"{self.layout.layers} layers under {self.layout.prefix!r}"
            f" ({self.elements / 1e6:,.0f} million parameters,"
            f" {f'head {self.head}' if self.head else 'no head'})"
        )


def _structures(archs: Iterable[Arch]) -> list[_Structure]:
    """Every distinct decoder among the declarations, named after the first that has it."""
    names = [field.name for field in fields(Arch) if field.name not in _NOT_STRUCTURE]
    found: list[tuple[list[object], Arch, set[str]]] = []
    for arch in archs:
        key = [getattr(arch, name) for name in names]
        heads = {".".join(head.split(".")[-2:]) for _, head in arch.spellings if head}
        for other, _, others_heads in found:
            if other == key:
                others_heads |= heads
                break
        else:
            bare = replace(
                arch,
                name=f"{arch.name}-style",
                classes=(),
                spellings=(),
                others={},
                shared_ids=None,
            )
            found.append((key, bare, {"lm_head.weight"} | heads))
    return [_Structure(arch, frozenset(heads)) for _, arch, heads in found]


def _by_structure(checkpoint: Checkpoint, structures: Sequence[_Structure]) -> Layout:
    """The layout of the decoder that stands out; `assumed` says which it was, and what else is."""
    places = [(each, prefix) for each in structures for prefix in _prefixes(checkpoint, each.arch)]
    candidates: list[_Candidate] = []
    for prefix in sorted({prefix for _, prefix in places}, key=len):
        here = [structure for structure, place in places if place == prefix]
        if found := _under(checkpoint, prefix, here):
            candidates.append(found)
    if not candidates:
        raise _no_decoder(checkpoint, [(each.arch, prefix) for each, prefix in places])
    chosen, others = _stands_out(checkpoint, _with_heads(checkpoint, candidates))
    layout = read_layout(checkpoint, chosen.structure.arch, chosen.layout.prefix, chosen.head)
    assert layout is not None  # a head more is no decoder less
    why = f"a {layout.arch} decoder under {layout.prefix!r} by its tensor names"
    kinds = dict(layout.kinds)
    for other in others:
        why += f"; another, of {other}, is left alone"
        theirs = {*other.layout.blocks, other.head} & {*kinds}
        kinds |= dict.fromkeys(theirs, ANOTHER)
    return replace(layout, kinds=kinds, assumed=why)


def _prefixes(checkpoint: Checkpoint, arch: Arch) -> list[str]:
    """Every prefix under which the arch's embedding stands."""
    embed = embed_name(arch)
    return [name.removesuffix(embed) for name in checkpoint.tensors if name.endswith(embed)]


def _under(
    checkpoint: Checkpoint, prefix: str, structures: Iterable[_Structure]
) -> _Candidate | None:
    """The decoder under a prefix: of those spellings that are all there, the one that says most.

    MappingError if two say as much, but not the same; or if the only one's sizes do not fit.
    """
    found: list[_Candidate] = []
    misfit: MappingError | None = None
    for structure in structures:
        try:
            layout = read_layout(checkpoint, structure.arch, prefix, "")
        except MappingError as error:
            misfit = misfit or error
            continue
        if layout:
            shapes = (checkpoint.tensors[name].shape for name in layout.blocks)
            found.append(_Candidate(structure, layout, sum(map(prod, shapes))))
    if not found:
        if misfit:
            raise misfit
        return None
    best = min(found, key=lambda candidate: _unexplained(candidate.layout))
    for other in found:
        if _unexplained(other.layout) == _unexplained(best.layout):
            _check_same(checkpoint, best.layout, other.layout)
    return best


def _with_heads(checkpoint: Checkpoint, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Each decoder with its head: the likeliest that is nearer to no other, nor to a larger one."""
    likely = [_likely_heads(checkpoint, candidate) for candidate in candidates]
    nearest: dict[str, tuple[int, int]] = {}
    for candidate, names in zip(candidates, likely, strict=True):
        for name in names:
            claim = _claim(name, candidate)
            nearest[name] = max(claim, nearest.get(name, claim))
    headed = []
    for candidate, names in zip(candidates, likely, strict=True):
        own = [name for name in names if _claim(name, candidate) == nearest[name]]
        head = max(own, key=lambda name: _shared_parts(name, candidate.layout.prefix), default="")
        headed.append(replace(candidate, head=head))
    return headed


def _likely_heads(checkpoint: Checkpoint, candidate: _Candidate) -> list[str]:
    """What is named like a head and as wide as the embedding, with most of its rows."""
    layout, structure = candidate.layout, candidate.structure
    embed = checkpoint.tensors[layout.prefix + embed_name(structure.arch)].shape
    return [
        name
        for name, span in checkpoint.tensors.items()
        if name not in layout.blocks
        and ".".join(name.split(".")[-2:]) in structure.heads
        and len(span.shape) == 2
        and span.shape[1:] == embed[1:]
        and 2 * span.shape[0] > embed[0]
    ]


def _claim(name: str, candidate: _Candidate) -> tuple[int, int]:
    """How near a head stands to a decoder; of equally near ones, the larger decoder has it."""
    return _shared_parts(name, candidate.layout.prefix), candidate.elements


def _shared_parts(name: str, prefix: str) -> int:
    """How many leading dotted parts a name shares with a prefix."""
    same = (a == b for a, b in zip(name.split("."), prefix.split("."), strict=False))
    return sum(1 for _ in takewhile(bool, same))


def _check_same(checkpoint: Checkpoint, first: Layout, second: Layout) -> None:
    for name, blocks in first.blocks.items():
        if second.blocks.get(name) != blocks:
            raise MappingError(
                f"{checkpoint.path}: fits a {first.arch} and a {second.arch} decoder, which differ"
                f" in what {name} holds; declare which it is with --arch"
            )


def _stands_out(
    checkpoint: Checkpoint, candidates: Sequence[_Candidate]
) -> tuple[_Candidate, list[_Candidate]]:
    """The language model among several decoders, and the others.

    If the config ties heads, or none has one, it is more than twice as large as any other; else it
    has a head, is more than twice as large as any other that has one, and none without is larger.
    MappingError names those between which it would be a guess.
    """

    def headed(candidate: _Candidate) -> bool:
        return bool(candidate.head) or checkpoint.tied is True

    chosen, *others = sorted(candidates, key=lambda it: (headed(it), it.elements), reverse=True)
    for other in others:
        allowed = chosen.elements / 2 if headed(other) == headed(chosen) else chosen.elements
        if other.elements > allowed:
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
    prefix, lost = _nearest(checkpoint, places)
    return MappingError(
        f"{found}; what comes nearest, under {prefix!r}, has no {lost}; get the files that"
        " lack, or declare with --arch how it is spelled"
    )


def _nearest(checkpoint: Checkpoint, places: Sequence[tuple[Arch, str]]) -> tuple[str, str]:
    """Of (declaration, prefix), the prefix that has most of a decoder, and what it lacks first."""
    found = [(_lacks(checkpoint, arch, prefix), prefix) for arch, prefix in places]
    (_, lost), prefix = max(found, key=lambda it: it[0][0])
    return prefix, lost


def _lacks(checkpoint: Checkpoint, arch: Arch, prefix: str) -> tuple[int, str]:
    """How many of a declaration's essential names are there, and the first that is not."""
    essential = [
        suffix
        for suffix, roles in arch.decoder.items()
        if any(_essence(role) in (*ESSENTIAL, "embed", "norm") for role in roles.split())
    ]
    names = {name[len(prefix) :] for name in checkpoint.tensors if name.startswith(prefix)}
    there = {_LAYER.sub(".#.", name, count=1) for name in names} & set(essential)
    lost = next((suffix for suffix in essential if suffix not in there), None)
    if lost:
        return len(there), prefix + lost.replace("#", "0")
    numbered = (
        suffix.replace("#", str(layer))
        for layer in count()  # ends: the names do
        for suffix in essential
        if "#" in suffix
    )
    return len(there), prefix + next(name for name in numbered if name not in names)


def _essence(role: str) -> str:
    return role.partition("@")[0].removeprefix("layers.#.")
