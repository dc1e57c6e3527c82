"""How an architecture says which roles its tensors hold.

An Arch is data (`archs.py` holds them all). Reading a checkpoint with one gives a Layout: for every
tensor either the blocks of the common decoder in it, in memory order along dim 0, or what else it
is (vision tower, connector, …). Nothing here knows a family by name; which one a checkpoint is of
is left to `recognise.py`.

Roles: `embed`, `norm`, `head`, and for each layer `layers.N.` + one of
`attn.{q,k,v,o}.{weight,bias}`, `attn.{q,k}_norm.weight`, `mlp.{gate,up,down}.{weight,bias}`,
`attn_norm.weight`, `mlp_norm.weight` (and `attn_post_norm.weight`, `mlp_post_norm.weight` where a
layer norms what it adds as well). A stream may follow: `@text`, `@vision` (a copy that only those
tokens use).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.span import Span
from ..errors import MappingError

BUFFER = "rotary buffer"
UNKNOWN = "no known role"

ESSENTIAL = frozenset(
    [f"attn.{part}.weight" for part in "qkvo"]
    + [f"mlp.{part}.weight" for part in ("gate", "up", "down")]
    + ["attn_norm.weight", "mlp_norm.weight"]
)
_LAYER = re.compile(r"([A-Za-z_.]+\.)(0|[1-9][0-9]{0,5})(\..+)")
_Layer = tuple[str, int]
"""Where a tensor is in a stack of layers: the stack's name, `layers.`, and the layer's number."""


@dataclass(frozen=True, slots=True)
class Arch:
    """One family of checkpoints.

    classes: what `architectures` in config.json may say. spellings: pairs of the decoder's prefix
    and the head's full name, as found on disk. decoder: tensor name after the prefix, layer number
    written `#`, to the roles it holds in memory order (space-separated when fused; empty for a
    buffer that is never blended). others: prefixes of all other tensors and what they are.
    shared_ids: how many leading token ids all descendants of its ancestor share.

    interleaved: those fused names of `decoder` in which q, k and v alternate head by head: the
    query rows of one key-value head, its key's, its value's, then the next head's. head_dim: rows
    of a head, for these, where config.json does not tell. foreign_layers: a name as in `decoder` to
    what a layer is that has it; such layers lie between those of the ancestor, which are numbered
    without them.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    spellings: tuple[tuple[str, str], ...]
    decoder: Mapping[str, str]
    others: Mapping[str, str]
    shared_ids: int | None = None
    interleaved: tuple[str, ...] = ()
    head_dim: int | None = None
    foreign_layers: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `declare.parse_declaration` reads. What has its default is left out."""
        values: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            required = each.default is MISSING and each.default_factory is MISSING
            if required or value:
                values[each.name] = _to_lists(value)
        return values


def _to_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return [_to_lists(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `start` to `stop` (dim 0) of a tensor hold `role`, from its row `first` on."""

    role: str
    start: int
    stop: int
    first: int = 0

    @property
    def last(self) -> int:
        """The row of `role` behind the block's last."""
        return self.first + self.stop - self.start


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
        return len({role.split(".")[1] for role in self.pieces() if role.startswith("layers.")})

    def roles(self) -> dict[str, tuple[str, Block]]:
        """Each role's tensor and its (in nearly all layouts only) block there, the first."""
        return {role: held[0] for role, held in self.pieces().items()}

    def pieces(self) -> dict[str, list[tuple[str, Block]]]:
        """Each role's blocks in the order of its rows, each with the tensor it is in."""
        found: dict[str, list[tuple[str, Block]]] = {}
        for name, blocks in self.blocks.items():
            for block in blocks:
                found.setdefault(block.role, []).append((name, block))
        return found


def embed_name(arch: Arch) -> str:
    """The embedding's name after the prefix."""
    return next(suffix for suffix, roles in arch.decoder.items() if roles == "embed")


