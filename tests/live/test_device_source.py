"""The source of a model on a card, tried on the CPU: every byte is that of the file it stands for.

Whole blends by way of it are compared with merged checkpoints in `test_live.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_adamms import make_plan
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.mapped_files import MappedFiles
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.live.device_source import DeviceSource, as_tensor
from lowmem_adamms.live.free_memory import Memory
from lowmem_adamms.live.placement import Placement, homes, place
from lowmem_adamms.mapping.plan import Part, Plan


@pytest.fixture(scope="module")
def plan(tiny_models: dict[str, Path]) -> Plan:
    return make_plan(tiny_models["qwen2_vl"], tiny_models["llava_onevision"])


@pytest.fixture
def files() -> Iterator[Spy]:
    spy = Spy()
    with spy:
        yield spy


class Spy(MappedFiles):
    """Mapped files that note what is asked of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Span] = []

    def view(self, span: Span) -> Any:
        self.seen.append(span)
        return super().view(span)


def bytes_of(span: Span) -> bytes:
    return span.path.read_bytes()[span.start : span.stop]


def placed(plan: Plan, vram: float, pinned: float) -> Placement:
    """Shares of base and donor on the card and in pinned memory; the rest in the page cache."""
    cpu = place(plan, Memory(64 << 30, None, None), device="cpu")
    total = cpu.sources_cache
    return replace(cpu, sources_vram=int(vram * total), sources_pinned=int(pinned * total))


def pieces(span: Span, size: int) -> Iterator[Span]:
    for start in range(span.start, span.stop, size):
        stop = min(start + size, span.stop)
        yield replace(span, start=start, stop=stop, shape=(stop - start,))


SHARES = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.4, 0.3)]


@pytest.mark.parametrize("shares", SHARES)
def test_every_span_and_every_piece_of_it_has_the_bytes_of_its_file(
    shares: tuple[float, float], plan: Plan, files: Spy
) -> None:
    source = DeviceSource(plan, files, placed(plan, *shares), "cpu")
    for span in plan.spans:
        assert source.view(span).dtype == torch.uint8
        assert bytes(source.view(span).numpy()) == bytes_of(span)
        whole = b"".join(bytes(source.view(piece).numpy()) for piece in pieces(span, 1000))
        assert whole == bytes_of(span)


@pytest.mark.parametrize("shares", SHARES)
def test_what_is_held_needs_its_file_no_more(
    shares: tuple[float, float], plan: Plan, files: Spy
) -> None:
    where = placed(plan, *shares)
    source = DeviceSource(plan, files, where, "cpu")
    files.seen.clear()
    kept = set()
    for _, part, home in homes(plan, where):
        for span in (part.base, part.donor):
            assert span is not None
            kept.add(home)
            source.view(span)
            assert (span in files.seen) == (home == "cache")
            if home != "cache":
                assert source.prefetch(span) == []
                if let_go := source.release(span, evict=True):
                    let_go()
    expected = {(0.0, 0.0): {"cache"}, (1.0, 0.0): {"vram"}, (0.0, 1.0): {"pinned"}}
    assert kept == expected.get(shares, {"vram", "pinned", "cache"})


def test_what_is_not_held_is_read_ahead_and_let_go(plan: Plan, files: Spy) -> None:
    source = DeviceSource(plan, files, placed(plan, 0, 0), "cpu")
    first = next(plan.spans)
    calls = source.prefetch(first)
    assert calls
    let_go = source.release(first, evict=False)
    for call in (*calls, let_go) if let_go else calls:
        call()
    assert bytes(source.view(first).numpy()) == bytes_of(first)


def test_vision_is_not_held(plan: Plan, files: Spy) -> None:
    source = DeviceSource(plan, files, placed(plan, 1, 0), "cpu")
    vision = next(step for step in plan.steps if step.action == "copy").parts[0].base
    assert source.prefetch(vision)
    assert bytes(source.view(vision).numpy()) == bytes_of(vision)


