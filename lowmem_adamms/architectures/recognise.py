"""Which declaration a checkpoint is of, and where in it the language model is.

What is in the file decides how its decoder is spelled: of all declarations, the one that explains
most. The announced class then gives the family's name and what is around the decoder. A decoder of
an unknown class is looked for under any prefix; what was taken for granted stands in the layout's
`assumed`, and where that would be a guess, it is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from math import prod

from ..checkpoints.checkpoint import Checkpoint
from ..errors import MappingError
from .families import UNDECLARED
from .layout import (
    UNKNOWN,
    Arch,
    Fit,
    Layout,
    Stem,
    guess_kind,
    measure_fit,
    read_layout,
    read_stem,
)

ANOTHER = "another decoder"
"""The kind of what belongs to a decoder that was not taken for the language model."""
_HEADS = ("embed_out.weight", "unembed.weight", "head.weight")
"""What a head may be called besides what declarations say."""
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
"""What config.json may call the number of layers and the width of a decoder."""


def recognise(
    checkpoint: Checkpoint, archs: Sequence[Arch], declared: Sequence[Arch] = ()
) -> Layout:
    """The layout of a checkpoint. `declared`: the user's own declarations, which go before `archs`.

    In this order: a declared class, a known class, names that a declared or a known spelling
    explains altogether, a declared spelling that leaves some unexplained, a decoder under any
    prefix. MappingError if nothing fits, or if several decoders fit and none stands out.
    """
    _refuse_encoder_decoder(checkpoint)
    stems = _Stems(checkpoint, archs, declared)
    layout = _recognise(stems, archs, declared)
    _check_depth(stems, layout)
    kinds = {
        name: (guess_kind(name) or UNKNOWN) if kind == UNKNOWN else kind
        for name, kind in layout.kinds.items()
    }
    return replace(layout, kinds=kinds)


def _recognise(stems: _Stems, archs: Sequence[Arch], declared: Sequence[Arch]) -> Layout:
    checkpoint = stems.checkpoint
    announced = _announced_classes(checkpoint)
    if layout := _of_class(stems, declared, announced, as_declared=True):
        return replace(layout, declared=True)
    _check_declared_class(stems, declared, announced)
    if layout := _of_class(stems, archs, announced):
        return layout
    config = f"config.json announces {', '.join(sorted(announced))}" if announced else ""
    config = config or "no config.json"
    own = [replace(layout, declared=True) for layout in _fits(stems, declared, as_declared=True)]
    known = (layout for arch in archs for layout in _fits(stems, [arch], exactly=True))
    by_names = (layout for layout in chain(own, known) if not layout.unknown)
    nearest = min(own, key=lambda layout: layout.unknown, default=None)
    if layout := next(by_names, nearest):
        by = ", declared by `arch`," if layout.declared else ""
        return replace(layout, assumed=f"{config}; taken for {layout.arch}{by} by its tensor names")
    layout = _by_structure(stems, (*declared, *archs, UNDECLARED), declared)
    return replace(layout, assumed=f"{config}; {layout.assumed}")


def _announced_classes(checkpoint: Checkpoint) -> set[str]:
    classes = checkpoint.config.get("architectures")
    classes = classes if isinstance(classes, list) else [classes]
    return {name for name in classes if isinstance(name, str)}


class _Stems:
    """The names of a checkpoint under each prefix that is asked for, and how they are spelled."""

    def __init__(
        self, checkpoint: Checkpoint, archs: Sequence[Arch], declared: Sequence[Arch]
    ) -> None:
        self.checkpoint = checkpoint
        self._archs = tuple(archs)
        known = (*archs, *declared, UNDECLARED)
        self._embeddings = {name for arch in known for name in arch.embed_names}
        self._stems: dict[str, Stem] = {}

    def __getitem__(self, prefix: str) -> Stem:
        if prefix not in self._stems:
            tensors = self.checkpoint.tensors
            has_embedding = any(prefix + name in tensors for name in self._embeddings)
            empty = Stem(prefix, (), {}, {})
            self._stems[prefix] = read_stem(self.checkpoint, prefix) if has_embedding else empty
        return self._stems[prefix]

    def ranked(self, prefix: str, first: Sequence[Arch] = ()) -> list[_Candidate]:
        """The spellings that fit under a prefix, the best first; of equals, those of `first`."""
        own = {_spelling(arch) for arch in first}
        archs: dict[tuple[object, ...], Arch] = {}
        for arch in (*first, *self._archs, UNDECLARED):
            archs.setdefault(_spelling(arch), arch)
        found = []
        for spelling, arch in archs.items():
            fit = measure_fit(self[prefix], arch)
            if not fit.missing:
                rank = (*fit.score, spelling in own, arch is not UNDECLARED)
                found.append(_Candidate(rank, arch, fit))
        return sorted(found, key=lambda candidate: candidate.rank, reverse=True)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An Arch that fits what is under a prefix; the best has the highest rank."""

    rank: tuple[int, ...]
    arch: Arch
    fit: Fit


