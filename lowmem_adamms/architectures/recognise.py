"""Which declaration a checkpoint is of, and where in it the language model is.

What is in the file decides how its decoder is spelled: of all declarations, the one that explains
most. The announced class then gives the family's name and what is around the decoder. A decoder of
an unknown class is looked for under any prefix; what was taken for granted stands in the layout's
`assumed`, and where that would be a guess, it is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..checkpoints.checkpoint import Checkpoint
from ..errors import MappingError
from .arch import UNKNOWN, Arch, guess_kind
from .layout import Layout
from .names import measure_fit
from .reader import Reader
from .structure import config_sizes, find_by_structure, sizes_of


def recognise(
    checkpoint: Checkpoint, archs: Sequence[Arch], declared: Sequence[Arch] = ()
) -> Layout:
    """The layout of a checkpoint. `declared`: the user's own declarations, which go before `archs`.

    In this order: a declared class, a known class, a declared spelling, a decoder under any prefix.
    MappingError if nothing fits, or if several decoders fit and none stands out.
    """
    _refuse_encoder_decoder(checkpoint)
    reader = Reader(checkpoint, archs)
    layout = _recognise(reader, archs, declared)
    _check_depth(reader, layout)
    kinds = {
        name: (guess_kind(name) or UNKNOWN) if kind == UNKNOWN else kind
        for name, kind in layout.kinds.items()
    }
    return replace(layout, kinds=kinds)


def _recognise(reader: Reader, archs: Sequence[Arch], declared: Sequence[Arch]) -> Layout:
    announced = _announced_classes(reader.checkpoint)
    own = [arch for arch in declared if announced & set(arch.classes)]
    if layout := _read_as_declared(reader, own):
        return replace(layout, declared=True)
    if own:
        raise _no_declared_decoder(reader, own[0], min(announced & set(own[0].classes)))
    known = [arch for arch in archs if announced & set(arch.classes)]
    if layout := _read_as_spelled(reader, known):
        return layout
    config = f"config.json announces {', '.join(sorted(announced))}" if announced else ""
    config = config or "no config.json"
    if layout := _read_as_declared(reader, declared):
        found = f"taken for {layout.arch}, declared by `arch`, by its tensor names"
        return replace(layout, declared=True, assumed=f"{config}; {found}")
    layout = find_by_structure(reader, archs, declared)
    return replace(layout, assumed=f"{config}; {layout.assumed}")


def _announced_classes(checkpoint: Checkpoint) -> set[str]:
    classes = checkpoint.config.get("architectures")
    classes = classes if isinstance(classes, list) else [classes]
    return {name for name in classes if isinstance(name, str)}


def _read_as_declared(reader: Reader, archs: Iterable[Arch]) -> Layout | None:
    """The layout with the fewest unknown tensors, even where another spelling explains more."""
    spellings = [(arch, *spelling) for arch in archs for spelling in arch.spellings]
    layouts = [layout for each in spellings if (layout := reader.read(*each))]
    return min(layouts, key=lambda layout: layout.unknown, default=None)


def _read_as_spelled(reader: Reader, archs: Iterable[Arch]) -> Layout | None:
    """The layout with the fewest unknown tensors; the decoder may be spelled as another family's.

    That is so of a LLaVA around Gemma 2.
    """
    layouts = []
    for arch in archs:
        for prefix, head in arch.spellings:
            if best := reader.read_best(prefix, [arch], head):
                spelled, layout = best
                if spelled is not arch:
                    layout = reader.read(arch.respelled(spelled), prefix, head) or layout
                layouts.append(layout)
    return min(layouts, key=lambda layout: layout.unknown, default=None)


def _no_declared_decoder(reader: Reader, arch: Arch, announced: str) -> MappingError:
    """Say what the decoder of a class that the user declared lacks."""
    fits = (measure_fit(reader.stem(prefix), arch) for prefix, _ in arch.spellings)
    missing = max(fits, key=lambda fit: fit.score).missing
    return MappingError(
        f"{reader.checkpoint.path}: config.json announces {announced}, which `arch` declares as"
        f" {arch.name}, but its decoder is not there: there is no {missing}; mend"
        " spellings or decoder of the declaration"
    )


def _check_depth(reader: Reader, layout: Layout) -> None:
    """Raise MappingError if config.json speaks of more layers in a decoder of this width."""
    checkpoint = reader.checkpoint
    depth, width = sizes_of(reader, layout)
    for level in checkpoint.config_levels:
        layers, level_width = config_sizes(level)
        if layers and layers > depth and level_width == width:
            raise MappingError(
                f"{checkpoint.path}: holds {depth} decoder layers under {layout.prefix!r},"
                f" config.json says {layers}; get the files that lack"
            )


def _refuse_encoder_decoder(checkpoint: Checkpoint) -> None:
    """Raise MappingError if config.json says that the decoder attends to an encoder."""
    if any(level.get("is_encoder_decoder") is True for level in checkpoint.config_levels):
        raise MappingError(
            f"{checkpoint.path}: an encoder-decoder, by its config.json; it descends from no"
            " language model that is a decoder alone, as both sides of a merge must"
        )
