"""`merge`: from a plan to a checkpoint folder that transformers loads.

Everything is made inside OUT/.partial and moved to its final name when all of it is complete,
fsynced and indexed; the index moves last. The journal there lets the same command resume after any
kill. Leaves to others: what the bytes are (`merge.py`), writing them (`sink.py`), the words
(`card.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import OutputError
from ..mapping import kinship
from ..mapping.alphas import Alpha, Alphas, alpha_to_json, resolve
from ..mapping.plan import Plan
from . import model_card as card
from .disk_sink import DiskSink
from .journal import ANSWERS, NAME, PENDING, WORK, Journal, pending
from .loop import Sink
from .shard_layout import OutFile, out_files
from .sources import BY_CACHE, Fetch, carry_out, download, remote

if TYPE_CHECKING:
    from typing import Unpack

    from ..hub.upload import Upload
    from ..kernels.select import Kernel
    from ..quantizing.quantization import Method, Quantized

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Options:
    """How a merge is written.

    These decide the output's bytes, besides plan and alpha. max_shard_size: bytes; None keeps the
    base's shards. quantize: "nf4" or "int8", as bitsandbytes does; asks the base's class in
    transformers what to quantize, for which trust_remote_code may be needed.

    These do not. force: merge also what looks unrelated. fetch: how what lies on the Hub gets here.
    push: is given every shard as it is durable; the caller finishes it. progress: called with bytes
    of output done since the last call, before they are quantized. note: called with each sentence
    about the inputs that is no reason to stop.

    These go beside the weights. search: how alpha was found, for adamms.json. beside: further
    files, such as a report.
    """

    max_shard_size: int | None = None
    quantize: Method | None = None
    trust_remote_code: bool = False
    force: bool = False
    fetch: Fetch = BY_CACHE
    push: Upload | None = None
    progress: Callable[[int], None] | None = None
    note: Callable[[str], object] | None = None
    search: Mapping[str, Any] | None = None
    beside: Mapping[str, bytes] | None = None


_PLAIN = Options()


class Keywords(TypedDict, total=False):
    """The fields of `Options` as keywords of `merge`, so that type checkers and editors know them.

    A test holds the two together.
    """

    max_shard_size: int | None
    quantize: Method | None
    trust_remote_code: bool
    force: bool
    fetch: Fetch
    push: Upload | None
    progress: Callable[[int], None] | None
    note: Callable[[str], object] | None
    search: Mapping[str, Any] | None
    beside: Mapping[str, bytes] | None


@dataclass(frozen=True, slots=True)
class Output:
    """What a merge of the plan makes: a folder, the shards in it, how they are quantized."""

    plan: Plan
    folder: Path
    files: tuple[OutFile, ...]
    how: Quantized | None

    @property
    def work(self) -> Path:
        """Where all is made until it is complete."""
        return self.folder / WORK

    def check(self, *, room: int = 0, push: bool = False) -> None:
        """OutputError if the folder cannot take it.

        room: bytes that must be free beside it. push: the folder may be a complete merge whose
        upload is not finished.
        """
        if not (push and pending(self.folder)):
            _check_place(self.plan, self.folder)
            _check_space(self.files, self.folder, room)

    def fingerprint(self, alpha: Alpha) -> str:
        """A digest of everything that decides the output's bytes."""
        from ..version import __version__

        layout = [[file.name, file.size, sorted(file.offsets.items())] for file in self.files]
        weight = alpha_to_json(alpha) if isinstance(alpha, Alphas) else repr(alpha)
        document = [__version__, weight, layout, self.plan.identity()]
        if self.how:
            document.append(self.how.identity())
        return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def merge(
    plan: Plan,
    alpha: Alpha,
    out: str | Path,
    options: Options | None = None,
    **more: Unpack[Keywords],
) -> Path:
    """Write the merged checkpoint of `plan` at `alpha` to the folder `out`, and return it.

    alpha: the donor's weight in 0..1, or an `Alphas` with one by layer or role. options: or each of
    its fields as a keyword, as in `merge(plan, 0.3, "merged", quantize="nf4")`.

    Resumes a killed run of the same merge, and leaves alone a complete one whose upload is not.
    Raises RecipeError, OutputError, FormatError, MappingError or PushError before anything is
    written; HubError, also later, where the Hub fails for good. TypeError for another keyword.
    """
    known = Keywords.__annotations__
    if unknown := sorted(more.keys() - known.keys()):
        raise TypeError(f"merge() has no option {unknown[0]!r}; it has {', '.join(known)}")
    options = replace(options or _PLAIN, **more)
    alpha = resolve(alpha, plan)
    return write(prepare(plan, Path(out), options), alpha, options)


