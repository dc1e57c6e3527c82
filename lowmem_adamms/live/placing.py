"""Where a search's model goes: device, held or streamed, precision, batch, and its sources.

Decided before anything is loaded, by `model_size` and the free memory. Imports no torch, so that
`plan` can show the decision at once.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..checkpoints.dtypes import DTYPES, DType
from ..errors import PlacementError, RecipeError
from ..mapping.plan import Plan
from ..settings import Device, Live, PlacementSettings, Quantization
from . import model_size
from .cpu_4bit import find_obstacle, repacks_4bit
from .free_memory import Memory
from .placement import (
    HIDDEN_STATES_PER_TOKEN,
    MAX_BATCHES_AT_ONCE,
    SPARE_BYTES,
    Location,
    Placement,
    locate_sources,
)
from .placement_text import explain_choice, explain_refusal

BATCH_SIZES = (8, 4, 2, 1)
"""Tried in this order where no batch size is asked for."""
_DEVICES: tuple[Device, ...] = ("cuda", "cpu")
_QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8", "nf4")


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to have a model in memory."""

    live: Live = "held"
    head_in_windows: bool = False
    quantize: Quantization | None = None


_WAYS = (  # the most wanted first
    _Way(),
    _Way("streamed"),
    _Way("streamed", head_in_windows=True),
    _Way(quantize="int8"),
    _Way(quantize="nf4"),
)


def place(
    plan: Plan,
    memory: Memory,
    settings: PlacementSettings,
    *,
    quantize: Quantization | None = None,
    dtype: str | None = None,
) -> Placement:
    """Choose the fastest device that fits the model, and there the most exact precision.

    A setting that is None is chosen here. First the batch is made smaller, then the model is
    streamed, then it is quantized, which alone changes answers, then a slower device is taken.
    What `ram` and `vram` of the settings say is in `memory`; here they only matter as given.

    quantize, dtype: used where `live_quantize` and `live_dtype` are None. A dtype that is None
    becomes that of most of the output's bytes. Nothing is quantized where bitsandbytes is missing,
    nor to 4 bit, unless asked for, where it cannot run the model so on this CPU.

    Raises PlacementError with the sums if nothing that was asked for fits, and RecipeError if a
    setting is not one of its choices.
    """
    quantize = _check_wishes(settings, settings.live_quantize or quantize)
    live_dtype = model_size.choose_dtype(plan, settings.live_dtype or dtype)
    batch_sizes = BATCH_SIZES if settings.batch_size is None else (settings.batch_size,)
    options = list(_list_options(plan, memory, live_dtype, batch_sizes))
    if quantize != "nf4" and _find_4bit_obstacle(plan):
        options = [each for each in options if (each.device, each.quantize) != ("cpu", "nf4")]
    if settings.live == "streamed" and all(option.live == "held" for option in options):
        raise PlacementError(f"{plan.base.path}: has no decoder layers to stream; hold it instead")
    allowed = [
        option
        for option in options
        if settings.device in (None, option.device)
        and quantize in (None, option.quantize or "none")
        and settings.live in (None, option.live)
    ]
    chosen = next((option for option in allowed if option.fits), None)
    if chosen is None:
        raise PlacementError(explain_refusal(options, allowed))
    rejected = allowed[: allowed.index(chosen)]
    if chosen.live == "streamed":
        chosen = _use_what_is_left(plan, chosen, settings)
    placed = _place_sources(plan, memory, chosen)
    return replace(placed, lines=tuple(explain_choice(plan, memory, placed, rejected)))


def check_runnable(plan: Plan, placement: Placement) -> None:
    """Raise PlacementError if this CPU can load the model in 4 bit, as asked, but not run it."""
    on_cpu = (placement.device, placement.quantize) == ("cpu", "nf4")
    if on_cpu and (obstacle := _find_4bit_obstacle(plan)):
        raise PlacementError(obstacle)


def hold_instead(plan: Plan, streamed: Placement, memory: Memory, reason: str) -> Placement:
    """Place a model that turned out not to be one that can be streamed, and tell why.

    PlacementError if it does not fit.
    """
    try:
        held = place(plan, memory, streamed.settings("held"))
    except PlacementError as error:
        raise PlacementError(f"{reason}, so that it cannot be streamed; {error}") from None
    return replace(held, lines=(f"the model is held: {reason}", *held.lines))


def _check_wishes(
    settings: PlacementSettings, quantize: Quantization | None
) -> Quantization | None:
    """The quantization that is asked for; "none" where there can be no other."""
    if settings.device not in (None, *_DEVICES):
        raise RecipeError(f"`device` {settings.device!r}: expected cpu or cuda")
    if quantize not in (None, *_QUANTIZATIONS):
        raise RecipeError(f"`quantize` {quantize!r}: expected int8, nf4 or none")
    if quantize in (None, "none"):
        has_package = importlib.util.find_spec("bitsandbytes") is not None
        return quantize if has_package else "none"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PlacementError(f"{quantize} needs bitsandbytes: pip install bitsandbytes")
    if settings.live == "streamed":
        raise RecipeError(
            f"a streamed model is exact, so that `live='streamed'` and {quantize} exclude each"
            " other; `live_quantize='none'` goes with it"
        )
    return quantize


