"""The command line: the only rooms that print.

Results go to stdout, everything else to stderr; progress is drawn only on a terminal. Exit codes:
0 done, 2 the user can fix it (one line, `error: …`), 130 interrupted. A bug keeps its traceback.
Each command lies in the file of its name; what they take is in `options.py`.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import MergeError
from . import archs, compare, demo, merge, plan, push, search, speech, verify
from .options import COMMANDS, parser

_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": plan.run,
    "compare": compare.run,
    "merge": merge.run,
    "search": search.run,
    "verify": verify.run,
    "push": push.run,
    "archs": archs.run,
    "demo": demo.run,
}
_NOT_THERE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)


def process() -> int:
    """`main` as all that a process does, which spares it looking for garbage that is not there.

    Measured on a merge of 16 GB: 0.3 s of the start, spent in imports, and 0.3 s of the end.
    """
    gc.set_threshold(100_000, 50, 50)
    try:
        return main()
    finally:
        gc.freeze()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    speech.prepare()
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = argparse.Namespace()
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        if "/" not in words[0] and not Path(words[0]).exists():
            return _fail(
                f"{words[0]}: no such folder or file, nor a command ({', '.join(COMMANDS)});"
                " see python -m lowmem_adamms --help"
            )
        words.insert(0, "merge")
    try:
        arguments = parser().parse_args(words)
        code = _RUN[arguments.command](arguments)
        sys.stdout.flush()
        return code
    except MergeError as error:
        return _fail(*error.lines)
    except BrokenPipeError:  # such as `plan --json | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"disk full ({error}); free some and run the same command to resume")
        if error.errno in _NOT_THERE:
            return _fail(f"{error.filename}: {error.strerror}")
        raise
    except KeyboardInterrupt:
        print(f"interrupted{_way_back(arguments)}", file=sys.stderr)
        return 130


def _way_back(arguments: argparse.Namespace) -> str:
    """What to do after an interruption; nothing where there is nothing to resume."""
    command = getattr(arguments, "command", None)
    if command in ("merge", "push") or getattr(arguments, "journal", None):
        return ": run the same command again to resume"
    return ": nothing was kept; with --journal FILE a search resumes" if command == "search" else ""


def _fail(*messages: str) -> int:
    """One line each, whatever a file's names put into it."""
    for message in messages:
        line = " ".join(message.split())
        safe = "".join(letter if letter.isprintable() else "?" for letter in line)
        print("error:", safe, file=sys.stderr)
    return 2
