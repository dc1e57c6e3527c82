"""Where the weights of a plan are that lie on the Hub."""

from __future__ import annotations

from pathlib import Path

from ..hub.remote_file import RemoteFile
from ..mapping.plan import Plan


def remote_shards(plan: Plan) -> dict[Path, RemoteFile]:
    """The shards of all inputs that are not on this disk, by the path where they would be."""
    remote: dict[Path, RemoteFile] = {}
    for checkpoint in plan.checkpoints.values():
        remote |= checkpoint.remote_files()
    return remote


def download(plan: Plan, *, show_bars: bool = False) -> None:
    """Download everything of all inputs that is on the Hub and not in the cache."""
    for checkpoint in plan.checkpoints.values():
        checkpoint.download(bars=show_bars)
