"""What several commands make of the words they were given: a plan, a placement, a way to fetch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError, RecipeError
from ..memory import measure
from ..placement import Placement, Quantize, place
from .console import draws

if TYPE_CHECKING:
    from ..inputs import Fetch
    from ..plan import Plan

_FEWEST = 10_000  # nobody means so few bytes


def make_plan(arguments: argparse.Namespace) -> Plan:
    """From base to donor; the command `plan` itself opens no `.bin` and fetches no shard."""
    from .. import join
    from ..checkpoint import open_checkpoint
    from ..declare import read_all

    declared = read_all(arguments.arch or ())
    fetch = fetching(arguments)
    bins = arguments.command != "plan" and fetch.cached
    base, donor = (
        open_checkpoint(ref, cache=not fetch.no_cache, bins=bins)
        for ref in (arguments.base, arguments.donor)
    )
    return join.make_plan(
        base, donor, embeddings=arguments.embeddings, dtype=arguments.dtype, declared=declared
    )


def fetching(arguments: argparse.Namespace) -> Fetch:
    """How what lies on the Hub gets here."""
    from ..inputs import Fetch

    budget = getattr(arguments, "disk_budget", None)
    return Fetch(
        no_cache=getattr(arguments, "no_cache", False),
        disk_budget=parse_size(budget, "--disk-budget") if budget else None,
        bars=draws(),
    )


def quantizing(arguments: argparse.Namespace) -> Quantize | None:
    """What the output is quantized to, if anything."""
    return None if arguments.quantize in (None, "none") else arguments.quantize


def placing(arguments: argparse.Namespace, plan: Plan) -> Placement:
    """Where the search's model goes, as asked for or as fits; PlacementError if nothing does."""
    ram = parse_size(arguments.ram, "--ram") if arguments.ram else None
    vram = parse_size(arguments.vram, "--vram", zero=True) if arguments.vram else None
    dtype = arguments.live_dtype or arguments.dtype
    return place(
        plan,
        measure(ram=ram, vram=vram),
        device=arguments.device,
        quantize=arguments.live_quantize or arguments.quantize,
        dtype=dtype.name if dtype else None,
        batch=arguments.batch_size,
    )


def check_page(path: Path | None, option: str) -> None:
    """OutputError now, not after the work, where a page clearly cannot be written."""
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise OutputError(f"{option} {path}: expected a file in a folder that exists")


def parse_size(text: str, option: str, *, zero: bool = False) -> int:
    """Bytes of `5GB`, `500 MB`, `2GiB` or a plain number; `zero` lets 0 pass.

    RecipeError names `option` (such as `--vram`) where `text` is no size, or a plain number that
    must be short of its unit.
    """
    from fractions import Fraction

    match = re.fullmatch(
        r"([0-9]{1,15}(?:\.[0-9]{1,15})?) *(?:([KMGT])(i?))?B?", text.strip(), re.IGNORECASE
    )
    number = Fraction(match[1]) if match else Fraction(0)
    if match is None or not (number or zero):
        raise RecipeError(f"{option} {text!r}: expected a size such as 16GB, 7.5GiB or 500MB")
    if match[1] == text.strip() and 0 < number < _FEWEST:
        raise RecipeError(f"{option} {text!r}: that many bytes? Give a unit, as in {match[1]}GB")
    base = 1024 if match[3] else 1000
    return int(number * base ** " KMGT".index((match[2] or " ").upper()))
