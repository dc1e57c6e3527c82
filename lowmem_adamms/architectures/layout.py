"""What an architecture is, as data, and the layout of a checkpoint read with one.

An Arch says which roles the tensors of a family hold. Reading a checkpoint with it gives a Layout:
for every tensor either the blocks of the common decoder in it, in memory order along dim 0, or what
else it is (vision tower, connector, …). Nothing here knows a family by name.

Roles: `embed`, `norm`, `head`, and for each layer `layers.N.` + one of
`attn.{q,k,v,o}.{weight,bias}`, `attn.{q,k}_norm.weight`, `mlp.{gate,up,down}.{weight,bias}`,
`attn_norm.weight`, `mlp_norm.weight` (and `attn_post_norm.weight`, `mlp_post_norm.weight` where a
layer norms what it adds as well). Of experts, for each expert K:
`mlp.experts.K.{gate,up,down}.{weight,bias}`, beside `mlp.router.{weight,bias,correction_bias}`,
`mlp.shared_expert.{gate,up,down}.weight` and `mlp.shared_expert_gate.weight`. Any other tensor of
the decoder is a role by its own name, such as `layers.N.linear_attn.A_log`: two decoders that are
spelled alike need no declaration. A stream may follow: `@text`, `@vision` (a copy that only those
tokens use), `@vision_expert` (what only visual tokens use and is no copy).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.span import Span
from ..errors import MappingError
from .block import Block
from .experts import (
    EXPERT,
    EXPERT_ROLES,
    choose_share,
    sees_transposed_router,
    split_stacks,
)
from .respelling import FUSED, respell

BUFFER = "rotary buffer"
UNKNOWN = "no known role"

ESSENTIAL = (
    *("attn_norm.weight", "mlp_norm.weight"),
    *(f"attn.{part}.weight" for part in "qkvo"),
    *(f"mlp.{part}.weight" for part in ("gate", "up", "down")),
)
"""What nearly every layer has: a decoder is read in the way that finds most of these."""
FOREIGN_LAYERS = {
    "layers.#.eh_proj.weight": "multi-token prediction",
    "layers.#.cross_attn.q_proj.weight": "cross-attention layer",
    "layers.#.encoder_attn.q_proj.weight": "cross-attention layer",
}
"""What no layer of a decoder-only ancestor has, whatever the family: see `Arch.foreign_layers`."""
OTHER_PARTS = (
    ("cross-attention layer", re.compile("cross_attn")),
    ("multi-token prediction", re.compile(r"(^|\.)mtp\b")),
    ("talker", re.compile(r"talker|token2wav|code2wav|codec|depth_decoder")),
    ("action expert", re.compile(r"action|gemma_expert|\bdit\b")),
    ("connector", re.compile(r"projector|connector|merger|resampler|mm_|newline|view_sep")),
    ("audio tower", re.compile(r"audio|speech|acoustic")),
    (
        "vision tower",
        re.compile(r"vision|visual|image|video|patch|\bvit|\bsam_|siglip|clip|pos_embed|vqmodel"),
    ),
)
"""What a tensor outside the decoder is by a word in its name, where no declaration tells."""
_COMMON_NAMES = {
    f"layers.#.{name}": " ".join(f"layers.#.{role}" for role in roles.split())
    for name, roles in {**EXPERT_ROLES, **FUSED}.items()
}
_EXPERT = re.compile(r"experts\.(0|[1-9][0-9]{0,5})\.")
_LAYER = re.compile(r"([A-Za-z_.]+\.)(0|[1-9][0-9]{0,5})\.(.+)")
_BESIDE_LAYERS = re.compile(r"\w+(\.\w+)?|\w+\.\d+\.\w+")
"""A tensor beside the layers, such as `per_layer_projection_norm.weight`; what has a longer name is
part of a tower, unless the decoder has its prefix for itself."""
_SHARED_PREFIX = re.compile(r"(model\.|transformer\.)*")
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
            have it is a stack of all experts; of a name with `*` and several roles, each role is
            that of an equal share of the experts. What is not named is a role by its own name.
        others: Prefixes of all other tensors, and what they are; with `#`, of what layers have
            that the ancestor's lack.
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
    def embed_names(self) -> list[str]:
        """What the embedding may be called after the prefix."""
        return [name for name, roles in self.decoder.items() if roles == "embed"]

    def roles_of(self, key: str, stacks: Collection[str]) -> str | None:
        """The roles that a name holds, as declared or as all families have it; None if neither.

        stacks: those of the decoder's layers.
        """
        roles = self.decoder.get(key)
        stack, in_layer, rest = key.partition("#.")
        if roles is not None or (in_layer and stack not in stacks):
            return roles
        if not in_layer:
            return self.decoder.get(respell(key))
        for name in (f"layers.#.{rest}", f"layers.#.{respell(rest)}"):
            roles = self.decoder.get(name, _COMMON_NAMES.get(name))
            if roles is not None:
                break
        return roles

    def respelled(self, other: Arch) -> Arch:
        """The same family around a decoder that is spelled as another's."""
        return replace(
            self,
            spellings=self.spellings if other.spellings else (),
            decoder=other.decoder,
            interleaved=other.interleaved,
            head_dim=other.head_dim,
            foreign_layers=other.foreign_layers,
        )

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

    def pieces(self) -> dict[str, tuple[tuple[str, Block], ...]]:
        """Each role's blocks in the order of its rows, each with the tensor it is in."""
        found: dict[str, tuple[tuple[str, Block], ...]] = {}
        for name, blocks in self.blocks.items():
            for block in blocks:
                found[block.role] = (*found.get(block.role, ()), (name, block))
        return found


