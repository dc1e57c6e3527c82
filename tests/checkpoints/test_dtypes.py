"""The dtype table: sizes as torch has them, names as safetensors has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lowmem_adamms.checkpoints.dtypes import DTYPES, FROM_TORCH
from lowmem_adamms.checkpoints.safetensors_header import build_header
from lowmem_adamms.errors import FormatError


def test_only_the_three_common_float_types_can_be_blended() -> None:
    sizes = {name: dtype.itemsize for name, dtype in DTYPES.items() if dtype.blendable}
    assert sizes == {"BF16": 2, "F16": 2, "F32": 4}


def test_names_are_keys() -> None:
    assert all(name == dtype.name for name, dtype in DTYPES.items())
    assert all(name == dtype.torch for name, dtype in FROM_TORCH.items())


@pytest.mark.parametrize("name", sorted(FROM_TORCH))
def test_sizes_agree_with_torch(name: str) -> None:
    torch_dtype = getattr(torch, name)
    assert FROM_TORCH[name].bits == torch.empty(0, dtype=torch_dtype).element_size() * 8


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_safetensors_knows_every_name_and_its_size(name: str, tmp_path: Path) -> None:
    """The reader of safetensors refuses unknown names and data of the wrong length."""
    dtype = DTYPES[name]
    head = build_header([("a", dtype, (4, 4))], {"format": "pt"})
    (tmp_path / "a.safetensors").write_bytes(head + bytes(dtype.nbytes(16)))
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.get_slice("a").get_dtype() == name


@pytest.mark.parametrize(
    ("name", "elements", "expected"),
    [("BF16", 3, 6), ("F4", 6, 3), ("F6_E2M3", 4, 3), ("F32", 0, 0)],
)
def test_bytes_of_elements(name: str, elements: int, expected: int) -> None:
    assert DTYPES[name].nbytes(elements) == expected


@pytest.mark.parametrize(("name", "elements"), [("F4", 1), ("F6_E3M2", 3), ("F4", 2**40 + 1)])
def test_elements_that_do_not_fill_a_byte_are_refused(name: str, elements: int) -> None:
    with pytest.raises(FormatError, match=name):
        DTYPES[name].nbytes(elements)
