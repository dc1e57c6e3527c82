"""The whole method for Python: map, search, merge. The command line is a thin layer above it.

    plan = make_plan(base, donor)                  # which donor tensor goes into which of the base
    found = find_alpha(plan, "questions.jsonl")    # loads the model, needs no labels
    merge(plan, found, "merged")                   # loads no model

Every function takes its settings as keywords (`find_alpha(plan, prompts, refine=1)`) or as the
frozen dataclass of `settings.py` that declares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import prompts as prompt_sets
from .architectures.arch import BUFFER, Arch
from .architectures.declare import read_declarations
from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .errors import OutputError, PromptError, RecipeError, SearchError
from .live.free_memory import measure_memory
from .live.placing import check_runnable, place
from .mapping import join
from .mapping.alphas import Alpha, alpha_to_json, resolve
from .mapping.mixture import Mixture, ModelRef, make_mixture
from .mapping.plan import Plan
from .merging import replacing, writer
from .merging.journal import ANSWERS, JOURNAL, PENDING, WORK, Asked, find_complete
from .merging.output_folder import check_no_input
from .merging.sources import download
from .merging.verify import verify
from .prompts import Prompt, Prompts
from .searching.answer_text import collapsed_share, drop_reasoning
from .searching.in_turn import search_in_turn
from .searching.search import Candidate, Result, choose, search
from .settings import (
    DEFAULT_TAGS,
    Measure,
    MethodSettings,
    OutputSettings,
    PlacementSettings,
    PlanSettings,
    Quantization,
    SearchSettings,
    UploadSettings,
    changed,
    combine,
)
from .values import Tags, check_type

if TYPE_CHECKING:
    from .hub.upload import Upload
    from .searching.session import AnyPlacement, Session, Timing


_COLLAPSED, _FEWEST_TO_COLLAPSE = 0.9, 10
"""The share of answers that means nothing any more, and the prompts it takes to say so."""

# Map


def make_plan(
    base: str | Path | Checkpoint,
    donor: ModelRef | Sequence[ModelRef],
    *,
    settings: PlanSettings | None = None,
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    declared: Sequence[Arch] = (),
    stream: bool = False,
    bins: bool = True,
    **fields: Any,
) -> Plan:
    """Plan the merge of two or more checkpoints from their headers; no tensor is read.

    Args:
        base: Folder, file or `org/name[@revision]` of the model that is kept.
        donor: The same of the model whose language weights are blended in, or several of them.
        settings: Or its fields as keywords: `embeddings`, `unmatched`, `dtype`, `rounding`, `arch`,
            `method`, `ancestor`, `density`, `trim`, `mask_seed`.
        weights: Of base and donors, beside alpha; for methods that use an ancestor. Default: 1.
        densities: Of base and donors, instead of one `density` for all.
        declared: Architectures declared in Python, before those of the files in `arch`.
        stream: Leave nothing of a Hub id in the cache; its weights must be safetensors.
        bins: Download a repository that has only `.bin` files, whose tensors cannot be located
            otherwise.

    Raises:
        FormatError: A checkpoint is missing, broken or quantized.
        HubError: A repository cannot be read.
        MappingError: The two language models do not fit each other.

    Example:
        >>> plan = make_plan("Qwen2-VL-7B-Instruct", "llava-onevision-qwen2-7b-ov-hf")
        >>> plan.counts
        {'interpolate': 339, 'copy': 391}
        >>> plan = make_plan("base", ["donor", "other"], method="ties", ancestor="Qwen2-7B")
    """
    settings = combine(PlanSettings, settings, fields)
    open_model = partial(_opened, cache=not stream, bins=bins and not stream)
    donors = [donor] if isinstance(donor, str | Path | Checkpoint) else list(donor)
    how: dict[str, Any] = {
        "embeddings": settings.embeddings,
        "dtype": settings.dtype,
        "unmatched": settings.unmatched,
        "rounding": settings.rounding,
        "declared": (*declared, *read_declarations(settings.arch)),
    }
    opened_base, opened_donors = open_model(base), [open_model(each) for each in donors]
    if len(donors) == 1 and not (changed(settings, MethodSettings) or weights or densities):
        return join.make_plan(opened_base, opened_donors[0], **how)
    return make_mixture(
        opened_base,
        opened_donors,
        settings,
        ancestor=open_model(settings.ancestor) if settings.ancestor else None,
        weights=weights,
        densities=densities,
        **how,
    )


def _opened(checkpoint: str | Path | Checkpoint, *, cache: bool, bins: bool) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    expected = "a folder, a file, a Hub id `org/name[@revision]` or an opened Checkpoint"
    check_type("a checkpoint", checkpoint, (str, Path), expected)
    return open_checkpoint(checkpoint, cache=cache, download_bins=bins)


def _check_plan(plan: object) -> None:
    check_type("plan", plan, Plan, "what make_plan returns")


# Search


class SearchProgress(Protocol):
    """Who wants to follow a search."""

    def asked(self, alpha: Asked) -> None:
        """The search has turned to an alpha."""

    def answered(self, alpha: Asked, tokens: int) -> None:
        """One more answer, of so many tokens; 0 if it was known from an earlier run."""

    def candidates(self, alpha: float, candidates: tuple[Candidate, ...]) -> None:
        """All answers at an alpha are there; scores as far as they are known."""


@dataclass(frozen=True, slots=True)
class FoundAlpha:
    """A finished search.

    result: every candidate with its score, the answers, and notes on what weakens the choice.
    facts: sections of key and value for the report. prompts: what was asked, in order.
    donor_answers: those at alpha 1, if they were asked for. command: what merges at an alpha, which
    is to follow as its last word. earlier: of several donors the results of all but the last.
    """

    result: Result
    prompts: Sequence[Prompt]
    title: str
    facts: Mapping[str, Mapping[str, str]]
    timings: tuple[Timing, ...] = ()
    donor_answers: tuple[str, ...] = ()
    command: str = ""
    earlier: tuple[Result, ...] = ()

    @property
    def alpha(self) -> Alpha:
        """The alpha to merge at; one for each of several donors."""
        if not self.earlier:
            return self.result.alpha
        return tuple(result.alpha for result in (*self.earlier, self.result))

    @property
    def reason_against(self) -> str:
        """Why nothing should be merged; empty if something should, or that is not known."""
        verdicts = [result.verdict for result in (*self.earlier, self.result)]
        reasons = [verdict.reason for verdict in verdicts if verdict and not verdict.merge]
        return reasons[-1] if len(reasons) == len(verdicts) else ""

    @property
    def page(self) -> str:
        """The report as one self-contained HTML page."""
        from .reporting.search_page import render_search_page

        return render_search_page(
            self.result,
            self.prompts,
            facts=self.facts,
            title=self.title,
            donor_answers=self.donor_answers,
            command=self.command,
            earlier=self.earlier,
        )

    def write_page(self, path: str | Path) -> None:
        """Write the report to a file. OutputError if that is not possible."""
        from .reporting.page import write_page

        write_page(Path(path), self.page)

    def to_json(self) -> dict[str, Any]:
        """The document of `search --json`, and what adamms.json says of the search."""
        document = self.result.to_json() | alpha_to_json(self.alpha)
        if self.earlier:
            document["in_turn"] = [each.to_json() for each in (*self.earlier, self.result)]
        if isinstance(self.prompts, Prompts):
            digest = prompt_sets.digest(self.prompts)
            document["prompt_set"] = {"ref": self.prompts.ref, "sha256": digest}
        return document

    def __str__(self) -> str:
        from .reporting.terminal import describe_result

        return describe_result(self.result)


def place_search(
    plan: Plan,
    settings: PlacementSettings | None = None,
    *,
    quantize: Quantization | None = None,
    **fields: Any,
) -> AnyPlacement:
    """Where the model of a search goes: device, precision and batch, as asked for or as fits.

    quantize: of the output; the model is loaded so too unless `live_quantize` says otherwise.
    Raises PlacementError if the model does not fit into the memory that is free, and RecipeError
    if vLLM is to run it and cannot.
    """
    _check_plan(plan)
    settings = combine(PlacementSettings, settings, fields)
    if isinstance(settings, SearchSettings) and settings.engine == "vllm":
        from .serving.vllm_model import place_in_engine

        return place_in_engine(plan, settings, quantize)
    memory = measure_memory(ram=settings.ram, vram=settings.vram)
    placement = place(plan, memory, settings, quantize=quantize, dtype=plan.options["dtype"])
    check_runnable(plan, placement)
    return placement


def find_alpha(
    plan: Plan,
    prompts: str | Path | Iterable[Prompt | str | Mapping[str, Any]],
    settings: SearchSettings | None = None,
    *,
    journal: str | Path | None = None,
    placement: AnyPlacement | None = None,
    progress: SearchProgress | None = None,
    note: Callable[[str], object] | None = None,
    **fields: Any,
) -> FoundAlpha:
    """Find the alpha at which the answers change least, without labels.

    Loads the base once, answers every prompt at each alpha of the grid and compares neighbouring
    alphas (AdaMMS, Algorithm 1).

    Args:
        plan: From `make_plan`.
        prompts: A prompt set as for `load_prompts`: a file, a folder of images, a Hub dataset, or
            a list of texts or of dicts with a `prompt` and an `image`; or loaded.
        settings: Or its fields as keywords: `alphas`, `refine`, `measure`, `samples`, `device`, ….
        journal: File that keeps the answers; the same call then resumes from them.
        placement: From `place_search`, if it was decided before.
        progress: Follows the search.
        note: Called with each sentence that the user should know.

    Raises:
        PlacementError: The model does not fit into memory.
        PromptError: The prompts cannot be read, or have images that the base cannot see.
        FormatError: The base cannot be loaded, or is not what its files hold.

    Example:
        >>> found = find_alpha(plan, "questions.jsonl", samples=50, journal="answers.jsonl")
        >>> found.alpha
        0.3
        >>> found.write_page("report.html")
    """
    from .reporting.recipe import list_facts, spell_merge
    from .searching.session_of_plan import open_session

    _check_plan(plan)
    settings = combine(SearchSettings, settings, fields)
    expected = "a file, a folder, a Hub dataset, or texts and dicts"
    check_type("prompts", prompts, (str, Path, Iterable), expected)
    if not isinstance(prompts, Prompts):
        prompts = prompt_sets.load_prompts(prompts, settings)
    check_images(plan, prompts)
    check_search(plan, settings)
    placement = placement or place_search(plan, settings)
    download(plan)
    with open_session(
        plan,
        prompts,
        settings,
        placement,
        Path(journal) if journal else None,
        asked=progress.asked if progress else None,
        answered=progress.answered if progress else None,
    ) as session:
        *earlier, result = _search(plan, session, prompts, settings, progress)
        _check_collapse(result)
        donor_answers = _ask_donor(session, result, prompts, settings)
        if note:
            for line in session.notes:
                note(line)
        return FoundAlpha(
            result,
            prompts,
            f"{plan.base.name} \N{LEFTWARDS ARROW} {' + '.join(d.name for d in plan.donors)}",
            list_facts(plan, prompts, settings, placement, session.timings),
            tuple(session.timings),
            donor_answers,
            spell_merge(plan, [each.alpha for each in earlier]),
            tuple(earlier),
        )


def _search(
    plan: Plan,
    session: Session,
    prompts: Prompts,
    settings: SearchSettings,
    progress: SearchProgress | None,
) -> tuple[Result, ...]:
    """The result of the search, or of several donors in turn.

    A verdict compares with the base, so that there is none where alpha 0 is another model.
    """
    how: dict[str, Any] = {
        "measure": settings.measure,
        "refine": settings.refine,
        "noise": session.again if settings.noise else None,
        "seed": settings.seed,
        "reasoning_tags": settings.reasoning_tags,
        "progress": progress.candidates if progress else None,
    }
    results: tuple[Result, ...]
    if plan.coefficients == 1:
        results = (search(session, prompts, settings.alphas, **how),)
    else:
        adds_up = isinstance(plan, Mixture) and not plan.method.relative
        results = search_in_turn(
            session, prompts, plan.coefficients, settings.alphas, adds_up=adds_up, **how
        )
    if plan.starts_at_base:
        return results
    return tuple(replace(result, verdict=None) for result in results)


def _ask_donor(
    session: Session, result: Result, prompts: Prompts, settings: SearchSettings
) -> tuple[str, ...]:
    """The donor's own answers, if they are wanted: those at alpha 1."""
    if not settings.donor_answers:
        return ()
    if 1.0 in result.answers:
        return result.answers[1.0]
    texts = [answer.text for answer in session.ask_donor(prompts)]
    return tuple(final or "" for final in drop_reasoning(texts, settings.reasoning_tags))


