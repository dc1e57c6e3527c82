"""Where the weights of a plan are that lie on the Hub."""

from __future__ import annotations

from pathlib import Path

from ..hub.remote_file import RemoteFile
from ..mapping.plan import Plan


def remote_shards(plan: Plan) -> dict[Path, RemoteFile]:
    """The shards of both sides that are not on this disk, by the path where they would be."""
    return plan.base.remote_files() | plan.donor.remote_files()


def download(plan: Plan, *, show_bars: bool = False) -> None:
    """Download everything of both sides that is on the Hub and not in the cache."""
    for side in (plan.base, plan.donor):
        side.download(bars=show_bars)
