"""A placement: where a live model and the weights that it is blended from are, and what they take.

Sizes of weights are exact, activations are an assumption, because nothing in a header tells them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..mapping.plan import Part, Plan
from ..settings import Device, Live, PlacementSettings, Quantization

Location = Literal["vram", "pinned", "cache"]
"""Where base and donor bytes are kept: card, page-locked RAM, or page cache."""

ACTIVATION_BYTES = 512 << 20
"""Assumed for activations, and for staging weights on their way into the model."""
ACTIVATION_BYTES_PER_SEQUENCE = 64 << 20
SPARE_BYTES = 256 << 20
"""Left free on the device for fragmentation and for what the estimates miss."""
MAX_BATCHES_AT_ONCE = 16
"""Batches that go through a streamed layer before the next is read, at most."""
HIDDEN_STATES_PER_TOKEN = 4
"""Assumed of a batch that waits at a layer: its input, its residual, positions and masks."""


@dataclass(frozen=True, slots=True)
class Placement:
    """One way to hold the model and its sources, and to answer a batch.

    The sources are the base and donor weights of all interpolated parts, which every `apply` reads.

    quantize: "int8", "nf4", or None for a model that is not quantized.
    dtype: of the parameters (of a quantized model, those that stay whole), as in `DTYPES`.
    staging_bytes: taken while a tensor is quantized. available_bytes: free on the device before.
    live: "streamed" if two layers in memory are enough; model_bytes are with those.
    head_in_windows: the head of a streamed model is not held, but blended as it is used.
    batches_at_once: that go through a streamed layer before the next is read. waiting_bytes: of
    those that wait meanwhile.
    kept_layers: how many layers of a streamed model stay in memory besides those two, blended once
    an alpha. kept_bytes: what they take. kept_source_bytes: what they are blended from.
    page_cache_bytes: RAM that is left for the page cache.
    lines: the decision and its sums, for people.
    """

    device: Device
    quantize: Quantization | None
    dtype: str
    batch_size: int
    model_bytes: int
    kv_cache_bytes: int
    staging_bytes: int
    available_bytes: int
    live: Live = "held"
    head_in_windows: bool = False
    batches_at_once: int = 1
    waiting_bytes: int = 0
    kept_layers: int = 0
    kept_bytes: int = 0
    kept_source_bytes: int = 0
    vram_source_bytes: int = 0
    pinned_source_bytes: int = 0
    cached_source_bytes: int = 0
    page_cache_bytes: int = 0
    lines: tuple[str, ...] = ()

    def identity(self) -> list[Any]:
        """Plain data that differs where answers may."""
        return [self.device, self.quantize, self.dtype, self.batch_size]

    def settings(self, live: Live) -> PlacementSettings:
        """What to ask for to have the same, but unquantized and held or streamed."""
        return PlacementSettings(
            device=self.device,
            live=live,
            live_quantize="none",
            live_dtype=self.dtype,
            batch_size=self.batch_size,
        )

    @property
    def activation_bytes(self) -> int:
        """An assumption."""
        return ACTIVATION_BYTES + ACTIVATION_BYTES_PER_SEQUENCE * self.batch_size

    @property
    def work_bytes(self) -> int:
        """Needed on the device besides the model."""
        return self.activation_bytes + self.kv_cache_bytes + self.staging_bytes

    @property
    def required_bytes(self) -> int:
        """Needed on the device in all, without sources and batches that wait."""
        return self.model_bytes + self.work_bytes + SPARE_BYTES

    @property
    def used_bytes(self) -> int:
        """Used on the device in all, without sources: what is needed, and what makes it faster."""
        return self.required_bytes + self.waiting_bytes + self.kept_bytes

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.required_bytes <= self.available_bytes

    @property
    def sources_stay_cached(self) -> bool:
        """Whether the page cache can hold what is read by way of it until the next apply."""
        return self.cached_source_bytes <= self.page_cache_bytes

    def __str__(self) -> str:
        streamed = " streamed" if self.live == "streamed" else ""
        head = ", head in windows," if self.head_in_windows else ""
        precision = self.quantize or self.dtype
        return f"{self.device} {precision}{streamed}{head} at batch {self.batch_size}"


def locate_sources(
    plan: Plan, vram_bytes: int, pinned_bytes: int
) -> Iterator[tuple[Part, int, Location]]:
    """Every interpolated part in plan order, its base and donor bytes, and where they are kept.

    The card is filled until a part does not fit, then pinned RAM. A location that was once left is
    not used again, so that more memory never holds less, and the sums of bytes in a Placement are
    enough to find the locations again.
    """
    remaining: list[tuple[Location, int]] = [("vram", vram_bytes), ("pinned", pinned_bytes)]
    for _, part in plan.parts:
        if part.donor is None:
            continue
        size = sum(side.nbytes for side in part.sides)
        while remaining and size > remaining[0][1]:
            del remaining[0]
        if not remaining:
            yield part, size, "cache"
            continue
        location, free_bytes = remaining[0]
        remaining[0] = location, free_bytes - size
        yield part, size, location
