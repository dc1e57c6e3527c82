"""Where a search's live model and the weights it is blended from go: card, pinned RAM, page cache.

Arithmetic over a plan's headers and the free memory, done before anything is loaded; the result
says its sums in `lines`. Sizes of weights are exact but for quantized vision towers; the room for
activations is an assumption. Imports neither torch nor transformers, so that `plan` can show the
decision at once. Leaves to others: how much memory there is (`memory.py`), the loading (`live.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from ..checkpoints.dtypes import DTYPES, DType, parse_dtype
from ..errors import PlacementError, RecipeError
from .free_memory import Memory

if TYPE_CHECKING:
    from ..mapping.plan import Part, Plan, Step

Device = Literal["cpu", "cuda"]
Quantize = Literal["int8", "nf4"]
Home = Literal["vram", "pinned", "cache"]

BATCHES = (8, 4, 2, 1)
"""Sequences answered at once, the most wanted first: what is tried where no batch is asked for."""
TOKENS = 2048
"""Length of each sequence, prompt, image and answer: the default."""
ACTIVATIONS, ACTIVATIONS_EACH = 512 << 20, 64 << 20
"""Bytes for activations and for staging weights on their way to the model, and those that each
sequence of the batch adds. An assumption: nothing in a header tells them."""
SPARE = 256 << 20
"""Bytes left alone on the device: fragments, and what the estimates miss."""

_DEVICES: tuple[Device, ...] = ("cuda", "cpu")
_PRECISIONS: tuple[Quantize | None, ...] = (None, "int8", "nf4")  # from the best down
_LINEAR_KINDS = frozenset({"attention", "MLP", "vision tower", "connector"})
_CACHED = re.compile(r"layers\.\d+\.attn\.[kv]\.weight")


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision. All counts but the batch are bytes.

    dtype: of the live model, as `dtypes.py` spells it; of a quantized one, of what stays whole.
    batch: sequences answered at once, for which work_bytes are enough.
    sources_*: the exact base and donor weights of all interpolated parts, which every apply reads,
    by where they are kept (`homes` tells it part by part); sources_stay: whether those in the page
    cache find room there from one apply to the next. lines: the sums, for people.
    """

    device: Device
    quantize: Quantize | None
    dtype: str
    model_bytes: int
    work_bytes: int
    batch: int
    sources_vram: int
    sources_pinned: int
    sources_cache: int
    sources_stay: bool
    lines: tuple[str, ...]


# What is needed


@dataclass(frozen=True, slots=True)
class _Option:
    """One way to hold the model and answer a batch: what it needs on its device, what that has."""

    device: Device
    quantize: Quantize | None
    dtype: DType
    batch: int
    model: int
    cache: int
    staging: int
    there: int

    @property
    def activations(self) -> int:
        return ACTIVATIONS + ACTIVATIONS_EACH * self.batch

    @property
    def work(self) -> int:
        return self.activations + self.cache + self.staging

    @property
    def need(self) -> int:
        return self.model + self.work + SPARE

    @property
    def fits(self) -> bool:
        return self.need <= self.there

    @property
    def name(self) -> str:
        return f"{self.device} {self.quantize or self.dtype.name} at batch {self.batch}"

    @property
    def flags(self) -> str:
        return f"--device {self.device} --live-quantize {self.quantize or 'none'}"

    @property
    def sum(self) -> str:
        return (
            f"model {_bytes(self.model)} + work {_bytes(self.work)} + spare {_bytes(SPARE)}"
            f" = {_bytes(self.need)} of {_bytes(self.there)}"
        )


def _live_dtype(plan: Plan, dtype: str | None) -> DType:
    """The one asked for, else that of most of the output's bytes."""
    if dtype is not None:
        return parse_dtype(dtype)
    sizes: dict[str, int] = {}
    for step in plan.steps:
        if step.dtype.blendable:
            sizes[step.dtype.name] = sizes.get(step.dtype.name, 0) + step.nbytes
    return DTYPES[max(sizes, key=lambda name: sizes[name])]


def _live_bytes(step: Step, live: DType) -> int:
    """Bytes of a whole parameter: floats are cast to the live dtype as they are loaded."""
    floating = (step.dtype.torch or "").startswith(("float", "bfloat"))
    return (live if floating else step.dtype).nbytes(step.elements)


def _quantized(step: Step) -> bool:
    """Whether bitsandbytes would quantize it: the weight of an nn.Linear other than the head.

    An estimate on the vision side: there a two-dimensional weight may also be a table of positions,
    which no name or shape tells from a Linear. Such tables are small.
    """
    return len(step.shape) == 2 and step.kind in _LINEAR_KINDS and step.name.endswith(".weight")


def stored_bytes(plan: Plan, quantize: Quantize | None = None) -> int:
    """Bytes of tensors that a merge writes; of a quantized one an estimate, from headers alone."""
    return sum(
        _quantized_bytes(step, quantize) if quantize and _quantized(step) else step.nbytes
        for step in plan.steps
    )


