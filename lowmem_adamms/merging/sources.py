"""How weights that lie on the Hub reach the loop: by the cache, by ranges, or shard by shard.

Leaves to others: each of these ways (`hub.py`, `ranges.py`, `shards.py`) and the loop (`merge.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.span import Span
from ..errors import DigestError, RecipeError
from ..hub.remote_file import RemoteFile
from ..mapping.alphas import Alpha
from ..mapping.plan import Plan, Step
from . import range_source as ranges
from . import shard_source as shards
from .journal import NAME
from .loop import WINDOW, Sink, Source, run, spans_in_order

if TYPE_CHECKING:
    from ..checkpoints.mapped_files import Bytes


@dataclass(frozen=True, slots=True)
class Fetch:
    """The way; unless it says otherwise, the ordinary cache.

    no_cache: stream tensors, store nothing. disk_budget: bytes of shards kept at one time, beside
    the output. bars: show progress of downloads into the cache.
    """

    no_cache: bool = False
    disk_budget: int | None = None
    bars: bool = False

    def __post_init__(self) -> None:
        if self.no_cache and self.disk_budget is not None:
            raise RecipeError("--no-cache stores no shard: leave it out, or --disk-budget")

    @property
    def cached(self) -> bool:
        """Whether the ordinary cache is used."""
        return not self.no_cache and self.disk_budget is None


BY_CACHE = Fetch()


def remote(plan: Plan) -> dict[Path, RemoteFile]:
    """The shards of both sides that are not on this disk."""
    return plan.base.remote_files() | plan.donor.remote_files()


def download(plan: Plan, *, bars: bool = False) -> None:
    """Have both sides lie in the cache, whole, where they come from the Hub."""
    for side in (plan.base, plan.donor):
        side.download(bars=bars)


def carry_out(
    plan: Plan, alpha: Alpha, sink: Sink, work: Path, fetch: Fetch, **options: Any
) -> list[str]:
    """`merge.run` with its bytes from wherever they are; options are run's.

    work: OUT/.partial. Returns the remote files whose bytes were not held against the digests of
    the Hub.
    """
    files, budget = remote(plan), fetch.disk_budget
    unchecked: list[str] = []
    if not files:
        run(plan, alpha, sink, **options)
    else:
        size = ranges.WINDOW if budget is None else WINDOW
        windows = spans_in_order(plan, alpha, sink, size)
        try:
            with (
                ranges.RangeSource(files, windows)
                if budget is None
                else shards.ShardSource(files, windows, work / shards.FOLDER, budget)
            ) as source:
                through = _Through(sink, source, files)
                run(plan, alpha, through, source=source, window=size, **options)
                unchecked = source.finish()
        except DigestError:
            if budget is None:  # a shard is checked before it is used
                _start_over(work)
            raise
    shutil.rmtree(work / shards.FOLDER, ignore_errors=True)  # also of a run begun another way
    return unchecked


def _start_over(work: Path) -> None:
    """What was made of bad bytes, before they were found out, must not be gone on with."""
    for path in work.iterdir():
        if path.name == NAME or path.suffix == ".safetensors":
            path.unlink()
    shutil.rmtree(work / shards.FOLDER, ignore_errors=True)


class _Through:
    """A sink that takes copies of what is no file of this disk from the source."""

    def __init__(self, sink: Sink, source: Source, files: Container[Path]) -> None:
        self._sink, self._source, self._files = sink, source, files

    def wants(self, step: Step) -> bool:
        return self._sink.wants(step)

    def copy(self, step: Step, offset: int, span: Span) -> None:
        if span.path not in self._files:
            self._sink.copy(step, offset, span)
            return
        slot = self._sink.slot(step, offset, span.nbytes)
        slot[...] = self._source.view(span)
        self._sink.commit()

    def slot(self, step: Step, offset: int, nbytes: int) -> Bytes:
        return self._sink.slot(step, offset, nbytes)

    def commit(self) -> None:
        self._sink.commit()
