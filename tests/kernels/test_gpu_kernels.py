"""The kernels for torch tensors against the reference, bit for bit.

Without a card the Triton kernel runs under Triton's interpreter, from a second copy of its module,
so that nothing else in the process sees interpreted kernels; and its PTX is compiled and read. With
a card, both kernels run there as well.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowmem_adamms.kernels import gpu, reference
from test_kernels import ALPHAS, DTYPES, TRIPLES, WIDTH, Bits, Triple, pair, patterns, specials

Parts = Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
# Untyped, so Any to mypy
TorchDispatchMode: Any = importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode
CARD = torch.cuda.is_available()


def copy_of_gpu(name: str) -> ModuleType:
    """The module once more, under another name, as this moment's environment makes it."""
    spec = importlib.util.spec_from_file_location(f"lowmem_adamms.kernels.{name}", gpu.__file__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Implementation:
    """One of the blends, on one device."""

    def __init__(self, module: ModuleType, name: str, device: str) -> None:
        self.module, self.blend, self.device = module, getattr(module, name), device

    def run(self, sides: Sequence[tuple[Bits, Bits]], dtypes: Triple, alpha: float) -> list[Bits]:
        """Results for storage arrays, in tensors that are filled with rubbish before."""
        parts = []
        for base, donor in sides:
            size = base.size * WIDTH[dtypes[2]] // 8
            out = torch.full((size,), 0xA5, dtype=torch.uint8, device=self.device)
            parts.append((as_bytes(base, self.device), as_bytes(donor, self.device), out))
        self(parts, dtypes, alpha)
        return [out.cpu().numpy().view(reference.STORAGE[dtypes[2]]) for _, _, out in parts]

    def __call__(self, parts: Parts, dtypes: Triple, alpha: float) -> None:
        with np.errstate(all="ignore"):  # the interpreter is numpy
            self.blend(parts, dtypes, alpha)


def as_bytes(bits: Bits, device: str = "cpu") -> torch.Tensor:
    return torch.from_numpy(bits.copy().view(np.uint8)).to(device)


@pytest.fixture(
    scope="module",
    params=["torch", "triton-interpreted", *(["torch-cuda", "triton-cuda"] if CARD else [])],
)
def kernel(request: pytest.FixtureRequest) -> Implementation:
    name, _, where = request.param.partition("-")
    device = "cuda" if where == "cuda" else "cpu"
    module: ModuleType = gpu
    if name == "triton":
        pytest.importorskip("triton")
    if where == "interpreted":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            module = copy_of_gpu("interpreted_gpu")
        module.__dict__["BLOCK"] = 1 << 13  # its cost is per block, not per element
    return Implementation(module, f"blend_{name}", device)


def assert_same(found: Bits, base: Bits, donor: Bits, dtypes: Triple, alpha: float) -> None:
    expected = reference.blend(base, donor, dtypes, alpha)
    different = np.flatnonzero(found != expected)
    first = [hex(bits[different[0]]) for bits in (base, donor, found, expected) if different.size]
    assert not first, (alpha, first)


def assert_equals_reference(
    kernel: Implementation, base: Bits, donor: Bits, dtypes: Triple, alpha: float
) -> None:
    (found,) = kernel.run([(base, donor)], dtypes, alpha)
    assert_same(found, base, donor, dtypes, alpha)


# Against the reference


@pytest.mark.parametrize("dtypes", TRIPLES, ids="-".join)
def test_equals_reference_on_any_bits(kernel: Implementation, dtypes: Triple) -> None:
    grid = itertools.product(specials(dtypes[0]), specials(dtypes[1]))
    ends = (
        np.array(column, reference.STORAGE[dtype])
        for column, dtype in zip(zip(*grid, strict=True), dtypes, strict=False)
    )
    base, donor = map(np.concatenate, zip(pair(dtypes, 4000, 3), ends, strict=True))
    for alpha in ALPHAS:
        assert_equals_reference(kernel, base, donor, dtypes, alpha)


@pytest.mark.parametrize("dtypes", TRIPLES, ids="-".join)
def test_equals_reference_where_sides_nearly_cancel(kernel: Implementation, dtypes: Triple) -> None:
    """Here a fused or a float32 multiplication shows, and rounding twice more often."""
    random = np.random.default_rng(4)
    size = random.standard_normal(4000) * 2.0 ** random.integers(-10, 10, 4000)
    base, donor = (
        reference.narrow(weight * size, dtype)
        for weight, dtype in zip((3.0, -7.0), dtypes, strict=False)
    )
    assert_equals_reference(kernel, base, donor, dtypes, 0.3)


@pytest.mark.parametrize("dtypes", [("BF16",) * 3, ("F16",) * 3], ids="-".join)
@pytest.mark.parametrize("alpha", [1e-9, 0.1, 0.3, 0.5])
def test_equals_reference_on_every_16_bit_base(
    kernel: Implementation, dtypes: Triple, alpha: float
) -> None:
    base = np.arange(1 << 16, dtype=np.uint16)
    for donor in (patterns(dtypes[1], base.size, 1), base[::-1].copy(), base ^ np.uint16(1)):
        assert_equals_reference(kernel, base, donor, dtypes, alpha)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_inputs_and_the_ends_keep_every_bit(kernel: Implementation, dtype: str) -> None:
    bits = np.concatenate([patterns(dtype, 20_000, 0), np.array(specials(dtype))])
    bits = bits.astype(reference.STORAGE[dtype])
    other = np.roll(bits, 1)
    for alpha in ALPHAS:
        assert np.array_equal(kernel.run([(bits, bits)], (dtype,) * 3, alpha)[0], bits)
    for alpha, side in ((0.0, bits), (1.0, other), (0, bits), (1, other)):
        assert np.array_equal(kernel.run([(bits, other)], (dtype,) * 3, alpha)[0], side)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([*((dtype,) * 3 for dtype in DTYPES), ("BF16", "F16", "BF16")]),
    st.floats(0, 1),
    st.data(),
)
def test_equals_reference_element_by_element(
    kernel: Implementation, dtypes: Triple, alpha: float, data: st.DataObject
) -> None:
    base, donor = (
        np.array([data.draw(st.integers(0, (1 << WIDTH[dtype]) - 1))], reference.STORAGE[dtype])
        for dtype in dtypes[:2]
    )
    assert_equals_reference(kernel, base, donor, dtypes, alpha)