def numbered(path: Path, count: int = 4096) -> Path:
    path.write_bytes(np.arange(count, dtype=np.uint16).tobytes())
    return path


def span_of(path: Path, start: int, stop: int) -> Span:
    return Span(path, DTYPES["BF16"], start, stop, ((stop - start) // 2,))


def plan_of(*pairs: tuple[Span, Span]) -> Any:
    """What a plan is to the source: blended parts, whatever their steps."""
    parts = [Part((0, base.shape[0]), "role", base, donor) for base, donor in pairs]
    return SimpleNamespace(parts=[(None, part) for part in parts])


def held(total: int) -> Any:
    return Placement("cpu", None, "BF16", 0, 0, 1, total, 0, 0, True, ())


@pytest.mark.parametrize("order", [1, -1])
def test_spans_that_overlap_what_is_held_are_whole(order: int, tmp_path: Path, files: Spy) -> None:
    """A tied donor lends one tensor twice, and embedding and head may have unlike row counts."""
    base, donor = numbered(tmp_path / "base"), numbered(tmp_path / "donor")
    spans = [
        (span_of(base, 0, 100), span_of(donor, 200, 300)),
        (span_of(base, 100, 220), span_of(donor, 200, 320)),
        (span_of(base, 220, 320), span_of(donor, 240, 340)),
        (span_of(base, 320, 340), span_of(donor, 260, 280)),
    ][::order]
    source = DeviceSource(plan_of(*spans), files, held(10**6), "cpu")
    for start in range(180, 360, 20):
        for stop in range(start + 20, 380, 20):
            span = span_of(donor, start, stop)
            assert bytes(source.view(span).numpy()) == bytes_of(span)


def test_the_same_tensor_is_held_once(tmp_path: Path, files: Spy) -> None:
    base, donor = numbered(tmp_path / "base"), numbered(tmp_path / "donor")
    lent = span_of(donor, 0, 2000)
    DeviceSource(
        plan_of((span_of(base, 0, 2000), lent), (span_of(base, 2000, 4000), lent)),
        files,
        held(10**6),
        "cpu",
    )
    assert files.seen.count(lent) == 1


@pytest.mark.parametrize("total", [0, 10**7])
def test_spans_at_odd_offsets_are_right(total: int, tmp_path: Path, files: Spy) -> None:
    """Their views are copies, which must live as long as the tensors made of them."""
    path = tmp_path / "odd"
    content = np.random.default_rng(0).integers(0, 256, 1 << 21, np.uint8).tobytes()
    path.write_bytes(content)
    half = 1 << 20
    spans = (span_of(path, 1, half + 1), span_of(path, half + 1, 2 * half - 1))
    source = DeviceSource(plan_of(spans), files, held(total), "cpu")
    tensors = [source.view(span) for span in spans]
    gc.collect()
    spoil = [np.full(half, 7, np.uint8) for _ in range(4)]
    for span, tensor in zip(spans, tensors, strict=True):
        assert bytes(tensor.numpy()) == content[span.start : span.stop]
    assert len(spoil) == 4


def test_a_tensor_over_an_array_shares_its_memory() -> None:
    array = np.arange(8, dtype=np.uint8)
    tensor = as_tensor(array)
    array[3] = 99
    assert tensor.tolist() == [0, 1, 2, 99, 4, 5, 6, 7]
    array.flags.writeable = False
    assert as_tensor(array).tolist() == array.tolist()  # and no warning
    assert as_tensor(array[:0]).shape == (0,)


def test_a_tensor_keeps_its_array_alive() -> None:
    tensors = [as_tensor(np.full(1 << 20, value, np.uint8)) for value in range(8)]
    assert [int(tensor.min()) for tensor in tensors] == list(range(8))
    assert [int(tensor.max()) for tensor in tensors] == list(range(8))
