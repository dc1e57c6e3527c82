"""What the commands that take a pair of models share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from .. import api
from ..errors import OutputError
from ..mapping.plan import Plan
from ..settings import PlanSettings, StreamSettings, setting
from .console import print_note


def parse_path(text: str) -> Path:
    """A file or folder."""
    return Path(text).expanduser()


def out_option(help: str, *, required: bool = False) -> Any:
    """The option -o, --out."""
    return setting(None, help, metavar="OUT", parse=parse_path, short="-o", required=required)


def json_option() -> Any:
    """The option --json."""
    return setting(False, "one JSON document on stdout")


def prompts_option() -> Any:
    """The option --prompts."""
    return setting(
        None,
        "unlabelled questions: JSON or JSON Lines (prompt and image, or conversations or messages),"
        " CSV, TSV, Parquet, a folder of images, or a Hub dataset (org/name[:config][@revision])",
        metavar="SET",
        parse=expanduser,
    )


def arch_option(help: str) -> Any:
    """The option --arch, where no plan is made."""
    return setting((), help, metavar="FILE", parse=expanduser, repeated=True)


def _model(metavar: str, what: str, nargs: str | None = None) -> Any:
    return setting(
        None,
        f"folder, file or Hub id, org/name[@revision], of the model that is {what}",
        metavar=metavar,
        parse=expanduser,
        positional=True,
        nargs=nargs,
    )


def _more_donors() -> Any:
    return setting((), "more donors", metavar="DONOR", parse=expanduser, positional=True, nargs="*")


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """The two models, or more."""

    base: str = _model("BASE", "kept")
    donor: str = _model("DONOR", "blended in")
    more: tuple[str, ...] = _more_donors()


@dataclass(frozen=True, kw_only=True)
class OptionalPairOptions:
    """The two models, or more."""

    base: str | None = _model("BASE", "kept", nargs="?")
    donor: str | None = _model("DONOR", "blended in", nargs="?")
    more: tuple[str, ...] = _more_donors()


def make_plan(
    base: str,
    donors: Sequence[str],
    settings: PlanSettings,
    *,
    bins: bool = True,
    **numbers: Any,
) -> Plan:
    """The plan of a base and its donors, with a note where --no-cache has no effect.

    numbers: `weights` and `densities`, as for `api.make_plan`. bins: download a repository that has
    only .bin files, whose tensors cannot be located otherwise.
    """
    stream = isinstance(settings, StreamSettings) and settings.no_cache
    plan = api.make_plan(base, donors, settings=settings, stream=stream, bins=bins, **numbers)
    if stream and not any(checkpoint.repo for checkpoint in plan.checkpoints.values()):
        print_note("--no-cache is for Hub ids; all checkpoints lie here and are read in place")
    return plan


def check_page(path: Path | None, option: str, *others: str | Path | None) -> None:
    """OutputError now, not after the work, if a page clearly cannot be written.

    others: what the same command reads or keeps, which the page must not replace.
    """
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError(f"{option} {path}: expected a file in a folder that exists")
    if path.resolve() in {Path(other).resolve() for other in others if other is not None}:
        raise OutputError(f"{option} {path}: this command needs that file; name another")
