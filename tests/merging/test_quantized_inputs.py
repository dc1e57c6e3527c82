"""Quantized inputs merge to the bytes of what transformers dequantizes them to.

Each tensor is quantized here with plain torch, and written twice: quantized, and as what
transformers' own functions make of it. Whatever reads the first must see the second.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stacks
import tiny
import torch
from command import run
from hub_server import HubServer, use
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lowmem_adamms import LiveModel, make_plan, merge
from lowmem_adamms.checkpoints import arranged, coded
from lowmem_adamms.checkpoints.checkpoint import open_checkpoint
from lowmem_adamms.checkpoints.coded import CodedSpan
from lowmem_adamms.checkpoints.mapped_files import MappedFiles
from lowmem_adamms.checkpoints.sampled_reads import SampledReader
from lowmem_adamms.comparing.comparison import compare
from lowmem_adamms.comparing.pairing import pair_checkpoints
from lowmem_adamms.errors import FormatError
from lowmem_adamms.mapping import kinship
from lowmem_adamms.mapping.mixture import make_mixture
from lowmem_adamms.merging.verify import verify
from lowmem_adamms.settings import MethodSettings

Tensors = dict[str, torch.Tensor]
Both = tuple[Path, Path]
"""A quantized checkpoint, and the same dequantized."""
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


# Quantizing


def scale_by(tensor: torch.Tensor, grid: tuple[int, int], fp8: torch.dtype) -> tuple[Any, Any]:
    """FP8 numbers and float32 scales, one for each block of a grid."""
    rows, columns = tensor.shape[-2] // grid[0], tensor.shape[-1] // grid[1]
    blocks = tensor.float().reshape(*tensor.shape[:-2], grid[0], rows, grid[1], columns)
    scales = blocks.abs().amax((-3, -1)) / torch.finfo(fp8).max
    codes = (blocks / scales[..., :, None, :, None]).to(fp8)
    return codes.reshape(tensor.shape), scales


def expand(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What transformers makes of them."""
    with_grid = scales.reshape(1, 1) if scales.numel() == 1 else scales
    return Fp8Dequantize(None)._dequantize_one(  # type: ignore[no-untyped-call]
        codes, with_grid, torch.bfloat16
    )