def check_search(plan: Plan, settings: SearchSettings) -> None:
    """RecipeError for what vLLM cannot tell, or what takes one donor that is blended linearly."""
    if settings.engine == "vllm" and settings.measure == "entropy":
        raise RecipeError(
            "vLLM does not tell the entropy of its answers: choose another measure, or the engine"
            " transformers"
        )
    if not isinstance(plan, Mixture):
        return
    if settings.engine == "vllm":
        raise RecipeError("vLLM is asked only about one donor and the method linear")
    if settings.donor_answers:
        raise RecipeError(
            "only the answers of one donor by the method linear can be shown: leave out"
            " `donor_answers`"
        )


def choose_alpha(
    files: Sequence[Path],
    *,
    measure: Measure | None = None,
    seed: int = 0,
    reasoning_tags: Tags | None = DEFAULT_TAGS,
) -> FoundAlpha:
    """Choose alpha by answers that were recorded before; no model is loaded.

    files: the answers.jsonl of searches. PromptError if they cannot be read, or do not belong
    together.
    """
    from .searching import recorded_answers

    answers, indices = recorded_answers.read_answers(files)
    result = choose(answers, measure=measure, seed=seed, reasoning_tags=reasoning_tags)
    _check_collapse(result)
    prompts = [Prompt("", id=f"prompt {index}") for index in indices]
    return FoundAlpha(result, prompts, "Recorded answers", {})


