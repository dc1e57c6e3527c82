"""Kernels that mix any number of models: the reference's bits, and what the reference means."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bits import DTYPES, Bits, patterns, specials, weights
from gpu_copies import CARD, interpreted_gpu
from lowmem_adamms.kernels import cpu, gpu, reference, select
from lowmem_adamms.kernels.reference import Mixing, Term

HALF = reference.ALL_KEPT // 2
MIXINGS = {
    "linear": Mixing((Term(0.7), Term(0.3))),
    "off the line": Mixing((Term(1.01), Term(0.02)), keeps_equal=False),
    "task arithmetic": Mixing((Term(), Term(0.3)), relative=True),
    "ties": Mixing((Term(low=0.01), Term(low=0.02)), 0.9, relative=True, elect=True, mean=True),
    "dare": Mixing(
        (Term(2, kept=HALF, key=5), Term(4, kept=HALF // 2, key=-1 % (1 << 64))), 1, True
    ),
    "dare-ties": Mixing(
        (Term(2, kept=HALF, key=5), Term(1, 0.5, kept=HALF, key=9)), 0.5, True, True, True
    ),
    "breadcrumbs": Mixing((Term(low=0.005, high=0.03), Term(0.4, low=0.001, high=0.02)), 1, True),
    "ram": Mixing((Term(low=1e-5), Term(low=1e-5)), 1, True, mean=True),
    "three": Mixing((Term(0.5), Term(0.2), Term(0.3))),
    "one": Mixing((Term(),), 0.5, relative=True),
}
FIRST = 12345
KERNELS = ("numba", "triton", "torch-cpu", *(["torch-cuda"] if CARD else []))


def on_tensors(kernel: gpu.MixKernel, device: str = "cpu") -> Callable[..., None]:
    """A kernel for torch tensors as one for numpy arrays."""

    def mix(parts: Sequence[Sequence[Any]], *rest: Any) -> None:
        tensors = [[torch.from_numpy(each).to(device) for each in part] for part in parts]
        with np.errstate(all="ignore"):  # Triton's interpreter is numpy
            kernel(tensors, *rest)
        for part, made in zip(parts, tensors, strict=True):
            part[-1][...] = made[-1].cpu().numpy()

    return mix


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Callable[..., None]:
    name: str = request.param
    if name == "numba":
        kernel: Callable[..., None] = cpu.mix
        return kernel
    if name == "triton":
        pytest.importorskip("triton")
        return on_tensors(interpreted_gpu().mix_triton)
    return on_tensors(gpu.mix, name.removeprefix("torch-"))


def streams_of(mixing: Mixing) -> int:
    return len(mixing.terms) + int(mixing.relative)


def inputs(dtypes: Sequence[str], count: int) -> list[Bits]:
    """Any bits, then weights of which many are equal, then special values."""
    return [
        np.concatenate(
            [
                patterns(dtype, count, seed),
                np.where(np.arange(count) % 3, weights(dtype, count, seed), 0).astype(
                    reference.STORAGE[dtype]
                ),
                np.roll(specials(dtype), seed),
                specials(dtype),
            ]
        )
        for seed, dtype in enumerate(dtypes)
    ]


def run(
    kernel: Callable[..., None], streams: Sequence[Bits], dtypes: Sequence[str], mixing: Mixing
) -> Bits:
    """The kernel's output, of the streams in two parts."""
    out: Bits = np.zeros(len(streams[0]), reference.STORAGE[dtypes[-1]])
    whole = [*streams, out]
    parts = [
        [each[place].view(np.uint8) for each in whole] for place in (slice(777), slice(777, None))
    ]
    kernel(parts, dtypes, mixing, [FIRST, FIRST + 777])
    return out


@pytest.mark.parametrize("name", MIXINGS)
def test_a_kernel_gives_the_reference_bits(kernel: Callable[..., None], name: str) -> None:
    mixing = MIXINGS[name]
    count = cpu.BLOCK + 300 if kernel is cpu.mix else 900
    for shift, out, stochastic in itertools.product(range(3), DTYPES, (False, True)):
        mixing = replace(mixing, stochastic=stochastic)
        dtypes = [DTYPES[(i + shift) % 3] for i in range(streams_of(mixing))] + [out]
        streams = inputs(dtypes[:-1], count)
        expected = reference.mix(streams, dtypes, mixing, FIRST)
        assert np.array_equal(run(kernel, streams, dtypes, mixing), expected), dtypes


def test_without_numba_the_reference_mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_has_numba", lambda: False)
    dtypes = ("BF16", "BF16", "BF16", "BF16")
    streams = inputs(dtypes[:-1], 900)
    expected = reference.mix(streams, dtypes, MIXINGS["dare-ties"], FIRST)
    assert np.array_equal(run(select.mix, streams, dtypes, MIXINGS["dare-ties"]), expected)


def test_the_temporaries_of_torch_do_not_grow_with_the_number_of_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    mix_values = reference.mix_values

    def watched(values: Sequence[torch.Tensor], *rest: Any) -> Any:
        seen.append(sum(value.numel() for value in values))
        return mix_values(values, *rest)

    monkeypatch.setattr(reference, "mix_values", watched)
    streams = [np.zeros(2 * gpu.CHUNK, np.uint16)] * 3
    run(on_tensors(gpu.mix_torch), streams, ("BF16",) * 4, MIXINGS["three"])
    assert max(seen) <= gpu.CHUNK


