"""The command line: the only wing that prints.

Results go to stdout, everything else to stderr; progress is drawn only on a terminal. Exit codes:
0 done, 2 the user can fix it (one line, `error: …`), 130 interrupted. A bug keeps its traceback.

    options    a parser for each command, made from the dataclass of what it takes
    console    what the commands print with
    pair       what the commands that take two models share
    plan, merge, search, compare, verify, push, archs, demo    a command each
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MergeError, RecipeError
from . import archs, compare, console, demo, merge, plan, push, search, verify
from .options import Command, did_you_mean, make_parser, program, read_options

COMMANDS = {
    "plan": plan.COMMAND,
    "compare": compare.COMMAND,
    "merge": merge.COMMAND,
    "search": search.COMMAND,
    "verify": verify.COMMAND,
    "push": push.COMMAND,
    "archs": archs.COMMAND,
    "demo": demo.COMMAND,
}
_ABOUT = """\
Merges two multimodal LLMs of different architecture whose language models share
an ancestor (AdaMMS, arXiv 2503.23733), in constant memory. BASE keeps its
architecture, vision encoder, tokenizer and processor; DONOR's language weights
are blended into it: out = (1 - alpha) * base + alpha * donor."""
_EXAMPLES = """\
examples:
  %(prog)s demo
  %(prog)s plan BASE DONOR
  %(prog)s BASE DONOR -o OUT --prompts questions.jsonl
  %(prog)s BASE DONOR -o OUT --alpha 0.3

BASE and DONOR are folders, files or Hub ids (org/name[@revision]). Without a
command, BASE DONOR ... is short for merge BASE DONOR ...
COMMAND --help tells what a command takes.
Exit codes: 0 done, 2 something you can fix, said in one line, 130 interrupted."""
_NOT_ACCESSIBLE = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)

_CUT_SHORT = (
    b"an input was cut short while it was read, or its disk failed: put it back, and run the same"
    b" command to resume"
)
_kept: list[Any] = []
_HELP = {
    errno.EIO: "check the disk or the network, and",
    errno.EFAULT: "an input was cut short while it was read: put it back, and",
    errno.EFBIG: "too large for this disk: choose another -o, or --max-shard-size 2GB; else",
    errno.EMFILE: "allow more open files (ulimit -n), and",
    errno.ENFILE: "close other programs, and",
}
"""What to do about errors of the system before the same command is run again."""


def process() -> int:
    """Run `main` as all that a process does, with rare garbage collections.

    Measured on a merge of 16 GB: saves 0.3 s of the start, spent in imports, and 0.3 s of the end.
    """
    gc.set_threshold(100_000, 50, 50)
    _explain_bus_errors()
    try:
        return main()
    finally:
        gc.freeze()


def _explain_bus_errors() -> None:
    """End in one line where a mapped input is cut short, or its disk fails, while it is read.

    The system then sends SIGBUS to the thread that reads, for which Python's own handlers come too
    late. What is on the disk is as after any kill.
    """
    if not sys.platform.startswith("linux"):
        return

    once = threading.Lock()  # several threads may meet it

    def explain(_: int) -> None:
        once.acquire()
        os.write(2, b"error: " + _CUT_SHORT + b"\n")
        os._exit(2)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
    _kept.append(handler)  # for as long as the process lives
    ctypes.CDLL(None).signal(signal.SIGBUS, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    console.prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    taken: Any = None
    try:
        command, taken = parse(words)
        code = command.run(taken)
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
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        if error.errno in _NOT_ACCESSIBLE:
            return _fail(what)
        if error.errno in _HELP:
            return _fail(f"{what}; {_HELP[error.errno]} run the same command to resume")
        raise
    except KeyboardInterrupt:
        console.print_info(f"interrupted{_way_to_resume(taken)}")
        return 130


def _fail(*messages: str) -> int:
    console.print_errors(messages)
    return 2


def parse(words: list[str]) -> tuple[Command, Any]:
    """The command that the words name, and what it takes as an instance of its dataclass."""
    parser = make_parser(COMMANDS, _ABOUT, _EXAMPLES)
    namespace = parser.parse_args(_join_alphas(_with_command(words)))
    command = COMMANDS[namespace.command]
    return command, read_options(command, namespace)


def _with_command(words: list[str]) -> list[str]:
    """The words with `merge` before them where they begin with a model instead of a command."""
    if not words or words[0] in COMMANDS or words[0].startswith("-"):
        return words
    if "/" not in words[0] and not Path(words[0]).exists():
        raise RecipeError(
            f"{words[0]}: no such folder or file, nor a command ({', '.join(COMMANDS)})"
            f"{did_you_mean(words[0], COMMANDS)}; a model of the Hub is called org/name; see"
            f" {program()} --help"
        )
    return ["merge", *words]


def _join_alphas(words: list[str]) -> list[str]:
    """The words with all numbers after --alpha in one, so that a model may follow them."""
    joined: list[str] = []
    is_alpha = False
    for word in words:
        is_number = re.fullmatch(r"[\d.eE+-]+", word) is not None
        if is_alpha and is_number and joined[-1] != "--alpha":
            joined[-1] += f" {word}"
        else:
            is_alpha = word == "--alpha" or (is_alpha and is_number)
            joined.append(word)
    return joined


def _way_to_resume(taken: Any) -> str:
    """What to do after an interruption; nothing where there is nothing to resume."""
    if isinstance(taken, (merge.MergeOptions, push.PushOptions)):
        return ": run the same command again to resume"
    if isinstance(taken, search.SearchOptions):
        if taken.journal:
            return ": run the same command again to resume"
        return ": nothing was kept; with --journal FILE a search resumes"
    return ""
