"""The command `push`, and the upload of a merge: checked first, committed when all is there."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .console import print_notes, progress_bar

if TYPE_CHECKING:
    from ..hub.upload import Push
    from ..mapping.plan import Plan


def run(arguments: argparse.Namespace) -> int:
    """Upload a merged folder, or finish its upload."""
    from ..merging.verify import verify

    verify(arguments.out)
    with pushing(arguments) as push:
        finish(arguments, push)
    return 0


@contextmanager
def pushing(arguments: argparse.Namespace, plan: Plan | None = None) -> Iterator[Push]:
    """The upload that was asked for, once the Hub said that it can be; nothing is sent yet.

    plan: what is to be merged; None if `arguments.out` is complete.
    """
    from ..hub.upload import Push, quiet
    from ..hub.upload_check import check
    from ..merging import model_card as card
    from ..merging.journal import pending

    complete = plan is None or pending(arguments.out)
    paper, readme = None, arguments.out / "README.md"
    if plan is not None:
        paper = card.model_card(plan, arguments.alpha or 0.0, {})
    elif readme.is_file():
        paper = readme.read_text("utf-8", errors="replace")
    with quiet():
        target = check(
            arguments.push_to_hub,
            private=arguments.private,
            replace=arguments.replace_repo,
            card=paper,
            out=arguments.out if complete else None,
        )
        with Push(target, arguments.out) as push:
            yield push


def finish(arguments: argparse.Namespace, push: Push) -> None:
    """Send what is left of the complete output, and commit."""
    from ..hub.upload_check import pushed_files
    from ..merging.verify import verify

    verify(arguments.out)
    total = sum(path.stat().st_size for path in pushed_files(arguments.out).values())
    with progress_bar("uploading", total) as progress:
        files = push.finish(progress)
    print_notes(push.notes)
    print(f"{push.url}: {files} files")
