"""How long a search would take on this CPU, from a moment's measurement of it.

An estimate within a factor of two or so: nothing in a header tells how long prompts and answers
are. While a search runs it is refined by what was answered so far. Imports no torch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import PlacementError
from ..mapping.plan import Plan
from ..settings import Live
from ..values import format_count, format_duration, format_size
from .free_memory import Memory
from .placement import Placement
from .placing import place

PROMPT_TOKENS, ANSWER_TOKENS = 512, 64
"""Assumed of a question with its image, and of its answer, unless that may not be so long."""
GENERATED_SHARE = 0.65
"""Of an answer's tokens, those that are generated one by one, as bench/search.md found."""
MEASURED_SECONDS = 0.1
AMPLE_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Speeds:
    """What this machine does in a second. disk: None where no file was there to read."""

    operations: float
    copied_bytes: float
    disk_bytes: float | None


def measure_speeds(path: Path) -> Speeds:
    """Multiply matrices, copy memory, and read some of a file past the page cache."""
    import numpy as np

    matrix = np.ones((768, 768), np.float32)
    source, copy = np.ones((2, 32 << 20), np.uint8)
    operations = 2 * 768**3 / _seconds_of(lambda: matrix @ matrix)
    copied_bytes = 2 * source.nbytes / _seconds_of(lambda: np.copyto(copy, source))
    return Speeds(operations, copied_bytes, _measure_disk(path) if path.is_file() else None)


def _seconds_of(work: Callable[[], object]) -> float:
    """The least of several runs, which takes MEASURED_SECONDS or one run."""
    work()
    least, begin = math.inf, time.perf_counter()
    while math.isinf(least) or time.perf_counter() - begin < MEASURED_SECONDS:
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return max(least, 1e-9)


def _measure_disk(path: Path) -> float:
    """Bytes a second from the middle of a file, which is not likely to be in the page cache."""
    with path.open("rb", buffering=0) as file:
        at, size = os.fstat(file.fileno()).st_size // 2, 16 << 20
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), at, size, os.POSIX_FADV_DONTNEED)
        file.seek(at)
        start = time.perf_counter()
        count = len(file.read(size))
        return max(count, 1) / max(time.perf_counter() - start, 1e-9)


def estimate_seconds(
    plan: Plan,
    placement: Placement,
    speeds: Speeds,
    prompts: int,
    alphas: int,
    answer_tokens: int = ANSWER_TOKENS,
) -> float:
    """Seconds of a search on the CPU: prompts x alphas x passes."""
    blended = [step for step in plan.steps if step.action == "interpolate"]
    weights = sum(step.elements for step in blended)
    written_bytes = sum(step.nbytes for step in blended)

    def blend(source_bytes: int) -> float:
        """Seconds to blend as much, of all that the layers and the rest are made of."""
        share = source_bytes / placement.cached_source_bytes if source_bytes else 0
        missed_bytes = max(0, source_bytes - placement.page_cache_bytes)
        moved = (source_bytes + share * written_bytes) / speeds.copied_bytes
        return moved + missed_bytes / (speeds.disk_bytes or math.inf)

    whole = blend(placement.cached_source_bytes)
    products = 2 * weights * prompts * (PROMPT_TOKENS + answer_tokens) / speeds.operations
    passes = 1 + GENERATED_SHARE * answer_tokens
    batches = -(-prompts // placement.batch_size)
    if placement.live == "streamed":  # each pass blends layers, for several batches at once
        rest = blend(placement.cached_source_bytes - placement.kept_source_bytes)
        further_passes = passes * -(-batches // placement.batches_at_once) - 1
        return alphas * (products + whole + further_passes * rest)
    moved = batches * passes * placement.model_bytes / speeds.copied_bytes
    return alphas * (products + moved + whole)


def describe_time(
    plan: Plan, placement: Placement, alphas: int, prompts: int, longest: int = ANSWER_TOKENS
) -> list[str]:
    """The estimate in a line, held and streamed; none for a card: only torch can measure it.

    longest: tokens of an answer, at most.
    """
    if placement.device != "cpu":
        return []
    answer_tokens = min(longest, ANSWER_TOKENS)
    speeds = measure_speeds(next(part.base.path for _, part in plan.parts))

    def guess(placed: Placement) -> str:
        seconds = estimate_seconds(plan, placed, speeds, prompts, alphas, answer_tokens)
        return f"{format_duration(seconds)} {placed.live}"

    times = guess(placement)
    if other := _place_otherwise(plan, placement):
        times += f", or {guess(other)} in {format_size(other.required_bytes)},"
    return [
        f"time: about {times} for {format_count(prompts, 'question')} of"
        f" {PROMPT_TOKENS} tokens at {format_count(alphas, 'alpha')}, answered in {answer_tokens}:"
        " a guess from a moment's measurement, refined while a search runs"
    ]


def _place_otherwise(plan: Plan, placement: Placement) -> Placement | None:
    """Streamed instead of held, or held on a machine that has the memory."""
    live: Live = "held" if placement.live == "streamed" else "streamed"
    ram_bytes = AMPLE_BYTES if live == "held" else placement.available_bytes
    try:
        return place(plan, Memory(ram_bytes, None, None), placement.settings(live))
    except PlacementError:  # it has no layers, or not even two of them fit
        return None
