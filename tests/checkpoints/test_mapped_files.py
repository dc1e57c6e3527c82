"""Mapped reads: views show the file's bytes, blocks are prefetched once and released."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowmem_adamms.checkpoints import mapped_files
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.mapped_files import MappedFile, MappedFiles, flush_range
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.errors import FormatError

BLOCK = 1 << 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_files, "BLOCK", BLOCK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of three blocks and a bit, of random bytes."""
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(3 * BLOCK + 1001))
    return path


def call_it(call: Callable[[], None] | None) -> None:
    if call is not None:
        call()


def span(path: Path, start: int, stop: int, dtype: str = "BF16") -> Span:
    return Span(path, DTYPES[dtype], start, stop, (stop - start,))


@pytest.mark.parametrize(
    ("dtype", "start", "stop", "copied"),
    [
        ("BF16", 0, 2 * BLOCK + 10, False),
        ("BF16", 5, 105, True),
        ("F32", 6, 1006, True),
        ("F32", 3 * BLOCK + 1, 3 * BLOCK + 1001, True),
    ],
)
def test_views_show_the_files_bytes_and_are_copies_only_if_unaligned(
    path: Path, dtype: str, start: int, stop: int, copied: bool
) -> None:
    with MappedFiles() as files:
        view = files.view(span(path, start, stop, dtype))
        assert view.tobytes() == path.read_bytes()[start:stop]
        assert view.flags.owndata == copied
        assert view.__array_interface__["data"][0] % DTYPES[dtype].itemsize == 0
        del view


def test_views_are_read_only_or_private(path: Path) -> None:
    before = path.read_bytes()
    with MappedFiles() as files:
        view = files.view(span(path, 0, 100))
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        files.view(span(path, 1, 101))[0] = 1
    assert path.read_bytes() == before
    assert view.tobytes() == before[:100], "closing with a view still held is harmless"


@pytest.mark.parametrize("left", [0, 10, 2 * BLOCK])
def test_a_file_that_was_cut_since_it_was_planned_is_named(path: Path, left: int) -> None:
    os.truncate(path, left)
    with (
        MappedFiles() as files,
        pytest.raises(FormatError, match=f"file: {left} bytes, expected"),
    ):
        for bring in files.prefetch(span(path, BLOCK, 3 * BLOCK + 1000)):
            bring()
        files.view(span(path, BLOCK, 3 * BLOCK + 1000))


def test_each_block_is_prefetched_once_until_it_is_released(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(BLOCK))
    with MappedFiles() as files:
        assert len(files.prefetch(span(path, 10, 20))) == 1  # block 0
        assert files.prefetch(span(path, 20, BLOCK)) == []
        assert len(files.prefetch(span(path, BLOCK - 2, 2 * BLOCK + 2))) == 2  # blocks 1 and 2
        assert len(files.prefetch(span(path, 2 * BLOCK, 3 * BLOCK + 1001))) == 1  # the short one
        assert len(files.prefetch(span(other, 0, 10))) == 1
        assert files.view(span(other, 0, 10)).tobytes() == bytes(10)
        call_it(files.release(span(path, 0, BLOCK + 2), evict=False))
        assert len(files.prefetch(span(path, 0, 2 * BLOCK))) == 1


def test_a_block_is_released_with_the_span_it_ends_in(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[tuple[int, int, bool]] = []

    def note(_: MappedFile, first: int, stop: int, *, evict: bool) -> None:
        released.append((first, stop, evict))

    monkeypatch.setattr(MappedFile, "release_blocks", note)
    with MappedFiles() as files:
        assert files.release(span(path, 0, BLOCK - 2), evict=True) is None
        for start, stop in (
            (BLOCK - 2, BLOCK),
            (BLOCK, 2 * BLOCK + 2),
            (2 * BLOCK + 2, 3 * BLOCK + 1001),
        ):
            call_it(files.release(span(path, start, stop), evict=True))
    assert released == [(0, 1, True), (1, 2, True), (2, 3, True)]


@pytest.mark.parametrize("evict", [False, True])
def test_bytes_survive_populating_and_releasing(path: Path, evict: bool) -> None:
    whole = span(path, 0, 3 * BLOCK + 1000)
    with MappedFiles() as files:
        for call in files.prefetch(whole):
            call()
        view = files.view(whole)
        call_it(files.release(whole, evict=evict))
        assert view.tobytes() == path.read_bytes()[: whole.stop]
        del view


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's smaps")
def test_release_unmaps_the_pages(path: Path) -> None:
    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
        return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))

    mapped = MappedFile(path)
    for block in range(4):
        mapped.populate_block(block)
    assert resident() * 1024 >= 3 * BLOCK
    mapped.release_blocks(0, 4, evict=False)
    assert resident() == 0
    mapped.close()


@pytest.mark.parametrize("is_missing", [True, False])
def test_without_populate_plain_advice_is_given(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_missing: bool
) -> None:
    asked: list[int] = []

    def refuse(address: object, length: Any, advice: object) -> int:
        asked.append(length.value)
        return -1

    monkeypatch.setattr(mapped_files, "_libc_madvise", None if is_missing else refuse)
    whole = span(path, 0, 3 * BLOCK + 1000)
    with MappedFiles() as files:
        for call in files.prefetch(whole):
            call()
        assert files.view(whole).tobytes() == path.read_bytes()[: whole.stop]
    assert is_missing or asked == [BLOCK, BLOCK, BLOCK, 1001]  # never past the file's end


def test_files_without_fadvise_are_not_evicted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with MappedFiles() as files:
        call_it(files.release(span(path, 0, 3 * BLOCK), evict=True))
        assert files.view(span(path, 0, 64)).tobytes() == path.read_bytes()[:64]


def test_only_ranges_that_are_not_empty_are_flushed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []

    def note(fd: object, start: Any, length: Any, flags: Any) -> int:
        asked.append((start.value, length.value, flags.value))
        return 0

    monkeypatch.setattr(mapped_files, "_libc_sync_file_range", note)
    with path.open("rb") as file:
        flush_range(file.fileno(), 10, 10)
        flush_range(file.fileno(), 10, 30)
        flush_range(file.fileno(), 0, 30, wait=True)
        monkeypatch.setattr(mapped_files, "_libc_sync_file_range", None)
        flush_range(file.fileno(), 0, 30)
    assert asked == [(10, 20, 2), (0, 30, 7)]


def test_what_is_kept_is_prefetched_once_and_not_released(path: Path) -> None:
    whole = span(path, 0, 3 * BLOCK)
    with MappedFiles(keep=True) as files:
        assert len(files.prefetch(whole)) == 3
        assert files.release(whole, evict=True) is None
        assert files.prefetch(whole) == []
        assert bytes(files.view(whole)) == path.read_bytes()[: 3 * BLOCK]