def _spelling(arch: Arch) -> tuple[object, ...]:
    """What two families that spell their decoders alike have in common."""
    return id(arch.decoder), arch.interleaved, arch.head_dim, *arch.foreign_layers


def _fits(
    stems: _Stems, archs: Iterable[Arch], *, as_declared: bool = False, exactly: bool = False
) -> list[Layout]:
    """The layout under each spelling of each declaration that has a decoder there.

    as_declared: read with this declaration even where another explains more. exactly: only where
    none explains more, and nothing in the layers is left to its own name. Those that are spelled as
    their declaration has it come first.
    """
    layouts: list[Layout] = []
    respelled: list[Layout] = []
    for arch in archs:
        for prefix, head in arch.spellings:
            try:
                best = None if as_declared else _read_best(stems, prefix, [arch], head)
            except MappingError:
                if exactly:
                    continue
                raise
            if exactly and (best is None or best.fit.undeclared or not best.is_of(arch)):
                continue
            if best and best.is_of(arch):
                layouts.append(best.layout)
                continue
            family = arch.respelled(best.arch) if best else arch
            if layout := read_layout(stems.checkpoint, family, prefix, head, stems[prefix]):
                (respelled if best else layouts).append(layout)
    return layouts + respelled


def _of_class(
    stems: _Stems, archs: Iterable[Arch], announced: set[str], *, as_declared: bool = False
) -> Layout | None:
    """Of the declarations of an announced class, the layout that explains most."""
    of_class = [arch for arch in archs if announced & set(arch.classes)]
    layouts = _fits(stems, of_class, as_declared=as_declared)
    return min(layouts, key=lambda layout: layout.unknown, default=None)


def _check_declared_class(stems: _Stems, declared: Iterable[Arch], announced: set[str]) -> None:
    """MappingError where the user declared this very class, but its decoder is not there."""
    for arch in declared:
        for name in sorted(announced & set(arch.classes)):
            found = [read_stem(stems.checkpoint, prefix) for prefix, _ in arch.spellings]
            fits = [measure_fit(stem, arch) for stem in found]
            fit = max(fits, key=lambda fit: fit.score)
            raise MappingError(
                f"{stems.checkpoint.path}: config.json announces {name}, which `arch` declares as"
                f" {arch.name}, but its decoder is not there: there is no {fit.missing}; mend"
                " spellings or decoder of the declaration"
            )


def _check_depth(stems: _Stems, layout: Layout) -> None:
    """Raise MappingError if config.json speaks of more layers in a decoder of this width."""
    checkpoint = stems.checkpoint
    depth, *width = _depth_and_width(stems, layout)
    for level in checkpoint.config_levels:
        layers = _first_number(level, _LAYERS)
        if layers and layers > depth and [_first_number(level, _WIDTHS)] == width:
            raise MappingError(
                f"{checkpoint.path}: holds {depth} decoder layers under {layout.prefix!r},"
                f" config.json says {layers}; get the files that lack"
            )


def _depth_and_width(stems: _Stems, layout: Layout) -> tuple[int, ...]:
    """How many layers a decoder has, foreign ones included, and the length of a token's row."""
    numbers = [
        name.number
        for name in stems[layout.prefix].names
        if name.stack and name.full in layout.blocks
    ]
    embedding, _ = layout.roles()["embed"]
    return max(numbers) + 1, *stems.checkpoint.tensors[embedding].shape[1:]


# By structure


@dataclass(frozen=True, slots=True)
class _Decoder:
    """A decoder found in a checkpoint.

    sizes: depth and width. elements: without its head; head: its name or ``.
    """

    arch: Arch
    layout: Layout
    sizes: tuple[int, ...]
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


