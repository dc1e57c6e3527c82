"""Decide where a search's model goes, and where the weights that it is blended from are kept.

The model is held, or streamed: then two decoder layers are in memory at a time, and what alpha does
not change is used where it lies in its files, unless it must go to a card. Arithmetic over a plan's
headers and the free memory, done before anything is loaded. Sizes of weights are exact except those
of quantized vision towers; activations are an assumption, because nothing in a header tells them.
Imports no torch, so that `plan` can show the decision at once.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoints.dtypes import DTYPES, DType
from ..errors import PlacementError, RecipeError
from ..mapping.mixture import Mixture
from ..settings import Device, Live, PlacementSettings, Quantization
from ..values import DTYPE_WORDS, format_count, format_size, parse_dtype
from .cpu_4bit import find_obstacle, repacks_4bit
from .free_memory import Memory

if TYPE_CHECKING:
    from ..mapping.plan import Part, Plan, Step

Location = Literal["vram", "pinned", "cache"]
"""Where base and donor bytes are kept: card, page-locked RAM, or page cache."""
_LOCATION_NAMES: dict[Location, str] = {
    "vram": "in VRAM",
    "pinned": "in pinned RAM",
    "cache": "through the page cache",
}

BATCH_SIZES = (8, 4, 2, 1)
"""Tried in this order where no batch size is asked for."""
SEQUENCE_TOKENS = 2048
"""Assumed length of a sequence: prompt, image and answer."""
ACTIVATION_BYTES = 512 << 20
"""Assumed for activations, and for staging weights on their way into the model."""
ACTIVATION_BYTES_PER_SEQUENCE = 64 << 20
SPARE_BYTES = 256 << 20
"""Left free on the device for fragmentation and for what the estimates miss."""
MAX_BATCHES_AT_ONCE = 16
"""Batches that go through a streamed layer before the next is read, at most."""
HIDDEN_STATES_PER_TOKEN = 4
"""Assumed of a batch that waits at a layer: its input, its residual, positions and masks."""

_DEVICES: tuple[Device, ...] = ("cuda", "cpu")
_QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8", "nf4")
_WAYS: tuple[tuple[Live, Quantization], ...] = (  # the most wanted first
    ("held", "none"),
    ("streamed", "none"),
    ("held", "int8"),
    ("held", "nf4"),
)
_MEMORY_NAMES = {"cuda": "VRAM", "cpu": "RAM"}
_LINEAR_KINDS = frozenset({"attention", "MLP", "vision tower", "connector"})
_CACHED_ROLE = re.compile(r"layers\.\d+\.attn\.[kv]\.weight")
_LAYER_ROLE = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Placement:
    """One way to hold the model and its sources, and to answer a batch.

    The sources are the base and donor weights of all interpolated parts, which every `apply` reads.

    quantize: "int8", "nf4", or None for a model that is not quantized.
    dtype: of the parameters (of a quantized model, those that stay whole), as in `DTYPES`.
    staging_bytes: taken while a tensor is quantized. available_bytes: free on the device before.
    live: "streamed" if only two layers are in memory at a time; model_bytes are with those.
    batches_at_once: that go through a streamed layer before the next is read. waiting_bytes: of
    those that wait meanwhile.
    page_cache_bytes: RAM that is left for the page cache.
    sources_stay_cached: the sources in the page cache find room there from one apply to the next.
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
    batches_at_once: int = 1
    waiting_bytes: int = 0
    vram_source_bytes: int = 0
    pinned_source_bytes: int = 0
    cached_source_bytes: int = 0
    page_cache_bytes: int = 0
    sources_stay_cached: bool = False
    lines: tuple[str, ...] = ()

    def identity(self) -> list[Any]:
        """Plain data that differs where answers may."""
        return [self.device, self.quantize, self.dtype, self.batch_size]

    @property
    def activation_bytes(self) -> int:
        """An assumption."""
        return ACTIVATION_BYTES + ACTIVATION_BYTES_PER_SEQUENCE * self.batch_size

    @property
    def work_bytes(self) -> int:
        """Needed on the device besides the model."""
        return self.activation_bytes + self.kv_cache_bytes + self.staging_bytes + self.waiting_bytes

    @property
    def required_bytes(self) -> int:
        """Needed on the device in all, without sources."""
        return self.model_bytes + self.work_bytes + SPARE_BYTES

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.required_bytes <= self.available_bytes

    def __str__(self) -> str:
        streamed = " streamed" if self.live == "streamed" else ""
        return f"{self.device} {self.quantize or self.dtype}{streamed} at batch {self.batch_size}"


