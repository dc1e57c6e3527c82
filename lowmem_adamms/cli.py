"""The command line: the only place that prints.

Results go to stdout, everything else to stderr; progress is drawn only on a terminal. Exit codes:
0 done, 2 the user can fix it (one line, `error: …`), 130 interrupted. A bug keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import __version__, dtypes
from .errors import MergeError, OutputError, RecipeError

if TYPE_CHECKING:
    from .dtypes import DType
    from .plan import Plan, Step

COMMANDS = ("plan", "merge", "verify", "demo")
_ANONYMOUS_MB = 128  # the bound that bench/merge.py checks, whole process


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        words.insert(0, "merge")
    try:
        arguments = _parser().parse_args(words)
        command: Callable[[argparse.Namespace], int] = arguments.command
        code = command(arguments)
        sys.stdout.flush()
        return code
    except MergeError as error:
        return _fail(str(error))
    except BrokenPipeError:  # such as `plan --json | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"disk full ({error}); free some and run the same command to resume")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return _fail(f"{error.filename}: {error.strerror}")
        raise
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    """One line, whatever a file's names put into it."""
    line = " ".join(message.split())
    safe = "".join(letter if letter.isprintable() else "?" for letter in line)
    print("error:", safe, file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lowmem_adamms",
        description="Merge two multimodal LLMs of different architecture whose language models"
        " share an ancestor (AdaMMS, arXiv 2503.23733), in constant memory. BASE keeps its"
        " architecture, vision encoder, tokenizer and processor; DONOR's language weights are"
        " blended in.",
        epilog="python -m lowmem_adamms BASE DONOR -o OUT --alpha 0.3   is short for   merge …",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    plan = commands.add_parser("plan", help="what would be done, from headers alone")
    _add_pair(plan)
    plan.add_argument("-o", "--out", metavar="OUT", type=Path, help="where it would be written")
    plan.add_argument("--json", action="store_true", help="one JSON document on stdout")
    plan.set_defaults(command=_plan)

    merge = commands.add_parser("merge", help="map and merge at a given alpha")
    _add_pair(merge)
    merge.add_argument("-o", "--out", metavar="OUT", type=Path, required=True, help="a new folder")
    merge.add_argument(
        "--alpha", type=float, help="the donor's weight: 0 is the base, 1 the donor; required"
    )
    merge.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB; default: the base's")
    merge.add_argument("--force", action="store_true", help="merge also what looks unrelated")
    merge.set_defaults(command=_merge)

    verify = commands.add_parser("verify", help="check a merged folder")
    verify.add_argument("out", metavar="OUT", type=Path)
    verify.add_argument(
        "--deep", action="store_true", help="also digests, and sampled rows against the inputs"
    )
    verify.set_defaults(command=_verify)

    demo = commands.add_parser("demo", help="make a tiny pair, merge it, generate from the result")
    demo.add_argument("-o", "--out", metavar="OUT", type=Path, help="keep the three models here")
    demo.add_argument("--alpha", type=float, default=0.3)
    demo.set_defaults(command=_demo)
    return parser


def _add_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="folder or file of the base checkpoint")
    parser.add_argument("donor", metavar="DONOR", help="folder or file of the donor checkpoint")
    parser.add_argument(
        "--embeddings",
        choices=("merge", "keep"),
        default="merge",
        help="join embedding and head rows by token (default), or keep the base's",
    )
    parser.add_argument("--dtype", type=_dtype, help="of the output: bf16, fp16, fp32")


def _dtype(text: str) -> DType:
    try:
        return dtypes.from_user(text)
    except RecipeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise RecipeError(f"--max-shard-size {text!r}: expected a size such as 5GB or 500MB")
    unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * unit)


def _make_plan(arguments: argparse.Namespace) -> Plan:
    from .plan import make_plan

    return make_plan(
        arguments.base, arguments.donor, embeddings=arguments.embeddings, dtype=arguments.dtype
    )


def _plan(arguments: argparse.Namespace) -> int:
    plan = _make_plan(arguments)
    forecast = _forecast(plan, arguments.out or Path())
    if arguments.json:
        print(json.dumps(plan.to_json() | {"forecast": forecast}, ensure_ascii=False))
        return 0
    _show_plan(plan)
    print(
        f"read {_bytes(plan.bytes_read)}, write {_bytes(plan.bytes_written)};"
        f" disk free {_bytes(forecast['disk_free'])}, needed {_bytes(forecast['disk_needed'])}\n"
        f"memory at most {_ANONYMOUS_MB} MB besides file pages;"
        f" about {forecast['seconds_at_1_GB_per_s']} s on a disk that moves 1 GB/s"
    )
    return 0


