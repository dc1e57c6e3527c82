"""A placement in words: the verdict, its sums, and what would fit instead of what does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..mapping.plan import Plan
from ..values import DTYPE_WORDS, format_count, format_size
from .free_memory import Memory
from .model_size import SEQUENCE_TOKENS, choose_dtype
from .placement import SPARE_BYTES, Placement

_MEMORY_NAMES = {"cuda": "VRAM", "cpu": "RAM"}


def explain_choice(
    plan: Plan, memory: Memory, chosen: Placement, rejected: Sequence[Placement]
) -> Iterator[str]:
    """The verdict, what is free, what is needed, what did not fit and what did, and the sources."""
    yield _describe_fit(plan, chosen)
    card = "no CUDA card"
    if memory.vram_bytes is not None:
        card = f"{format_size(memory.vram_bytes)} free on {memory.card_name or 'the CUDA card'}"
    yield f"memory: {card}, {format_size(memory.ram_bytes)} of RAM available"
    work = (
        f"work: {format_size(chosen.activation_bytes)} assumed for activations and staging"
        f" + {_describe_cache(chosen)}"
    )
    if chosen.staging_bytes:
        work += f" + {format_size(chosen.staging_bytes)}, 3 x the largest quantized tensor"
    yield work
    for option in rejected:
        yield f"{option}: {_describe_sum(option)}: does not fit"
    yield f"{chosen}: {_describe_sum(chosen)}: chosen"
    if chosen.waiting_bytes:
        yield (
            f"batches: {chosen.batches_at_once} go through a layer before the next is read;"
            f" {format_size(chosen.waiting_bytes)} for those that wait"
        )
    yield from _explain_sources(chosen)


def _describe_fit(plan: Plan, chosen: Placement) -> str:
    """The verdict: `fits: 8.3B exact (bf16) in 4.1 GB of 8.0 GB, layers streamed from …`."""
    how = "held"
    if chosen.live == "streamed":
        what = "layers and head" if chosen.head_in_windows else "layers"
        where = "page cache" if chosen.sources_stay_cached else "disk"
        how = f"{what} streamed from the {where}"
    word = DTYPE_WORDS[chosen.dtype][0]
    is_exact = chosen.quantize is None and chosen.dtype == choose_dtype(plan).name
    precision = f"exact ({word})" if is_exact else f"in {chosen.quantize or word}"
    device = "card" if chosen.device == "cuda" else "CPU"
    return (
        f"fits: {_count_parameters(plan)} {precision}"
        f" in {format_size(chosen.required_bytes)} of {format_size(chosen.available_bytes)}, {how};"
        f" on the {device}, {format_count(chosen.batch_size, 'question')} at a time"
    )


def _count_parameters(plan: Plan) -> str:
    """As in the names of models: `8.3B`, `0.5B`, `3.2M`."""
    number = sum(step.elements for step in plan.steps)
    return f"{number / 1e9:.1f}B" if number >= 10**8 else f"{number / 1e6:.1f}M"


def _describe_sum(option: Placement) -> str:
    model = "two layers and the rest" if option.live == "streamed" else "model"
    return (
        f"{model} {format_size(option.model_bytes)} + work {format_size(option.work_bytes)}"
        f" + spare {format_size(SPARE_BYTES)} = {format_size(option.required_bytes)}"
        f" of {format_size(option.available_bytes)}"
    )


def _describe_cache(option: Placement) -> str:
    tokens = f"{option.batch_size} x {SEQUENCE_TOKENS} tokens"
    return f"{format_size(option.kv_cache_bytes)} key-value cache of {tokens}"


def _explain_sources(placed: Placement) -> Iterator[str]:
    """Where base and donor are, and how much of them each alpha must read from the disk again."""
    places = (
        (placed.vram_source_bytes, "in VRAM"),
        (placed.pinned_source_bytes, "in pinned RAM"),
        (placed.cached_source_bytes, "through the page cache"),
    )
    where = ", ".join(f"{format_size(size)} {place}" for size, place in places if size)
    each = "pass" if placed.live == "streamed" and not placed.kept_layers else "alpha"
    total = sum(size for size, _ in places)
    yield f"base + donor: each {each} reads {format_size(total)}: {where}"
    if placed.kept_layers:
        rest = format_size(total - placed.kept_source_bytes)
        yield (
            f"layers: {placed.kept_layers} stay blended from pass to pass in"
            f" {format_size(placed.kept_bytes)}; each pass of an alpha but the first reads {rest}"
        )
    if placed.cached_source_bytes:
        reads = "the disk is read once"
        if not placed.sources_stay_cached:
            missed = format_size(placed.cached_source_bytes - placed.page_cache_bytes)
            reads = f"each {each} reads {missed} or more from the disk again"
        yield f"page cache: {format_size(placed.page_cache_bytes)} of RAM is left for it; {reads}"


def explain_refusal(options: Sequence[Placement], allowed: Sequence[Placement]) -> str:
    """What the smallest allowed option on each device lacks, and what would fit instead."""
    help = "a smaller model would help"
    if fitting := next((option for option in options if option.fits), None):
        way = f"live_quantize={fitting.quantize or 'none'!r}"
        way = "live='streamed'" if fitting.live == "streamed" else way
        help = f"`device={fitting.device!r}` with `{way}` would fit"
    if not allowed:  # there is always an option on the CPU, so a card was asked for
        return (
            f"no CUDA card was found, or `vram=0` rules it out; {help}. For a card that nvidia-smi"
            " does not show, give its memory as `vram`"
        )
    by_need = sorted(allowed, key=lambda option: -option.required_bytes)
    smallest = {option.device: option for option in by_need}
    shortages = ", ".join(
        f"{option} needs {format_size(option.required_bytes)} of {_MEMORY_NAMES[device]}"
        f" but {format_size(option.available_bytes)} is free"
        for device, option in smallest.items()
    )
    free = " and ".join(f"`{_MEMORY_NAMES[device].lower()}`" for device in smallest)
    first = allowed[0]  # nothing fits, so that all have the last batch size
    if first.batch_size > 1:
        help += ", a smaller `batch_size` may help"
    return (
        f"the model does not fit: {shortages} (with a {_describe_cache(first)}); {help}, or free"
        f" memory ({free} may say how much there will be)"
    )
