"""stdout and stderr that take any text, whatever the terminal's encoding, also when closed.

Leaves to others: what is said.
"""

from __future__ import annotations

import io
import json
import sys


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def prepare() -> None:
    """Have a character that the encoding lacks, such as an umlaut in a path, written as `\\xe4`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # as `>&-` leaves it
            setattr(sys, name, _Nowhere())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def as_json(document: object) -> str:
    """The document in a line that stdout can take as it is: `\\xe4` would not be JSON."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(document, ensure_ascii=not utf8)
