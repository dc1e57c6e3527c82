"""The language model of a checkpoint of an unknown class, found by the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import prod

from ..checkpoints.checkpoint import Checkpoint
from ..errors import MappingError
from .arch import Arch, guess_kind
from .block import Block
from .families import UNDECLARED
from .layout import Layout
from .names import measure_fit
from .reader import Reader

ANOTHER = "another decoder"
"""The kind of what belongs to a decoder that was not taken for the language model."""
_HEADS = ("embed_out.weight", "unembed.weight", "head.weight")
"""What a head may be called besides what declarations say."""
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
"""What config.json may call the number of layers and the width of a decoder."""


@dataclass(frozen=True, slots=True)
class _Decoder:
    """A decoder found in a checkpoint.

    sizes: depth and width. elements: without its head; head: its name or ``.
    """

    layout: Layout
    sizes: tuple[int, int]
    elements: int
    head: str = ""

    def __str__(self) -> str:
        return (
            f"{self.layout.layers} layers under {self.layout.prefix!r}"
            f" ({self.elements / 1e6:,.0f} million parameters,"
            f" {f'head {self.head}' if self.head else 'no head'})"
        )


def find_by_structure(
    reader: Reader, known: Sequence[Arch], declared: Sequence[Arch] = ()
) -> Layout:
    """The layout of the decoder that stands out; `assumed` says which it was, and what else is."""
    archs = (*declared, *known, UNDECLARED)
    checkpoint = reader.checkpoint
    prefixes = _find_prefixes(checkpoint, archs)
    candidates = [
        decoder for prefix in prefixes if (decoder := _find_decoder(reader, prefix, declared))
    ]
    if not candidates:
        raise _no_decoder(reader, prefixes, archs)
    heads = {*_HEADS, *(_last_parts(head) for arch in archs for _, head in arch.spellings if head)}
    chosen, others = _choose(checkpoint, _assign_heads(checkpoint, candidates, heads))
    layout = _add_head(checkpoint, chosen.layout, chosen.head)
    assumed = f"a {layout.arch} decoder under {layout.prefix!r} by its tensor names"
    kinds = dict(layout.kinds)
    for other in others:
        assumed += f"; another, of {other}, is left alone"
        for name in (*other.layout.blocks, other.head):
            if name in kinds:
                kinds[name] = ANOTHER
    return replace(layout, kinds=kinds, assumed=assumed)


def _find_prefixes(checkpoint: Checkpoint, archs: Sequence[Arch]) -> list[str]:
    """What stands before the name of an embedding, the shortest first."""
    embeddings = tuple({name for arch in archs for name in arch.embed_names})
    prefixes = {
        full[: -len(name)]
        for full in checkpoint.tensors
        if full.endswith(embeddings)
        for name in embeddings
        if full == name or full.endswith(f".{name}")
    }
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))


def _find_decoder(reader: Reader, prefix: str, first: Sequence[Arch]) -> _Decoder | None:
    """The decoder under a prefix, if there is one."""
    best = reader.read_best(prefix, first)
    if best is None:
        return None
    spelled, found = best
    if spelled.others:  # they are of its own family
        found = reader.read(replace(spelled, others={}), prefix, "") or found
    layout = replace(found, arch=f"{spelled.name}-style", shared_ids=None)
    elements = sum(
        prod(reader.checkpoint.tensors[name].shape)
        for name, blocks in layout.blocks.items()
        if blocks[0].role.startswith(("embed", "layers."))
    )
    return _Decoder(layout, sizes_of(reader, layout), elements)


def _no_decoder(reader: Reader, prefixes: Sequence[str], archs: Sequence[Arch]) -> MappingError:
    """Say what comes nearest to a decoder, and what it lacks."""
    tensors = reader.checkpoint.tensors
    found = (
        f"{reader.checkpoint.path}: no decoder found among its {len(tensors)} tensors"
        f" (first: {next(iter(tensors))})"
    )
    fits = [
        (measure_fit(reader.stem(prefix), arch), prefix) for prefix in prefixes for arch in archs
    ]
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


# Heads


def _last_parts(name: str) -> str:
    """The last two dotted parts of a name, such as `lm_head.weight`."""
    return ".".join(name.split(".")[-2:])


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


def _add_head(checkpoint: Checkpoint, layout: Layout, head: str) -> Layout:
    """A layout that was read without its head, with it."""
    held = {head: "head", f"{head.removesuffix('weight')}bias": "head.bias"}
    blocks = {
        name: (Block(role, 0, checkpoint.tensors[name].shape[0]),)
        for name, role in held.items()
        if name in checkpoint.tensors
    }
    kinds = {name: kind for name, kind in layout.kinds.items() if name not in blocks}
    return replace(layout, blocks={**layout.blocks, **blocks}, kinds=kinds)


def _possible_heads(
    checkpoint: Checkpoint, candidate: _Decoder, heads: Collection[str]
) -> list[str]:
    """What is named like a head, lies around the decoder, and is as wide as the embedding.

    It has most of the embedding's rows as well: CSM's head is of audio codes.
    """
    layout = candidate.layout
    rows, *width = checkpoint.tensors[layout.embedding].shape
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


# Which of several


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
        sizes = config_sizes(level)
        fitting = [candidate for candidate in candidates if candidate.sizes == sizes]
        if fitting:
            return fitting
    return []


def sizes_of(reader: Reader, layout: Layout) -> tuple[int, int]:
    """How many layers a decoder has, foreign ones included, and its width."""
    names = reader.stem(layout.prefix).names
    numbers = [name.number for name in names if name.stack and name.full in layout.blocks]
    *_, width = (0, *reader.checkpoint.tensors[layout.embedding].shape[1:])
    return max(numbers) + 1, width


def config_sizes(level: Mapping[str, object]) -> tuple[int | None, int | None]:
    """The number of layers and the width, as a level of config.json has them."""
    return _first_number(level, _LAYERS), _first_number(level, _WIDTHS)


def _first_number(level: Mapping[str, object], names: Sequence[str]) -> int | None:
    """The first of these settings that is a number."""
    values = (level.get(name) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
