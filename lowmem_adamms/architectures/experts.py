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


def _list_names() -> Iterator[tuple[str, str]]:
    for part in ("gate", "up", "down"):
        expert, shared = f"mlp.experts.*.{part}", f"mlp.shared_expert.{part}.weight"
        for kind in ("weight", "bias"):
            yield f"mlp.experts.*.{part}_proj.{kind}", f"{expert}.{kind}"
            yield f"moe.{part}_proj.{kind}", f"{expert}.{kind}"
        yield f"mlp.experts.{part}_proj", f"{expert}.weight"
        yield f"mlp.experts.{part}_proj_bias", f"{expert}.bias"
        yield f"mlp.shared_experts.{part}_proj", f"mlp.shared_experts.*.{part}.weight"
        for where in ("mlp.shared_expert", "mlp.shared_experts", "share_expert"):
            yield f"{where}.{part}_proj.weight", shared
    yield "mlp.experts.gate_up_proj", "mlp.experts.*.gate.weight mlp.experts.*.up.weight"
    for where in ("mlp.shared_expert", "mlp.shared_experts"):
        fused = "mlp.shared_expert.gate.weight mlp.shared_expert.up.weight"
        yield f"{where}.gate_up_proj.weight", fused
    yield "mlp.shared_expert_gate.weight", "mlp.shared_expert_gate.weight"
    for where in ("mlp.gate", "mlp.router"):
        for kind in ("weight", "bias"):
            yield f"{where}.{kind}", f"mlp.router.{kind}"
    yield "moe.gate.weight", "mlp.router.weight"
    for name in ("mlp.gate.e_score_correction_bias", "moe.router_bias"):
        yield name, "mlp.router.correction_bias"


EXPERT_ROLES = dict(_list_names())
"""A tensor's name within its layer to the roles within the layer that it holds, in memory order.

These are the names of transformers' classes and of the Hub, once respelled: of Qwen, DeepSeek, GLM,
Llama 4, ERNIE, Mixtral, gpt-oss and Step. A declaration that has the name goes before.
"""
Shape = tuple[int, ...]


def is_expert(role: str) -> bool:
    """Whether a role is an expert's, or what several experts have in common."""
    return ".mlp.experts" in role


def choose_share(roles: Sequence[str], expert: int, experts: int) -> str:
    """The role of one of several experts, of which each share in turn has a role of its own.

    ERNIE-4.5-VL numbers the experts of text and then those of images: of 128, expert 64 is the
    first of the second role.
    """
    size = -(-experts // len(roles))
    return roles[expert // size].replace(EXPERT, str(expert % size))


def split_stacks(
    path: Path, stacks: Mapping[str, tuple[Sequence[str], Shape, bool]], width: int
) -> dict[str, tuple[Block, ...]]:
    """The blocks of each stack of one checkpoint.

    MappingError if a shape does not fit, or does not tell which way round the stack is.

    stacks: by tensor name its roles in memory order, with EXPERT for the expert's number, its
    shape, and whether the roles alternate row by row. width: the decoder's.
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
