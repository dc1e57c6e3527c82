"""The command `push`: upload a merged folder, or finish its upload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import api
from ..hub.upload import Upload, pushed_files
from ..settings import UploadSettings, setting
from .console import print_line, progress_bar
from .options import Command
from .pair import parse_path


@dataclass(frozen=True, kw_only=True)
class PushOptions(UploadSettings):
    """What `push` takes."""

    out: Path = setting(None, "what merge wrote", metavar="OUT", parse=parse_path, positional=True)
    push_to_hub: str | None = setting(
        None, "a repository of models on the Hub", metavar="ORG/NAME", positional=True
    )


def run(options: PushOptions) -> int:
    """Upload, with a bar where somebody sees it."""
    with api.push(options.out, options) as upload:
        show_upload(upload, options.out, upload.finish)
    return 0


def show_upload(
    upload: Upload, out: Path, finish: Callable[[Callable[[int], None] | None], int]
) -> None:
    """Finish an upload and say where it is."""
    total = sum(path.stat().st_size for path in pushed_files(out).values())
    with progress_bar("uploading", total) as progress:
        files = finish(progress)
    print_line(f"{upload.url}: {files} files")


COMMAND = Command(
    takes=PushOptions,
    run=run,
    help="upload a merged folder, or finish its upload",
    description="Uploads a merged folder to the Hub in one commit. HF_TOKEN or a login of"
    " huggingface_hub\nmust allow it.",
)
