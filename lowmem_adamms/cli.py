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
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, speech
from .arch import BUFFER
from .errors import MergeError, OutputError, PlacementError, PromptError, RecipeError
from .journal import ANSWERS, NAME, WORK
from .options import COMMANDS, NEED_A_MODEL, at_home, parser
from .placement import Placement, Quantize, measure, parse_size, place, stored_bytes

if TYPE_CHECKING:
    from .alphas import Alpha
    from .demo import Pair
    from .inputs import Fetch
    from .journal import AnswerJournal
    from .plan import Plan
    from .prompts import Prompt
    from .push import Push
    from .quantized import Quantized
    from .recipe import Recipe
    from .refine import Refined
    from .search import Result
    from .session import Session

_NOT_THERE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
_MOST_ALPHAS = 1001
_ANONYMOUS_MB = 128  # the bound that bench/merge.py checks, whole process
_QUANTIZING_MB = 512  # of which torch, transformers and bitsandbytes take some 370


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
        arguments = at_home(parser().parse_args(words))
        code = _COMMANDS[arguments.command](arguments)
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


def _make_plan(arguments: argparse.Namespace) -> Plan:
    from .checkpoint import open_checkpoint
    from .declare import read_all
    from .plan import make_plan

    declared = read_all(arguments.arch or ())
    fetch = _fetch(arguments)
    bins = arguments.command != "plan" and fetch.cached
    base, donor = (
        open_checkpoint(ref, cache=not fetch.no_cache, bins=bins)
        for ref in (arguments.base, arguments.donor)
    )
    return make_plan(
        base, donor, embeddings=arguments.embeddings, dtype=arguments.dtype, declared=declared
    )


def _fetch(arguments: argparse.Namespace) -> Fetch:
    """How what lies on the Hub gets here."""
    from .inputs import Fetch

    budget = getattr(arguments, "disk_budget", None)
    return Fetch(
        no_cache=getattr(arguments, "no_cache", False),
        disk_budget=parse_size(budget, "--disk-budget") if budget else None,
        bars=sys.stderr.isatty(),
    )


def _plan(arguments: argparse.Namespace) -> int:
    from . import show

    plan = _make_plan(arguments)
    forecast = _forecast(plan, arguments.out or Path(), _quantize(arguments))
    try:
        lines = _place(plan, arguments).lines
    except PlacementError as error:
        lines = (str(error),)
    if arguments.json:
        document = plan.to_json() | {"forecast": forecast, "search": list(lines)}
        print(speech.as_json(document))
        return 0
    console = _console()
    _show_plan(plan, console)
    about = f" (about; {how} of bitsandbytes)" if (how := _quantize(arguments)) else ""
    print(
        f"read {show.size(plan.bytes_read)}, write {show.size(forecast['disk_needed'])}{about};"
        f" disk free {show.size(forecast['disk_free'])},"
        f" needed {show.size(forecast['disk_needed'])}\n"
        f"memory at most {forecast['anonymous_memory'] >> 20} MB besides file pages;"
        f" about {forecast['seconds_at_1_GB_per_s']} s on a disk that moves 1 GB/s"
    )
    if forecast["to_fetch"]:
        print(
            f"from the Hub: {show.size(forecast['to_fetch'])} in shards that are not in the cache;"
            " --no-cache streams what is needed of them"
        )
    print("a search for alpha would run so:", *lines, sep="\n  ")
    return 0


def _quantize(arguments: argparse.Namespace) -> Quantize | None:
    """What the output is quantized to, if anything."""
    return None if arguments.quantize in (None, "none") else arguments.quantize


def _forecast(plan: Plan, out: Path, quantize: Quantize | None) -> dict[str, int]:
    from .inputs import remote

    written = stored_bytes(plan, quantize)
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    return {
        "disk_needed": written,
        "disk_free": shutil.disk_usage(there).free,
        "anonymous_memory": (_QUANTIZING_MB if quantize else _ANONYMOUS_MB) << 20,
        "to_fetch": sum(file.size for file in remote(plan).values()),
        "seconds_at_1_GB_per_s": math.ceil((plan.bytes_read + written) / 1e9),
    }


