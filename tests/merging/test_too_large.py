"""Values that the output dtype cannot hold, NaN and infinity: refused by name, never unsaid."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import spelled
import tiny
import torch
from safetensors.torch import save_file

from lowmem_adamms import make_plan, merge
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.errors import FormatError, RecipeError
from lowmem_adamms.merging import disk_sink, loop, output_folder
from lowmem_adamms.merging.verify import verify

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
    with pytest.raises(RecipeError, match=rf"{re.escape(Q)}: 1 .*65504.*`dtype` bf16"):
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
    out = merge(plan, 0.3, tmp_path / "out", force=True, allow_nonfinite=True)
    found = tiny.load(out)[Q][3, 4]
    wanted = (0.7 * 0.5 + 0.3 * torch.tensor(value).bfloat16().double()).half()
    assert torch.equal(found, wanted) or (found.isnan() and wanted.isnan())


# NaN and infinity in the inputs


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blended_values_that_are_not_finite_are_refused_by_name_and_number(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    plan = make_plan(put(tmp_path / "base", 0.5, dtype), put(tmp_path / "donor", value, dtype))
    for _ in range(2):  # a resumed merge is no way around it
        with pytest.raises(FormatError, match=rf"{re.escape(Q)}: 1 .*NaN or infinite, .*`allow"):
            merge(plan, 0.3, tmp_path / "out", force=True)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".partial"]


@pytest.mark.parametrize("window", [500, 1 << 20])
def test_they_are_counted_exactly_where_they_are_allowed(
    window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also across windows, and in a merge that is resumed."""
    monkeypatch.setattr(loop, "WINDOW", window)
    monkeypatch.setattr(disk_sink, "WINDOW", window)
    base, donor = (put(tmp_path / name, 0.5, torch.bfloat16) for name in ("base", "donor"))
    tensors = tiny.load(donor)
    tensors[Q][:, ::2] = torch.inf
    tensors["model.norm.weight"][1] = torch.nan
    save_file(tensors, donor / "model.safetensors", {"format": "pt"})
    plan, out, notes = make_plan(base, donor), tmp_path / "out", list[str]()
    with pytest.raises(FormatError, match="NaN or infinite"):
        merge(plan, 0.3, out, force=True)
    merge(plan, 0.3, out, force=True, allow_nonfinite=True, note=notes.append)
    counts = {Q: tensors[Q].numel() // 2, "model.norm.weight": 1}
    assert json.loads((out / "adamms.json").read_bytes())["nonfinite"] == counts
    assert any("NaN or infinite" in line for line in notes)
    assert any("NaN or infinite" in line for line in verify(out).notes)


def test_what_a_killed_merge_was_allowed_the_next_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it need not blend those values again."""
    plan = make_plan(*(put(tmp_path / name, 0.5, torch.bfloat16) for name in ("base", "donor")))
    donor = tiny.load(tmp_path / "donor")
    donor["lm_head.weight"][0, 0] = torch.nan
    save_file(donor, tmp_path / "donor" / "model.safetensors", {"format": "pt"})
    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(plan, 0.3, tmp_path / "out", force=True, allow_nonfinite=True)
    with pytest.raises(FormatError, match=r"lm_head\.weight: 1 blended values are NaN"):
        merge(plan, 0.3, tmp_path / "out", force=True)


def interrupt(_: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", [None, "F16"])
@pytest.mark.parametrize("alpha", [0, 1])
def test_what_is_copied_or_cast_is_not_counted(
    alpha: float, dtype: str | None, tmp_path: Path
) -> None:
    base, donor = (put(tmp_path / name, torch.nan, torch.bfloat16) for name in ("base", "donor"))
    plan = make_plan(base, donor, dtype=dtype)
    out = merge(plan, alpha, tmp_path / "out", force=True)
    assert "nonfinite" not in json.loads((out / "adamms.json").read_bytes())
    assert not verify(out).notes
