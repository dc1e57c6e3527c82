"""Mixtures of experts: what their tensors are called, and whose part of a stack is which expert's.

A stack of experts is [experts, rows, columns], or transposed, [experts, columns, rows]. What a
matrix reads (gate, up) or writes (down) is as wide as the decoder: that tells which dimension is
which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import MappingError
from .block import Block

EXPERT = "*"
"""The number of an expert in a declared name or role; a stack has it in its roles alone."""
_PARTS = ("gate", "up", "down")
_KINDS = ("weight", "bias")
_SHARED = ("mlp.shared_expert", "mlp.shared_experts", "share_expert")
EXPERT_ROLES = {
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.gate.e_score_correction_bias": "mlp.router.correction_bias",
    **{
        f"{shared}.{part}_proj.weight": f"mlp.shared_expert.{part}.weight"
        for shared in _SHARED
        for part in _PARTS
    },
    # Each expert's own
    **{
        f"mlp.experts.*.{part}_proj.{kind}": f"mlp.experts.*.{part}.{kind}"
        for part in _PARTS
        for kind in _KINDS
    },
    # Stacks
    "mlp.experts.gate_up_proj": "mlp.experts.*.gate.weight mlp.experts.*.up.weight",
    "mlp.experts.gate_up_proj_bias": "mlp.experts.*.gate.bias mlp.experts.*.up.bias",
    "mlp.experts.down_proj": "mlp.experts.*.down.weight",
    "mlp.experts.down_proj_bias": "mlp.experts.*.down.bias",
    # Step-3.7
    "moe.gate.weight": "mlp.router.weight",
    "moe.router_bias": "mlp.router.correction_bias",
    **{
        f"moe.{part}_proj.{kind}": f"mlp.experts.*.{part}.{kind}"
        for part in _PARTS
        for kind in _KINDS
    },
}
"""A tensor's name within its layer to the roles within the layer that it holds, in memory order.

These are the names of transformers' classes and of the Hub: Qwen, DeepSeek, GLM, gpt-oss, Step. A
declaration that has the name goes before.
"""
ROUTER_ROLES = ("mlp.router.weight", "mlp.router.bias", "mlp.shared_expert_gate.weight")
"""Roles that are names as well."""

Shape = tuple[int, ...]


def is_expert(role: str) -> bool:
    """Whether a role is an expert's, or what several experts have in common."""
    return ".mlp.experts" in role


def split_stacks(
    path: Path, stacks: Mapping[str, tuple[Sequence[str], Shape, bool]], width: int
) -> dict[str, tuple[Block, ...]]:
    """The blocks of each stack of one checkpoint.

    Args:
        path: The checkpoint, for errors.
        stacks: By tensor name: its roles in memory order, with EXPERT for the expert's number; its
            shape; and whether the roles alternate row by row.
        width: The decoder's width.

    Raises:
        MappingError: A shape does not fit, or does not tell which way round the stack is.
    """
    seen = {
        name: _sees_transposed(roles, shape, width) for name, (roles, shape, _) in stacks.items()
    }
    siblings: dict[str, set[bool]] = {}
    for name, (roles, _, _) in stacks.items():
        if (transposed := seen[name]) is not None:
            siblings.setdefault(_stem(roles), set()).add(transposed)
    found = {}
    for name, (roles, shape, alternate) in stacks.items():
        transposed = seen[name]
        if transposed is None:
            others = siblings.get(_stem(roles), set())
            if len(others) != 1:
                raise MappingError(
                    f"{path}: {name} is {list(shape)}: nothing tells which way round its experts"
                    f" are; expected one dimension of {width}, the decoder's width"
                )
            (transposed,) = others
        found[name] = tuple(_split(path, name, roles, shape, alternate, transposed))
    return found


def _stem(roles: Sequence[str]) -> str:
    """What the roles of one layer's experts have in common."""
    return roles[0].partition(EXPERT)[0]


def _sees_transposed(roles: Sequence[str], shape: Shape, width: int) -> bool | None:
    """Whether a stack is transposed; None if its shape does not tell. Biases never are."""
    if len(shape) == 2 and ".bias" in roles[0]:
        return False
    if len(shape) != 3 or (shape[1] == width) == (shape[2] == width):
        return None
    writes = ".down." in roles[0]
    return shape[2 if writes else 1] == width


def sees_transposed_router(shape: Shape, width: int) -> bool:
    """Whether a router is [width, experts], as ERNIE-4.5-VL has it, not [experts, width]."""
    return len(shape) == 2 and shape[0] == width != shape[1]


def _split(
    path: Path, name: str, roles: Sequence[str], shape: Shape, alternate: bool, transposed: bool
) -> Iterator[Block]:
    rows = shape[-1] if transposed else shape[1]
    if rows % len(roles):
        raise MappingError(
            f"{path}: {name} is {list(shape)}, which does not divide into {', '.join(roles)}"
        )
    step = len(roles) if alternate else 1
    size = rows // len(roles)
    for expert in range(shape[0]):
        for i, role in enumerate(roles):
            start, stop = (i, rows) if alternate else (i * size, (i + 1) * size)
            named = role.replace(EXPERT, str(expert))
            yield Block(named, start, stop, 0, expert, transposed, step)
