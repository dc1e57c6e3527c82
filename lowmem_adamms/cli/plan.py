"""The command `plan`: what would be done, from headers alone, and what it would take."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlacementError
from ..live.placement import Quantize, stored_bytes
from .arguments import make_plan, placing, quantizing
from .console import print_json, screen

if TYPE_CHECKING:
    from ..mapping.plan import Plan

_ANONYMOUS_MB = 128  # the bound that bench/merge.py checks, whole process
_QUANTIZING_MB = 512  # of which torch, transformers and bitsandbytes take some 370


def run(arguments: argparse.Namespace) -> int:
    """Print the plan as tables or as one document."""
    plan, quantize = make_plan(arguments), quantizing(arguments)
    forecast = _forecast(plan, arguments.out or Path(), quantize)
    try:
        lines = placing(arguments, plan).lines
    except PlacementError as error:
        lines = (str(error),)
    if arguments.json:
        print_json(plan.to_json() | {"forecast": forecast, "search": list(lines)})
    else:
        show_plan(plan, screen())
        _show_forecast(plan, forecast, quantize, lines)
    return 0


def show_plan(plan: Plan, console: Any) -> None:
    """The table, what is left over of the donor, and the notes."""
    from rich.markup import escape

    from ..reporting import terminal as show

    console.print(show.plan_table(plan))
    console.print(f"left over of the donor: {escape(show.leftover(plan))}", soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _forecast(plan: Plan, out: Path, quantize: Quantize | None) -> dict[str, int]:
    from ..merging.sources import remote

    written = stored_bytes(plan, quantize)
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    return {
        "disk_needed": written,
        "disk_free": shutil.disk_usage(there).free,
        "anonymous_memory": (_QUANTIZING_MB if quantize else _ANONYMOUS_MB) << 20,
        "to_fetch": sum(file.size for file in remote(plan).values()),
        "seconds_at_1_GB_per_s": math.ceil((plan.bytes_read + written) / 1e9),
    }


def _show_forecast(
    plan: Plan, forecast: dict[str, int], quantize: Quantize | None, search: Sequence[str]
) -> None:
    from ..reporting.terminal import size

    about = f" (about; {quantize} of bitsandbytes)" if quantize else ""
    print(
        f"read {size(plan.bytes_read)}, write {size(forecast['disk_needed'])}{about};"
        f" disk free {size(forecast['disk_free'])},"
        f" needed {size(forecast['disk_needed'])}\n"
        f"memory at most {forecast['anonymous_memory'] >> 20} MB besides file pages;"
        f" about {forecast['seconds_at_1_GB_per_s']} s on a disk that moves 1 GB/s"
    )
    if forecast["to_fetch"]:
        print(
            f"from the Hub: {size(forecast['to_fetch'])} in shards that are not in the cache;"
            " --no-cache streams what is needed of them"
        )
    print("a search for alpha would run so:", *search, sep="\n  ")
