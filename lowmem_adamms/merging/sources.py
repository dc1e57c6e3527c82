"""Where the weights of a plan are that lie on the Hub."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.arranged import Arranged
from ..errors import HubError
from ..hub.remote_file import RemoteFile
from ..mapping.plan import Plan
from ..values import format_size

MAX_AT_ONCE = 32 << 20
"""Bytes of a streamed donor that may be needed at once to bring them into the base's order."""


def remote_shards(plan: Plan) -> dict[Path, RemoteFile]:
    """The shards of all inputs that are not on this disk, by the path where they would be."""
    remote: dict[Path, RemoteFile] = {}
    for checkpoint in plan.checkpoints.values():
        remote |= checkpoint.remote_files()
    return remote


def check_streamable(plan: Plan) -> None:
    """HubError where streaming would take more memory than a merge is allowed."""
    remote = remote_shards(plan)
    for step, part in plan.parts if remote else ():
        for side in part.sides:
            if not isinstance(side, Arranged) or side.path not in remote:
                continue
            nbytes = sum(span.nbytes for span in side.spans)
            if nbytes > MAX_AT_ONCE:
                raise HubError(
                    f"{remote[side.path].repo_id}: {format_size(nbytes)} of it are needed at once"
                    f" to bring them into the order of {step.name}, expected at most"
                    f" {format_size(MAX_AT_ONCE)} where nothing is stored; merge by way of the"
                    " cache, without `no_cache=True`"
                )


def download(plan: Plan, *, show_bars: bool = False) -> None:
    """Download everything of all inputs that is on the Hub and not in the cache."""
    for checkpoint in plan.checkpoints.values():
        checkpoint.download(bars=show_bars)