def _place(plan: Plan, arguments: argparse.Namespace) -> Placement:
    ram = parse_size(arguments.ram, "--ram") if arguments.ram else None
    vram = parse_size(arguments.vram, "--vram", zero=True) if arguments.vram else None
    dtype = arguments.live_dtype or arguments.dtype
    return place(
        plan,
        measure(ram=ram, vram=vram),
        device=arguments.device,
        quantize=arguments.live_quantize or arguments.quantize,
        dtype=dtype.name if dtype else None,
        batch=arguments.batch_size,
    )


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)


def _show_plan(plan: Plan, console: Any) -> None:
    from rich.markup import escape

    from . import show

    console.print(show.plan_table(plan))
    console.print(f"left over of the donor: {escape(show.leftover(plan))}", soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _compare(arguments: argparse.Namespace) -> int:
    from . import compare, compare_table, pairing
    from .declare import read_all
    from .plan import make_plan

    if arguments.html:
        _check_page(arguments.html, "--html")
    make = partial(make_plan, declared=read_all(arguments.arch or ()))
    joined = pairing.join(arguments.a, arguments.b, make=make)
    with _progress("comparing", compare.bytes_read(joined) if arguments.full else None) as progress:
        sample = None if arguments.full else arguments.sample
        found = compare.compare(joined, sample=sample, progress=progress)
    if arguments.html:
        from . import compare_page, report_page

        report_page.write(arguments.html, compare_page.html(found))
    if arguments.json:
        print(speech.as_json(found.to_json()))
    else:
        console = _console()
        ascii_only = console.options.ascii_only
        for item in compare_table.drawn(found, width=console.width, ascii_only=ascii_only):
            console.print(item, soft_wrap=isinstance(item, str))
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from .writer import check_output, how_quantized

    recipe = _read_config(arguments)
    _check_weights(arguments)
    fetch = _fetch(arguments)
    if arguments.prompts and not fetch.cached:
        raise RecipeError(
            "a search loads the model from files: leave out --no-cache and --disk-budget, or search"
            " first and merge at the --alpha it finds"
        )
    upload = arguments.push_to_hub is not None
    if not upload and (arguments.private or arguments.replace_repo):
        raise RecipeError("--private and --replace-repo go with --push-to-hub ORG/NAME")
    size = (
        parse_size(arguments.max_shard_size, "--max-shard-size")
        if arguments.max_shard_size
        else None
    )
    prompts = _load_prompts(arguments) if arguments.prompts else ()
    plan = _make_plan(arguments)
    alpha = _given_alpha(arguments, plan, recipe)
    _show_notes(plan.notes)
    code = arguments.trust_remote_code
    how = how_quantized(plan, _quantize(arguments), trust_remote_code=code)
    options: dict[str, Any] = {"max_shard_size": size, "fetch": fetch}
    check_output(plan, arguments.out, how=how, push=upload, **options)
    with _pushing(arguments, plan) if upload else nullcontext() as push:
        found = None
        if prompts:
            found = _run_search(arguments, plan, prompts, _answers_in(arguments.out))
            _show_search(found.result, found.refined)
            alpha = found.alpha
        _write(arguments, plan, alpha, found, how, {**options, "push": push})
        if push:
            _finish_push(arguments, push)
    return 0


def _write(
    arguments: argparse.Namespace,
    plan: Plan,
    alpha: Any,
    found: _Found | None,
    how: Quantized | None,
    options: dict[str, Any],
) -> None:
    """Write the merged checkpoint; options are `writer.merge`'s own."""
    from . import show
    from .writer import merge

    code = arguments.trust_remote_code
    with _progress("merging", plan.bytes_written) as progress:
        merge(
            plan,
            alpha,
            arguments.out,
            force=arguments.force,
            search=found.to_json() if found else None,
            beside={"report.html": found.page.encode()} if found else None,
            progress=progress,
            quantize=_quantize(arguments),
            trust_remote_code=code,
            note=lambda line: _show_notes([line]),
            **options,
        )
    counts = plan.to_json()["counts"]
    written = sum(path.stat().st_size for path in arguments.out.glob("*.safetensors"))
    quantized = f", {len(how.names)} of them quantized to {how.method}" if how else ""
    print(
        f"{arguments.out}: {counts['interpolate']} tensors interpolated, {counts['copy']} copied"
        f"{quantized}, {show.size(written if how else plan.bytes_written)}"
    )


@contextmanager
def _pushing(arguments: argparse.Namespace, plan: Plan | None = None) -> Iterator[Push]:
    """The upload that was asked for, once the Hub said that it can be; nothing is sent yet.

    plan: what is to be merged; None if `arguments.out` is complete.
    """
    from . import card
    from .journal import pending
    from .push import Push, quiet
    from .push_check import check

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


def _finish_push(arguments: argparse.Namespace, push: Push) -> None:
    """Send what is left of the complete output, and commit."""
    from .push_check import pushed_files
    from .verify import verify

    verify(arguments.out)
    total = sum(path.stat().st_size for path in pushed_files(arguments.out).values())
    with _progress("uploading", total) as progress:
        files = push.finish(progress)
    _show_notes(push.notes)
    print(f"{push.url}: {files} files")


def _push(arguments: argparse.Namespace) -> int:
    from .verify import verify

    verify(arguments.out)
    with _pushing(arguments) as push:
        _finish_push(arguments, push)
    return 0


def _read_config(arguments: argparse.Namespace) -> Recipe | None:
    """What --config says; models and dtype are then taken from it."""
    if arguments.config is None:
        return None
    from .recipe import read

    ways = ("base", "alpha", "alpha_layers", "prompts")
    if given := [way for way in ways if getattr(arguments, way) is not None]:
        names = ["BASE" if way == "base" else f"--{way.replace('_', '-')}" for way in given]
        raise RecipeError(f"--config names models and weights; leave out {', '.join(names)}")
    recipe = read(arguments.config)
    arguments.base, arguments.donor = recipe.base, recipe.donor
    arguments.dtype = arguments.dtype or recipe.dtype
    return recipe


def _check_weights(arguments: argparse.Namespace) -> None:
    """Two models and one way to their weights, so far as can be seen without opening anything."""
    from .alphas import check_alpha

    if arguments.donor is None:
        raise RecipeError("merge needs BASE and DONOR, or --config with mergekit's YAML")
    given = [way for way in ("alpha", "alpha_layers") if getattr(arguments, way) is not None]
    if arguments.config is None and bool(given) == (arguments.prompts is not None):
        raise RecipeError(
            "give either --alpha, the donor's weight (0.1 to 0.3 is usual), or --prompts, questions"
            " to search it with"
        )
    if arguments.alpha is not None:
        check_alpha(arguments.alpha)
    if arguments.refine_layers and arguments.prompts is None:
        raise RecipeError("--refine-layers is a second stage of the search; give --prompts")


def _given_alpha(arguments: argparse.Namespace, plan: Plan, recipe: Recipe | None) -> Any:
    """What the command line or --config says about weights; None: they are to be searched."""
    if recipe is not None:
        alpha, notes = recipe.alphas(plan)
        _show_notes(notes)
        return alpha
    if arguments.alpha_layers is None:
        return arguments.alpha
    from .alphas import parse_layers

    return parse_layers(arguments.alpha_layers, plan.base_layout.layers, arguments.alpha)


def _answers_in(out: Path) -> Path:
    """Where the answers of a search for `out` are kept: at their final place once they got there.

    OutputError if a merge at a given alpha was begun in `out`: it would be met only after hours.
    """
    final, ours = out / ANSWERS, out / WORK / ANSWERS
    if (out / WORK / NAME).is_file() and not (final.is_file() or ours.is_file()):
        raise OutputError(
            f"{out} holds an unfinished merge at a given --alpha; delete {out / WORK} or choose"
            " another -o"
        )
    return final if final.is_file() else ours


@dataclass(frozen=True, slots=True)
class _Found:
    """A finished search, its second stage if there was one, and its report."""

    result: Result
    refined: Refined | None
    page: str

    @property
    def alpha(self) -> Alpha:
        """What to merge at."""
        return self.refined.alpha if self.refined else self.result.alpha

    def to_json(self) -> dict[str, Any]:
        """For adamms.json and `search --json`."""
        from .alphas import to_json

        layers = {"layers": self.refined.to_json()} if self.refined else {}
        return self.result.to_json() | to_json(self.alpha) | layers


def _load_prompts(arguments: argparse.Namespace) -> tuple[Prompt, ...]:
    from .prompts import Columns, load_prompts

    columns = None
    if arguments.text_column or arguments.image_column:
        images = arguments.image_column
        columns = Columns(arguments.text_column, tuple(images) if images else None)
    return load_prompts(
        arguments.prompts,
        question=arguments.question,
        sample=arguments.samples,
        seed=arguments.seed,
        split=arguments.split,
        columns=columns,
    )


def _alphas(text: str | None) -> Sequence[float]:
    """`0,0.1,0.2` or `start:stop:step`, the stop included."""
    from .search import DEFAULT_ALPHAS

    if text is None:
        return DEFAULT_ALPHAS
    try:
        if ":" not in text:
            return sorted({float(word) for word in text.split(",")})
        start, stop, step = map(float, text.split(":"))
        count = int((stop - start) / step + 1.000001)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise RecipeError(f"--alphas {text!r}: expected 0,0.1,0.2 or 0:0.6:0.1") from None
    if not 0 < count <= _MOST_ALPHAS:
        raise RecipeError(f"--alphas {text!r}: makes {count} alphas; expected 3 to {_MOST_ALPHAS}")
    return [round(start + i * step, 6) for i in range(count)]


def _run_search(
    arguments: argparse.Namespace, plan: Plan, prompts: Sequence[Prompt], journal: Path | None
) -> _Found:
    """Search on the live model; the journal, if there is one, is resumed from."""
    from . import refine, show
    from .inputs import download
    from .search import search

    alphas = _alphas(arguments.alphas)
    count = arguments.refine_layers
    groups = refine.split(plan.base_layout.layers, count) if count else []
    passes = refine.PASSES * len(groups)
    _check_images(plan, prompts)
    download(plan, bars=sys.stderr.isatty())
    placement = _place(plan, arguments)
    for line in placement.lines:
        print(line, file=sys.stderr)
    if groups:
        more = f"{passes} more passes, {passes * len(prompts)} answers"
        print(f"then an alpha for each of {count} groups of layers: {more}", file=sys.stderr)
    progress = show.SearchProgress(len(alphas) + passes, len(prompts))
    with _session(arguments, plan, prompts, placement, journal, progress) as session:
        with _live(progress):
            result = search(
                session,
                prompts,
                alphas,
                measure=arguments.measure,
                refine=arguments.refine,
                noise=None if arguments.no_noise else session.again,
                seed=arguments.seed,
                progress=progress.candidates,
            )
            refined = None
            if groups:
                seed = arguments.seed
                refined = refine.refine(session, prompts, result, groups, seed=seed)
        _show_notes(session.notes)
        page = _report(arguments, plan, placement, prompts, result, refined, session)
    return _Found(result, refined, page)


def _check_images(plan: Plan, prompts: Sequence[Prompt]) -> None:
    """A base that holds nothing but a decoder cannot be shown images; said before it is loaded."""
    if set(plan.base_layout.kinds.values()) <= {BUFFER}:
        for prompt in prompts:
            if prompt.images:
                raise PromptError(f"{prompt.id}: has an image, but {plan.base.path} is text-only")


@contextmanager
def _journal(path: Path, key: str) -> Iterator[AnswerJournal]:
    """The journal at `path`; if it ends without an answer, no trace of it is left."""
    from .journal import AnswerJournal

    made = [folder for folder in path.absolute().parents if not folder.exists()]
    with AnswerJournal(path, key) as journal:
        try:
            yield journal
        finally:
            if not journal.answers:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # another run may have put something there
                    for folder in made:
                        folder.rmdir()


@contextmanager
def _session(
    arguments: argparse.Namespace,
    plan: Plan,
    prompts: Sequence[Prompt],
    placement: Placement,
    path: Path | None,
    progress: Any,
) -> Iterator[Session]:
    from .decoding import Settings
    from .encode import load_processor
    from .live import LiveModel
    from .session import Session, fingerprint

    settings = Settings(
        max_new_tokens=arguments.max_new_tokens,
        batch_size=placement.batch,
        drafts=not arguments.no_drafts,
        vision_cache=not arguments.no_vision_cache,
    )

    def load() -> LiveModel:
        # A base that cannot be talked to is found out before its weights are read
        trust = arguments.trust_remote_code
        processor = load_processor(plan.base.path, trust_remote_code=trust)
        return LiveModel(
            plan,
            dtype=placement.dtype if arguments.live_dtype else None,
            placement=placement,
            trust_remote_code=trust,
            force=arguments.force,
            processor=processor,
        )

    key = fingerprint(plan, prompts, settings, placement)
    hooks = {"asked": progress.asked, "answered": progress.answered}
    with (
        _journal(path, key) if path else nullcontext() as journal,
        Session(load, settings, journal, **hooks) as session,
    ):
        yield session


@contextmanager
def _live(renderable: Any) -> Iterator[None]:
    """A renderable kept up to date on stderr, or nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live

    with Live(renderable, console=Console(stderr=True), refresh_per_second=2, transient=True):
        yield


def _report(
    arguments: argparse.Namespace,
    plan: Plan,
    placement: Placement,
    prompts: Sequence[Prompt],
    result: Result,
    refined: Refined | None,
    session: Session,
) -> str:
    from . import report

    recipe = {
        "base": f"{plan.base.ref} ({plan.base_layout.arch})",
        "donor": f"{plan.donor.ref} ({plan.donor_layout.arch})",
        "prompts": f"{arguments.prompts}, {len(prompts)} of them, seed {arguments.seed}",
        "answers": f"greedy, {arguments.max_new_tokens} tokens at most",
        "batch": str(placement.batch),
        "embeddings": str(plan.options["embeddings"]),
        "version": __version__,
    }
    where = {str(i): line for i, line in enumerate(placement.lines, 1)}
    layers = {"Layers": refined.lines()} if refined else {}
    return report.html(
        result,
        prompts,
        timings=session.timings,
        facts=layers | {"Recipe": recipe, "Placement": where},
        title=f"{plan.base.name} \N{LEFTWARDS ARROW} {plan.donor.name}",
    )


def _show_search(result: Result, refined: Refined | None = None) -> None:
    from . import show

    console = _console()
    console.print(show.search_table(result.candidates, result.alpha))
    print(show.verdict(result))
    if refined:
        for layers, line in refined.lines().items():
            print(f"{layers}: {line}")
    _show_notes([*result.notes, *(refined.notes if refined else ())])


def _show_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _search(arguments: argparse.Namespace) -> int:
    if arguments.report:
        _check_page(arguments.report, "--report")
    if arguments.answers:
        return _search_recorded(arguments)
    if not (arguments.donor and arguments.prompts):
        raise RecipeError("search needs BASE, DONOR and --prompts, or --answers")
    prompts = _load_prompts(arguments)
    plan = _make_plan(arguments)
    _show_notes(plan.notes)
    found = _run_search(arguments, plan, prompts, arguments.journal)
    if arguments.report:
        from . import report

        report.write(arguments.report, found.page)
    return _conclude(arguments, found, plan.base.ref, plan.donor.ref)


def _check_page(path: Path, option: str) -> None:
    """OutputError now, not after the work, where a page clearly cannot be written."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError(f"{option} {path}: expected a file in a folder that exists")


def _search_recorded(arguments: argparse.Namespace) -> int:
    """Score answers that somebody recorded at each alpha."""
    from . import recorded, report
    from .prompts import Prompt
    from .search import choose

    if asks := [name for name in NEED_A_MODEL if getattr(arguments, name)]:
        names = [
            name.upper() if name in ("base", "donor") else f"--{name.replace('_', '-')}"
            for name in asks
        ]
        raise RecipeError(
            f"--answers scores what is recorded and asks no model; leave out {', '.join(names)}"
        )
    answers, ids = recorded.read([recorded.parse_spec(text) for text in arguments.answers])
    result = choose(answers, measure=arguments.measure, seed=arguments.seed)
    if arguments.report:
        prompts = [Prompt(name, id=name) for name in ids]
        report.write(arguments.report, report.html(result, prompts, title="Recorded answers"))
    return _conclude(arguments, _Found(result, None, ""), None, None)


def _conclude(
    arguments: argparse.Namespace, found: _Found, base: str | None, donor: str | None
) -> int:
    if arguments.json:
        document = found.to_json() | {"base": base, "donor": donor, "version": __version__}
        print(speech.as_json(document))
    else:
        _show_search(found.result, found.refined)
    return 0


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[int], None] | None]:
    """A bar with rate and time left on stderr, or nothing where that is no terminal or no total."""
    if total is None or not sys.stderr.isatty():
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
    from .show import size
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
        f" {size(verdict.bytes)}{deep}"
    )
    _show_notes(verdict.notes)
    return 0