# Parts


def test_many_parts_of_awkward_sizes_in_one_call(
    kernel: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel.module, "BLOCK", 1 << 10)
    monkeypatch.setattr(kernel.module, "CHUNK", 1 << 10)
    sizes = [1, 1023, 0, 1024, 3, 1025, 2055, 0, 1, 4096]
    for dtypes in (("BF16", "BF16", "BF16"), ("BF16", "F16", "F32"), ("F32", "F32", "BF16")):
        sides = [pair(dtypes, size, 10 * i) for i, size in enumerate(sizes)]
        for alpha in (0.3, 0.0, 1.0):
            for found, (base, donor) in zip(kernel.run(sides, dtypes, alpha), sides, strict=True):
                assert_same(found, base, donor, dtypes, alpha)


def test_a_part_larger_than_a_chunk_and_a_block(kernel: Implementation) -> None:
    dtypes = ("BF16", "BF16", "BF16")
    base, donor = pair(dtypes, gpu.CHUNK + 5, 0)
    assert_equals_reference(kernel, base, donor, dtypes, 0.3)


def test_no_parts_is_nothing_to_do(kernel: Implementation) -> None:
    assert kernel.run([], ("BF16", "BF16", "BF16"), 0.3) == []


@pytest.mark.parametrize("dtypes", [("BF16",) * 3, ("F32", "F16", "BF16")], ids="-".join)
def test_parts_of_larger_tensors_at_any_element_and_only_they_are_written(
    kernel: Implementation, dtypes: Triple
) -> None:
    count, starts = 9000, (1, 3, 7)
    arrays = [patterns(dtype, count + 20, seed) for seed, dtype in enumerate(dtypes)]
    tensors = [as_bytes(bits, kernel.device) for bits in arrays]
    widths = [WIDTH[dtype] // 8 for dtype in dtypes]
    base, donor, out = (
        whole[start * width : (start + count) * width]
        for whole, start, width in zip(tensors, starts, widths, strict=True)
    )
    kernel([(base, donor, out)], dtypes, 0.3)
    window = [bits[start : start + count] for bits, start in zip(arrays, starts, strict=True)]
    window[2][:] = reference.blend(window[0], window[1], dtypes, 0.3)
    for tensor, bits in zip(tensors, arrays, strict=True):
        assert np.array_equal(tensor.cpu().numpy(), bits.view(np.uint8))


class Peak(TorchDispatchMode):  # type: ignore[misc]
    """Bytes of new tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        result: torch.Tensor = func(*args, **(kwargs or {}))
        storage = result.untyped_storage()
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if storage.data_ptr() not in known and storage.data_ptr() not in self.alive:
            self.alive[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, storage.data_ptr())
            self.most = max(self.most, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("dtypes", [("BF16",) * 3, ("F32",) * 3, ("F16", "BF16", "F32")])
def test_temporaries_of_the_torch_kernel_do_not_grow_with_the_part(dtypes: Triple) -> None:
    peaks = []
    for count in (gpu.CHUNK, 4 * gpu.CHUNK):
        part = tuple(torch.ones(count * WIDTH[dtype] // 8, dtype=torch.uint8) for dtype in dtypes)
        with Peak() as peak:
            gpu.blend_torch([part], dtypes, 0.3)
        peaks.append(peak.most)
    assert 16 * gpu.CHUNK <= peaks[0] == peaks[1] <= 32 << 20  # at least two float64 a chunk


# What is compiled for a card


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtypes", [*((d,) * 3 for d in DTYPES), ("F16", "F32", "BF16")])
def test_compiled_code_neither_fuses_nor_flushes(
    dtypes: Triple, capability: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    backends = importlib.import_module("triton.backends.compiler")
    compiler = importlib.import_module("triton.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    compiled = copy_of_gpu("compiled_gpu")
    constants = compiled._constants(dtypes)
    words = ["*i16" if WIDTH[dtype] == 16 else "*i32" for dtype in dtypes]
    signature = dict.fromkeys(constants, "constexpr") | dict(
        zip(compiled._blend.arg_names, [*words, "i32", "i64", "i64"], strict=False)
    )
    source = compiler.ASTSource(
        compiled._blend, {name: signature[name] for name in compiled._blend.arg_names}, constants
    )
    target = backends.GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options=compiled._OPTIONS).asm["ptx"]
    assert "mul.rn.f64" in ptx and "add.rn.f64" in ptx
    assert "fma" not in ptx
    assert "ftz" not in ptx


# Selection


def test_a_cpu_takes_the_torch_kernel() -> None:
    kernel, why = gpu.kernel("cpu")
    assert kernel is gpu.blend_torch
    assert why == "torch: Triton needs a CUDA device, this is cpu"


def test_an_old_card_takes_the_torch_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    kernel, why = gpu.kernel("cuda")
    assert kernel is gpu.blend_torch
    assert why == "torch: compute capability 7.5, Triton needs 8.0"


def test_without_triton_the_torch_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    without = copy_of_gpu("gpu_without_triton")
    kernel, why = without.kernel("cuda")
    assert kernel is without.blend_torch
    assert why.startswith("torch: Triton cannot be imported (")
    base, donor = pair(("F32", "BF16", "F16"), 1000, 0)
    implementation = Implementation(without, "blend_torch", "cpu")
    (found,) = implementation.run([(base, donor)], ("F32", "BF16", "F16"), 0.3)
    assert_same(found, base, donor, ("F32", "BF16", "F16"), 0.3)
    with pytest.raises(ImportError):
        without.blend_triton([], ("F16", "F16", "F16"), 0.3)


@pytest.mark.skipif(CARD, reason="Triton works here")
def test_where_triton_fails_the_torch_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernel, why = gpu.kernel("cuda")
    assert kernel is gpu.blend_torch
    assert why.startswith("torch: Triton does not work here (")
    assert "\n" not in why


def test_where_bits_differ_the_torch_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "agrees", lambda blend, device, dtypes: dtypes[0] != "F16")
    kernel, why = gpu.kernel("cuda", [("BF16",) * 3, ("F16", "BF16", "F32")])
    assert kernel is gpu.blend_torch
    assert why == "torch: Triton's results for F16-BF16-F32 differ from the reference"
    kernel, why = gpu.kernel("cuda", [("BF16",) * 3])
    assert kernel is gpu.blend_triton
    assert why.startswith("triton: compute capability 9.0")


@pytest.mark.parametrize("dtypes", TRIPLES, ids="-".join)
def test_the_check_on_the_card_accepts_a_right_kernel(
    kernel: Implementation, dtypes: Triple
) -> None:
    assert gpu.agrees(kernel, torch.device(kernel.device), dtypes)


def wrong(parts: Parts, dtypes: Triple, alpha: float, mixed: Any, flush: bool = False) -> None:
    """The reference with another sum, or without subnormal results."""
    for base, donor, out in parts:
        sides = [
            side.numpy().view(reference.STORAGE[dtype])
            for side, dtype in zip((base, donor), dtypes, strict=False)
        ]
        with np.errstate(all="ignore"):
            wide = [
                reference.widen(side, dtype) for side, dtype in zip(sides, dtypes, strict=False)
            ]
            values = mixed(*wide, alpha)
        if flush:
            values = np.where(np.abs(values) < 2.0**-126, 0.0, values)
        bits = reference.narrow(values.astype(np.float64), dtypes[2])
        if dtypes[0] == dtypes[1] == dtypes[2]:
            bits = np.where(sides[0] == sides[1], sides[0], bits)
        out.copy_(torch.from_numpy(bits.view(np.uint8)))


def plain(base: Any, donor: Any, alpha: Any) -> Any:
    return (1 - alpha) * base + alpha * donor


def in_float32(base: Any, donor: Any, alpha: float) -> Any:
    return plain(base.astype(np.float32), donor.astype(np.float32), np.float32(alpha))


def unrounded_products(base: Any, donor: Any, alpha: float) -> Any:
    """As a fused multiply-add has them."""
    return plain(base.astype(np.longdouble), donor.astype(np.longdouble), np.longdouble(alpha))


@pytest.mark.parametrize("dtypes", [("BF16",) * 3, ("F32",) * 3, ("BF16", "F32", "F16")])
def test_the_check_on_the_card_notices_other_arithmetic(dtypes: Triple) -> None:
    def agrees(*how: Any) -> bool:
        same: bool = gpu.agrees(lambda *call: wrong(*call, *how), torch.device("cpu"), dtypes)
        return same

    assert agrees(plain)
    assert not agrees(in_float32)
    if np.finfo(np.longdouble).nmant > 52:
        assert not agrees(unrounded_products)
    if dtypes[2] != "F16":
        assert not agrees(plain, True)


def test_the_check_on_the_card_sees_an_unaligned_tail() -> None:
    def aligned_only(parts: Parts, dtypes: Triple, alpha: float) -> None:
        gpu.blend_torch(parts[:1], dtypes, alpha)

    assert not gpu.agrees(aligned_only, torch.device("cpu"), ("BF16", "BF16", "BF16"))