# What the reference means


def mixed(values: Sequence[float], mixing: Mixing) -> float:
    streams = [np.array([value], np.float32).view(np.uint32) for value in values]
    dtypes = ["F32"] * (len(values) + 1)
    return float(reference.widen(reference.mix(streams, dtypes, mixing), "F32")[0])


TIES = Mixing((Term(), Term(), Term()), relative=True, elect=True, mean=True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((3, 2, -1, 0), 2.5),  # the sum is positive: the mean of those that are
        ((-3, 2, -1, 0), -2),
        ((3, 0, 0, 0), 3),  # what did not change has no say
        ((2, -1, -1, 0), 2),  # a sum of zero is positive
        ((0, 0, 0, 5), 0.0),  # 0 - 5 each
        ((math.nan, 1, 1, 0), math.nan),
    ],
)
def test_an_elected_mean(values: tuple[float, ...], expected: float) -> None:
    assert mixed(values, TIES) == pytest.approx(expected, nan_ok=True)


def test_bounds_are_inclusive_and_weights_divide() -> None:
    mixing = Mixing((Term(3, 3, 1, 2), Term(1, 1, 1, 2)), relative=True, mean=True)
    assert mixed((1, 2, 0), mixing) == (3 * 1 + 2) / 4
    assert mixed((2.5, 2, 0), mixing) == 2
    assert mixed((0.5, 9, 4), mixing) == 4


def test_equal_values_come_out_as_they_are() -> None:
    third = float(np.float32(1 / 3))
    assert mixed((third,) * 3, Mixing((Term(0.1), Term(0.2), Term(0.7)))) == third
    assert math.copysign(1, mixed((-0.0, -0.0), Mixing((Term(),), relative=True))) == -1
    assert mixed((math.inf, math.inf), Mixing((Term(),), relative=True)) == math.inf
    assert mixed((1, 1), Mixing((Term(1), Term(1)), keeps_equal=False)) == 2


def test_a_random_choice_keeps_its_share_and_depends_on_key_and_place() -> None:
    index = np.arange(1 << 16, dtype=np.uint64)
    kept = [reference.draw(key, index) < HALF // 4 for key in (1, 2)]
    assert all(abs(each.mean() - 0.125) < 0.01 for each in kept)
    assert abs((kept[0] & kept[1]).mean() - 0.125**2) < 0.005
    assert np.array_equal(reference.draw(1, index[7:]), reference.draw(1, index)[7:])
    # The first outputs of SplitMix64 from the state 0, as published with it
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert reference.draw(0, index[:3]).tolist() == [word >> 11 for word in known]


# The first pass


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids="-".join)
def test_magnitudes_are_counted(dtypes: tuple[str, str, str]) -> None:
    model, ancestor = inputs(dtypes[:2], 3000)
    with np.errstate(all="ignore"):
        difference = reference.widen(model, dtypes[0]) - reference.widen(ancestor, dtypes[1])
    words = reference.narrow(np.abs(difference), dtypes[2]).astype(int)
    shift = 16 if dtypes[2] == "F32" else 0
    for count in (reference.count_magnitudes, count_by_numba):
        counts = np.zeros(1 << 15, np.int64)
        count(model, ancestor, dtypes, counts)
        assert found_in(counts) == Counter((words >> shift).tolist())
    if dtypes[2] == "F32":
        ((prefix, _),) = Counter((words >> 16).tolist()).most_common(1)
        inside = words[words >> 16 == prefix] & 0xFFFF
        for count in (reference.count_magnitudes, count_by_numba):
            counts = np.zeros(1 << 16, np.int64)
            count(model, ancestor, dtypes, counts, prefix)
            assert found_in(counts) == Counter(inside.tolist())


def count_by_numba(model: Bits, ancestor: Bits, *rest: Any) -> None:
    cpu.count_magnitudes(model.view(np.uint8), ancestor.view(np.uint8), *rest)


def found_in(counts: npt.NDArray[np.int64]) -> dict[int, int]:
    return {int(word): int(counts[word]) for word in np.flatnonzero(counts)}


@pytest.mark.parametrize("relative", [False, True])
def test_products_are_summed_block_by_block_in_order(relative: bool) -> None:
    dtypes, pairs = ("BF16", "F32", "F16"), [(0, 0), (1, 1), (0, 1)]
    count = reference.SUM_BLOCK + 1000
    streams = [weights(dtype, count, seed) for seed, dtype in enumerate(dtypes)]
    found = cpu.sum_products([each.view(np.uint8) for each in streams], dtypes, pairs, relative)
    assert np.array_equal(found, reference.sum_products(streams, dtypes, pairs, relative))
    values = [reference.widen(each, dtype) for each, dtype in zip(streams, dtypes, strict=True)]
    values = [value - relative * values[-1] for value in values]
    for column, (a, b) in zip(found.T, pairs, strict=True):
        assert math.fsum(column) == pytest.approx(math.fsum(values[a] * values[b]), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_a_rounded_magnitude_begins(dtype: str) -> None:
    infinity = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
    assert reference.smallest_rounded_to(0, dtype) == 0
    for word in (1, 2, 3, 0x80, 0x400, infinity // 2, infinity - 1, infinity):
        bound = reference.smallest_rounded_to(word, dtype)
        assert reference.narrow(np.array([bound]), dtype)[0] == word
        assert reference.narrow(np.array([math.nextafter(bound, 0)]), dtype)[0] == word - 1
