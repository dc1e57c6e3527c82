"""A checkpoint read with an architecture.

For every tensor either the blocks of the common decoder in it, in memory order along dim 0, or what
else it is (vision tower, connector, …). Nothing here knows a family by name.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoints.checkpoint import Checkpoint
from ..errors import MappingError
from .arch import BUFFER, UNKNOWN, Arch, guess_kind, is_buffer
from .block import Block
from .experts import EXPERT, choose_share, sees_transposed_router, split_stacks
from .names import Name, Stem, measure_fit
from .respelling import respell

_BESIDE_LAYERS = re.compile(r"\w+(\.\w+)?|\w+\.\d+\.\w+")
"""A tensor beside the layers, such as `per_layer_projection_norm.weight`; what has a longer name is
part of a tower, unless the decoder has its prefix for itself."""
_SHARED_PREFIX = re.compile(r"(model\.|transformer\.)*")


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
        roles = (block.role for blocks in self.blocks.values() for block in blocks)
        return len({role.split(".")[1] for role in roles if role.startswith("layers.")})

    @property
    def unknown(self) -> int:
        """Number of tensors that are nothing its Arch knows."""
        return sum(kind == UNKNOWN for kind in self.kinds.values())

    @property
    def embedding(self) -> str:
        """The tensor that holds the embedding."""
        return next(name for name, blocks in self.blocks.items() if blocks[0].role == "embed")

    @property
    def head(self) -> str | None:
        """The tensor that holds the head, if there is one."""
        held = (name for name, blocks in self.blocks.items() if blocks[0].role == "head")
        return next(held, None)

    def roles(self) -> dict[str, tuple[str, Block]]:
        """Each role's tensor and its (in nearly all layouts only) block there, the first."""
        return {role: blocks[0] for role, blocks in self.pieces().items()}

    def pieces(self) -> dict[str, tuple[tuple[str, Block], ...]]:
        """Each role's blocks in the order of its rows, each with the tensor it is in."""
        found: dict[str, tuple[tuple[str, Block], ...]] = {}
        for name, blocks in self.blocks.items():
            for block in blocks:
                found[block.role] = (*found.get(block.role, ()), (name, block))
        return found


def read_layout(checkpoint: Checkpoint, arch: Arch, head: str, stem: Stem) -> Layout | None:
    """The layout of what begins with a prefix, or None if there is no embedding, or a layer lacks.

    head: the head's full name. MappingError if a fused tensor's rows do not divide into its roles.
    """
    if measure_fit(stem, arch).missing:
        return None
    roles_of, kinds = _read_roles(checkpoint, arch, stem, head)
    interleaved = {name.full for name in stem.names if name.key in arch.interleaved}
    *_, width = (0, *checkpoint.tensors[f"{stem.prefix}{stem.find_embedding(arch)}"].shape)
    blocks = _split_experts(checkpoint, roles_of, interleaved, width)
    query_rows = {}  # by layer: the output projection has a column per query row
    for name, roles in roles_of.items():
        shape = checkpoint.tensors[name].shape
        if ".attn.o.weight" in roles[0] and len(shape) == 2:
            query_rows[_layer_of(roles[0])] = shape[1]
    for name, roles in roles_of.items():
        if name in blocks:
            continue
        if len(roles) == 1:
            shape = checkpoint.tensors[name].shape
            blocks[name] = (Block(roles[0], 0, shape[0] if shape else 1),)
        else:
            rows = query_rows.get(_layer_of(roles[0]), 0)
            head_dim = _head_dim(checkpoint, arch, rows) if name in interleaved else None
            blocks[name] = _split_fused(checkpoint, name, roles, rows, head_dim)
    return Layout(arch.name, stem.prefix, None, blocks, kinds, arch.shared_ids)


def _layer_of(role: str) -> str:
    return role.split(".")[1] if role.startswith("layers.") else ""


# Names to roles