def _archs(arguments: argparse.Namespace) -> int:
    """List the declarations, the user's before ours, or print one so that --arch takes it."""
    from . import archs, declare, show

    known = (*declare.read_all(arguments.arch or ()), *archs.ARCHS)
    one = declare.named(arguments.name, known) if arguments.name else None
    if arguments.json:
        document = declare.plain(one) if one else [declare.plain(arch) for arch in known]
        print(speech.as_json(document))
    else:
        print(declare.to_toml(one) if one else show.archs(known), end="" if one else "\n")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    """The embedded pair: write it out, or run the whole method on it and judge the result."""
    from . import demo
    from .alphas import check_alpha

    if arguments.export:
        if arguments.out or arguments.alpha is not None:
            raise RecipeError("demo --export only writes the pair and its questions; give no more")
        pair = demo.export(arguments.export)
        for path in (pair.base, pair.donor, pair.prompts, pair.exam):
            print(path)
        return 0
    if arguments.alpha is not None:
        check_alpha(arguments.alpha)
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="lowmem-adamms-"))
    pair = demo.export(folder)
    return _demo_in(folder, pair, arguments.alpha)


def _demo_in(folder: Path, pair: Pair, alpha: float | None) -> int:
    from . import demo, make_plan, show

    console = _console()
    _show_plan(make_plan(pair.base, pair.donor), console)
    out = folder / "merged"
    how = ["--prompts", str(pair.prompts)] if alpha is None else ["--alpha", str(alpha)]
    words = ["merge", str(pair.base), str(pair.donor), "-o", str(out), *how]
    _merge(parser().parse_args([*words, "--max-new-tokens", str(demo.LONGEST)]))
    exam = demo.load_exam(pair.exam)
    scores = _scores(out)
    curve = demo.judge(pair.base, pair.donor, list(scores) or [0.0], exam)
    (donor,) = demo.judge(pair.donor, pair.donor, [0.0], exam)
    (merged,) = demo.judge(out, out, [0.0], exam)
    console.print(show.marks_table({"base": curve[0], "donor": donor, "merged": merged}))
    if scores:
        rows = zip(scores.items(), curve, strict=True)
        console.print(show.curve({a: (d, marks["mean"]) for (a, d), marks in rows}))
    print(f"right answers in per cent, {len(exam)} questions that the search has not seen")
    print(f"merged model: {out}")
    if scores:
        print(f"report: {out / 'report.html'}")
    return 0


def _scores(out: Path) -> dict[float, float | None]:
    """The D of each alpha of the search that a merged checkpoint records, if it had one."""
    found = json.loads((out / "adamms.json").read_text(encoding="utf-8"))
    return {row["alpha"]: row["score"] for row in found.get("candidates", ())}


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "compare": _compare,
    "merge": _merge,
    "search": _search,
    "verify": _verify,
    "archs": _archs,
    "push": _push,
    "demo": _demo,
}
