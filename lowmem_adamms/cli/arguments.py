"""What several commands make of the words they were given: a plan, a placement, a way to fetch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from ..live.free_memory import measure
from ..live.placement import Placement, Quantize, place
from .console import draws, print_notes

if TYPE_CHECKING:
    from ..mapping.plan import Plan
    from ..merging.sources import Fetch


def make_plan(arguments: argparse.Namespace) -> Plan:
    """From base to donor; the command `plan` itself opens no `.bin` and fetches no shard."""
    from ..architectures.declare import read_declarations
    from ..checkpoints.checkpoint import open_checkpoint
    from ..mapping import join

    declared = read_declarations(arguments.arch or ())
    fetch = fetching(arguments)
    bins = arguments.command != "plan" and fetch.cached
    base, donor = (
        open_checkpoint(ref, cache=not fetch.no_cache, download_bins=bins)
        for ref in (arguments.base, arguments.donor)
    )
    if not (fetch.cached or base.repo or donor.repo):
        option = "--no-cache" if fetch.no_cache else "--disk-budget"
        print_notes([f"{option} is for Hub ids; both checkpoints lie here and are read in place"])
    return join.make_plan(
        base, donor, embeddings=arguments.embeddings, dtype=arguments.dtype, declared=declared
    )


def fetching(arguments: argparse.Namespace) -> Fetch:
    """How what lies on the Hub gets here."""
    from ..merging.sources import Fetch

    no_cache, budget = (getattr(arguments, name, None) for name in ("no_cache", "disk_budget"))
    return Fetch(no_cache=bool(no_cache), disk_budget=budget, bars=draws())


def quantizing(arguments: argparse.Namespace) -> Quantize | None:
    """What the output is quantized to, if anything."""
    return None if arguments.quantize in (None, "none") else arguments.quantize


def placing(arguments: argparse.Namespace, plan: Plan) -> Placement:
    """Where the search's model goes, as asked for or as fits; PlacementError if nothing does."""
    dtype = arguments.live_dtype or arguments.dtype
    return place(
        plan,
        measure(ram=arguments.ram, vram=arguments.vram),
        device=arguments.device,
        quantize=arguments.live_quantize or arguments.quantize,
        dtype=dtype.name if dtype else None,
        batch=arguments.batch_size,
    )


def check_page(path: Path | None, option: str, *others: str | Path | None) -> None:
    """OutputError now, not after the work, where a page clearly cannot be written.

    others: what the same command reads or keeps, which the page must not replace.
    """
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError(f"{option} {path}: expected a file in a folder that exists")
    if path.resolve() in {Path(other).resolve() for other in others if other is not None}:
        raise OutputError(f"{option} {path}: this command needs that file; name another")
