"""Small reads at any place: the right bytes, from here or the Hub, and evenly spread samples."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.sampled_reads import SampledReader, evenly_spread
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.errors import FormatError


@pytest.mark.parametrize(
    ("total", "length", "count", "starts"),
    [
        (100, 10, 1, [0]),
        (100, 10, 4, [0, 30, 60, 90]),
        (11, 10, 4, [0, 1]),
        (3, 10, 4, [0]),
        (100, 10, 0, []),
    ],
)
def test_stretches_are_spread_from_the_first_to_the_last(
    total: int, length: int, count: int, starts: list[int]
) -> None:
    assert evenly_spread(total, length, count) == starts


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    return path


def span(path: Path, start: int, stop: int) -> Span:
    dtype = DTYPES["F16"]
    return Span(path, dtype, start, stop, ((stop - start) // 2,))


class Remote:
    """A file of the Hub."""

    def read(self, start: int, stop: int) -> bytes:
        return bytes(range(start + 1, stop + 1))


@pytest.mark.parametrize("without", [None, OSError, AttributeError])
def test_spans_are_read_from_here_and_from_the_hub(
    path: Path, monkeypatch: pytest.MonkeyPatch, without: type[Exception] | None
) -> None:
    """Also where the system does not read past the cache, or has no `preadv` at all."""

    def fail(*_: object) -> int:
        assert without is not None
        raise without

    if without:
        monkeypatch.setattr(os, "preadv", fail, raising=False)
    far: dict[Path, Any] = {path.with_name("far"): Remote()}
    spans = [span(path, 10, 14), span(path, 100, 180), span(path.with_name("far"), 20, 24)]
    with SampledReader(far) as reader:
        assert [bytes(raw) for raw in reader.map(reader.read_bytes, spans)] == [
            bytes(range(10, 14)),
            bytes(range(100, 180)),
            bytes(range(21, 25)),
        ]


def test_bits_and_floats_of_a_span(path: Path) -> None:
    with SampledReader() as reader:
        bits, floats = reader.read_bits(span(path, 60, 64)), reader.read_floats(span(path, 60, 64))
    assert bits.tolist() == [0x3D3C, 0x3F3E]
    assert (floats == np.array([0x3D3C, 0x3F3E], np.uint16).view(np.float16)).all()
    assert floats.dtype == np.float64


def test_a_file_that_ends_too_early_is_an_error_not_zeros(path: Path) -> None:
    with SampledReader() as reader, pytest.raises(FormatError, match="file: ends before byte 210"):
        reader.read_bytes(span(path, 190, 210))
