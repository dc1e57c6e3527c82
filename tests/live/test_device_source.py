"""The source of a model on a card, tried on the CPU: every byte is that of the file it stands for.

Whole blends by way of it are compared with merged checkpoints in `test_live_model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stacks
import torch

from lowmem_adamms import make_plan
from lowmem_adamms.checkpoints.arranged import Arranged
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.mapped_files import MappedFiles
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.live.device_source import DeviceSource, as_tensor
from lowmem_adamms.live.free_memory import Memory
from lowmem_adamms.live.placement import Placement, locate_sources
from lowmem_adamms.live.placing import place
from lowmem_adamms.mapping.plan import Part, Plan
from lowmem_adamms.settings import PlacementSettings


@pytest.fixture(scope="module")
def plan(tiny_models: dict[str, Path]) -> Plan:
    return make_plan(tiny_models["qwen2_vl"], tiny_models["llava_onevision"])


class Spy(MappedFiles):
    """Mapped files that note what is asked of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Span] = []

    def view(self, span: Span) -> Any:
        self.seen.append(span)
        return super().view(span)


@pytest.fixture
def files() -> Iterator[Spy]:
    spy = Spy()
    with spy:
        yield spy


def bytes_on_disk(span: Span) -> bytes:
    return span.path.read_bytes()[span.start : span.stop]


def placed(plan: Plan, vram: float, pinned: float) -> Placement:
    """Shares of base and donor on the card and in pinned memory; the rest in the page cache."""
    cpu = place(plan, Memory(64 << 30, None, None), PlacementSettings(device="cpu"))
    total = cpu.cached_source_bytes
    return replace(
        cpu, vram_source_bytes=int(vram * total), pinned_source_bytes=int(pinned * total)
    )


@pytest.mark.parametrize(
    ("shares", "locations"),
    [
        ((0.0, 0.0), {"cache"}),
        ((1.0, 0.0), {"vram"}),
        ((0.0, 1.0), {"pinned"}),
        ((0.4, 0.3), {"vram", "pinned", "cache"}),
    ],
)
def test_every_span_has_the_bytes_of_its_file_which_what_is_held_needs_no_more(
    shares: tuple[float, float], locations: set[str], plan: Plan, files: Spy
) -> None:
    placement = placed(plan, *shares)
    source = DeviceSource(plan, files, placement, "cpu")
    files.seen.clear()
    found = set()
    held = placement.vram_source_bytes, placement.pinned_source_bytes
    for part, _, location in locate_sources(plan, *held):
        found.add(location)
        assert isinstance(part.donor, Span)
        for span in (part.base, part.donor):
            assert source.view(span).dtype == torch.uint8
            assert bytes(source.view(span).numpy()) == bytes_on_disk(span)
            assert (span in files.seen) == (location == "cache")
            middle = replace(span, start=span.start + 2, stop=span.stop - 2)
            assert bytes(source.view(middle).numpy()) == bytes_on_disk(middle)
            if location != "cache":
                assert source.prefetch(span) == []
                assert source.release(span, evict=True) is None
    assert found == locations


@pytest.mark.parametrize("shares", [(0.0, 0.0), (1.0, 0.0), (0.4, 0.3)])
def test_experts_in_another_order_are_put_together_on_the_device(
    shares: tuple[float, float], files: Spy, tmp_path: Path
) -> None:
    """From what is held or not, whole and in part."""
    text = stacks.ancestor(bias=False)
    sides = [
        stacks.write(tmp_path / form, stacks.spell(stacks.descend(text, seed), form), form)
        for seed, form in enumerate(("transposed", "each"))
    ]
    mixture = make_plan(*sides)
    source = DeviceSource(mixture, files, placed(mixture, *shares), "cpu")
    arranged = [part.donor for _, part in mixture.parts if isinstance(part.donor, Arranged)]
    assert len(arranged) == 2 * stacks.EXPERTS
    for donor in arranged:
        for run in (donor, donor.flat_slice(5, donor.elements - 11)):
            found = run.assemble(source.view)
            assert found.dtype == torch.uint8
            assert bytes(found.numpy()) == run.assemble(files.view).tobytes()