def place(
    plan: Plan,
    memory: Memory,
    settings: PlacementSettings,
    *,
    quantize: Quantization | None = None,
    dtype: str | None = None,
) -> Placement:
    """Choose the fastest device that fits the model, and there the most exact precision.

    A setting that is None is chosen here; the batch is made smaller before the model is streamed,
    and that is done before the precision is lowered or a slower device is taken, because only
    quantizing changes answers. `ram` and `vram` of the
    settings are not read: `memory` has them.

    quantize, dtype: used where `live_quantize` and `live_dtype` are None. A dtype that is None
    becomes that of most of the output's bytes. Nothing is quantized where bitsandbytes is missing,
    nor to 4 bit, unless asked for, where it cannot run the model so on this CPU.

    Raises PlacementError with the sums if nothing that was asked for fits, and RecipeError if a
    setting is not one of its choices.
    """
    device, quantize = settings.device, settings.live_quantize or quantize
    if device not in (None, *_DEVICES):
        raise RecipeError(f"`device` {device!r}: expected cpu or cuda")
    if quantize not in (None, *_QUANTIZATIONS):
        raise RecipeError(f"`quantize` {quantize!r}: expected int8, nf4 or none")
    if importlib.util.find_spec("bitsandbytes") is None:
        if quantize not in (None, "none"):
            raise PlacementError(f"{quantize} needs bitsandbytes: pip install bitsandbytes")
        quantize = "none"
    live_dtype = _choose_dtype(plan, settings.live_dtype or dtype)
    batch_sizes = BATCH_SIZES if settings.batch_size is None else (settings.batch_size,)
    options = _list_options(plan, memory, live_dtype, batch_sizes)
    if quantize != "nf4" and _find_4bit_obstacle(plan):
        options = [each for each in options if (each.device, each.quantize) != ("cpu", "nf4")]
    if settings.live == "streamed":
        _check_streamable(plan, options, quantize)
    allowed = [
        option
        for option in options
        if device in (None, option.device)
        and quantize in (None, option.quantize or "none")
        and settings.live in (None, option.live)
    ]
    chosen = next((option for option in allowed if option.fits), None)
    if chosen is None:
        raise PlacementError(_explain_refusal(options, allowed))
    rejected = allowed[: allowed.index(chosen)]
    return _place_sources(plan, memory, chosen, _explain_choice(memory, chosen, rejected))


def check_runnable(plan: Plan, placement: Placement) -> None:
    """Raise PlacementError if this CPU can load the model in 4 bit, as asked, but not run it."""
    on_cpu = (placement.device, placement.quantize) == ("cpu", "nf4")
    if on_cpu and (obstacle := _find_4bit_obstacle(plan)):
        raise PlacementError(obstacle)


def _find_4bit_obstacle(plan: Plan) -> str | None:
    linear = ((step.name, step.shape) for step in plan.steps if _is_linear(step))
    return find_obstacle(linear) if repacks_4bit() else None


def hold_instead(plan: Plan, streamed: Placement, memory: Memory, reason: str) -> Placement:
    """Place a model that turned out not to be one that can be streamed, and tell why.

    PlacementError if it does not fit.
    """
    settings = PlacementSettings(
        device=streamed.device,
        live="held",
        live_quantize="none",
        live_dtype=streamed.dtype,
        batch_size=streamed.batch_size,
    )
    try:
        held = place(plan, memory, settings)
    except PlacementError as error:
        raise PlacementError(f"{reason}, so that it cannot be streamed; {error}") from None
    return replace(held, lines=(f"the model is held: {reason}", *held.lines))


def _check_streamable(
    plan: Plan, options: Sequence[Placement], quantize: Quantization | None
) -> None:
    if quantize not in (None, "none"):
        raise RecipeError(
            f"a streamed model is exact, so that `live='streamed'` and {quantize} exclude each"
            " other; `live_quantize='none'` goes with it"
        )
    if all(option.live == "held" for option in options):
        raise PlacementError(f"{plan.base.path}: has no decoder layers to stream; hold it instead")


def _list_options(
    plan: Plan, memory: Memory, dtype: DType, batch_sizes: Sequence[int]
) -> list[Placement]:
    """One placement for each device there is and each precision, the most wanted first.

    Each has the first batch size with which it fits, or the last one if it fits with none.
    """
    quantizable = (_loaded_bytes(step, dtype) for step in plan.steps if _is_quantizable(step))
    # While a tensor is quantized, its blend, a copy of it and the result exist at once
    staging_bytes = 3 * max(quantizable, default=0)
    kv_cache_bytes = _kv_cache_bytes_per_sequence(plan, dtype)
    available: dict[Device, int | None] = {"cuda": memory.vram_bytes, "cpu": memory.ram_bytes}
    options = []
    for (device, available_bytes), (live, quantize) in product(available.items(), _WAYS):
        model_bytes = _model_bytes(plan, dtype, device, live, quantize)
        if available_bytes is None or model_bytes is None:
            continue
        for batch_size in batch_sizes:
            option = Placement(
                device,
                None if quantize == "none" else quantize,
                dtype.name,
                batch_size,
                model_bytes,
                kv_cache_bytes * batch_size,
                0 if quantize == "none" else staging_bytes,
                available_bytes,
                live,
            )
            if option.fits:
                break
        options.append(_let_batches_wait(plan, option) if live == "streamed" else option)
    return options


