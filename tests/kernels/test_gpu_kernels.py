"""What only the kernels for torch tensors have: temporaries, PTX, and the check on the card."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bits import SAME, TRIPLES, WIDTH, Triple
from gpu_copies import CARD, copy_of_gpu, interpreted_gpu
from lowmem_adamms.kernels import gpu, reference
from lowmem_adamms.kernels.reference import Mixing, Term

Parts = Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
ALL_BF16 = ("BF16", "BF16", "BF16")
MIXING = Mixing((Term(2, kept=1 << 52, key=3), Term(2, kept=1 << 52, key=4)), relative=True)
# Untyped, so Any to mypy
TorchDispatchMode: Any = importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode


class PeakMemory(TorchDispatchMode):  # type: ignore[misc]
    """Bytes of new tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        result: torch.Tensor = func(*args, **(kwargs or {}))
        storage = result.untyped_storage()
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if storage.data_ptr() not in known and storage.data_ptr() not in self.alive:
            self.alive[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, storage.data_ptr())
            self.peak_bytes = max(self.peak_bytes, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("dtypes", [SAME[0], SAME[2], ("F16", "BF16", "F32")])
def test_temporaries_of_the_torch_kernel_do_not_grow_with_the_part(dtypes: Triple) -> None:
    peaks = []
    for count in (gpu.CHUNK, 4 * gpu.CHUNK):
        part = tuple(torch.ones(count * WIDTH[dtype] // 8, dtype=torch.uint8) for dtype in dtypes)
        with PeakMemory() as memory:
            gpu.blend_torch([part], dtypes, 0.3)
        peaks.append(memory.peak_bytes)
    assert 16 * gpu.CHUNK <= peaks[0] == peaks[1] <= 32 << 20  # at least two float64 a chunk


def test_a_part_larger_than_a_chunk_has_its_reference_bits() -> None:
    count = gpu.CHUNK + 5
    base, donor = (torch.arange(count).to(torch.int16) ^ mask for mask in (0, 0x55))
    out = torch.empty(2 * count, dtype=torch.uint8)
    gpu.blend_torch([(base.view(torch.uint8), donor.view(torch.uint8), out)], ALL_BF16, 0.3)
    sides = [side.numpy().view(np.uint16) for side in (base, donor)]
    expected = reference.blend(sides[0], sides[1], ALL_BF16, 0.3)
    assert np.array_equal(out.numpy().view(np.uint16), expected)


def compile_to_ptx(
    kernel: str, constants: Callable[[Any], dict[str, Any]], types: Sequence[Any], capability: int
) -> str:
    """PTX of a kernel of gpu.py; types: of its arguments that are no constants."""
    backends = importlib.import_module("triton.backends.compiler")
    compiler = importlib.import_module("triton.compiler")
    compiled = copy_of_gpu("compiled_gpu")
    function, values = getattr(compiled, kernel), constants(compiled)
    given = zip(function.arg_names, types, strict=False)
    signature = dict(given) | dict.fromkeys(values, "constexpr")
    source = compiler.ASTSource(function, signature, values)
    target = backends.GPUTarget("cuda", capability, 32)
    return str(
        importlib.import_module("triton")
        .compile(source, target=target, options=compiled._OPTIONS)
        .asm["ptx"]
    )


@pytest.fixture
def ptx_of(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return compile_to_ptx


def words(dtypes: Sequence[str]) -> list[str]:
    return ["*i16" if WIDTH[dtype] == 16 else "*i32" for dtype in dtypes]


def assert_plain_arithmetic(ptx: str) -> None:
    """Neither fused nor flushed."""
    assert "mul.rn.f64" in ptx and "add.rn.f64" in ptx
    assert "fma" not in ptx
    assert "ftz" not in ptx


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtypes", [*SAME, ("F16", "F32", "BF16")], ids="-".join)
def test_a_compiled_blend_neither_fuses_nor_flushes(
    dtypes: Triple, capability: int, ptx_of: Callable[..., str]
) -> None:
    types = [*words(dtypes), "i32", "i64", "i64"]
    ptx = ptx_of("_blend", lambda g: g._constants(dtypes, True), types, capability)
    assert_plain_arithmetic(ptx)


@pytest.mark.parametrize(
    ("mixing", "dtypes"),
    [
        (Mixing((Term(0.4), Term(0.3), Term(0.3))), ("F16", "F32", "BF16", "BF16")),
        (
            Mixing((Term(2, kept=1), Term(2, kept=1)), relative=True, elect=True, mean=True),
            ("BF16",) * 4,
        ),
    ],
)
def test_a_compiled_mix_neither_fuses_nor_flushes(
    mixing: Mixing, dtypes: tuple[str, ...], ptx_of: Callable[..., str]
) -> None:
    types = [tuple(words(dtypes[:-1])), *words(dtypes[-1:]), "i32", "i64", "*i64"]
    ptx = ptx_of("_mix", lambda g: g._mix_constants(dtypes, mixing), types, 80)
    assert_plain_arithmetic(ptx)
    assert ("div.rn.f64" in ptx) == mixing.mean


# Selection


def test_a_cpu_takes_the_torch_kernel() -> None:
    kernel, why = gpu.select_kernel("cpu")
    assert kernel is gpu.blend_torch
    assert why == "torch: Triton needs a CUDA device, this is cpu"


def test_a_card_takes_triton_if_it_is_new_enough_and_triton_works_and_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    old = "torch: compute capability 7.5, Triton needs 8.0"
    assert gpu.select_kernel("cuda") == (gpu.blend_torch, old)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    if not CARD:
        kernel, why = gpu.select_kernel("cuda")
        assert kernel is gpu.blend_torch
        assert why.startswith("torch: Triton does not work here (") and "\n" not in why
    monkeypatch.setattr(gpu, "matches_reference", lambda blend, device, dtypes: dtypes[0] != "F16")
    wrong = "torch: Triton's results for F16-BF16-F32 differ from the reference"
    assert gpu.select_kernel("cuda", [ALL_BF16, ("F16", "BF16", "F32")]) == (gpu.blend_torch, wrong)
    kernel, why = gpu.select_kernel("cuda", [ALL_BF16])
    assert kernel is gpu.blend_triton
    assert why.startswith("triton: compute capability 9.0")


@pytest.mark.parametrize("is_right", [True, False])
def test_a_mix_takes_triton_where_it_is_right(
    is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    assert gpu._select_mix(torch.device("cpu"), ALL_BF16, MIXING) is gpu.mix_torch
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "mix_matches_reference", lambda *given: is_right)
    gpu._select_mix.cache_clear()
    chosen = gpu._select_mix(torch.device("cuda"), ALL_BF16, MIXING)
    gpu._select_mix.cache_clear()
    assert chosen is (gpu.mix_triton if is_right else gpu.mix_torch)


# The check on the card


@pytest.mark.parametrize("dtypes", TRIPLES, ids="-".join)
def test_the_check_accepts_a_right_kernel(dtypes: Triple) -> None:
    assert gpu.matches_reference(gpu.blend_torch, torch.device("cpu"), dtypes)
    if CARD:
        assert gpu.matches_reference(gpu.blend_triton, torch.device("cuda"), dtypes)


def test_the_check_accepts_the_interpreted_kernel() -> None:
    pytest.importorskip("triton")
    with np.errstate(all="ignore"):  # the interpreter is numpy
        assert gpu.matches_reference(
            interpreted_gpu().blend_triton, torch.device("cpu"), ("BF16", "F32", "F16")
        )


@pytest.mark.parametrize("mixing", [MIXING, gpu._make_trial(MIXING)])
def test_the_check_of_a_mix(mixing: Mixing) -> None:
    """It accepts what is right, and notices a kernel that takes no account of the place."""
    dtypes, device = ("BF16", "F32", "F16", "BF16"), torch.device("cpu")

    def nowhere(parts: Any, dtypes: Any, mixing: Mixing, firsts: Any) -> None:
        gpu.mix_torch(parts, dtypes, mixing, [0] * len(parts))

    assert gpu.mix_matches_reference(gpu.mix_torch, device, dtypes, mixing)
    assert not gpu.mix_matches_reference(nowhere, device, dtypes, mixing)


def plain(base: Any, donor: Any, alpha: Any) -> Any:
    return (1 - alpha) * base + alpha * donor


def in_float32(base: Any, donor: Any, alpha: float) -> Any:
    return plain(base.astype(np.float32), donor.astype(np.float32), np.float32(alpha))


def with_fused_products(base: Any, donor: Any, alpha: float) -> Any:
    """As a fused multiply-add does not round them."""
    return plain(base.astype(np.longdouble), donor.astype(np.longdouble), np.longdouble(alpha))


def without_subnormals(base: Any, donor: Any, alpha: float) -> Any:
    values = plain(base, donor, alpha)
    return np.where(np.abs(values) < 2.0**-126, 0.0, values)


def wrong_kernel(mix: Callable[[Any, Any, float], Any]) -> gpu.Kernel:
    """The reference with another sum."""

    def blend(parts: Parts, dtypes: Triple, alpha: float, stochastic: bool) -> None:
        for *sides, out in parts:
            bits = [
                side.numpy().view(reference.STORAGE[dtype])
                for side, dtype in zip(sides, dtypes, strict=False)
            ]
            with np.errstate(all="ignore"):
                base, donor = (reference.widen(bits[i], dtypes[i]) for i in (0, 1))
                values = mix(base, donor, alpha).astype(np.float64)
                if stochastic:
                    values = reference.round_stochastically(values, (base, donor), dtypes[2])
                mixed = reference.narrow(values, dtypes[2])
            if dtypes[0] == dtypes[1] == dtypes[2]:
                mixed = np.where(bits[0] == bits[1], bits[0], mixed)
            out.copy_(torch.from_numpy(mixed.view(np.uint8)))

    return blend


@pytest.mark.parametrize("dtypes", [SAME[0], SAME[2], ("BF16", "F32", "F16")], ids="-".join)
def test_the_check_notices_other_arithmetic(dtypes: Triple) -> None:
    def is_accepted(mix: Callable[[Any, Any, float], Any]) -> bool:
        accepted: bool = gpu.matches_reference(wrong_kernel(mix), torch.device("cpu"), dtypes)
        return accepted

    assert is_accepted(plain)
    assert not is_accepted(in_float32)
    if np.finfo(np.longdouble).nmant > 52:
        assert not is_accepted(with_fused_products)
    if dtypes[2] != "F16":
        assert not is_accepted(without_subnormals)


def test_the_check_sees_an_unaligned_tail() -> None:
    def aligned_only(parts: Parts, dtypes: Triple, alpha: float, stochastic: bool) -> None:
        gpu.blend_torch(parts[:1], dtypes, alpha, stochastic)

    assert not gpu.matches_reference(aligned_only, torch.device("cpu"), ALL_BF16)