def _check_collapse(result: Result) -> None:
    """SearchError if nearly all answers are the same or none, whatever the alpha."""
    shares = {alpha: collapsed_share(answers) for alpha, answers in result.answers.items()}
    if result.prompts >= _FEWEST_TO_COLLAPSE and min(shares.values()) >= _COLLAPSED:
        alpha, share = next(iter(shares.items()))
        raise SearchError(
            f"at every alpha {_COLLAPSED:.0%} or more of the answers are empty, repeating or the"
            f" same ({share:.0%} at alpha {alpha:g}), so none can be chosen. The base may lack its"
            " chat template, or the questions may leave no choice; try its answers by hand"
        )


def check_images(plan: Plan, prompts: Sequence[Prompt]) -> None:
    """PromptError if a prompt has an image and the base is nothing but a decoder."""
    if set(plan.base_layout.kinds.values()) <= {BUFFER}:
        for prompt in prompts:
            if prompt.images or prompt.audio:
                what = "an image" if prompt.images else "a sound"
                raise PromptError(f"{prompt.id}: has {what}, but {plan.base.path} is text-only")


# Merge


@dataclass(frozen=True, kw_only=True)
class MergeSettings(OutputSettings, UploadSettings):
    """How a merge is written, and where it is uploaded to."""


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge that was checked as far as possible before alpha is known.

    upload: the upload that belongs to it, or None. staging: where it is made if it is to replace a
    complete merge.
    """

    plan: Plan
    settings: MergeSettings
    output: writer.Output
    upload: Upload | None
    staging: Path | None = None

    @property
    def answers(self) -> Path:
        """Where a search for this output keeps its answers: in their final place once they are.

        OutputError if a merge at a given alpha was begun there: it would be met only after hours.
        """
        out = self.staging or self.output.folder
        final, unfinished = out / ANSWERS, out / WORK / ANSWERS
        if not (final.is_file() or unfinished.is_file()):
            if (out / WORK / JOURNAL).is_file():
                raise OutputError(
                    f"{out} holds an unfinished merge at a given alpha; delete {out / WORK} or"
                    " choose another `out`"
                )
            if find_complete(out):
                raise OutputError(f"{out} holds a merge at a given alpha; choose another `out`")
        return final if final.is_file() else unfinished

    def write(
        self,
        alpha: Alpha | FoundAlpha,
        *,
        progress: Callable[[int], None] | None = None,
        note: Callable[[str], object] | None = None,
        show_bars: bool = False,
    ) -> Path:
        """Write the checkpoint, with the report of the search if alpha was searched for."""
        found = alpha if isinstance(alpha, FoundAlpha) else None
        weight = alpha.alpha if isinstance(alpha, FoundAlpha) else alpha
        if found and (reason := found.reason_against):
            raise SearchError(
                f"nothing is merged: {reason} To merge all the same, give `alpha` and another"
                f" folder than {self.output.folder}, which has the answers"
            )
        out, staging = self.output.folder, self.staging
        if find_complete(out) == self.output.fingerprint(resolve(weight, self.plan)):
            staging = None  # it has been replaced already, by what is asked for
        writer.write(
            replace(self.output, folder=staging) if staging else self.output,
            weight,
            force=self.settings.force,
            stream=self.settings.no_cache,
            allow_nonfinite=self.settings.allow_nonfinite,
            show_bars=show_bars,
            upload=self.upload,
            progress=progress,
            note=note,
            search=_without_paths(found.to_json()) if found else None,
            extra_files={"report.html": found.page.encode()} if found else None,
        )
        if staging:
            replacing.move_into_place(out)
        return out

    def finish_upload(self, progress: Callable[[int], None] | None = None) -> int:
        """Check the output, send what is left of it and commit; returns the number of files."""
        if self.upload is None:
            return 0
        verify(self.output.folder)
        return self.upload.finish(progress)


@contextmanager
def prepare_merge(
    plan: Plan, out: str | Path, settings: MergeSettings | None = None, **fields: Any
) -> Iterator[Merge]:
    """Check everything that can be checked before alpha is known: folder, space, Hub.

    Raises OutputError, RecipeError, FormatError or PushError; nothing has been written then.
    """
    _check_plan(plan)
    check_type("out", out, (str, Path), "a folder")
    settings = combine(MergeSettings, settings, fields)
    out = Path(out)
    if settings.push_to_hub is None and (settings.private or settings.replace_repo):
        raise RecipeError(
            "`private` and `replace_repo` go with `push_to_hub`, the repository's name"
        )
    output = writer.prepare(
        plan,
        out,
        max_shard_size=settings.max_shard_size,
        quantizer=_quantizer(plan, settings),
    )
    staging = None
    if settings.overwrite:
        if settings.push_to_hub is not None:
            raise RecipeError("overwrite and push_to_hub exclude each other; push the result after")
        check_no_input(plan, out)
        staging = replacing.find_staging(out)
    (replace(output, folder=staging) if staging else output).check(
        push=settings.push_to_hub is not None
    )
    with ExitStack() as stack:
        upload = None
        if settings.push_to_hub is not None:
            upload = stack.enter_context(_checked_upload(out, settings))
        yield Merge(plan, settings, output, upload, staging)


def merge(
    plan: Plan,
    alpha: Alpha | FoundAlpha,
    out: str | Path,
    settings: MergeSettings | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], object] | None = None,
    **fields: Any,
) -> Path:
    """Write the merged checkpoint to a folder, and upload it if `push_to_hub` is given.

    Streams both checkpoints once; peak memory does not depend on their size. A killed merge
    resumes when it is called again with the same arguments.

    Args:
        plan: From `make_plan`.
        alpha: Weight of the donor, 0 to 1, one for each layer or role (`Alphas`), of several
            donors a tuple of these, or what `find_alpha` found; then its report goes beside the
            weights. Of the methods ties, dare-ties, metagpt and ram: the factor of what all
            models add; their authors take 1.
        out: Folder to create. It must be empty or hold the unfinished output of this merge.
        settings: Or its fields as keywords: `quantize`, `max_shard_size`, `force`, `no_cache`,
            `allow_nonfinite`, `overwrite`, `trust_remote_code`, `push_to_hub`, `private`,
            `replace_repo`.
        progress: Called with the bytes of output produced since the last call.
        note: Called with each sentence about the inputs that the user should know.

    Returns:
        The folder.

    Raises:
        OutputError: `out` is not usable, or the disk is too small.
        MappingError: The two language models are not related (unless `force`).
        FormatError: An input is not what its header says, or what is blended is NaN or infinite.
        PushError: The Hub cannot take the upload, or did not; what is on disk is unharmed.

    Example:
        >>> plan = make_plan("Qwen2-VL-7B-Instruct", "llava-onevision-qwen2-7b-ov-hf")
        >>> merge(plan, 0.3, "merged", quantize="nf4")
        PosixPath('merged')
    """
    with prepare_merge(plan, out, settings, **fields) as job:
        folder = job.write(alpha, progress=progress, note=note)
        job.finish_upload()
    return folder


def _without_paths(document: dict[str, Any]) -> dict[str, Any]:
    """The document of a search, with the name of a prompt set that lies here, not its place."""
    prompt_set = document.get("prompt_set")
    if prompt_set and Path(prompt_set["ref"]).exists():
        prompt_set["ref"] = Path(prompt_set["ref"]).absolute().name
    return document


def _quantizer(plan: Plan, settings: OutputSettings) -> writer.Quantizer | None:
    if settings.quantize in (None, "none"):
        return None
    from .quantizing.quantization import prepare

    return prepare(plan, settings.quantize, trust_remote_code=settings.trust_remote_code)


# Upload


@contextmanager
def push(out: str | Path, settings: UploadSettings) -> Iterator[Upload]:
    """The upload of a merged folder, checked by the Hub; nothing is sent before its `finish()`.

    FormatError if the folder is not a complete merge, PushError if the Hub will not take it.
    """
    out = Path(out)
    verify(out)
    with _checked_upload(out, settings) as upload:
        yield upload


@contextmanager
def _checked_upload(out: Path, settings: UploadSettings) -> Iterator[Upload]:
    from .hub.upload import Upload

    with Upload(out, settings, pending_note=out / PENDING) as upload:
        upload.check()
        yield upload