FORMS: dict[str, tuple[str, str, Callable[[torch.Tensor], tuple[int, int]], torch.dtype, Any]] = {
    "blocks": ("fp8", "_scale_inv", lambda t: (t.shape[0] // 16, 2), E4M3, torch.float32),
    "one": ("fp8", "_scale_inv", lambda t: (1, 1), E4M3, torch.float32),
    "channels": (
        "compressed-tensors",
        "_scale",
        lambda t: (t.shape[0], 1),
        E4M3,
        torch.bfloat16,
    ),
    "e5m2": ("compressed-tensors", "_scale", lambda t: (1, 1), E5M2, torch.float16),
}


def write_both(folder: Path, out: Path, form: str) -> Both:
    """A checkpoint with its projections quantized, and the same dequantized."""
    method, suffix, grid_of, fp8, scale_dtype = FORMS[form]
    quantized: Tensors = {}
    plain: Tensors = {}
    for name, tensor in tiny.load(folder).items():
        quantized[name] = plain[name] = tensor
        if re.search(r"layers\.\d+\..*_proj\.weight$|visual\.blocks\.0\.mlp\.fc1\.weight$", name):
            codes, scales = scale_by(tensor, grid_of(tensor), fp8)
            scales = scales.to(scale_dtype)
            quantized[name], plain[name] = codes, expand(codes, scales)
            quantized[name + suffix] = scales.reshape(()) if form == "e5m2" else scales
            if form == "e5m2":
                quantized[name.replace(".weight", ".input_scale")] = torch.ones(1)
    settings = {"quantization_config": {"quant_method": method}}
    return save(folder, out / "quantized", quantized, settings), save(
        folder, out / "plain", plain, {}
    )


def save(folder: Path, out: Path, tensors: Tensors, settings: dict[str, Any]) -> Path:
    """A copy of a checkpoint with other tensors."""
    out.mkdir(parents=True)
    tiny._copy_sidecars(folder, out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_bytes())
    (out / "config.json").write_text(json.dumps(config | settings))
    return out


Write = Callable[[str, str], Both]


@pytest.fixture(scope="module")
def write(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A family in a form, written once."""
    return functools.cache(
        lambda family, form: write_both(tiny_models[family], tmp_path_factory.mktemp(form), form)
    )


@pytest.fixture(scope="module", params=sorted(FORMS))
def any_donor(request: pytest.FixtureRequest, write: Write) -> Both:
    return write("llava_onevision", request.param)


@pytest.fixture(scope="module")
def donors(write: Write) -> Both:
    return write("llava_onevision", "blocks")


@pytest.fixture(scope="module")
def bases(write: Write) -> Both:
    return write("qwen2_vl", "e5m2")


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tiny.raw(tensor) for name, tensor in tiny.load(folder).items()}


# As donors and as bases


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_a_quantized_donor(
    any_donor: Both, tiny_models: dict[str, Path], tmp_path: Path, alpha: float
) -> None:
    base = tiny_models["qwen2_vl"]
    out, expected = (
        merge(make_plan(base, donor), alpha, tmp_path / donor.name) for donor in any_donor
    )
    assert weights(out) == weights(expected)
    assert verify(out, deep=True, base=base, donor=any_donor[0]).rows


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_a_quantized_base_is_written_in_bf16(
    bases: Both, tiny_models: dict[str, Path], tmp_path: Path, alpha: float
) -> None:
    donor = tiny_models["llava_onevision"]
    out, expected = (merge(make_plan(base, donor), alpha, tmp_path / base.name) for base in bases)
    assert weights(out) == weights(expected)
    assert {tensor.dtype for tensor in tiny.load(out).values()} == {torch.bfloat16}
    assert "quantization_config" not in (out / "config.json").read_text()
    assert "quantization_config" in (bases[0] / "config.json").read_text()
    verify(out, deep=True, base=bases[0], donor=donor)
    tiny.load_model(out)


def test_a_nested_quantization_config_is_left_out_as_well(
    bases: Both, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(bases[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_bytes())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (base / "config.json").write_text(json.dumps(config))
    out = merge(make_plan(base, tiny_models["llava_onevision"]), 0.3, tmp_path / "out")
    assert json.loads((out / "config.json").read_bytes()) == json.loads(
        (bases[1] / "config.json").read_bytes()
    )


def test_asked_for_another_dtype(bases: Both, donors: Both, tmp_path: Path) -> None:
    out, expected = (
        merge(make_plan(base, donor, dtype="fp16"), 0.3, tmp_path / base.name)
        for base, donor in zip(bases, donors, strict=True)
    )
    assert weights(out) == weights(expected)
    assert json.loads((out / "config.json").read_bytes())["torch_dtype"] == "float16"


def test_everything_that_looks_at_a_plan_sees_the_same(
    donors: Both, tiny_models: dict[str, Path]
) -> None:
    base = tiny_models["qwen2_vl"]
    quantized, plain = (make_plan(base, donor) for donor in donors)
    assert kinship.measure(quantized) == kinship.measure(plain)
    compared, expected = (compare(pair_checkpoints(base, donor)) for donor in donors)
    assert compared.similarities == expected.similarities
    assert compared.ancestry == expected.ancestry
    # What is read is what lies in the file: half as much, and scales
    size = sum(part.base.nbytes for _, part in quantized.parts)
    assert quantized.bytes_written == plain.bytes_written == size
    assert quantized.bytes_read < plain.bytes_read
    assert quantized.identity() != plain.identity()


@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_other_methods(
    donors: Both, tiny_models: dict[str, Path], tmp_path: Path, method: Any
) -> None:
    base = tiny_models["qwen2_vl"]
    ancestor = tiny_models["qwen2"] if method == "ties" else None
    settings = MethodSettings(method=method)
    out, expected = (
        merge(make_mixture(base, [donor], settings, ancestor=ancestor), 0.4, tmp_path / donor.name)
        for donor in donors
    )
    assert weights(out) == weights(expected)
    verify(out, deep=True, base=base, donor=donors[0], ancestor=ancestor)


@pytest.mark.parametrize("options", [(), ("--no-cache",)])
def test_from_the_hub(
    donors: Both,
    bases: Both,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = weights(merge(make_plan(bases[1], donors[1]), 0.3, tmp_path / "expected"))
    with HubServer() as server:
        use(server, monkeypatch, tmp_path)
        server.add("org/base", bases[0])
        server.add("org/donor", donors[0])
        assert run("org/base", "org/donor", "-o", "out", "--alpha", "0.3", *options) == 0
        assert weights(tmp_path / "out") == expected
        assert run("verify", "out", "--deep") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert "quantization_config" not in config


def test_a_live_model_of_a_quantized_donor(donors: Both, tiny_models: dict[str, Path]) -> None:
    states = []
    for donor in donors:
        with LiveModel(make_plan(tiny_models["qwen2_vl"], donor), device="cpu") as live:
            live.apply(0.3)
            states.append({n: tiny.raw(p) for n, p in live.model.state_dict().items()})
    assert states[0] == states[1]


def test_a_quantized_base_is_not_run_and_not_quantized_anew(
    bases: Both, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    plan = make_plan(bases[0], tiny_models["llava_onevision"])
    with pytest.raises(FormatError, match="a quantized base cannot be run; merge it at alpha 0"):
        LiveModel(plan, device="cpu")
    with pytest.raises(FormatError, match="a quantized base cannot be quantized; merge it"):
        merge(plan, 0.3, tmp_path / "out", quantize="nf4")


def test_a_piece_of_any_size_is_the_same(any_donor: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "TILE", 100)
    tensors, plain = (open_checkpoint(folder).tensors for folder in any_donor)
    with SampledReader() as reader, MappedFiles() as files:
        checked = 0
        for name, span in tensors.items():
            if not isinstance(span, CodedSpan):
                continue
            checked += 1
            expected = reader.read_bytes(plain[name])
            assert arranged.view_side(span, files.view).tobytes() == expected
            for first, count in ((0, 1), (5, 200), (span.elements - 71, 71)):
                piece = span.flat_slice(first, count)
                assert reader.read_bytes(piece) == expected[2 * first : 2 * (first + count)]
            rows = span.rows(3, 7)
            assert reader.read_bytes(rows) == reader.read_bytes(plain[name].rows(3, 7))
            of_device = coded.view_span(
                span, lambda each: torch.from_numpy(files.view(each).copy())
            )
            assert isinstance(of_device, torch.Tensor)
            assert of_device.numpy().tobytes() == expected
    assert checked > 10


# Numbers


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_every_8_bit_number(fp8: torch.dtype) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(fp8).float().numpy()
    name = {E4M3: "F8_E4M3", E5M2: "F8_E5M2"}[fp8]
    np.testing.assert_array_equal(coded._fp8_values(name), expected)


def test_every_scale_of_8_bits() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(coded._exponent_values(), expected)


def test_rounding_to_bf16_is_torchs() -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 20_000, np.uint32)
    bits[:3000] = bits[:3000] & 0xFFFF0000 | 0x8000  # halfway between two
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(coded._round_to_bf16(values), expected)
    assert coded._round_to_bf16(np.array([np.nan], np.float32))[0] == 0x7FC0


def test_blocks_that_do_not_divide_a_matrix(tmp_path: Path) -> None:
    """DeepSeek's kv_a_proj has 576 rows, four blocks and a half."""
    random = torch.Generator().manual_seed(0)
    codes = (torch.randn(2, 200, 300, generator=random)).to(E4M3)
    scales = torch.rand(2, 2, 3, generator=random)
    save_file({"w": codes, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    span = open_checkpoint(tmp_path).tensors["w"]
    grown = scales.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :200, :300]
    expected = (codes.float() * grown).bfloat16()
    with SampledReader() as reader:
        assert reader.read_bytes(span) == tiny.raw(expected)
        piece = span.rows(1, 2)
        assert reader.read_bytes(piece) == tiny.raw(expected[1])


# MXFP4


def pack(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[experts, rows, columns] as blocks and scales: the nearest of the sixteen numbers."""
    groups = matrix.float().reshape(*matrix.shape[:2], -1, 32)
    exponents = torch.ceil(torch.log2(groups.abs().amax(-1) / 6)).int()
    scaled = groups / torch.exp2(exponents.float())[..., None]
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = (scaled.abs()[..., None] - numbers).abs().argmin(-1) + 8 * (scaled < 0)
    blocks = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).to(torch.uint8)
    return blocks, (exponents + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """gpt-oss in small, in MXFP4 and in bf16, and the same with separate experts."""
    root = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "HIDDEN", 32)
        ancestor = stacks.ancestor(inner=64)
        found = {}
        for seed, side in ((1, "base"), (2, "donor")):
            text = stacks.descend(ancestor, seed)
            for form in ("interleaved", "each"):
                found[f"{side} {form}"] = stacks.spell(text, form)
    folders = {}
    for label, arrays in found.items():
        side, _, form = label.partition(" ")
        tensors = {n: torch.from_numpy(a.copy()).bfloat16() for n, a in arrays.items()}
        versions = {"plain": dict(tensors)}
        if form == "interleaved":
            versions["packed"] = dict(tensors)
            for name in [name for name in tensors if name.endswith("_proj")]:
                blocks, scales = pack(versions["packed"].pop(name).transpose(1, 2))
                versions["packed"] |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                dequantized = convert_moe_packed_tensors(blocks, scales)
                versions["plain"][name] = dequantized.contiguous()
        for version, saved in versions.items():
            folder = stacks.write(root / f"{side} {form} {version}", {}, form)
            save_file(saved, folder / "model.safetensors", {"format": "pt"})
            if version == "packed":
                config = json.loads((folder / "config.json").read_bytes())
                config["quantization_config"] = {"quant_method": "mxfp4"}
                (folder / "config.json").write_text(json.dumps(config))
            folders[f"{side} {form} {version}"] = folder
    return folders


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("form", ["interleaved", "each"])
def test_a_donor_in_mxfp4(packed: dict[str, Path], tmp_path: Path, form: str, alpha: float) -> None:
    """Into stacks like its own, and into experts one by one."""
    base = packed[f"base {form} plain"]
    donor, plain = (packed[f"donor interleaved {version}"] for version in ("packed", "plain"))
    out, expected = (
        merge(make_plan(base, each), alpha, tmp_path / each.name) for each in (donor, plain)
    )
    assert weights(out) == weights(expected)
    assert verify(out, deep=True, base=base, donor=donor).rows


def test_a_base_in_mxfp4_comes_out_as_bf16_gpt_oss(packed: dict[str, Path], tmp_path: Path) -> None:
    donor = packed["donor each plain"]
    base, plain = (packed[f"base interleaved {version}"] for version in ("packed", "plain"))
    out, expected = (
        merge(make_plan(each, donor), 0.3, tmp_path / each.name) for each in (base, plain)
    )
    assert weights(out) == weights(expected)
    assert "quantization_config" not in (out / "config.json").read_text()
    verify(out, deep=True, base=base, donor=donor)


def test_any_piece_of_mxfp4(packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "TILE", 1)
    packed_span, plain = (
        open_checkpoint(packed[f"donor interleaved {version}"]).tensors[
            "model.layers.1.mlp.experts.down_proj"
        ]
        for version in ("packed", "plain")
    )
    assert packed_span.shape == plain.shape == (3, 64, 32)
    with SampledReader() as reader:
        expected = reader.read_bytes(plain)
        for first in (0, 1, 31, 33, 1030, 2047, 2048, 4000, 6143):
            for count in (1, 40, 2048, 3000):
                piece = packed_span.flat_slice(first, min(count, plain.elements - first))
                assert reader.read_bytes(piece) == expected[2 * first : 2 * (first + count)]


@pytest.mark.parametrize("window", [100, 3000, 1 << 20])
def test_fp8_experts_in_another_order_come_in_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Quantized experts one by one, into a base that has them stacked and transposed."""
    monkeypatch.setattr(arranged, "BAND", 40)
    monkeypatch.setattr("lowmem_adamms.merging.loop.WINDOW", window)
    ancestor = stacks.ancestor()
    base = stacks.write(tmp_path / "base", {}, "transposed")
    arrays = stacks.spell(stacks.descend(ancestor, 1), "transposed")
    save_file(
        {n: torch.from_numpy(a).bfloat16() for n, a in arrays.items()}, base / "model.safetensors"
    )
    quantized: Tensors = {}
    plain: Tensors = {}
    for name, array in stacks.spell(stacks.descend(ancestor, 2), "each").items():
        quantized[name] = plain[name] = torch.from_numpy(array).bfloat16()
        if ".experts." in name and name.endswith(".weight"):
            codes, scales = scale_by(plain[name], (2, 2), E4M3)
            quantized[name], quantized[f"{name}_scale_inv"] = codes, scales
            plain[name] = expand(codes, scales)
    results = []
    for label, tensors in (("quantized", quantized), ("plain", plain)):
        donor = stacks.write(tmp_path / label, {}, "each")
        save_file(tensors, donor / "model.safetensors")
        out = merge(make_plan(base, donor), 0.3, tmp_path / f"{label} out")
        verify(out, deep=True)
        results.append(weights(out))
    assert results[0] == results[1]


# What is refused


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"w": torch.zeros(4, 4).to(E4M3), "w_scale_inv": torch.ones(3, 1)}, "w is [4, 4], its"),
        ({"w": torch.zeros(4, 4).to(E4M3), "w_scale": torch.ones(4, dtype=torch.int64)}, "I64 [4]"),
        ({"w": torch.zeros(4, 4).to(E4M3)}, "tensor w (F8_E4M3)"),
        (
            {
                "e_blocks": torch.zeros(1, 2, 1, 8, dtype=torch.uint8),
                "e_scales": torch.zeros(1, 2, 1, dtype=torch.uint8),
            },
            "e_blocks is [1, 2, 1, 8]",
        ),
        ({"a.weight": torch.zeros(4, 4, dtype=torch.int8)}, "tensor a.weight (I8)"),
        ({"a.weight_packed": torch.zeros(4, 4, dtype=torch.int32)}, "tensor a.weight_packed (I32)"),
    ],
)
def test_what_cannot_be_dequantized_is_named(tmp_path: Path, tensors: Tensors, said: str) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
