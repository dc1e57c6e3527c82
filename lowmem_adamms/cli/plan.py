"""The command `plan`: what would be done, from headers alone, and what it would take."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import api
from ..errors import PlacementError
from ..live.model_size import output_bytes
from ..live.placement import Placement
from ..live.search_time import describe_time
from ..merging.sources import remote_shards
from ..settings import (
    DEFAULT_ALPHAS,
    PlacementSettings,
    PlanSettings,
    QuantizeSettings,
    SearchSettings,
    StreamSettings,
)
from ..values import format_size
from .console import print_json, print_line, screen
from .options import Command, spell_settings
from .pair import PairOptions, json_option, make_plan, out_option

if TYPE_CHECKING:
    from ..mapping.plan import Plan

_ANONYMOUS_MB = 128  # the bound that bench/merge.py checks, whole process
_QUANTIZING_MB = 512  # of which torch, transformers and bitsandbytes take some 370


@dataclass(frozen=True, kw_only=True)
class PlanOptions(PairOptions, PlanSettings, QuantizeSettings, StreamSettings, PlacementSettings):
    """What `plan` takes."""

    out: Path | None = out_option("where the output would go: show how much space is free there")
    json: bool = json_option()


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a merge would take, in bytes; keys of `plan --json`."""

    disk_needed: int
    disk_free: int
    anonymous_memory: int
    to_fetch: int
    seconds_at_1_GB_per_s: int  # noqa: N815  (a key of the document)


def run(options: PlanOptions) -> int:
    """Print the plan as tables or as one document."""
    plan = make_plan(options.base, (options.donor, *options.more), options, bins=False)
    forecast = _forecast(plan, options)
    placement = None
    try:
        placement = api.place_search(plan, options, quantize=options.quantize)
        lines = placement.lines
    except PlacementError as error:
        lines = (spell_settings(str(error)),)
    if options.json:
        document = plan.to_json() | {"forecast": asdict(forecast), "search": list(lines)}
        print_json(document | {"notes": [spell_settings(note) for note in plan.notes]})
    else:
        show_plan(plan, screen())
        for note in plan.notes:
            print_line(f"note: {note}")
        if isinstance(placement, Placement):
            grid = len(DEFAULT_ALPHAS), SearchSettings().samples
            lines = (*lines, *describe_time(plan, placement, *grid))
        _show_forecast(plan, forecast, options, lines)
    return 0


def show_plan(plan: Plan, console: Any) -> None:
    """The table, and what is left over of the donor."""
    from ..reporting import terminal

    console.print(terminal.plan_table(plan))
    print_line(f"left over of the donor: {terminal.describe_leftover(plan)}")


def _forecast(plan: Plan, options: PlanOptions) -> Forecast:
    quantize = None if options.quantize == "none" else options.quantize
    written = output_bytes(plan, quantize)
    out = options.out or Path()
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    return Forecast(
        disk_needed=written,
        disk_free=shutil.disk_usage(place).free,
        anonymous_memory=(_QUANTIZING_MB if quantize else _ANONYMOUS_MB) << 20,
        to_fetch=sum(file.size for file in remote_shards(plan).values()),
        seconds_at_1_GB_per_s=math.ceil((plan.bytes_read + written) / 1e9),
    )


def _show_forecast(
    plan: Plan, forecast: Forecast, options: PlanOptions, search: Sequence[str]
) -> None:
    quantized = options.quantize not in (None, "none")
    about = f" (about; {options.quantize} of bitsandbytes)" if quantized else ""
    print_line(
        f"read {format_size(plan.bytes_read)}, write {format_size(forecast.disk_needed)}{about};"
        f" disk free {format_size(forecast.disk_free)},"
        f" needed {format_size(forecast.disk_needed)}\n"
        f"memory at most {forecast.anonymous_memory >> 20} MB besides file pages;"
        f" about {forecast.seconds_at_1_GB_per_s} s on a disk that moves 1 GB/s"
    )
    if forecast.to_fetch:
        print_line(
            f"from the Hub: {format_size(forecast.to_fetch)} in shards that are not in the cache;"
            " --no-cache streams what is needed of them"
        )
    print_line("\n  ".join(["a search for alpha would run so:", *search]))


COMMAND = Command(
    takes=PlanOptions,
    run=run,
    help="what would be done, from headers alone",
    description="Shows what a merge would do with each tensor, what it would take, and where a"
    "\nsearch would run. Reads headers only and writes nothing.",
)