def block_span(checkpoint: Checkpoint, name: str, block: Block) -> Span:
    """The bytes of one block."""
    return checkpoint.tensors[name].rows(block.start, block.stop)


# The names under a prefix


@dataclass(frozen=True, slots=True)
class Name:
    """A tensor's name after a prefix, taken apart.

    key: as a declaration would spell it, its first number written `#`, an expert's EXPERT. stack
    and number: such as `layers.` and 3, or an empty stack outside of layers. expert: its number,
    if it is of one.
    """

    full: str
    key: str
    stack: str = ""
    number: int = 0
    expert: str = EXPERT


@dataclass(frozen=True, slots=True)
class Stem:
    """What of a checkpoint begins with a prefix.

    counts: how many names have a key. layers: the numbers that occur in each stack.
    """

    prefix: str
    names: Sequence[Name]
    counts: Mapping[str, int]
    layers: Mapping[str, frozenset[int]]

    def find_embedding(self, arch: Arch) -> str | None:
        """The first of the names that an Arch gives the embedding which is there."""
        return next((name for name in arch.embed_names if name in self.counts), None)

    def stacks_of(self, arch: Arch) -> frozenset[str]:
        """The stacks of layers that an Arch declares; of one without spellings, the deepest."""
        declared = {key.partition("#")[0] for key in arch.decoder if "#" in key}
        beside = [stack for stack in self.layers if stack.count(".") == 1]
        if arch.spellings or not beside or not declared.isdisjoint(beside):
            return frozenset(declared)
        return frozenset([max(beside, key=lambda stack: len(self.layers[stack]))])


def read_stem(checkpoint: Checkpoint, prefix: str) -> Stem:
    """Take apart the names that begin with a prefix."""
    names = []
    keys: dict[str, str] = {}  # one string for thousands of experts
    for full in checkpoint.tensors:
        if full.startswith(prefix):
            suffix = full[len(prefix) :]
            layer = _LAYER.match(suffix)
            if layer is None:
                names.append(Name(full, suffix))
            else:
                stack, number, rest = layer.groups()
                key, expert = rest, _EXPERT.search(rest)
                if expert:
                    key = f"{rest[: expert.start(1)]}{EXPERT}{rest[expert.end(1) :]}"
                key = f"{stack}#.{key}"
                names.append(
                    Name(
                        full,
                        keys.setdefault(key, key),
                        keys.setdefault(stack, stack),
                        int(number),
                        expert[1] if expert else EXPERT,
                    )
                )
    layers: dict[str, set[int]] = {}
    for name in names:
        if name.stack:
            layers.setdefault(name.stack, set()).add(name.number)
    numbers = {stack: frozenset(found) for stack, found in layers.items()}
    return Stem(prefix, names, Counter(name.key for name in names), numbers)


# How an Arch reads them