def _find_4bit_obstacle(plan: Plan) -> str | None:
    return find_obstacle(model_size.linear_weights(plan)) if repacks_4bit() else None


def _list_options(
    plan: Plan, memory: Memory, dtype: DType, batch_sizes: Sequence[int]
) -> Iterator[Placement]:
    """One placement for each device there is and each way, the most wanted first.

    Each has the first batch size with which it fits, or the last one if it fits with none.
    """
    kv_cache_bytes = model_size.kv_cache_bytes(plan, dtype)
    staging_bytes = model_size.staging_bytes(plan, dtype)
    available = {"cuda": memory.vram_bytes, "cpu": memory.ram_bytes}
    for device, way in product(_DEVICES, _WAYS):
        model_bytes = _model_bytes(plan, dtype, device, way)
        available_bytes = available[device]
        if available_bytes is None or model_bytes is None:
            continue
        for batch_size in batch_sizes:
            option = Placement(
                device,
                way.quantize,
                dtype.name,
                batch_size,
                model_bytes,
                kv_cache_bytes * batch_size,
                staging_bytes if way.quantize else 0,
                available_bytes,
                way.live,
                way.head_in_windows,
            )
            if option.fits:
                break
        yield option


def _model_bytes(plan: Plan, dtype: DType, device: Device, way: _Way) -> int | None:
    """None where the model cannot go this way, or where the way before takes no more."""
    if way.live == "held":
        return model_size.held_bytes(plan, dtype, way.quantize)
    whole, cut = (
        model_size.streamed_bytes(plan, dtype, device, head_in_windows=in_windows)
        for in_windows in (False, True)
    )
    if not way.head_in_windows:
        return whole
    return cut if cut != whole else None


def _use_what_is_left(plan: Plan, streamed: Placement, settings: PlacementSettings) -> Placement:
    """Let batches share each reading of a layer, and layers stay blended between passes.

    Both save readings, and both take memory: it is divided so that the fewest layers are read for a
    token of MAX_BATCHES_AT_ONCE batches. Who asks for a streamed model wants it small, so that no
    layers stay unless they also say how much memory there is.
    """
    given = settings.ram if streamed.device == "cpu" else settings.vram
    keep_layers = settings.live is None or given is not None
    dtype = DTYPES[streamed.dtype]
    tokens = streamed.batch_size * model_size.SEQUENCE_TOKENS
    state_bytes = model_size.hidden_bytes(plan, dtype) * HIDDEN_STATES_PER_TOKEN
    batch_bytes = streamed.kv_cache_bytes + tokens * state_bytes
    sizes = model_size.layer_bytes(plan, dtype, streamed.device)
    left_bytes = streamed.available_bytes - streamed.required_bytes

    def count_kept(waiting: int) -> int:
        count = (left_bytes - waiting * batch_bytes) // max(sizes) if keep_layers else 0
        return min(count, max(0, len(sizes) - 2))

    def count_readings(waiting: int) -> int:
        rounds = -(-MAX_BATCHES_AT_ONCE // (1 + waiting))
        others = len(sizes) - count_kept(waiting)
        return rounds * others if others > 2 else 0

    most = min(left_bytes // batch_bytes, MAX_BATCHES_AT_ONCE - 1)
    waiting = min(range(most, -1, -1), key=count_readings)
    kept = count_kept(waiting)
    return replace(
        streamed,
        batches_at_once=1 + waiting,
        waiting_bytes=waiting * batch_bytes,
        kept_layers=kept,
        kept_bytes=kept * max(sizes),
        kept_source_bytes=model_size.layer_source_bytes(plan) * kept // len(sizes),
    )


def _place_sources(plan: Plan, memory: Memory, chosen: Placement) -> Placement:
    """Put the sources into what the model leaves free.

    Pinned memory cannot be swapped or reclaimed, so at most half of the RAM is used for it. On the
    CPU nothing is copied: the mapped files serve, and the kernel caches what it has room for.
    """
    on_card = chosen.device == "cuda"
    vram_bytes = chosen.available_bytes - chosen.used_bytes if on_card else 0
    pinned_bytes = memory.ram_bytes // 2 if on_card else 0
    total: Counter[Location] = Counter()
    for _, size, location in locate_sources(plan, vram_bytes, pinned_bytes):
        total[location] += size
    used_ram = total["pinned"] + SPARE_BYTES if on_card else chosen.used_bytes
    return replace(
        chosen,
        vram_source_bytes=total["vram"],
        pinned_source_bytes=total["pinned"],
        cached_source_bytes=total["cache"],
        page_cache_bytes=max(0, memory.ram_bytes - used_ram),
    )
