"""From a plan and an alpha to a checkpoint folder that transformers loads.

Everything is made inside OUT/.partial and moved to its final name when all of it is complete,
fsynced and indexed. The journal there lets the same command resume after any kill.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoints.mapped_files import MappedFiles
from ..checkpoints.quantized import without_settings
from ..errors import DigestError, FormatError, OutputError
from ..mapping import kinship
from ..mapping.alphas import Alpha, alpha_to_json, resolve
from ..mapping.plan import Plan, Step
from . import model_card, output_folder
from .disk_sink import DiskSink
from .journal import JOURNAL, PENDING, WORK, Journal, find_complete, is_pending
from .loop import Sink, run, spans_in_order
from .output_folder import INDEX, write_file, write_json
from .range_source import REMOTE_WINDOW, RangeSource
from .shard_layout import Entry, ShardLayout, lay_out_shards
from .sources import check_streamable, download, remote_shards
from .verify import verify

if TYPE_CHECKING:
    from ..hub.upload import Upload
    from ..kernels.select import Kernel

MANY_PARTS = 8192
"""A plan of more parts, as of many experts, takes the memory that large windows would."""


class Quantizer(Protocol):
    """How an output is quantized. The wing `quantizing` makes one for a plan."""

    def entries(self, step: Step) -> Sequence[Entry]:
        """The tensors of the output that a step becomes; they stay together in one shard."""

    def open_sink(self, disk: DiskSink, work: Path) -> AbstractContextManager[Sink]:
        """A sink that quantizes what it is given and hands it on. work: a folder for scratch."""

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the quantized model, from that of the merged one."""

    def describe(self) -> dict[str, Any]:
        """What adamms.json says of it: at least method, tensors (how many), and bitsandbytes."""

    def identity(self) -> list[Any]:
        """Plain data that decides the output's bytes."""

    def note_machine(self, plan: Plan) -> str | None:
        """Why the output cannot be run on this machine, if it cannot."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a merge of the plan makes: a folder, the shards in it, how they are quantized."""

    plan: Plan
    folder: Path
    shards: tuple[ShardLayout, ...]
    quantizer: Quantizer | None = None

    @property
    def work(self) -> Path:
        """Folder that holds unfinished output."""
        return self.folder / WORK

    def check(self, *, push: bool = False) -> None:
        """Raise OutputError if the folder is not usable: not empty, an input, too little space.

        A complete merge is usable if `write` is asked for the same one.
        push: also if its upload is not finished.
        """
        if find_complete(self.folder) and (push or not is_pending(self.folder)):
            return
        output_folder.check_place(self.plan, self.folder)
        output_folder.check_space(self.plan, self.shards, self.folder)

    def fingerprint(self, alpha: Alpha) -> str:
        """A digest of everything that decides the output's bytes."""
        from ..version import __version__

        layout = [[shard.name, shard.size, sorted(shard.offsets.items())] for shard in self.shards]
        weight = repr(alpha) if isinstance(alpha, float) else alpha_to_json(alpha)
        document = [__version__, weight, layout, self.plan.identity()]
        if self.quantizer:
            document.append(self.quantizer.identity())
        return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def prepare(
    plan: Plan,
    out: Path,
    *,
    max_shard_size: int | None = None,
    quantizer: Quantizer | None = None,
) -> Output:
    """What a merge of the plan writes to `out`, before alpha is known. Touches no file.

    max_shard_size: bytes of tensors in a file; None keeps the base's files.
    """
    entries_of = quantizer.entries if quantizer else None
    return Output(plan, out, lay_out_shards(plan, max_shard_size, entries_of), quantizer)