def _model_bytes(plan: Plan, live: DType, quantize: Quantize | None) -> int:
    return sum(
        _quantized_bytes(step, quantize)
        if quantize and _quantized(step)
        else _live_bytes(step, live)
        for step in plan.steps
    )


def _quantized_bytes(step: Step, quantize: Quantize) -> int:
    """Bytes of a weight in int8 with a float32 scale a row, or in NF4 with double quantization.

    NF4: half a byte an element, one of scale for 64 elements, and 4 for 256 such scales (Dettmers
    et al., QLoRA, arXiv 2305.14314, section 3).
    """
    if quantize == "int8":
        return step.elements + 4 * step.shape[0]
    scales = -(-step.elements // 64)
    return -(-step.elements // 2) + scales + 4 * -(-scales // 256)


def _kv_bytes(plan: Plan, live: DType, tokens: int) -> int:
    """Bytes of the key-value cache of one sequence of `tokens` tokens, in the live dtype.

    Streams of one layer (CogVLM's experts) share its cache: each token goes through one of them.
    """
    rows: dict[str, int] = {}
    for _, part in plan.parts:
        if part.role and _CACHED.fullmatch(part.role.partition("@")[0]):
            rows[part.role] = rows.get(part.role, 0) + part.rows[1] - part.rows[0]
    widest: dict[str, int] = {}
    for role, count in rows.items():
        plain = role.partition("@")[0]
        widest[plain] = max(widest.get(plain, 0), count)
    return sum(widest.values()) * live.itemsize * tokens


def _options(
    plan: Plan, memory: Memory, live: DType, batches: Sequence[int], tokens: int
) -> list[_Option]:
    """Every way to hold the model, the most wanted first.

    Each at the first of the falling `batches` with which it fits, or else at the last: quantizing
    changes the answers, a smaller batch only the time they take.
    """
    # While a tensor is quantized its blend, a copy and the result are there at once
    largest = max((_live_bytes(step, live) for step in plan.steps if _quantized(step)), default=0)
    models = {precision: _model_bytes(plan, live, precision) for precision in _PRECISIONS}
    cache = _kv_bytes(plan, live, tokens)
    room = {"cuda": memory.vram, "cpu": memory.ram}
    options = []
    for device, precision in product(_DEVICES, _PRECISIONS):
        if (there := room[device]) is not None:
            model, staging = models[precision], 3 * largest if precision else 0
            ways = [
                _Option(device, precision, live, batch, model, cache * batch, staging, there)
                for batch in batches
            ]
            options.append(next((way for way in ways if way.fits), ways[-1]))
    return options


# The decision


def place(
    plan: Plan,
    memory: Memory,
    *,
    device: str | None = None,
    quantize: Quantize | Literal["none"] | None = None,
    dtype: str | None = None,
    batch: int | None = None,
    tokens: int = TOKENS,
) -> Placement:
    """Decide where the live model and its sources go: the most exact that fits the fastest device.

    device: "cuda" or "cpu"; quantize: "int8", "nf4" or "none"; dtype: of the live model, such as
    "BF16"; batch: sequences answered at once. None of each: decided here, the batch as the largest
    of `BATCHES` that fits, made smaller before the precision is lowered or a slower device taken.
    tokens: length of each sequence, in the key-value cache. PlacementError gives the numbers where
    nothing that was asked for fits; RecipeError where a wish is none of the above.
    """
    if device not in (None, *_DEVICES):
        raise RecipeError(f"--device {device}: expected cpu or cuda")
    if quantize not in (None, "none", "int8", "nf4"):
        raise RecipeError(f"--quantize {quantize}: expected int8, nf4 or none")
    live = _live_dtype(plan, dtype)
    options = _options(plan, memory, live, BATCHES if batch is None else (batch,), tokens)
    wished = [
        option
        for option in options
        if device in (None, option.device) and quantize in (None, option.quantize or "none")
    ]
    chosen = next((option for option in wished if option.fits), None)
    if chosen is None:
        raise _refusal(options, wished, tokens)
    lines = _choice_lines(memory, chosen, wished[: wished.index(chosen)], tokens)
    return _with_sources(plan, memory, chosen, lines)


def _choice_lines(
    memory: Memory, chosen: _Option, tried: Sequence[_Option], tokens: int
) -> list[str]:
    """What there is, what is needed, what did not fit and what did."""
    work = (
        f"work: {_bytes(chosen.activations)} assumed for activations and staging"
        f" + {_cache(chosen, tokens)}"
    )
    if chosen.staging:
        work += f" + {_bytes(chosen.staging)}, 3 x the largest quantized tensor"
    return [
        f"memory: {_on_card(memory)}{_bytes(memory.ram)} of RAM available",
        work,
        *(f"{option.name}: {option.sum}: does not fit" for option in tried),
        f"{chosen.name}: {chosen.sum}: chosen",
    ]


def homes(plan: Plan, placement: Placement) -> Iterator[tuple[Step, Part, Home]]:
    """Every interpolated part in plan order, and where its base and donor bytes are kept."""
    blended = list(_blended(plan))
    sizes = (_source_bytes(part) for _, part in blended)
    where = _fill(sizes, placement.sources_vram, placement.sources_pinned)
    for (step, part), home in zip(blended, where, strict=True):
        yield step, part, home


def _blended(plan: Plan) -> Iterator[tuple[Step, Part]]:
    return ((step, part) for step, part in plan.parts if part.donor)


def _source_bytes(part: Part) -> int:
    return part.base.nbytes + (part.donor.nbytes if part.donor else 0)


def _fill(sizes: Iterable[int], vram: int, pinned: int) -> Iterator[Home]:
    """A place for each size in turn; one that does not fit ends the place for all that follow.

    So more room never means less in it, and the sums alone are enough to find the parts again.
    """
    rooms: Iterator[tuple[Home, int]] = iter((("vram", vram), ("pinned", pinned)))
    home, room = next(rooms)
    for size in sizes:
        while home != "cache" and size > room:
            home, room = next(rooms, ("cache", 0))
        room -= size
        yield home


def _with_sources(plan: Plan, memory: Memory, chosen: _Option, lines: list[str]) -> Placement:
    """The placement, with the sources in what the model leaves free.

    Pinned memory cannot be swapped or given back in need: at most half of the RAM. On the CPU
    nothing is copied: the mapped files serve, and the kernel caches what it has room for.
    """
    on_card = chosen.device == "cuda"
    vram, pinned = (chosen.there - chosen.need, memory.ram // 2) if on_card else (0, 0)
    sizes = [_source_bytes(part) for _, part in _blended(plan)]
    sums: dict[Home, int] = {"vram": 0, "pinned": 0, "cache": 0}
    for home, size in zip(_fill(sizes, vram, pinned), sizes, strict=True):
        sums[home] += size
    taken = sums["pinned"] + SPARE if on_card else chosen.need
    ram_left = max(0, memory.ram - taken)
    lines += _source_lines(sums, ram_left)
    return Placement(
        chosen.device,
        chosen.quantize,
        chosen.dtype.name,
        chosen.model,
        chosen.work,
        chosen.batch,
        sums["vram"],
        sums["pinned"],
        sums["cache"],
        sums["cache"] <= ram_left,
        tuple(lines),
    )


def _source_lines(sums: dict[Home, int], ram_left: int) -> Iterator[str]:
    """Where base and donor go, and how much of them each alpha must fetch from the disk anew."""
    words: dict[Home, str] = {
        "vram": "in VRAM",
        "pinned": "in pinned RAM",
        "cache": "through the page cache",
    }
    where = ", ".join(f"{_bytes(sums[home])} {word}" for home, word in words.items() if sums[home])
    yield f"base + donor: each alpha reads {_bytes(sum(sums.values()))}: {where}"
    if again := sums["cache"] - min(sums["cache"], ram_left):
        yield (
            f"page cache: at most {_bytes(ram_left)} of it stays in the RAM left;"
            f" each alpha reads the other {_bytes(again)} or more from the disk again"
        )
    elif sums["cache"]:
        yield f"page cache: all of it fits the {_bytes(ram_left)} of RAM left; read from disk once"


def _on_card(memory: Memory) -> str:
    if memory.vram is None:
        return "no CUDA card, "
    return f"{_bytes(memory.vram)} free on {memory.card or 'the CUDA card'}, "


def _cache(option: _Option, tokens: int) -> str:
    return f"{_bytes(option.cache)} key-value cache of {option.batch} x {tokens} tokens"


def _refusal(options: list[_Option], wished: list[_Option], tokens: int) -> PlacementError:
    """What the smallest wished option on each device lacks, and what would fit instead."""
    other = next((option for option in options if option.fits), None)
    fitting = f"{other.flags} would fit" if other else "a smaller model would help"
    if not wished:  # every CPU option exists, so it was a card that was wished for
        return PlacementError(
            f"no CUDA card was found, or --vram 0 rules it out; {fitting},"
            " --vram SIZE plans for a card that nvidia-smi does not show"
        )
    least = {
        device: min(on_device, key=lambda option: option.need)
        for device in _DEVICES
        if (on_device := [option for option in wished if option.device == device])
    }
    lacks = ", ".join(
        f"{option.name} needs {_bytes(option.need)}"
        f" of {'VRAM' if device == 'cuda' else 'RAM'} but {_bytes(option.there)} is free"
        for device, option in least.items()
    )
    free = " and ".join("--vram" if device == "cuda" else "--ram" for device in least)
    smallest = wished[0]  # nothing fits, so all are at the last batch tried
    fewer = ", a smaller --batch-size may help" if smallest.batch > 1 else ""
    return PlacementError(
        f"the model does not fit: {lacks} (with a {_cache(smallest, tokens)}); {fitting}{fewer},"
        f" or free memory ({free} may say how much there will be)"
    )


def _bytes(count: int) -> str:
    """A size for people, in decimal units."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
