"""A LoRA adapter as the donor's side of a join: its modules by the base's roles.

An adapter was trained around some model, whose names it has, under a prefix of its own. They are
read with the declaration, the base's first, that has a role of the base for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ..architectures.arch import Arch, guess_kind
from ..architectures.block import Block
from ..architectures.experts import EXPERT
from ..architectures.families import ARCHS
from ..architectures.layout import Layout
from ..checkpoints.checkpoint import Checkpoint
from ..errors import MappingError
from .side import Side

_LAYER = re.compile(r"(?:^|(?<=\.))([A-Za-z_]+\.)(\d{1,6})\.")
_EXPERT = re.compile(r"\bexperts\.(\d{1,6})\.")
_STREAMS = ("", "@text", "@vision")
Held = dict[str, tuple[str, ...]]
"""The roles that each tensor of an adapter holds, in the order of its rows."""


def read_adapter_side(
    checkpoint: Checkpoint, base: Side, declared: Sequence[Arch], *, keep_unknown: bool
) -> Side:
    """Read an adapter by the base's roles.

    keep_unknown: leave out what has no role in the base, instead of raising MappingError.
    """
    kinds = {name: kind for name in checkpoint.tensors if (kind := guess_kind(name))}
    names = [name for name in checkpoint.tensors if name not in kinds]
    archs = sorted([*declared, *ARCHS], key=lambda arch: arch.name != base.layout.arch)
    arch, held = max(
        ((arch, _find_roles(names, arch, base)) for arch in archs), key=lambda found: len(found[1])
    )
    unknown = [name for name in names if name not in held]
    if unknown and not keep_unknown:
        raise MappingError(
            f"{checkpoint.path}: the adapter changes {unknown[0]}, which has no role in"
            f" {base.path}; expected modules of its language model;"
            " `unmatched='keep'` leaves it out"
        )
    blocks = {
        name: tuple(_cut_blocks(checkpoint.tensors[name].shape, roles, base))
        for name, roles in held.items()
    }
    layout = Layout(f"LoRA ({arch.name})", "", None, blocks, kinds, None)
    return Side(checkpoint, layout, blocks, layout.pieces(), tied=False)


def _find_roles(names: Sequence[str], arch: Arch, base: Side) -> Held:
    """The roles of those names that a declaration has, if the base has these roles."""
    held: Held = {}
    for name in names:
        roles = _read_name(name, arch)
        if roles and all(_has_role(role, base.pieces) for role in roles):
            held[name] = roles
    return held


def _read_name(name: str, arch: Arch) -> tuple[str, ...]:
    """The roles of a tensor, whatever its prefix."""
    for layer in _LAYER.finditer(name):
        rest, number = name[layer.end() :], EXPERT
        if expert := _EXPERT.search(rest):
            rest, number = rest.replace(expert[0], f"experts.{EXPERT}.", 1), expert[1]
        if roles := arch.roles_of(f"{layer[1]}#.{rest}", frozenset({layer[1]})):
            return tuple(roles.replace("#", layer[2]).replace(EXPERT, number).split())
    if any(name == head or name.endswith(f".{head}") for _, head in arch.spellings):
        return ("head",)
    for key, roles in arch.decoder.items():
        if "#" not in key and (name == key or name.endswith(f".{key}")):
            return tuple(roles.split())
    return ()


def _has_role(role: str, pieces: Mapping[str, object]) -> bool:
    return any(f"{role}{stream}" in pieces for stream in _STREAMS)


def _cut_blocks(shape: tuple[int, ...], roles: Sequence[str], base: Side) -> Iterator[Block]:
    """The rows of each role: of several that are fused, as many as the base has."""
    start = 0
    for role in roles:
        streams = (f"{role}{stream}" for stream in _STREAMS)
        found = next(each for each in streams if each in base.pieces)
        rows = shape[0] if len(roles) == 1 else base.rows_of(found)
        yield Block(role, start, start + rows)
        start += rows