def _by_structure(stems: _Stems, archs: Sequence[Arch], first: Sequence[Arch]) -> Layout:
    """The layout of the decoder that stands out; `assumed` says which it was, and what else is."""
    checkpoint = stems.checkpoint
    heads = {_last_parts(head) for arch in archs for _, head in arch.spellings if head}
    heads |= {*_HEADS}
    embeddings = {name for arch in archs for name in arch.embed_names}
    prefixes = {
        full[: -len(name)]
        for full in checkpoint.tensors
        for name in embeddings
        if full.endswith(name) and full[: -len(name)][-1:] in ("", ".")
    }
    candidates: list[_Decoder] = []
    for prefix in sorted(prefixes, key=len):
        if best := _read_best(stems, prefix, first):
            arch = replace(best.arch, name=f"{best.arch.name}-style", others={}, shared_ids=None)
            found = replace(best.layout, arch=arch.name)
            elements = sum(
                prod(checkpoint.tensors[name].shape)
                for name, blocks in found.blocks.items()
                if blocks[0].role.startswith(("embed", "layers."))
            )
            candidates.append(_Decoder(arch, found, _depth_and_width(stems, found), elements))
    if not candidates:
        raise _no_decoder(stems, prefixes, archs)
    chosen, others = _choose(checkpoint, _assign_heads(checkpoint, candidates, heads))
    prefix = chosen.layout.prefix
    layout = read_layout(checkpoint, chosen.arch, prefix, chosen.head, stems[prefix])
    assert layout is not None  # it was read before, without its head
    assumed = f"a {layout.arch} decoder under {layout.prefix!r} by its tensor names"
    kinds = dict(layout.kinds)
    for other in others:
        assumed += f"; another, of {other}, is left alone"
        for name in (*other.layout.blocks, other.head):
            if name in kinds:
                kinds[name] = ANOTHER
    return replace(layout, kinds=kinds, assumed=assumed)


@dataclass(frozen=True, slots=True)
class _Reading:
    """How a decoder is read best: with this Arch, which explains so much, into this layout."""

    rank: tuple[int, ...]
    arch: Arch
    fit: Fit
    layout: Layout

    def is_of(self, arch: Arch) -> bool:
        """Whether a family spells its decoder so."""
        return _spelling(arch) == _spelling(self.arch)


def _read_best(
    stems: _Stems, prefix: str, first: Sequence[Arch] = (), head: str = ""
) -> _Reading | None:
    """Read what is under a prefix with the declaration that explains most of it.

    Of equals, those of `first`. MappingError if two others explain as much, but not the same; or if
    the sizes of fused tensors do not fit the only one that finds all that is essential.
    """
    best: _Reading | None = None
    misfit: MappingError | None = None
    for candidate in stems.ranked(prefix, first):
        rank, arch, fit = candidate.rank, candidate.arch, candidate.fit
        if best and rank < best.rank:
            break
        if best and fit.unused != best.fit.unused:  # it speaks of what is not there
            continue
        try:
            layout = read_layout(stems.checkpoint, arch, prefix, head, stems[prefix])
        except MappingError as error:
            if fit.is_complete:
                raise
            misfit = misfit or error
            continue
        assert layout is not None  # else it would not be ranked
        if best:
            _check_same(stems.checkpoint, best.layout, layout)
        else:
            best = _Reading(rank, arch, fit, layout)
    if misfit and not best:
        raise misfit
    return best


def _check_same(checkpoint: Checkpoint, first: Layout, second: Layout) -> None:
    for name, blocks in first.blocks.items():
        if second.blocks.get(name) != blocks:
            raise MappingError(
                f"{checkpoint.path}: fits a {first.arch} and a {second.arch} decoder, which differ"
                f" in what {name} holds; declare which it is with `arch`"
            )


