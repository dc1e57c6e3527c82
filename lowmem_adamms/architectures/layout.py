"""What an architecture is, as data, and the layout of a checkpoint read with one.

An Arch says which roles the tensors of a family hold. Reading a checkpoint with it gives a Layout:
for every tensor either the blocks of the common decoder in it, in memory order along dim 0, or what
else it is (vision tower, connector, …). Nothing here knows a family by name.

Roles: `embed`, `norm`, `head`, and for each layer `layers.N.` + one of
`attn.{q,k,v,o}.{weight,bias}`, `attn.{q,k}_norm.weight`, `mlp.{gate,up,down}.{weight,bias}`,
`attn_norm.weight`, `mlp_norm.weight` (and `attn_post_norm.weight`, `mlp_post_norm.weight` where a
layer norms what it adds as well). Of experts, for each expert K:
`mlp.experts.K.{gate,up,down}.{weight,bias}`, beside `mlp.router.{weight,bias,correction_bias}`,
`mlp.shared_expert.{gate,up,down}.weight` and `mlp.shared_expert_gate.weight`. A stream may follow:
`@text`, `@vision` (a copy that only those tokens use).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.span import Span
from ..errors import MappingError
from .block import Block
from .experts import EXPERT, EXPERT_ROLES, ROUTER_ROLES, sees_transposed_router, split_stacks

BUFFER = "rotary buffer"
UNKNOWN = "no known role"

ESSENTIAL = (
    *("attn_norm.weight", "mlp_norm.weight"),
    *(f"attn.{part}.weight" for part in "qkvo"),
    *(f"mlp.{part}.weight" for part in ("gate", "up", "down")),
)
"""What every layer of a decoder has."""
_LAYER = re.compile(r"([A-Za-z_.]+\.)(0|[1-9][0-9]{0,5})(\..+)")
_EXPERT = re.compile(r"experts\.(0|[1-9][0-9]{0,5})\.")
_EXPERT_NAMES = {
    f"layers.#.{name}": " ".join(f"layers.#.{role}" for role in roles.split())
    for name, roles in {**EXPERT_ROLES, **{role: role for role in ROUTER_ROLES}}.items()
}
_Layer = tuple[str, int]
"""The name of a stack of layers, such as `layers.`, and the number of one of them."""


@dataclass(frozen=True, slots=True)
class Arch:
    """One family of checkpoints.

    Attributes:
        name: What it is called in plans.
        source: Where its names come from.
        classes: What `architectures` in config.json may say.
        spellings: Pairs of the decoder's prefix and the head's full name, as found on disk.
        decoder: Tensor name after the prefix, layer number written `#` and expert number `*`, to
            the roles it holds in memory order: space-separated when fused, empty for a buffer that
            is never blended. Several names may stand for one role. A name without `*` whose roles
            have it is a stack of all experts.
        others: Prefixes of all other tensors, and what they are.
        shared_ids: How many leading token ids all descendants of its ancestor share.
        interleaved: Those fused names of `decoder` in which q, k and v alternate head by head (the
            query rows of one key-value head, its key's, its value's, then the next head's), or gate
            and up of stacked experts row by row.
        head_dim: Rows of a head, for these, where config.json does not tell.
        foreign_layers: A name as in `decoder` to what a layer is that has it; such layers lie
            between those of the ancestor, which are numbered without them.
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

    @property
    def embed_name(self) -> str:
        """The embedding's name after the prefix."""
        return next(name for name, roles in self.decoder.items() if roles == "embed")

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

    @property
    def unknown(self) -> int:
        """Number of tensors that are nothing its Arch knows."""
        return sum(kind == UNKNOWN for kind in self.kinds.values())

    def roles(self) -> dict[str, tuple[str, Block]]:
        """Each role's tensor and its (in nearly all layouts only) block there, the first."""
        return {role: blocks[0] for role, blocks in self.pieces().items()}

    def pieces(self) -> dict[str, list[tuple[str, Block]]]:
        """Each role's blocks in the order of its rows, each with the tensor it is in."""
        found: dict[str, list[tuple[str, Block]]] = {}
        for name, blocks in self.blocks.items():
            for block in blocks:
                found.setdefault(block.role, []).append((name, block))
        return found


def block_span(checkpoint: Checkpoint, name: str, block: Block) -> Span:
    """The bytes of one block."""
    return checkpoint.tensors[name].rows(block.start, block.stop)


def read_layout(checkpoint: Checkpoint, arch: Arch, prefix: str, head: str) -> Layout | None:
    """The layout under one spelling, or None if its decoder is not all there.

    MappingError if it is, but a fused tensor's rows do not divide into its roles.
    """
    if prefix + arch.embed_name not in checkpoint.tensors:
        return None
    roles_of, kinds = _read_roles(checkpoint, arch, prefix, head)
    if _first_missing({role for roles in roles_of.values() for role in roles}):
        return None
    query_rows = 0
    for name, roles in roles_of.items():
        span = checkpoint.tensors[name]
        if ".attn.o.weight" in roles[0] and len(span.shape) == 2:
            query_rows = span.shape[1]  # the output projection has a column per query row
    *_, width = (0, *checkpoint.tensors[prefix + arch.embed_name].shape)
    blocks = _split_experts(checkpoint, arch, prefix, roles_of, width)
    for name, roles in roles_of.items():
        if name in blocks:
            continue
        key, _, _ = _declared_name(arch, prefix, name)
        head_dim = _head_dim(checkpoint, arch, query_rows) if key in arch.interleaved else None
        blocks[name] = _split(checkpoint, name, roles, query_rows, head_dim)
    layout = Layout(arch.name, prefix, None, blocks, kinds, arch.shared_ids)
    _check_held_once(checkpoint, layout)
    return layout


def _check_held_once(checkpoint: Checkpoint, layout: Layout) -> None:
    """MappingError where two tensors hold the same rows of a role: a declaration names both."""
    for role, pieces in layout.pieces().items():
        if len({block.first for _, block in pieces}) < len(pieces):
            first, second, *_ = (name for name, _ in pieces)
            raise MappingError(f"{checkpoint.path}: both {first} and {second} hold {role}")


def _split_experts(
    checkpoint: Checkpoint,
    arch: Arch,
    prefix: str,
    roles_of: Mapping[str, Sequence[str]],
    width: int,
) -> dict[str, tuple[Block, ...]]:
    """The blocks of stacked experts, and of routers, which may be transposed."""
    stacks: dict[str, tuple[Sequence[str], tuple[int, ...], bool]] = {}
    blocks: dict[str, tuple[Block, ...]] = {}
    for name, roles in roles_of.items():
        shape = checkpoint.tensors[name].shape
        if EXPERT in roles[0]:
            key, _, _ = _declared_name(arch, prefix, name)
            stacks[name] = (roles, shape, key in arch.interleaved)
        elif ".router.weight" in roles[0] and sees_transposed_router(shape, width):
            blocks[name] = (Block(roles[0], 0, shape[1], transposed=True),)
    # In the order of the file
    blocks |= split_stacks(checkpoint.path, stacks, width)
    return {name: blocks[name] for name in roles_of if name in blocks}


def find_missing(checkpoint: Checkpoint, arch: Arch, prefix: str) -> tuple[int, str]:
    """How many roles an incomplete decoder has, and the first tensor that it lacks."""
    roles_of, _ = _read_roles(checkpoint, arch, prefix, head="")
    found = {role for roles in roles_of.values() for role in roles}
    missing = _first_missing(found)
    assert missing is not None
    layer = missing.split(".")[1] if "." in missing else ""
    for name, roles in arch.decoder.items():
        if missing in [role.partition("@")[0] for role in roles.replace("#", layer).split()]:
            return len(found), prefix + name.replace("#", layer)
    raise AssertionError(f"no name for {missing}")


def _read_roles(
    checkpoint: Checkpoint, arch: Arch, prefix: str, head: str
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The roles in each tensor of the decoder, and what each other tensor is."""
    foreign = _find_foreign_layers(checkpoint, arch, prefix)
    roles_of: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    for name in checkpoint.tensors:
        key, layer, expert = _declared_name(arch, prefix, name)
        roles = "head" if name == head else arch.decoder.get(key, _EXPERT_NAMES.get(key))
        if layer in foreign:
            kinds[name] = foreign[layer]
        elif roles is None:
            kinds[name] = _kind(arch, name)
        elif not roles.strip():
            kinds[name] = BUFFER
        else:
            roles = roles.replace("#", _ancestors_number(layer, foreign))
            roles_of[name] = roles.replace(EXPERT, expert or EXPERT).split()
    return roles_of, kinds


def _first_missing(roles: Collection[str]) -> str | None:
    """The first essential role of a decoder of layers 0 to n-1 that is not among these."""
    plain = {role.partition("@")[0] for role in roles}
    layers = {role.split(".")[1] for role in plain if role.startswith("layers.")}
    for role in ("embed", "norm"):
        if role not in plain:
            return role
    for layer in range(max(len(layers), 1)):
        is_sparse = f"layers.{layer}.mlp.router.weight" in plain
        for part in ESSENTIAL:
            if is_sparse and part.startswith("mlp."):
                continue
            if f"layers.{layer}.{part}" not in plain:
                return f"layers.{layer}.{part}"
    return None


def _declared_name(arch: Arch, prefix: str, name: str) -> tuple[str, _Layer | None, str]:
    """A tensor's name as the declaration would spell it; the layer and the expert it is of."""
    if not name.startswith(prefix):
        return "", None, ""
    suffix = name[len(prefix) :]
    layer = None if suffix in arch.decoder else _LAYER.match(suffix)
    if layer is None:
        return suffix, None, ""
    stack, number, rest = layer.groups()
    expert = _EXPERT.search(rest)
    if expert:
        rest = rest[: expert.start(1)] + EXPERT + rest[expert.end(1) :]
    return f"{stack}#{rest}", (stack, int(number)), expert[1] if expert else ""


def _find_foreign_layers(
    checkpoint: Checkpoint, arch: Arch, prefix: str
) -> dict[_Layer | None, str]:
    """The layers that are none of the ancestor's, and what each is."""
    if not arch.foreign_layers:
        return {}
    keys = (_declared_name(arch, prefix, name) for name in checkpoint.tensors)
    return {layer: arch.foreign_layers[key] for key, layer, _ in keys if key in arch.foreign_layers}


def _ancestors_number(layer: _Layer | None, foreign: Iterable[_Layer | None]) -> str:
    """The layer's number in the ancestor, which has no foreign layers."""
    if layer is None:
        return "#"
    stack, number = layer
    before = [other for other in foreign if other and other[0] == stack and other[1] < number]
    return str(number - len(before))


def _kind(arch: Arch, name: str) -> str:
    """What a tensor outside the decoder is: the longest declared prefix wins."""
    if name.endswith("rotary_emb.inv_freq"):
        return BUFFER
    prefixes = [prefix for prefix in arch.others if name.startswith(prefix)]
    return arch.others[max(prefixes, key=len)] if prefixes else UNKNOWN


def _split(
    checkpoint: Checkpoint, name: str, roles: list[str], query_rows: int, head_dim: int | None
) -> tuple[Block, ...]:
    """The rows of each role in a tensor, from shapes.

    A lone role holds all rows. Of a fused q, k, v the query takes `query_rows`; the others (and
    gate and up) share the rest equally. head_dim: rows of a head of an interleaved tensor, 0 if
    they are not known; None of any other tensor.
    """
    span = checkpoint.tensors[name]
    rows = span.shape[0] if span.shape else 1
    if len(roles) == 1:
        return (Block(roles[0], 0, rows),)
    sizes = _fused_rows(rows, roles, query_rows)
    if sizes is None:
        raise MappingError(
            f"{checkpoint.path}: {name} has {rows} rows, which do not divide into"
            f" {', '.join(roles)} (query rows expected: {query_rows})"
        )
    groups = 1
    if head_dim is not None:
        groups = sizes[-1] // head_dim if head_dim else 0
        if not groups or any(size % groups for size in sizes) or sizes[-1] != groups * head_dim:
            raise MappingError(
                f"{checkpoint.path}: {name} has {rows} rows, which do not divide into heads of"
                f" {head_dim} (from num_attention_heads in config.json)"
            )
    blocks, start = [], 0
    for group in range(groups):
        for role, size in zip(roles, sizes, strict=True):
            group_rows = size // groups
            blocks.append(Block(role, start, start + group_rows, group * group_rows))
            start += group_rows
    return tuple(blocks)


def _head_dim(checkpoint: Checkpoint, arch: Arch, query_rows: int) -> int:
    """Rows of one attention head: as the config says, else as declared; 0 if neither does."""
    for level in checkpoint.config_levels:
        heads = level.get("num_attention_heads")
        if isinstance(heads, int) and heads > 0:
            return query_rows // heads
    return arch.head_dim or 0


def _fused_rows(rows: int, roles: list[str], query_rows: int) -> list[int] | None:
    """The rows of each of several roles in one tensor, or None if they do not divide."""
    is_query = [".attn.q." in role for role in roles]
    rest = rows - query_rows * is_query.count(True)
    others = is_query.count(False)
    if (any(is_query) and not query_rows) or rest <= 0 or rest % others:
        return None
    return [query_rows if query else rest // others for query in is_query]