def _read_roles(
    checkpoint: Checkpoint, arch: Arch, stem: Stem, head: str
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The roles in each tensor of the decoder, and what each other tensor is."""
    stacks = stem.stacks_of(arch)
    is_alone = _is_alone(checkpoint, stem, stacks)
    bias = f"{head.removesuffix('weight')}bias"
    names = {name.full: name for name in stem.names}
    shared = Counter((name.key, name.number) for name in stem.names if name.expert != EXPERT)
    roles_of: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    for full in checkpoint.tensors:
        name = names.get(full)
        if full in (head, bias):
            roles_of[full] = ["head" if full == head else "head.bias"]
        elif name is None:
            kinds[full] = arch.kind_outside(full)
        elif stem.is_foreign(name):
            kinds[full] = stem.foreign[name.stack, name.number]
        elif roles := _find_roles(arch, name, stem, stacks, is_alone):
            number = stem.ancestors_number(name.stack, name.number)
            found = roles.replace("#", str(number)).split()
            if name.expert != EXPERT and len(found) > 1:
                found = [choose_share(found, int(name.expert), shared[name.key, name.number])]
            # Of both sides of a merge, so that a role is one string in memory
            roles_of[full] = [sys.intern(role.replace(EXPERT, name.expert)) for role in found]
        elif roles == "":
            kinds[full] = BUFFER
        else:
            kinds[full] = arch.kind_in_layer(name.key) or arch.kind_outside(full)
    return roles_of, kinds


def _find_roles(
    arch: Arch, name: Name, stem: Stem, stacks: Collection[str], is_alone: bool
) -> str | None:
    """The roles a name under the prefix holds: as declared, or its own name; None if it is none.

    is_alone: whatever is under the prefix belongs to the decoder.
    """
    roles = arch.roles_of(name.key, stacks)
    if roles is not None and (roles != "embed" or name.key == stem.find_embedding(arch)):
        return roles
    if arch.kind_in_layer(name.key) or is_buffer(name.full):
        return None
    if name.stack in stacks:
        return f"layers.#.{respell(name.key.partition('#.')[2])}"
    suffix = name.full[len(stem.prefix) :]
    if suffix.startswith(tuple(stacks)):  # no layer: its number is odd
        return None
    if (is_alone or _BESIDE_LAYERS.fullmatch(suffix)) and not guess_kind(suffix):
        return respell(suffix) if arch.kind_outside(name.full) == UNKNOWN else None
    return None


def _is_alone(checkpoint: Checkpoint, stem: Stem, stacks: Collection[str]) -> bool:
    """Whether a decoder has its prefix for itself: one of its own, or nothing speaks of a tower."""
    if not _SHARED_PREFIX.fullmatch(stem.prefix):
        return True
    if stem.prefix == "" or any(str(name).endswith("_config") for name in checkpoint.config):
        return False
    in_layers = {name.full for name in stem.names if name.stack in stacks}
    return not any(guess_kind(name) for name in checkpoint.tensors if name not in in_layers)


# Roles to rows


def _split_experts(
    checkpoint: Checkpoint,
    roles_of: Mapping[str, Sequence[str]],
    interleaved: Collection[str],
    width: int,
) -> dict[str, tuple[Block, ...]]:
    """The blocks of stacked experts, and of routers, which may be transposed."""
    stacks: dict[str, tuple[Sequence[str], tuple[int, ...], bool]] = {}
    blocks: dict[str, tuple[Block, ...]] = {}
    for name, roles in roles_of.items():
        shape = checkpoint.tensors[name].shape
        if EXPERT in roles[0]:
            stacks[name] = (roles, shape, name in interleaved)
        elif ".router.weight" in roles[0] and sees_transposed_router(shape, width):
            blocks[name] = (Block(roles[0], 0, shape[1], transposed=True),)
    # In the order of the file
    blocks |= split_stacks(checkpoint.path, stacks, width)
    return {name: blocks[name] for name in roles_of if name in blocks}


def _split_fused(
    checkpoint: Checkpoint, name: str, roles: list[str], query_rows: int, head_dim: int | None
) -> tuple[Block, ...]:
    """The rows of each of several roles in a tensor, from shapes.

    Of a fused q, k, v the query takes `query_rows`; the others (and gate and up) share the rest
    equally. head_dim: rows of a head of an interleaved tensor, 0 if they are not known; None of any
    other tensor.
    """
    span = checkpoint.tensors[name]
    rows = span.shape[0] if span.shape else 1
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