def prepare(plan: Plan, out: Path, options: Options = _PLAIN) -> Output:
    """What will be written, before alpha is known; errors as of `quantized.prepare`."""
    how, code = None, options.trust_remote_code
    if options.quantize is not None:
        from ..quantizing import quantization as quantized

        how = quantized.prepare(plan, options.quantize, trust_remote_code=code)
    files = out_files(plan, options.max_shard_size, how.entries if how else None)
    return Output(plan, out, files, how)


def write(output: Output, alpha: Alpha, options: Options = _PLAIN) -> Path:
    """`merge` of what was prepared with these options; checked anew, as time may have passed."""
    push = options.push is not None
    output.check(room=options.fetch.disk_budget or 0, push=push)
    alpha = resolve(alpha, output.plan)
    fingerprint = output.fingerprint(alpha)
    if not _only_upload_left(output.folder, fingerprint):
        _write(output, alpha, options, fingerprint)
    return output.folder


def _write(output: Output, alpha: Alpha, options: Options, fingerprint: str) -> None:
    """Everything, in the order in which it can go wrong at the least cost."""
    from ..kernels.select import select_kernel

    plan, fetch = output.plan, options.fetch
    elsewhere = remote(plan)
    # One after the other: beside the kernel's imports, samples wait for the interpreter, not a disk
    kin = kinship.measure(plan) if options.force else kinship.check(plan)
    kernel, why = select_kernel(plan.dtypes)
    if options.note:
        for line in kin.notes:
            options.note(line)
    plan.base.fetch_sidecars()
    if elsewhere and fetch.cached:
        download(plan, bars=fetch.bars)
    if options.push:
        options.push.begin()
    with Journal(output.folder, fingerprint) as journal:
        _check_alone(output.folder, journal)
        unchecked = _write_weights(output, alpha, options, journal, kernel)
        for name, content in (options.beside or {}).items():
            _write_file(output.work / name, content)
        papers = card.recipe(plan, alpha, kin, why, options.search or {})
        if output.how:
            papers["quantized"] = output.how.paper()
        if elsewhere:
            papers["not_checked"] = unchecked
        _write_papers(output, alpha, journal, papers)
        _publish(output.folder)


def _write_weights(
    output: Output, alpha: Alpha, options: Options, journal: Journal, kernel: Kernel
) -> list[str]:
    """All that the journal does not know as done; returns the files not held against a digest."""
    plan, push, progress = output.plan, options.push, options.progress
    evict = plan.bytes_read + plan.bytes_written > _physical_memory() // 2
    finished = (lambda name: push.add_shard(output.work / name)) if push else None
    with _sink(output, journal, evict=evict, finished=finished) as sink:
        _hand_over(push, output.work, journal)
        if progress:
            progress(sum(step.nbytes for step in plan.steps if not sink.wants(step)))
        means = {"kernel": kernel, "evict": evict, "progress": progress}
        return carry_out(plan, alpha, sink, output.work, options.fetch, **means)


@contextmanager
def _sink(output: Output, journal: Journal, **options: Any) -> Iterator[Sink]:
    """The disk sink with its options, behind the stage that quantizes if there is one."""
    with DiskSink(output.folder, output.files, journal, **options) as disk:
        if output.how is None:
            yield disk
            return
        from ..quantizing.quantizing_sink import QuantizingSink

        with QuantizingSink(disk, output.how, output.work, evict=options["evict"]) as sink:
            yield sink


def _only_upload_left(out: Path, fingerprint: str) -> bool:
    """Whether `out` is this merge, complete; OutputError if it is another one, to be uploaded."""
    found = pending(out)
    if found not in (None, fingerprint):
        raise OutputError(
            f"{out} holds a merge of other inputs or options that waits for its upload; finish that"
            " with `push`, or choose another -o"
        )
    return found is not None


def _hand_over(push: Upload | None, work: Path, journal: Journal) -> None:
    """Note that the output is to be uploaded, or no longer, and give what is complete already."""
    note = work / PENDING
    if push is None:
        note.unlink(missing_ok=True)
        return
    line = json.dumps({"merge": journal.fingerprint, "repo": push.repo}, ensure_ascii=True)
    _write_file(note, line.encode() + b"\n")
    for name in list(journal.done):
        unpublished = work / name
        push.add_shard(unpublished if unpublished.exists() else work.parent / name)