@dataclass(frozen=True, slots=True)
class Fit:
    """How well an Arch explains the names under a prefix.

    essential: how many of the ESSENTIAL roles it finds. undeclared: how many tensors of the layers
    it does not name. unused: how many names it has that do not occur. missing: the first that is
    not there of what no decoder can do without.
    """

    essential: int
    undeclared: int
    unused: int
    layers: int
    missing: str | None

    @property
    def score(self) -> tuple[int, int]:
        """How much it explains: the greater, the better."""
        return self.essential, -self.undeclared

    @property
    def is_complete(self) -> bool:
        """Whether each layer has all that is essential."""
        return self.essential >= self.layers * len(ESSENTIAL)


def measure_fit(stem: Stem, arch: Arch) -> Fit:
    """Tell how well an Arch explains what is under a prefix."""
    stacks = stem.stacks_of(arch)
    foreign = _find_foreign_layers(stem, arch)
    layers = {
        _ancestors_number(stack, number, foreign)
        for stack in stacks
        for number in stem.layers.get(stack, ())
        if (stack, number) not in foreign
    }
    essential = undeclared = 0
    counts = stem.counts
    if foreign:
        counts = Counter(
            name.key for name in stem.names if (name.stack, name.number) not in foreign
        )
    for key, count in counts.items():
        roles = arch.roles_of(key, stacks)
        if roles is not None:
            plain = (role.partition("@")[0].removeprefix("layers.#.") for role in roles.split())
            essential += count * sum(_count_essential(role) for role in plain)
        elif key.partition("#")[0] in stacks and _own_kind(arch, key) is None:
            undeclared += count
    missing = None
    if stem.find_embedding(arch) is None:
        missing = f"{stem.prefix}{arch.embed_names[0]}"
    elif gaps := set(range(max(layers, default=0) + 1)) - layers:
        missing = f"{stem.prefix}{min(stacks, default='layers.')}{min(gaps)}."
    unused = len(arch.decoder.keys() - stem.counts.keys())
    return Fit(essential, undeclared, unused, len(layers), missing)


def _count_essential(role: str) -> int:
    """How many ESSENTIAL roles a role within a layer stands for: a router for a whole MLP."""
    return 3 if role == "mlp.router.weight" else int(role in ESSENTIAL)


def read_layout(
    checkpoint: Checkpoint, arch: Arch, prefix: str, head: str, stem: Stem | None = None
) -> Layout | None:
    """The layout under one spelling, or None if there is no embedding, or a layer is missing.

    MappingError if a fused tensor's rows do not divide into its roles. stem: of the prefix, if it
    was read before.
    """
    stem = stem or read_stem(checkpoint, prefix)
    if measure_fit(stem, arch).missing:
        return None
    roles_of, kinds = _read_roles(checkpoint, arch, stem, head)
    query_rows = {}  # by layer: the output projection has a column per query row
    for name, roles in roles_of.items():
        span = checkpoint.tensors[name]
        if ".attn.o.weight" in roles[0] and len(span.shape) == 2:
            query_rows[_layer_of(roles[0])] = span.shape[1]
    keys = {name.full: name.key for name in stem.names}
    interleaved = {name for name in roles_of if keys.get(name) in arch.interleaved}
    *_, width = (0, *checkpoint.tensors[f"{prefix}{stem.find_embedding(arch)}"].shape)
    blocks = _split_experts(checkpoint, roles_of, interleaved, width)
    for name, roles in roles_of.items():
        if name in blocks:
            continue
        if len(roles) == 1:
            shape = checkpoint.tensors[name].shape
            blocks[name] = (Block(roles[0], 0, shape[0] if shape else 1),)
        else:
            rows = query_rows.get(_layer_of(roles[0]), 0)
            head_dim = _head_dim(checkpoint, arch, rows) if name in interleaved else None
            blocks[name] = _split(checkpoint, name, roles, rows, head_dim)
    return Layout(arch.name, prefix, None, blocks, kinds, arch.shared_ids)


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