def _assign_heads(
    checkpoint: Checkpoint, candidates: Sequence[_Decoder], heads: Collection[str]
) -> list[_Decoder]:
    """Each decoder with its head: of those that lie nearest to it, the nearest.

    A head lies near a decoder by the dotted parts that its name shares with the prefix; a head that
    is equally near to several decoders belongs to the largest. heads: how its name may end.
    """

    def nearness(name: str, candidate: _Decoder) -> tuple[int, int]:
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
    checkpoint: Checkpoint, candidate: _Decoder, heads: Collection[str]
) -> list[str]:
    """What is named like a head, lies around the decoder, and is as wide as the embedding.

    It has most of the embedding's rows as well: CSM's head is of audio codes.
    """
    layout = candidate.layout
    embedding, _ = layout.roles()["embed"]
    rows, *width = checkpoint.tensors[embedding].shape
    return [
        name
        for name, span in checkpoint.tensors.items()
        if (leaf := _last_parts(name)) in heads
        and layout.prefix.startswith(name.removesuffix(leaf))
        and (name not in layout.blocks or layout.blocks[name][0].role == leaf)
        and len(span.shape) == 2
        and [*span.shape[1:]] == width
        and 2 * span.shape[0] > rows
    ]


def _shared_parts(name: str, prefix: str) -> int:
    """How many leading dotted parts a name shares with a prefix."""
    pairs = zip(name.split("."), prefix.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _choose(
    checkpoint: Checkpoint, candidates: Sequence[_Decoder]
) -> tuple[_Decoder, list[_Decoder]]:
    """The language model among several decoders, and the others.

    Its prefix does not speak of something else, such as a talker, and it has the depth and width
    that config.json gives the language model. Where that fits none or several, size decides: if
    the config ties heads, or none has one, it is more than twice as large as any other; else it has
    a head, is more than twice as large as any other that has one, and none without is larger.
    MappingError names those between which it would be a guess.
    """

    def has_head(candidate: _Decoder) -> bool:
        return bool(candidate.head) or checkpoint.tied is True

    speaking = [each for each in candidates if not guess_kind(each.layout.prefix)] or candidates
    fitting = _of_config_sizes(checkpoint, speaking) or speaking
    chosen, *others = sorted(fitting, key=lambda it: (has_head(it), it.elements), reverse=True)
    for other in others:
        alike = has_head(other) == has_head(chosen)
        if other.elements > (chosen.elements / 2 if alike else chosen.elements):
            prefix, head = chosen.layout.prefix, chosen.head or "lm_head.weight"
            raise MappingError(
                f"{checkpoint.path}: which decoder is the language model? {chosen} or {other};"
                f' declare it with `arch`, such as spellings = [["{prefix}", "{head}"]]'
            )
    return chosen, [candidate for candidate in candidates if candidate is not chosen]


def _of_config_sizes(checkpoint: Checkpoint, candidates: Sequence[_Decoder]) -> list[_Decoder]:
    """The decoders that are as deep and wide as the outermost level of the config that fits any."""
    for level in checkpoint.config_levels:
        sizes = _first_number(level, _LAYERS), _first_number(level, _WIDTHS)
        fitting = [candidate for candidate in candidates if candidate.sizes == sizes]
        if fitting:
            return fitting
    return []


def _first_number(level: Mapping[str, object], names: Sequence[str]) -> int | None:
    """The first of these settings that is a number."""
    values = (level.get(name) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


# What is missing


def _no_decoder(stems: _Stems, prefixes: Collection[str], archs: Sequence[Arch]) -> MappingError:
    """Say what comes nearest to a decoder, and what it lacks."""
    tensors = stems.checkpoint.tensors
    found = (
        f"{stems.checkpoint.path}: no decoder found among its {len(tensors)} tensors"
        f" (first: {next(iter(tensors))})"
    )
    fits = [(measure_fit(stems[prefix], arch), prefix) for prefix in prefixes for arch in archs]
    if not fits:
        return MappingError(
            f"{found}; expected names such as model.embed_tokens.weight or those of a known family"
            " (see `archs`), or a declaration with `arch`"
        )
    fit, prefix = max(fits, key=lambda each: each[0].score)
    what_to_do = "declare with `arch` how it is spelled"
    if fit.layers and str(fit.missing).endswith("."):  # some layers are there
        what_to_do = f"get the files that lack, or {what_to_do}"
    return MappingError(
        f"{found}; what comes nearest, under {prefix!r}, has no {fit.missing}; {what_to_do}"
    )


def _refuse_encoder_decoder(checkpoint: Checkpoint) -> None:
    """Raise MappingError if config.json says that the decoder attends to an encoder."""
    if any(level.get("is_encoder_decoder") is True for level in checkpoint.config_levels):
        raise MappingError(
            f"{checkpoint.path}: an encoder-decoder, by its config.json; it descends from no"
            " language model that is a decoder alone, as both sides of a merge must"
        )