def _forecast(plan: Plan, out: Path) -> dict[str, int]:
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    return {
        "disk_needed": plan.bytes_written,
        "disk_free": shutil.disk_usage(there).free,
        "anonymous_memory": _ANONYMOUS_MB << 20,
        "seconds_at_1_GB_per_s": math.ceil((plan.bytes_read + plan.bytes_written) / 1e9),
    }


def _show_plan(plan: Plan) -> None:
    """The plan as a table, layers collapsed: one row per kind, action and reason."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows: dict[tuple[str, str, str], list[Step]] = {}
    for step in plan.steps:
        rows.setdefault((step.kind, step.action, step.reason), []).append(step)
    table = Table(title_justify="left", title=escape(_title(plan)))
    for heading in ("base's", "tensors", "size", "action", "why"):
        table.add_column(heading, justify="right" if heading in ("tensors", "size") else "left")
    for (kind, action, reason), steps in rows.items():
        size = _bytes(sum(step.nbytes for step in steps))
        table.add_row(kind, str(len(steps)), size, action, escape(reason))
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(table)
    unused: dict[str, int] = {}
    for kind in plan.leftover.values():
        unused[kind] = unused.get(kind, 0) + 1
    listed = ", ".join(f"{count} {kind}" for kind, count in unused.items()) or "nothing"
    console.print(f"left over of the donor: {escape(listed)}", soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _title(plan: Plan) -> str:
    return (
        f"{plan.base.name} ({plan.base_layout.arch}) <- {plan.donor.name}"
        f" ({plan.donor_layout.arch}), {plan.base_layout.layers} layers"
    )


def _merge(arguments: argparse.Namespace) -> int:
    from .merge import check_alpha
    from .writer import merge

    if arguments.alpha is None:
        raise RecipeError("--alpha is missing: the donor's weight, 0..1 (0.1 to 0.3 is usual)")
    check_alpha(arguments.alpha)
    size = _size(arguments.max_shard_size) if arguments.max_shard_size else None
    plan = _make_plan(arguments)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    with _progress("merging", plan.bytes_written) as progress:
        merge(
            plan,
            arguments.alpha,
            arguments.out,
            max_shard_size=size,
            force=arguments.force,
            progress=progress,
        )
    counts = plan.to_json()["counts"]
    print(
        f"{arguments.out}: {counts['interpolate']} tensors interpolated, {counts['copy']} copied,"
        f" {_bytes(plan.bytes_written)}"
    )
    return 0


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar with rate and time left on stderr, or nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn(what),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _verify(arguments: argparse.Namespace) -> int:
    from .verify import verify

    def say(what: str) -> None:
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)

    talk = sys.stderr.isatty() and arguments.deep
    try:
        verdict = verify(arguments.out, deep=arguments.deep, progress=say if talk else None)
    finally:
        if talk:
            print("\r\x1b[K", end="", file=sys.stderr)
    deep = "" if verdict.rows is None else f", {verdict.rows} sampled rows equal to the recipe's"
    print(
        f"{arguments.out}: ok, {verdict.tensors} tensors in {verdict.shards} shards,"
        f" {_bytes(verdict.bytes)}{deep}"
    )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    """Make a tiny Qwen2-VL and LLaVA-OneVision of one ancestor, plan, merge, generate."""
    if arguments.out and arguments.out.exists():
        if not arguments.out.is_dir():
            raise OutputError(f"{arguments.out} is a file; -o names a folder")
        if any(arguments.out.iterdir()):
            raise OutputError(f"{arguments.out} is not empty; choose another -o")
    if arguments.out:
        return _demo_in(arguments.out, arguments.alpha)
    with tempfile.TemporaryDirectory(prefix="lowmem-adamms-") as folder:
        return _demo_in(Path(folder), arguments.alpha)


def _demo_in(folder: Path, alpha: float) -> int:
    from . import demo, make_plan, merge
    from .merge import check_alpha

    check_alpha(alpha)
    base, donor = demo.make_pair(folder)
    plan = make_plan(base, donor)
    _show_plan(plan)
    out = merge(plan, alpha, folder / "merged")
    prompt = "the image shows"
    for name, model in (("base", base), (f"merged at alpha {alpha:g}", out)):
        print(f"{name} answers: {demo.generate(model, prompt)!r}")
    print("(both have random weights: what counts is that transformers loads and runs the result)")
    return 0


def _bytes(count: int) -> str:
    """A size for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"
