"""Every kernel against the reference, bit for bit: numba, numpy, torch, and Triton.

Without a card the Triton kernel runs in Triton's interpreter, from a second copy of its module, so
that nothing else in the process sees interpreted kernels. With a card, both GPU kernels run there
as well.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from bits import (
    ALPHAS,
    SAME,
    TRIPLES,
    Bits,
    Triple,
    bits_of,
    pair,
    patterns,
    special_pairs,
    specials,
)
from gpu_copies import CARD, copy_of_gpu, interpreted_gpu
from lowmem_adamms.kernels import cpu, gpu, reference, select

ALL_BF16 = ("BF16", "BF16", "BF16")
Buffers = Sequence[tuple[Bits, Bits, Bits]]
Kernel = Callable[[Buffers, Triple, float, bool], None]
"""Takes byte buffers in numpy arrays, wherever it works."""


def on_device(blend: Any, device: str) -> Kernel:
    """A kernel for torch tensors as one for numpy arrays."""

    def kernel(parts: Buffers, dtypes: Triple, alpha: float, stochastic: bool) -> None:
        tensors = [[torch.from_numpy(side).to(device) for side in part] for part in parts]
        with np.errstate(all="ignore"):  # the interpreter is numpy
            blend([tuple(part) for part in tensors], dtypes, alpha, stochastic)
        for part, (_, _, out) in zip(parts, tensors, strict=True):
            part[2][...] = out.cpu().numpy()

    return kernel


KERNELS = ["numba", "numpy", "torch", "triton", *(["torch-cuda", "triton-cuda"] if CARD else [])]


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    name: str = request.param
    on_arrays: dict[str, Kernel] = {"numba": cpu.blend, "numpy": select.blend_numpy}
    if name in on_arrays:
        return on_arrays[name]
    if name == "triton":
        pytest.importorskip("triton")
        return on_device(interpreted_gpu().blend_triton, "cpu")
    function, _, device = name.partition("-")
    return on_device(getattr(gpu, f"blend_{function}"), device or "cpu")


def run(
    kernel: Kernel,
    sides: Sequence[tuple[Bits, Bits]],
    dtypes: Triple,
    alpha: float,
    stochastic: bool = False,
) -> list[Bits]:
    """Results for storage arrays, in buffers that are filled with rubbish before."""
    outs = [np.full(base.size, 0xA5, reference.STORAGE[dtypes[2]]) for base, _ in sides]
    parts = [
        (base.view(np.uint8), donor.view(np.uint8), out.view(np.uint8))
        for (base, donor), out in zip(sides, outs, strict=True)
    ]
    kernel(parts, dtypes, alpha, stochastic)
    return outs


def assert_equals_reference(
    kernel: Kernel, sides: Sequence[tuple[Bits, Bits]], dtypes: Triple, alpha: float
) -> None:
    """Rounded to nearest as stochastically."""
    for stochastic in (False, True):
        outs = run(kernel, sides, dtypes, alpha, stochastic)
        for (base, donor), found in zip(sides, outs, strict=True):
            expected = reference.blend(base, donor, dtypes, alpha, stochastic)
            wrong = np.flatnonzero(found != expected)[:1]
            shown = [hex(x[wrong[0]]) for x in (base, donor, found, expected) if wrong.size]
            assert not wrong.size, (alpha, stochastic, shown)


# Bits


@pytest.mark.parametrize("dtypes", TRIPLES, ids="-".join)
def test_any_bits(kernel: Kernel, dtypes: Triple) -> None:
    for alpha in ALPHAS:
        assert_equals_reference(kernel, [pair(dtypes, 8000, 3)], dtypes, alpha)
        assert_equals_reference(kernel, [special_pairs(dtypes)], dtypes, alpha)


@pytest.mark.parametrize("dtypes", TRIPLES, ids="-".join)
def test_sides_that_nearly_cancel(kernel: Kernel, dtypes: Triple) -> None:
    """Here a fused or a float32 multiplication shows, and rounding twice more often."""
    random = np.random.default_rng(4)
    size = random.standard_normal(4000) * 2.0 ** random.integers(-10, 10, 4000)
    base, donor = reference.narrow(3 * size, dtypes[0]), reference.narrow(-7 * size, dtypes[1])
    assert_equals_reference(kernel, [(base, donor)], dtypes, 0.3)


@pytest.mark.parametrize("dtypes", SAME[:2], ids="-".join)
def test_every_16_bit_base(kernel: Kernel, dtypes: Triple) -> None:
    base = np.arange(1 << 16, dtype=np.uint16)
    donors = (patterns(dtypes[1], base.size, 1), base[::-1].copy(), base ^ np.uint16(1))
    for alpha in (1e-9, 0.3, 0.5):
        assert_equals_reference(kernel, [(base, donor) for donor in donors], dtypes, alpha)


# The exceptions of the formula, and what half of either side gives


@pytest.mark.parametrize("dtypes", SAME, ids="-".join)
def test_the_ends_and_equal_inputs_keep_every_bit(kernel: Kernel, dtypes: Triple) -> None:
    bits = np.concatenate([patterns(dtypes[0], 20_000, 0), specials(dtypes[0])])
    for alpha in ALPHAS:
        for stochastic in (False, True):
            assert np.array_equal(run(kernel, [(bits, bits)], dtypes, alpha, stochastic)[0], bits)
    base, donor = special_pairs(dtypes)
    for alpha, side in ((0.0, base), (1.0, donor), (0, base), (1, donor)):
        for stochastic in (False, True):
            assert np.array_equal(run(kernel, [(base, donor)], dtypes, alpha, stochastic)[0], side)


@pytest.mark.parametrize(
    ("dtypes", "base", "donor", "expected"),
    [
        # Halfway between 1 and the next number: the even one below; between the next two: above
        (("BF16",) * 3, 1.0, 1 + 2**-7, 1.0),
        (("BF16",) * 3, 1 + 2**-7, 1 + 2**-6, 1 + 2**-6),
        (("F16",) * 3, 1.0, 1 + 2**-10, 1.0),
        (("F16",) * 3, 1 + 2**-10, 1 + 2**-9, 1 + 2**-9),
        (("F32",) * 3, 1.0, 1 + 2**-23, 1.0),
        # A hair above a tie: 1 + 2**-8 + 2**-24. Rounding by way of float32 would lose the hair
        (("F32", "F32", "BF16"), 1.0, 1 + 2**-7 + 2**-23, 1 + 2**-7),
        (("F32", "F32", "F16"), 1.0, 1 + 2**-10 + 2**-23, 1 + 2**-10),
        # Subnormal results: half of the smallest ties to zero, three halves to two
        (("BF16",) * 3, 2.0**-133, 0.0, 0.0),
        (("BF16",) * 3, 2.0**-133, 2.0**-132, 2.0**-132),
        (("F16",) * 3, 2.0**-24, 0.0, 0.0),
        (("F16",) * 3, 2.0**-24, 2.0**-23, 2.0**-23),
        (("F32",) * 3, 2.0**-149, 0.0, 0.0),
        (("F32", "F32", "F16"), 2.0**-24 + 2.0**-40, 0.0, 2.0**-24),
        # Overflow: into fp16 from values it cannot hold; 65519 still rounds down to 65504
        (("F32", "F32", "F16"), 65520.0, 65520.0, math.inf),
        (("F32", "F32", "F16"), 65519.0, 65519.0, 65504.0),
        (("F32", "F32", "BF16"), *[float(np.finfo(np.float32).max)] * 2, math.inf),
    ],
)
def test_ties_subnormals_and_overflow_at_half(
    kernel: Kernel, dtypes: Triple, base: float, donor: float, expected: float
) -> None:
    sides = bits_of(base, dtypes[0]), bits_of(donor, dtypes[1])
    (found,) = run(kernel, [sides], dtypes, 0.5)
    assert reference.widen(found, dtypes[2]).tolist() == [expected]


# Parts


@pytest.mark.parametrize("dtypes", [SAME[0], ("BF16", "F16", "F32"), ("F32", "F32", "BF16")])
def test_many_parts_of_awkward_sizes_in_one_call(kernel: Kernel, dtypes: Triple) -> None:
    blocks = (cpu.BLOCK, gpu.BLOCK)
    sizes = [0, 1, 3, *(size + off for size in blocks for off in (-1, 0, 1, size + 7)), 0, 1]
    sides = [pair(dtypes, size, 10 * i) for i, size in enumerate(sizes)]
    for alpha in (0.3, 0.0, 1.0):
        assert_equals_reference(kernel, sides, dtypes, alpha)
    assert run(kernel, [], dtypes, 0.3) == []


@pytest.mark.parametrize("dtypes", [ALL_BF16, ("F32", "F16", "BF16")], ids="-".join)
def test_parts_begin_at_any_element_and_only_they_are_written(
    kernel: Kernel, dtypes: Triple
) -> None:
    count, starts = 9000, (1, 3, 7)
    arrays = [patterns(dtype, count + 20, seed) for seed, dtype in enumerate(dtypes)]
    expected = [array.copy() for array in arrays]
    windows = [slice(start, start + count) for start in starts]
    base, donor = (array[window] for array, window in zip(expected, windows[:2], strict=False))
    expected[2][windows[2]] = reference.blend(base, donor, dtypes, 0.3)
    part = [array[window].view(np.uint8) for array, window in zip(arrays, windows, strict=True)]
    kernel([(part[0], part[1], part[2])], dtypes, 0.3, False)
    assert all(map(np.array_equal, arrays, expected))


def test_read_only_inputs_are_accepted() -> None:
    base, donor = pair(ALL_BF16, 100, 0)
    base.flags.writeable = donor.flags.writeable = False
    for kernel in (cpu.blend, select.blend_numpy):
        assert_equals_reference(kernel, [(base, donor)], ALL_BF16, 0.3)


def test_several_threads_may_call_at_once() -> None:
    sides = [pair(ALL_BF16, 3 * cpu.BLOCK, seed) for seed in range(4)]
    expected = [reference.blend(*side, ALL_BF16, 0.3) for side in sides]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = pool.map(lambda side: run(cpu.blend, [side], ALL_BF16, 0.3)[0], sides)
            assert all(map(np.array_equal, found, expected))


# Selection


def test_numba_is_selected_where_it_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, why = select.select_kernel([ALL_BF16])
    assert kernel is cpu.blend
    assert "numba" in why
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "lowmem_adamms.kernels.cpu")
    monkeypatch.delattr(importlib.import_module("lowmem_adamms.kernels"), "cpu")
    kernel, why = select.select_kernel([ALL_BF16])
    assert kernel is select.blend_numpy
    assert why.startswith("numpy: numba cannot be imported")


def test_without_triton_the_torch_kernel_is_selected_and_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    without = copy_of_gpu("gpu_without_triton")
    kernel, why = without.select_kernel("cuda")
    assert kernel is without.blend_torch
    assert why.startswith("torch: Triton cannot be imported (")
    dtypes = ("F32", "BF16", "F16")
    assert_equals_reference(on_device(kernel, "cpu"), [pair(dtypes, 1000, 0)], dtypes, 0.3)
    with pytest.raises(ImportError):
        without.blend_triton([], dtypes, 0.3)