def _let_batches_wait(plan: Plan, option: Placement) -> Placement:
    """As many batches at once as the memory that is left allows, for they share each reading."""
    width = max((step.shape[-1] for step, part in plan.parts if part.role == "embed"), default=0)
    tokens = option.batch_size * SEQUENCE_TOKENS
    states = tokens * width * DTYPES[option.dtype].itemsize * HIDDEN_STATES_PER_TOKEN
    each = option.kv_cache_bytes + states
    count = min(MAX_BATCHES_AT_ONCE - 1, (option.available_bytes - option.required_bytes) // each)
    count = max(0, count)
    return replace(option, batches_at_once=1 + count, waiting_bytes=count * each)


# Sizes


def _choose_dtype(plan: Plan, dtype: str | None) -> DType:
    """The one asked for, else that of most of the output's bytes."""
    if dtype is not None:
        return DTYPES[parse_dtype(dtype)]
    sizes: Counter[str] = Counter()
    for step in plan.steps:
        if step.dtype.blendable:
            sizes[step.dtype.name] += step.nbytes
    return DTYPES[sizes.most_common(1)[0][0]]


def _model_bytes(
    plan: Plan, dtype: DType, device: Device, live: Live, quantize: Quantization
) -> int | None:
    """Bytes of the model in memory; None if it has no layers that could be streamed."""
    if live == "held":
        return sum(_stored_bytes(step, _loaded_bytes(step, dtype), quantize) for step in plan.steps)
    layers: Counter[int] = Counter()
    held_bytes = 0
    is_whole = isinstance(plan, Mixture) or all(part.role != "head" for _, part in plan.parts)
    for step in plan.steps:
        loaded_bytes = _loaded_bytes(step, dtype)
        if device == "cpu" and step.action == "copy" and loaded_bytes == step.nbytes:
            continue  # used where it lies mapped
        role = next((part.role for part in step.parts if part.role), "")
        if layer := _LAYER_ROLE.match(role):
            layers[int(layer[1])] += loaded_bytes
        elif role != "embed" or is_whole:  # of an embedding by itself only the rows in use
            held_bytes += loaded_bytes
    return held_bytes + 2 * max(layers.values()) if layers else None


def output_bytes(plan: Plan, quantize: Quantization | None = None) -> int:
    """Bytes of the tensors that a merge writes; of a quantized output an estimate from headers."""
    return sum(_stored_bytes(step, step.nbytes, quantize) for step in plan.steps)


def _loaded_bytes(step: Step, dtype: DType) -> int:
    """Bytes of an unquantized parameter: floats are cast to the model's dtype, others are not."""
    is_float = (step.dtype.torch or "").startswith(("float", "bfloat"))
    return (dtype if is_float else step.dtype).nbytes(step.elements)


def _stored_bytes(step: Step, whole_bytes: int, quantize: Quantization | None) -> int:
    """Bytes of a step's tensor: `whole_bytes`, or fewer if it is one that is quantized.

    int8 has a float32 scale for each row. NF4 with double quantization takes half a byte for each
    element, one for each 64 elements, and four for each 256 of these (QLoRA, arXiv 2305.14314,
    section 3).
    """
    if quantize in (None, "none") or not _is_quantizable(step):
        return whole_bytes
    if quantize == "int8":
        return step.elements + 4 * step.shape[0]
    scales = -(-step.elements // 64)
    return -(-step.elements // 2) + scales + 4 * -(-scales // 256)


def _is_quantizable(step: Step) -> bool:
    """Whether bitsandbytes would quantize it: the weight of an nn.Linear other than the head.

    A guess on the vision side, where a two-dimensional weight may also be a table of positions,
    which no name or shape tells from a Linear. Such tables are small.
    """
    return len(step.shape) == 2 and step.kind in _LINEAR_KINDS and step.name.endswith(".weight")


def _is_linear(step: Step) -> bool:
    """The same without what is named like a table of positions."""
    return _is_quantizable(step) and "embed" not in step.name.split(".")[-2]


def _kv_cache_bytes_per_sequence(plan: Plan, dtype: DType) -> int:
    """Bytes of the key-value cache of one sequence of SEQUENCE_TOKENS tokens.

    Streams of one layer (CogVLM's experts) share its cache: each token goes through one of them.
    """
    rows: Counter[str] = Counter()
    for _, part in plan.parts:
        if part.role and _CACHED_ROLE.fullmatch(part.role.partition("@")[0]):
            rows[part.role] += part.rows[1] - part.rows[0]
    widest: dict[str, int] = {}
    for role, count in rows.items():
        plain_role = role.partition("@")[0]
        widest[plain_role] = max(widest.get(plain_role, 0), count)
    return sum(widest.values()) * dtype.itemsize * SEQUENCE_TOKENS


# Where base and donor bytes are kept


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


def _place_sources(plan: Plan, memory: Memory, chosen: Placement, lines: list[str]) -> Placement:
    """Put the sources into what the model leaves free.

    Pinned memory cannot be swapped or reclaimed, so at most half of the RAM is used for it. On the
    CPU nothing is copied: the mapped files serve, and the kernel caches what it has room for.
    """
    on_card = chosen.device == "cuda"
    vram_bytes = chosen.available_bytes - chosen.required_bytes if on_card else 0
    pinned_bytes = memory.ram_bytes // 2 if on_card else 0
    total: Counter[Location] = Counter()
    for _, size, location in locate_sources(plan, vram_bytes, pinned_bytes):
        total[location] += size
    used_ram = total["pinned"] + SPARE_BYTES if on_card else chosen.required_bytes
    free_ram = max(0, memory.ram_bytes - used_ram)
    placed = replace(
        chosen,
        vram_source_bytes=total["vram"],
        pinned_source_bytes=total["pinned"],
        cached_source_bytes=total["cache"],
        page_cache_bytes=free_ram,
        sources_stay_cached=total["cache"] <= free_ram,
    )
    return replace(
        placed, lines=(_describe_fit(placed), *lines, *_explain_sources(total, free_ram))
    )


# Words


def _explain_choice(memory: Memory, chosen: Placement, rejected: Sequence[Placement]) -> list[str]:
    """What is free, what is needed, what did not fit and what did."""
    card = "no CUDA card"
    if memory.vram_bytes is not None:
        card = f"{format_size(memory.vram_bytes)} free on {memory.card_name or 'the CUDA card'}"
    work = (
        f"work: {format_size(chosen.activation_bytes)} assumed for activations and staging"
        f" + {_describe_cache(chosen)}"
    )
    if chosen.waiting_bytes:
        waiting = chosen.batches_at_once - 1
        work += f" + {format_size(chosen.waiting_bytes)} for {waiting} batches that wait at a layer"
    if chosen.staging_bytes:
        work += f" + {format_size(chosen.staging_bytes)}, 3 x the largest quantized tensor"
    return [
        f"memory: {card}, {format_size(memory.ram_bytes)} of RAM available",
        work,
        *(f"{option}: {_describe_sum(option)}: does not fit" for option in rejected),
        f"{chosen}: {_describe_sum(chosen)}: chosen",
    ]


def _describe_fit(placed: Placement) -> str:
    """What was decided, in a line."""
    device = "card" if placed.device == "cuda" else "CPU"
    streamed = ""
    if placed.live == "streamed":
        where = "page cache" if placed.sources_stay_cached else "disk"
        streamed = f" exact, layers streamed from the {where},"
    return (
        f"fits on the {device} in {placed.quantize or DTYPE_WORDS[placed.dtype][0]}:"
        f" {format_size(placed.required_bytes)} of {format_size(placed.available_bytes)},{streamed}"
        f" {format_count(placed.batch_size, 'question')} at a time"
    )


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


def _explain_sources(total: Counter[Location], free_ram: int) -> Iterator[str]:
    """Where base and donor are, and how much of them each alpha must read from the disk again."""
    where = ", ".join(
        f"{format_size(total[location])} {name}"
        for location, name in _LOCATION_NAMES.items()
        if total[location]
    )
    yield f"base + donor: each alpha reads {format_size(sum(total.values()))}: {where}"
    if cached := total["cache"]:
        reads = "the disk is read once"
        if cached > free_ram:
            reads = f"each alpha reads {format_size(cached - free_ram)} or more from the disk again"
        yield f"page cache: {format_size(free_ram)} of RAM is left for it; {reads}"


def _explain_refusal(options: Sequence[Placement], allowed: Sequence[Placement]) -> str:
    """What the smallest allowed option on each device lacks, and what would fit instead."""
    help = "a smaller model would help"
    if fitting := next((option for option in options if option.fits), None):
        quantize = fitting.quantize or "none"
        way = f"live_quantize={quantize!r}" if fitting.live == "held" else "live='streamed'"
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