def write(
    output: Output,
    alpha: Alpha,
    *,
    force: bool = False,
    stream: bool = False,
    allow_nonfinite: bool = False,
    show_bars: bool = False,
    upload: Upload | None = None,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], object] | None = None,
    search: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the merged checkpoint and return its folder.

    Resumes a killed run of the same merge, and leaves alone a complete one. What can be refused is
    refused before anything is written.

    output: from `prepare`; it is checked once more, as time may have passed. stream: read what lies
    on the Hub by ranges, instead of downloading it into the cache. upload: is given every shard as
    it is durable. progress: called with the bytes of output done since the last call, as they are
    before they are quantized. note: called with each sentence about the inputs that is no reason to
    stop. search: how alpha was found, for adamms.json. extra_files: to put beside the weights, such
    as a report, by name.
    """
    from ..kernels.select import select_kernel

    output.check(push=upload is not None)
    plan = output.plan
    note = note or (lambda line: None)
    alpha = resolve(alpha, plan)
    before = _identities(plan)
    fingerprint = output.fingerprint(alpha)
    if _is_complete(output.folder, fingerprint):
        note(f"{output.folder} holds this merge already, complete: nothing was written")
        return output.folder
    if stream:
        check_streamable(plan)
    # One after the other: beside the kernel's imports, samples wait for the interpreter, not a disk
    measure = kinship.measure if force else kinship.check
    kinships = [measure(pair) for pair in plan.pairs]
    kernel, kernel_name = select_kernel(plan.dtypes)
    if output.quantizer and (obstacle := output.quantizer.note_machine(plan)):
        note(obstacle)
    from_hub = bool(remote_shards(plan))
    plan.base.fetch_sidecars()
    if from_hub and not stream:
        download(plan, show_bars=show_bars)
    if upload:
        upload.begin()
    inputs = model_card.digest_inputs(plan)
    notes = list(_pair_notes(plan, kinships, inputs))
    for line in notes:
        note(line)
    with Journal(output.folder, fingerprint) as journal:
        output_folder.check_still_unused(output.folder, journal)
        journal.note_inputs(hashlib.sha256(json.dumps(inputs).encode()).hexdigest())
        unchecked = _write_shards(
            output, alpha, journal, kernel, upload, progress, allow_nonfinite=allow_nonfinite
        )
        for name, content in (extra_files or {}).items():
            write_file(output.work / name, content)
        recipe = model_card.make_recipe(plan, alpha, kinships, kernel_name, search or {}, inputs)
        recipe["merge"] = fingerprint
        recipe["notes"] += notes
        if output.quantizer:
            recipe["quantized"] = output.quantizer.describe()
        if journal.nonfinite:
            recipe["nonfinite"] = journal.nonfinite
            note(model_card.describe_nonfinite(journal.nonfinite))
        if from_hub:
            recipe["not_checked"] = unchecked
        _write_papers(output, alpha, journal, recipe)
        _check_files(output, before)
        output_folder.publish(output.folder)
    return output.folder


def _identities(plan: Plan) -> list[Any]:
    return [checkpoint.identity() for checkpoint in plan.checkpoints.values()]


def _check_files(output: Output, before: list[Any]) -> None:
    """Raise OutputError if inputs have changed since, or what was written is not all there."""
    for shard in output.shards:
        if not any((folder / shard.name).exists() for folder in (output.work, output.folder)):
            raise OutputError(
                f"{output.work / shard.name} was deleted while the merge ran; run the same command"
                " to write it again"
            )
    plan = output.plan
    if _identities(plan) != before:
        _discard(output.work)
        paths = " or ".join(str(checkpoint.path) for checkpoint in plan.checkpoints.values())
        raise OutputError(
            f"{paths} was changed while it was merged, so nothing was written; run the command"
            " again when it is at rest"
        )


def _pair_notes(
    plan: Plan, kinships: Sequence[kinship.Kinship], inputs: Mapping[str, Any]
) -> Iterator[str]:
    """What makes a merge of these models doubtful."""
    weights = {side: [{**item, "file": ""} for item in items] for side, items in inputs.items()}
    sides = [side for side in plan.checkpoints if side != "base"]
    for side, kin in zip(sides, kinships, strict=True):
        if weights["base"] == weights[side]:
            result = ": at any alpha the result is the base" if len(sides) == 1 else ""
            yield f"base and {side} hold the same weights{result}"
        if kin.cosines and kin.lowest[1] < kinship.THRESHOLD:
            group, cosine = kin.lowest
            yield (
                f"base and {side} look unrelated (cosine similarity of {group} is {cosine:.3f});"
                " they are merged because of `force=True`"
            )


def _is_complete(out: Path, fingerprint: str) -> bool:
    """Whether `out` holds this merge, complete. OutputError if it holds another."""
    found = find_complete(out)
    if found is None:
        return False
    if found != fingerprint:
        waits = " that waits for its upload; finish that with `push`," if is_pending(out) else ";"
        raise OutputError(
            f"{out} is not empty: it holds a merge of other inputs or options{waits} choose"
            " another `out`, or `overwrite=True`"
        )
    verify(out)
    with suppress(OSError):  # a kill may have left the work folder, empty
        (out / WORK).rmdir()
    return True


def _write_shards(
    output: Output,
    alpha: Alpha,
    journal: Journal,
    kernel: Kernel,
    upload: Upload | None,
    progress: Callable[[int], None] | None,
    *,
    allow_nonfinite: bool,
) -> list[str]:
    """Write all that the journal does not know as done.

    Returns the files on the Hub whose bytes could not be held against the Hub's digests.
    """
    plan = output.plan
    evict = plan.bytes_read + plan.bytes_written > _physical_memory() // 2
    counts: Counter[str] = Counter()

    def note_nonfinite(tensor: str, count: int) -> None:
        counts[tensor] += count
        journal.note_nonfinite(tensor, counts[tensor])
        refuse_nonfinite()

    def refuse_nonfinite() -> None:
        if journal.nonfinite and not allow_nonfinite:
            raise FormatError(
                f"{model_card.describe_nonfinite(journal.nonfinite)}, at least; look for a damaged"
                " input, or write them with `allow_nonfinite=True`"
            )

    refuse_nonfinite()
    with _open_sink(output, journal, upload, evict=evict) as sink:
        _note_upload(output.work, journal, upload)
        if progress:
            progress(sum(step.nbytes for step in plan.steps if not sink.wants(step)))
        remote = remote_shards(plan)
        has_many_parts = sum(len(step.parts) for step in plan.steps) > MANY_PARTS
        windows = spans_in_order(plan, alpha, sink, REMOTE_WINDOW)
        try:
            with RangeSource(remote, windows) if remote else MappedFiles() as source:
                run(
                    plan,
                    alpha,
                    sink,
                    kernel=kernel,
                    source=source,
                    window=REMOTE_WINDOW if remote or has_many_parts else None,
                    evict=evict,
                    progress=progress,
                    nonfinite=note_nonfinite,
                )
                return source.finish() if isinstance(source, RangeSource) else []
        except DigestError:  # what was made of bad bytes must not be resumed
            _discard(output.work)
            raise


def _discard(work: Path) -> None:
    """Delete what a resumed merge would rely on; the answers of a search stay."""
    for path in work.iterdir():
        if path.name == JOURNAL or path.suffix == ".safetensors":
            path.unlink()


@contextmanager
def _open_sink(
    output: Output, journal: Journal, upload: Upload | None, *, evict: bool
) -> Iterator[Sink]:
    """The disk sink, behind the one that quantizes if there is one."""
    finished = (lambda name: upload.add_shard(output.work / name)) if upload else None
    with DiskSink(output.work, output.shards, journal, evict=evict, finished=finished) as disk:
        if output.quantizer is None:
            yield disk
        else:
            with output.quantizer.open_sink(disk, output.work) as sink:
                yield sink


def _note_upload(work: Path, journal: Journal, upload: Upload | None) -> None:
    """Note whether the output is to be uploaded, and hand over the shards complete already."""
    if upload is None:
        (work / PENDING).unlink(missing_ok=True)
        return
    line = json.dumps({"merge": journal.fingerprint, "repo": upload.repo}, ensure_ascii=True)
    write_file(work / PENDING, line.encode() + b"\n")
    for name in list(journal.done):
        unpublished = work / name
        upload.add_shard(unpublished if unpublished.exists() else work.parent / name)


def _write_papers(output: Output, alpha: Alpha, journal: Journal, recipe: dict[str, Any]) -> None:
    """Index, sidecars, model card and adamms.json into the work folder, each durable."""
    plan, shards, work = output.plan, output.shards, output.work
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name in sorted(shard.offsets)}
        total = sum(journal.done[shard.name]["size"] - len(shard.header) for shard in shards)
        write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    sidecars = list(plan.base.sidecars())
    for relative in sidecars:
        output_folder.copy_file(plan.base.path / relative, work / relative)
    config: Mapping[str, Any] = plan.base.config
    if plan.base.quantization:
        config = without_settings(config)
    if config and plan.options["dtype"]:
        config = model_card.set_config_dtype(config, plan.options["dtype"])
    if output.quantizer:
        config = output.quantizer.config(config)
    if config != plan.base.config:
        write_json(work / "config.json", config)
    card = model_card.make_card(plan, alpha, recipe)
    write_file(work / "README.md", card.encode(errors="replace"))
    outputs = [
        {key: journal.done[shard.name][key] for key in ("file", "size", "blake3")}
        for shard in shards
    ]
    digests = {str(name): output_folder.digest_file(work / name) for name in sidecars}
    write_json(work / "adamms.json", recipe | {"outputs": outputs, "sidecars": digests})


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