def _read_roles(
    checkpoint: Checkpoint, arch: Arch, stem: Stem, head: str
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The roles in each tensor of the decoder, and what each other tensor is."""
    foreign = _find_foreign_layers(stem, arch)
    stacks = stem.stacks_of(arch)
    embedding = stem.find_embedding(arch)
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
            kinds[full] = _kind(arch, full)
        elif (name.stack, name.number) in foreign:
            kinds[full] = foreign[name.stack, name.number]
        elif roles := _find_roles(arch, name, stacks, stem.prefix, embedding, is_alone):
            number = _ancestors_number(name.stack, name.number, foreign) if name.stack else ""
            found = roles.replace("#", str(number)).split()
            if name.expert != EXPERT and len(found) > 1:
                found = [choose_share(found, int(name.expert), shared[name.key, name.number])]
            # Of both sides of a merge, so that a role is one string in memory
            roles_of[full] = [sys.intern(role.replace(EXPERT, name.expert)) for role in found]
        else:
            kinds[full] = BUFFER if roles == "" else _own_kind(arch, name.key) or _kind(arch, full)
    return roles_of, kinds


def _find_roles(
    arch: Arch,
    name: Name,
    stacks: Collection[str],
    prefix: str,
    embedding: str | None,
    is_alone: bool,
) -> str | None:
    """The roles a name under the prefix holds: as declared, or its own name; None if it is none.

    is_alone: whatever is under the prefix belongs to the decoder.
    """
    roles = arch.roles_of(name.key, stacks)
    if roles is not None and (roles != "embed" or name.key == embedding):
        return roles
    if _own_kind(arch, name.key) or name.full.endswith("rotary_emb.inv_freq"):
        return None
    if name.stack in stacks:
        return f"layers.#.{respell(name.key.partition('#.')[2])}"
    suffix = name.full[len(prefix) :]
    if suffix.startswith(tuple(stacks)):  # no layer: its number is odd
        return None
    if (is_alone or _BESIDE_LAYERS.fullmatch(suffix)) and not guess_kind(suffix):
        return respell(suffix) if _kind(arch, name.full) == UNKNOWN else None
    return None


def _is_alone(checkpoint: Checkpoint, stem: Stem, stacks: Collection[str]) -> bool:
    """Whether a decoder has its prefix for itself: one of its own, or nothing speaks of a tower."""
    if not _SHARED_PREFIX.fullmatch(stem.prefix):
        return True
    in_layers = {name.full for name in stem.names if name.stack in stacks}
    others = (name for name in checkpoint.tensors if name not in in_layers)
    has_parts = any(str(name).endswith("_config") for name in checkpoint.config)
    return stem.prefix != "" and not has_parts and not any(map(guess_kind, others))


def _own_kind(arch: Arch, key: str) -> str | None:
    """What a tensor of a layer is that the ancestor's layers lack, if `others` says so."""
    kinds = (kind for name, kind in arch.others.items() if "#" in name and key.startswith(name))
    return next(kinds, None)


def _find_foreign_layers(stem: Stem, arch: Arch) -> dict[_Layer, str]:
    """The layers that are none of the ancestor's, and what each is."""
    signs = {**FOREIGN_LAYERS, **arch.foreign_layers}
    if signs.keys().isdisjoint(stem.counts):
        return {}
    return {(name.stack, name.number): signs[name.key] for name in stem.names if name.key in signs}


def _ancestors_number(stack: str, number: int, foreign: Collection[_Layer]) -> int:
    """The layer's number in the ancestor, which has no foreign layers."""
    return number - sum(other[0] == stack and other[1] < number for other in foreign)


def _layer_of(role: str) -> str:
    return role.split(".")[1] if role.startswith("layers.") else ""


def _kind(arch: Arch, name: str) -> str:
    """What a tensor outside the decoder is: the longest declared prefix wins."""
    if name.endswith("rotary_emb.inv_freq"):
        return BUFFER
    prefixes = [prefix for prefix in arch.others if name.startswith(prefix)]
    return arch.others[max(prefixes, key=len)] if prefixes else UNKNOWN


def guess_kind(name: str) -> str | None:
    """What a tensor outside the decoder may be by a word in its name."""
    return next((kind for kind, words in OTHER_PARTS if words.search(name)), None)


def _split(
    checkpoint: Checkpoint, name: str, roles: list[str], query_rows: int, head_dim: int | None
) -> tuple[Block, ...]:
    """The rows of each of several roles in a tensor, from shapes.

    Of a fused q, k, v the query takes `query_rows`; the others (and
    gate and up) share the rest equally. head_dim: rows of a head of an interleaved tensor, 0 if
    they are not known; None of any other tensor.
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
