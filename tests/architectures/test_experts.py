"""Whose part of a stack of experts is which, by shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from stacks import ancestor, spell, write

from lowmem_adamms.architectures.block import Block
from lowmem_adamms.architectures.experts import split_stacks
from lowmem_adamms.checkpoints.checkpoint import open_checkpoint
from lowmem_adamms.errors import MappingError
from lowmem_adamms.mapping.side import read_side

GATE_UP = ("layers.1.mlp.experts.*.gate.weight", "layers.1.mlp.experts.*.up.weight")
DOWN = ("layers.1.mlp.experts.*.down.weight",)


def turned(gate_up: tuple[int, ...], down: tuple[int, ...], width: int) -> tuple[bool, bool]:
    """Whether each of two stacks is taken for transposed."""
    stacks = {"gate_up": (GATE_UP, gate_up, False), "down": (DOWN, down, False)}
    found = split_stacks(Path("it"), stacks, width)
    return found["gate_up"][0].transposed, found["down"][0].transposed


@pytest.mark.parametrize("inner", [4, 6, 8, 16])
def test_either_stack_tells_of_the_other(inner: int) -> None:
    """At a width of 8, gate and up are square at 4, down is at 8; never both."""
    assert turned((2, 2 * inner, 8), (2, 8, inner), 8) == (False, False)
    assert turned((2, 8, 2 * inner), (2, inner, 8), 8) == (True, True)


def test_what_no_shape_tells_is_an_error() -> None:
    for shape in ((2, 8, 8), (2, 6, 4), (2, 8)):
        with pytest.raises(MappingError, match=r"it: down is .* nothing tells which way round"):
            split_stacks(Path("it"), {"down": (DOWN, shape, False)}, 8)
    with pytest.raises(MappingError, match="nothing tells"):  # its siblings contradict each other
        turned_up = ("layers.1.mlp.experts.*.up.weight",)
        stacks = {
            "a": (turned_up, (2, 8, 6), False),
            "b": (turned_up, (2, 6, 8), False),
            "c": (DOWN, (2, 8, 8), False),
        }
        split_stacks(Path("it"), stacks, 8)


def test_rows_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(MappingError, match=r"gate_up is \[2, 7, 8\], which does not divide"):
        turned((2, 7, 8), (2, 8, 3), 8)


@pytest.mark.parametrize(
    ("alternate", "places"), [(False, [(0, 3), (3, 6)]), (True, [(0, 6), (1, 6)])]
)
def test_gate_and_up_lie_one_after_the_other_or_alternate(
    alternate: bool, places: list[tuple[int, int]]
) -> None:
    found = split_stacks(Path("it"), {"gate_up": (GATE_UP, (2, 6, 8), alternate)}, 8)["gate_up"]
    step = 2 if alternate else 1
    assert list(found) == [
        Block(role.replace("*", str(expert)), start, stop, 0, expert, False, step)
        for expert in range(2)
        for role, (start, stop) in zip(GATE_UP, places, strict=True)
    ]
    assert {block.rows for block in found} == {3}


def test_a_role_that_two_tensors_hold_is_an_error(tmp_path: Path) -> None:
    tensors = spell(ancestor(), "each")
    tensors["model.layers.1.mlp.router.weight"] = tensors["model.layers.1.mlp.gate.weight"]
    folder = write(tmp_path / "it", tensors, "each")
    with pytest.raises(
        MappingError, match=r"both .*mlp\.(gate|router)\.weight and .* hold layers.1"
    ):
        read_side(open_checkpoint(folder), ())