def read_layout(checkpoint: Checkpoint, arch: Arch, prefix: str, head: str) -> Layout | None:
    """The layout under one spelling, or None if its decoder is not all there."""
    if prefix + embed_name(arch) not in checkpoint.tensors:
        return None
    foreign = _foreign_layers(checkpoint, arch, prefix)
    held: dict[str, tuple[str, list[str]]] = {}
    kinds: dict[str, str] = {}
    o_columns = None
    for name, span in checkpoint.tensors.items():
        key, layer = _key(arch, prefix, name)
        roles = "head" if name == head else arch.decoder.get(key)
        if layer in foreign:
            kinds[name] = foreign[layer]
        elif roles is None:
            kinds[name] = _kind(arch, name)
        elif not roles:
            kinds[name] = BUFFER
        else:
            held[name] = key, roles.replace("#", _ancestors_number(layer, foreign)).split()
            if ".attn.o.weight" in roles and len(span.shape) == 2:
                o_columns = span.shape[1]
    if not _complete(role for _, roles in held.values() for role in roles):
        return None
    blocks = {
        name: _split(checkpoint, arch, name, key, roles, o_columns)
        for name, (key, roles) in held.items()
    }
    return Layout(arch.name, prefix, None, blocks, kinds, arch.shared_ids)


def _key(arch: Arch, prefix: str, name: str) -> tuple[str, _Layer | None]:
    """A tensor's name as the declaration would spell it, and the layer it is in, if it is."""
    if not name.startswith(prefix):
        return "", None
    suffix = name[len(prefix) :]
    layer = None if suffix in arch.decoder else _LAYER.match(suffix)
    if layer is None:
        return suffix, None
    return f"{layer[1]}#{layer[3]}", (layer[1], int(layer[2]))


def _foreign_layers(checkpoint: Checkpoint, arch: Arch, prefix: str) -> dict[_Layer | None, str]:
    """The layers that are none of the ancestor's, and what each is."""
    if not arch.foreign_layers:
        return {}
    keys = (_key(arch, prefix, name) for name in checkpoint.tensors)
    return {layer: arch.foreign_layers[key] for key, layer in keys if key in arch.foreign_layers}


def _ancestors_number(layer: _Layer | None, foreign: Iterable[_Layer | None]) -> str:
    """The layer's number in the ancestor, which has no foreign layers."""
    if layer is None:
        return "#"
    stack, number = layer
    before = (other for other in foreign if other and other[0] == stack and other[1] < number)
    return str(number - sum(1 for _ in before))


def _kind(arch: Arch, name: str) -> str:
    """What a tensor outside the decoder is: the longest declared prefix wins."""
    if name.endswith("rotary_emb.inv_freq"):
        return BUFFER
    known = [prefix for prefix in arch.others if name.startswith(prefix)]
    return arch.others[max(known, key=len)] if known else UNKNOWN


def _complete(held: Iterable[str]) -> bool:
    """Whether embed, norm and layers 0..n-1 with all essential weights are among the roles held."""
    roles = {role.partition("@")[0] for role in held}
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
    checkpoint: Checkpoint,
    arch: Arch,
    name: str,
    key: str,
    roles: list[str],
    o_columns: int | None,
) -> tuple[Block, ...]:
    """The rows of each role in a tensor, from shapes (interleaved ones also from the head's size).

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
    groups = 1
    if key in arch.interleaved:
        head_dim = _head_dim(checkpoint, arch, o_columns)
        groups = sizes[-1] // head_dim if head_dim else 0
        if not groups or any(size % groups for size in sizes) or sizes[-1] != groups * head_dim:
            raise MappingError(
                f"{checkpoint.path}: {name} has {rows} rows, which do not divide into heads of"
                f" {head_dim} (from num_attention_heads in config.json)"
            )
    blocks, start = [], 0
    for group in range(groups):
        for role, size in zip(roles, sizes, strict=True):
            take = size // groups
            blocks.append(Block(role, start, start + take, group * take))
            start += take
    return tuple(blocks)


def _head_dim(checkpoint: Checkpoint, arch: Arch, o_columns: int | None) -> int:
    """Rows of one attention head: as the config says, else as declared; 0 if neither does."""
    for level in checkpoint.config_levels:
        heads = level.get("num_attention_heads")
        if isinstance(heads, int) and heads > 0:
            return (o_columns or 0) // heads
    return arch.head_dim or 0


def _fused_rows(rows: int, roles: list[str], o_columns: int | None) -> list[int] | None:
    query = [".attn.q." in role for role in roles]
    q_rows = (o_columns or 0) if any(query) else 0
    rest = rows - q_rows * sum(query)
    others = query.count(False)
    if (any(query) and not q_rows) or rest <= 0 or rest % others:
        return None
    return [q_rows if is_query else rest // others for is_query in query]


def block_span(checkpoint: Checkpoint, name: str, block: Block) -> Span:
    """The bytes of one block."""
    return checkpoint.tensors[name].rows(block.start, block.stop)
