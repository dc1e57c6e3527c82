"""Values that a narrower output dtype cannot hold: refused by name, never written as infinite."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import spelled
import tiny
import torch
from safetensors.torch import save_file

from lowmem_adamms import make_plan, merge
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.errors import RecipeError

Q = "model.layers.1.self_attn.q_proj.weight"


def put(folder: Path, value: float, dtype: torch.dtype) -> Path:
    """A Qwen2 with one weight that stands out."""
    arrays = spelled.SPELLERS["qwen2"]["Qwen2"](spelled.ancestor("qwen2", 3), {}, 1)
    tensors = {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}
    tensors[Q][3, 4] = value
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [1e6, -1e6])
@pytest.mark.parametrize("alpha", [0.3, 1])
def test_a_blend_beyond_fp16_is_refused(value: float, alpha: float, tmp_path: Path) -> None:
    base = put(tmp_path / "base", 0.5, torch.float16)
    donor = put(tmp_path / "donor", value, torch.bfloat16)
    with pytest.raises(RecipeError, match=rf"{re.escape(Q)}: 1 .*65504.*--dtype bf16"):
        merge(make_plan(base, donor), alpha, tmp_path / "out", force=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".partial"}
    wider = make_plan(base, donor, dtype=DTYPES["BF16"])
    found = tiny.load(merge(wider, alpha, tmp_path / "wider", force=True))[Q]
    assert torch.isfinite(found).all()


def test_what_is_only_cast_is_refused_as_well(tmp_path: Path) -> None:
    base = put(tmp_path / "base", 1e6, torch.bfloat16)
    plan = make_plan(base, put(tmp_path / "donor", 0.5, torch.bfloat16), dtype=DTYPES["F16"])
    with pytest.raises(RecipeError, match=re.escape(Q)):
        merge(plan, 0, tmp_path / "out", force=True)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 6e4, -6e4])
def test_what_was_not_finite_before_or_fits_is_written(value: float, tmp_path: Path) -> None:
    base = put(tmp_path / "base", 0.5, torch.float16)
    plan = make_plan(base, put(tmp_path / "donor", value, torch.bfloat16))
    found = tiny.load(merge(plan, 0.3, tmp_path / "out", force=True))[Q][3, 4]
    wanted = (0.7 * 0.5 + 0.3 * torch.tensor(value).bfloat16().double()).half()
    assert torch.equal(found, wanted) or (found.isnan() and wanted.isnan())
