"""Pages: a template rendered into one HTML file that needs no network and no second file.

Every value that a template prints is escaped, and hidden characters in it are made visible; a
template cannot forget either.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError
from ..values import format_count
from .text import show_hidden

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, *, scripts: Sequence[str], **values: Any) -> str:
    """Render a template of `templates/` with the values that it prints.

    scripts: names of the files with the only code that the page's policy allows to run, even if a
    value should ever get past the escaping.
    """
    code = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in scripts)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
        f" script-src 'sha256-{digest}'"
    )
    return _environment().get_template(template).render(values, policy=policy, script=code)


@cache
def _environment() -> jinja2.Environment:
    """What compiles the templates, each once."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = format_count
    return environment


def _finalize(value: Any) -> Any:
    """What jinja2 applies to each value before it escapes it; finished HTML is left alone."""
    return value if hasattr(value, "__html__") else show_hidden(str(value))


def write_page(path: Path, page: str) -> None:
    """Write `page` to `path` as UTF-8, whole or not at all; OutputError if it cannot be."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(page)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{path}: cannot write the report: {reason}; choose another") from error