def test_what_is_not_held_is_read_ahead_and_released(plan: Plan, files: Spy) -> None:
    source = DeviceSource(plan, files, placed(plan, 1, 0), "cpu")
    vision = next(step for step in plan.steps if step.action == "copy").parts[0].base
    calls = source.prefetch(vision)
    assert calls
    release = source.release(vision, evict=False)
    for call in (*calls, release) if release else calls:
        call()
    assert bytes(source.view(vision).numpy()) == bytes_on_disk(vision)


def test_what_was_sent_stays_while_the_next_is_sent(plan: Plan, files: Spy) -> None:
    """They go by turns through two buffers, of which the tensors must not be views."""
    source = DeviceSource(plan, files, placed(plan, 0, 0), "cpu")
    spans = [step.parts[0].base for step in plan.steps[:6]]
    tensors = [source.view(span) for span in (*spans, *reversed(spans))]
    for span, tensor in zip((*spans, *reversed(spans)), tensors, strict=True):
        assert bytes(tensor.numpy()) == bytes_on_disk(span)
    assert len({buffer.data_ptr() for buffer in source._staging._buffers}) == 2


def numbered(path: Path, count: int = 4096) -> Path:
    path.write_bytes(np.arange(count, dtype=np.uint16).tobytes())
    return path


def span_of(path: Path, start: int, stop: int) -> Span:
    return Span(path, DTYPES["BF16"], start, stop, ((stop - start) // 2,))


def source_of(files: MappedFiles, vram: int, *pairs: tuple[Span, Span]) -> DeviceSource:
    """A source of blended parts, whatever their steps, with so many bytes on the card."""
    parts = [Part((0, base.shape[0]), "role", base, donor) for base, donor in pairs]
    plan: Any = SimpleNamespace(parts=[(None, part) for part in parts])
    placement = Placement("cpu", None, "BF16", 1, 0, 0, 0, 0, vram_source_bytes=vram)
    return DeviceSource(plan, files, placement, "cpu")


@pytest.mark.parametrize("order", [1, -1])
def test_spans_that_overlap_are_held_once_and_whole(order: int, tmp_path: Path, files: Spy) -> None:
    """A tied donor lends one tensor twice, and embedding and head may have unlike row counts."""
    base, donor = numbered(tmp_path / "base"), numbered(tmp_path / "donor")
    pairs = [
        (span_of(base, 0, 100), span_of(donor, 200, 300)),
        (span_of(base, 100, 220), span_of(donor, 200, 320)),
        (span_of(base, 340, 460), span_of(donor, 200, 320)),
        (span_of(base, 220, 320), span_of(donor, 240, 340)),
        (span_of(base, 320, 340), span_of(donor, 260, 280)),
    ][::order]
    source = source_of(files, 10**6, *pairs)
    assert files.seen.count(span_of(donor, 200, 320)) == 1
    for start in range(180, 360, 20):
        for stop in range(start + 20, 380, 20):
            span = span_of(donor, start, stop)
            assert bytes(source.view(span).numpy()) == bytes_on_disk(span)


@pytest.mark.parametrize("vram", [0, 10**7])
def test_spans_at_odd_offsets_are_right(vram: int, tmp_path: Path, files: Spy) -> None:
    """Their views are copies, which must live as long as the tensors made of them."""
    path = tmp_path / "odd"
    content = np.random.default_rng(0).integers(0, 256, 1 << 21, np.uint8).tobytes()
    path.write_bytes(content)
    half = 1 << 20
    spans = (span_of(path, 1, half + 1), span_of(path, half + 1, 2 * half - 1))
    source = source_of(files, vram, spans)
    tensors = [source.view(span) for span in spans]
    for span, tensor in zip(spans, tensors, strict=True):
        assert bytes(tensor.numpy()) == content[span.start : span.stop]


def test_a_tensor_over_an_array_shares_its_memory_and_keeps_it_alive() -> None:
    array = np.arange(8, dtype=np.uint8)
    tensor = as_tensor(array)
    array[3] = 99
    assert tensor.tolist() == [0, 1, 2, 99, 4, 5, 6, 7]
    array.flags.writeable = False
    assert as_tensor(array).tolist() == array.tolist()  # and no warning
    assert as_tensor(array[:0]).shape == (0,)
    tensors = [as_tensor(np.full(1 << 20, value, np.uint8)) for value in range(8)]
    found = [(int(tensor.min()), int(tensor.max())) for tensor in tensors]
    assert found == [(value, value) for value in range(8)]