def _check_place(plan: Plan, out: Path) -> None:
    """OUT must be new, empty, or our own unfinished merge, and not an input or inside one."""
    there = _nearest(out)
    if not there.is_dir():
        raise OutputError(f"{out}: {there} is a file; -o names a folder")
    for side in (plan.base, plan.donor):
        if side.folder and side.folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise OutputError(f"{out} is the input {side.path} or inside it; choose another -o")
    if there != out or (out / WORK / NAME).is_file():
        return
    if pending(out):
        raise OutputError(
            f"{out} is complete and waits for its upload; finish that with `push` or the command"
            " that began it, or choose another -o"
        )
    ours = {out / WORK, out / WORK / ANSWERS}  # what a killed search leaves
    if not set(out.rglob("*")) <= ours:
        raise OutputError(f"{out} is not empty; choose another -o or empty it")


def _check_alone(out: Path, journal: Journal) -> None:
    """OutputError if another run finished in `out` since it was looked at: its result stays."""
    if journal.resumed or {path.name for path in out.iterdir()} == {WORK}:
        return
    journal.path.unlink()
    with suppress(OSError):  # answers of a search may lie there
        journal.path.parent.rmdir()
    raise OutputError(f"{out}: another run has just put its result there; choose another -o")


def _nearest(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above it that does."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _check_space(files: tuple[OutFile, ...], out: Path, beside: int) -> None:
    """The whole output must fit before anything starts, and `beside` it what is fetched."""
    there = _nearest(out)
    partial = [out / WORK / file.name for file in files]
    already = sum(path.stat().st_blocks * 512 for path in partial if path.exists())
    placed = sum(file.size for file in files if (out / file.name).exists())
    need = sum(file.size for file in files) - already - placed + beside + (64 << 20)
    free = shutil.disk_usage(there).free
    if need > free:
        raise OutputError(
            f"{there}: {free / 1e9:.1f} GB free, the output needs {need / 1e9:.1f} GB;"
            " free some or choose another -o"
        )


def _write_papers(output: Output, alpha: Alpha, journal: Journal, papers: dict[str, Any]) -> None:
    """Index, sidecars, model card and adamms.json into the work folder, each durable."""
    plan, files, work = output.plan, output.files, output.work
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in sorted(file.offsets)}
        total = sum(journal.done[file.name]["size"] - len(file.header) for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(work / INDEX, index)
    for relative in plan.base.sidecars():
        _copy_file(plan.base.path / relative, work / relative)
    config, dtype = plan.base.config, plan.options["dtype"]
    if dtype and config:
        config = card.config_in_dtype(config, dtype)
    if output.how:
        config = output.how.config(config)
    if config != plan.base.config:
        _write_json(work / "config.json", config)
    _write_file(work / "README.md", card.model_card(plan, alpha, papers).encode(errors="replace"))
    made = [journal.done[file.name] for file in files]
    outputs = [{key: line[key] for key in ("file", "size", "blake3")} for line in made]
    _write_json(work / "adamms.json", papers | {"outputs": outputs})


def _write_json(path: Path, document: object) -> None:
    # A path that is not UTF-8 comes as lone surrogates, which JSON can hold and UTF-8 cannot
    text = json.dumps(document, indent=2, ensure_ascii=False)
    _write_file(path, text.encode(errors="backslashreplace") + b"\n")


def _write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _copy_file(source: Path, target: Path) -> None:
    """In pieces: a repository may hold a film beside its weights."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as given, target.open("wb") as file:
        shutil.copyfileobj(given, file)
        file.flush()
        os.fsync(file.fileno())


def _publish(out: Path) -> None:
    """Move everything to its final name, the index last, then remove the work folder."""
    work = out / WORK
    everything = sorted(work.rglob("*"))
    made = [path for path in everything if path.is_file() and path.name != NAME]
    if (work / ANSWERS).is_file():  # a search does not fsync it as it grows
        _sync(work / ANSWERS)
    for path in sorted(made, key=lambda path: path.name == INDEX):
        target = out / path.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    for folder in {out.absolute().parent, *(out / path.relative_to(work).parent for path in made)}:
        _sync(folder)
    for folder in [path for path in reversed(everything) if path.is_dir()]:
        folder.rmdir()
    (work / NAME).unlink()
    work.rmdir()
    _sync(out)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
