"""How an architecture says which roles its tensors hold.

An Arch is data (`archs.py` holds them all). Reading a checkpoint with one gives a Layout: for every
tensor either the blocks of the common decoder in it, in memory order along dim 0, or what else it
is (vision tower, connector, …). Nothing here knows a family by name; which one a checkpoint is of
is left to `recognise.py`.

Roles: `embed`, `norm`, `head`, and for each layer `layers.N.` + one of
`attn.{q,k,v,o}.{weight,bias}`, `attn.{q,k}_norm.weight`, `mlp.{gate,up,down}.{weight,bias}`,
`attn_norm.weight`, `mlp_norm.weight`. A stream may follow: `@text`, `@vision` (a copy that only
those tokens use).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .checkpoint import Checkpoint, Span
from .errors import MappingError

BUFFER = "rotary buffer"
UNKNOWN = "no known role"

ESSENTIAL = frozenset(
    [f"attn.{part}.weight" for part in "qkvo"]
    + [f"mlp.{part}.weight" for part in ("gate", "up", "down")]
    + ["attn_norm.weight", "mlp_norm.weight"]
)
_LAYER = re.compile(r"([A-Za-z_.]+\.)(0|[1-9][0-9]{0,5})(\..+)")


@dataclass(frozen=True, slots=True)
class Arch:
    """One family of checkpoints.

    classes: what `architectures` in config.json may say. spellings: pairs of the decoder's prefix
    and the head's full name, as found on disk. decoder: tensor name after the prefix, layer number
    written `#`, to the roles it holds in memory order (space-separated when fused; empty for a
    buffer that is never blended). others: prefixes of all other tensors and what they are.
    shared_ids: how many leading token ids all descendants of its ancestor share.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    spellings: tuple[tuple[str, str], ...]
    decoder: Mapping[str, str]
    others: Mapping[str, str]
    shared_ids: int | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `start` to `stop` (dim 0) of a tensor hold `role`."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint read with an Arch: `blocks` of the decoder's tensors, `kinds` of the others.

    assumed: what was taken for granted in recognising it. declared: the Arch is a user's own.
    """

    arch: str
    prefix: str
    assumed: str | None
    blocks: Mapping[str, tuple[Block, ...]]
    kinds: Mapping[str, str]
    shared_ids: int | None
    declared: bool = False

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        indices = {block.role.split(".")[1] for block in self._all() if block.role[:7] == "layers."}
        return len(indices)

    def roles(self) -> dict[str, tuple[str, Block]]:
        """Each role's tensor and block."""
        return {
            block.role: (name, block) for name, blocks in self.blocks.items() for block in blocks
        }

    def _all(self) -> Iterable[Block]:
        return (block for blocks in self.blocks.values() for block in blocks)


def embed_name(arch: Arch) -> str:
    """The embedding's name after the prefix."""
    return next(suffix for suffix, roles in arch.decoder.items() if roles == "embed")


def read(checkpoint: Checkpoint, arch: Arch, prefix: str, head: str) -> Layout | None:
    """The layout under one spelling, or None if its decoder is not all there."""
    if prefix + embed_name(arch) not in checkpoint.tensors:
        return None
    blocks: dict[str, tuple[Block, ...]] = {}
    kinds: dict[str, str] = {}
    o_columns = None
    for name, span in checkpoint.tensors.items():
        roles = "head" if name == head else _decoder_roles(arch, prefix, name)
        if roles is None:
            kinds[name] = _kind(arch, name)
        elif not roles:
            kinds[name] = BUFFER
        else:
            blocks[name] = tuple(Block(role, 0, 0) for role in roles.split())
            if ".attn.o.weight" in roles and len(span.shape) == 2:
                o_columns = span.shape[1]
    if not _complete(blocks):
        return None
    split = {
        name: _split(checkpoint, name, [block.role for block in held], o_columns)
        for name, held in blocks.items()
    }
    return Layout(arch.name, prefix, None, split, kinds, arch.shared_ids)


def _decoder_roles(arch: Arch, prefix: str, name: str) -> str | None:
    """The roles the declaration gives a name, with the layer number filled in; None if none."""
    if not name.startswith(prefix):
        return None
    suffix = name[len(prefix) :]
    if suffix in arch.decoder:
        return arch.decoder[suffix]
    layer = _LAYER.match(suffix)
    if layer is None:
        return None
    roles = arch.decoder.get(f"{layer[1]}#{layer[3]}")
    return roles if roles is None else roles.replace("#", layer[2])


def _kind(arch: Arch, name: str) -> str:
    """What a tensor outside the decoder is: the longest declared prefix wins."""
    if name.endswith("rotary_emb.inv_freq"):
        return BUFFER
    known = [prefix for prefix in arch.others if name.startswith(prefix)]
    return arch.others[max(known, key=len)] if known else UNKNOWN


def _complete(blocks: Mapping[str, tuple[Block, ...]]) -> bool:
    """Whether embed, norm and layers 0..n-1 with all essential weights are there."""
    roles = {block.role.split("@")[0] for held in blocks.values() for block in held}
    layers: dict[int, set[str]] = {}
    for role in roles:
        if role.startswith("layers."):
            _, index, rest = role.split(".", 2)
            layers.setdefault(int(index), set()).add(rest)
    return (
        {"embed", "norm"} <= roles
        and bool(layers)
        and set(layers) == set(range(len(layers)))
        and all(found >= ESSENTIAL for found in layers.values())
    )


def _split(
    checkpoint: Checkpoint, name: str, roles: list[str], o_columns: int | None
) -> tuple[Block, ...]:
    """The rows of each role in a tensor, from shapes alone.

    A lone role holds all rows. Of a fused q, k, v the query takes as many rows as the attention's
    output projection has columns; the others (and gate and up) share the rest equally.
    """
    span = checkpoint.tensors[name]
    rows = span.shape[0] if span.shape else 1
    if len(roles) == 1:
        return (Block(roles[0], 0, rows),)
    sizes = _fused_rows(rows, roles, o_columns)
    if sizes is None:
        raise MappingError(
            f"{checkpoint.path}: {name} has {rows} rows, which do not divide into"
            f" {', '.join(roles)} (query rows expected: {o_columns})"
        )
    blocks, start = [], 0
    for role, size in zip(roles, sizes, strict=True):
        blocks.append(Block(role, start, start + size))
        start += size
    return tuple(blocks)


def _fused_rows(rows: int, roles: list[str], o_columns: int | None) -> list[int] | None:
    query = [".attn.q." in role for role in roles]
    q_rows = (o_columns or 0) if any(query) else 0
    rest = rows - q_rows * sum(query)
    others = query.count(False)
    if (any(query) and not q_rows) or rest <= 0 or rest % others:
        return None
    return [q_rows if is_query else rest // others for is_query in query]


def span_of(checkpoint: Checkpoint, name: str, block: Block) -> Span:
    """The bytes of one block."""
    return checkpoint.tensors[name].rows(block.start, block.stop)
