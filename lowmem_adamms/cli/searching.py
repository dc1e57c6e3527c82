"""A search on the live model, as `search` and `merge` run it: model, journal, progress, report.

Leaves to others: the method (`search.py` and `refine.py` of the package), asking and remembering
(`session.py`), the page (`report.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architectures.layout import BUFFER
from ..errors import PromptError
from ..version import __version__
from .arguments import placing
from .console import draws, kept_up_to_date, print_notes, screen

if TYPE_CHECKING:
    from ..live.live_model import LiveModel
    from ..live.placement import Placement
    from ..mapping.alphas import Alpha
    from ..mapping.plan import Plan
    from ..merging.journal import AnswerJournal
    from ..prompts import Prompt, Prompts
    from ..reporting.terminal import SearchProgress
    from ..searching.layer_search import Refined
    from ..searching.search import Result
    from ..searching.session import Session


@dataclass(frozen=True, slots=True)
class Found:
    """A finished search, its second stage if there was one, its report, and what was asked."""

    result: Result
    refined: Refined | None
    page: str
    prompts: Prompts | None = None

    @property
    def alpha(self) -> Alpha:
        """What to merge at."""
        return self.refined.alpha if self.refined else self.result.alpha

    def to_json(self) -> dict[str, Any]:
        """For adamms.json and `search --json`."""
        from ..mapping.alphas import to_json
        from ..prompts import digest

        more: dict[str, Any] = {"layers": self.refined.to_json()} if self.refined else {}
        if self.prompts is not None:
            more["prompt_set"] = {"ref": self.prompts.ref, "sha256": digest(self.prompts)}
        return self.result.to_json() | to_json(self.alpha) | more


def load_prompts(arguments: argparse.Namespace) -> Prompts:
    """The sample of --prompts."""
    from .. import prompts
    from ..settings import PromptSettings

    settings = PromptSettings(
        question=arguments.question,
        split=arguments.split,
        text_column=arguments.text_column,
        image_column=tuple(arguments.image_column or ()),
        samples=arguments.samples,
        seed=arguments.seed,
    )
    return prompts.load_prompts(arguments.prompts, settings)


def search_for_alpha(
    arguments: argparse.Namespace, plan: Plan, prompts: Prompts, journal: Path | None
) -> Found:
    """Search on the live model; the journal, if there is one, is resumed from."""
    from ..merging.sources import download
    from ..reporting import terminal as show
    from ..searching import layer_search as refine
    from ..searching.search import DEFAULT_ALPHAS

    alphas = arguments.alphas or DEFAULT_ALPHAS
    count = arguments.refine_layers
    groups = refine.split(plan.base_layout.layers, count) if count else []
    passes = refine.PASSES * len(groups)
    _check_images(plan, prompts)
    task = _Task(arguments, plan, prompts, placing(arguments, plan))
    for line in task.placement.lines:
        print(line, file=sys.stderr)
    if groups:
        more = f"{passes} more passes, {passes * len(prompts)} answers"
        print(f"then an alpha for each of {count} groups of layers: {more}", file=sys.stderr)
    download(plan, bars=draws())  # no sooner: what does not fit need not be fetched
    progress = show.SearchProgress(len(alphas) + passes, len(prompts))
    with _session(task, journal, progress) as session:
        with kept_up_to_date(progress):
            result = _search(task, session, alphas, progress)
            seed = arguments.seed
            refined = refine.refine(session, prompts, result, groups, seed=seed) if groups else None
        print_notes(session.notes)
        return Found(result, refined, _report(task, session, result, refined), prompts)


def show_found(found: Found) -> None:
    """The curve, the verdict, and what weakens it."""
    from ..reporting import terminal as show

    result, refined = found.result, found.refined
    screen().print(show.search_table(result.rounds, result.alpha))
    print(show.verdict(result))
    if refined:
        for layers, line in refined.lines().items():
            print(f"{layers}: {line}")
    apart = ["D compares within a round: closer neighbours differ less"] if result.earlier else []
    print_notes([*apart, *result.notes, *(refined.notes if refined else ())])


@dataclass(frozen=True, slots=True)
class _Task:
    """What is searched, and on what."""

    arguments: argparse.Namespace
    plan: Plan
    prompts: Prompts
    placement: Placement

    def load(self) -> LiveModel:
        """The model itself, which takes a while."""
        from ..live.live_model import LiveModel
        from ..live.prompt_encoder import load_processor

        # A base that cannot be talked to is found out before its weights are read
        trust = self.arguments.trust_remote_code
        processor = load_processor(self.plan.base.path, trust_remote_code=trust)
        return LiveModel(
            self.plan,
            dtype=self.placement.dtype if self.arguments.live_dtype else None,
            placement=self.placement,
            trust_remote_code=trust,
            force=self.arguments.force,
            processor=processor,
        )


def _search(
    task: _Task, session: Session, alphas: Sequence[float], progress: SearchProgress
) -> Result:
    from ..searching.search import search

    arguments = task.arguments
    return search(
        session,
        task.prompts,
        alphas,
        measure=arguments.measure,
        refine=arguments.refine,
        noise=None if arguments.no_noise else session.again,
        seed=arguments.seed,
        progress=progress.candidates,
    )


def _check_images(plan: Plan, prompts: Sequence[Prompt]) -> None:
    """A base that holds nothing but a decoder cannot be shown images; said before it is loaded."""
    if set(plan.base_layout.kinds.values()) <= {BUFFER}:
        for prompt in prompts:
            if prompt.images:
                raise PromptError(f"{prompt.id}: has an image, but {plan.base.path} is text-only")


@contextmanager
def _session(task: _Task, path: Path | None, progress: SearchProgress) -> Iterator[Session]:
    """What asks the model and remembers its answers, in the journal at `path` if there is one."""
    from ..live.draft_decoding import Settings
    from ..searching.session import Session, fingerprint

    arguments = task.arguments
    settings = Settings(
        max_new_tokens=arguments.max_new_tokens,
        batch_size=task.placement.batch,
        drafts=not arguments.no_drafts,
        vision_cache=not arguments.no_vision_cache,
    )
    key = fingerprint(task.plan, task.prompts, settings, task.placement)
    with (
        _journal(path, key) if path else nullcontext() as journal,
        Session(
            task.load, settings, journal, asked=progress.asked, answered=progress.answered
        ) as session,
    ):
        yield session


@contextmanager
def _journal(path: Path, key: str) -> Iterator[AnswerJournal]:
    """The journal at `path`; if it ends without an answer, no trace of it is left."""
    from ..merging.journal import AnswerJournal

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


def _report(task: _Task, session: Session, result: Result, refined: Refined | None) -> str:
    from ..reporting import search_page as report

    arguments, plan, placement = task.arguments, task.plan, task.placement
    recipe = {
        "base": f"{plan.base.ref} ({plan.base_layout.arch})",
        "donor": f"{plan.donor.ref} ({plan.donor_layout.arch})",
        "prompts": f"{task.prompts.ref}, {len(task.prompts)} of them, seed {arguments.seed}",
        "answers": f"greedy, {arguments.max_new_tokens} tokens at most",
        "batch": str(placement.batch),
        "embeddings": str(plan.options["embeddings"]),
        "version": __version__,
    }
    where = {str(i): line for i, line in enumerate(placement.lines, 1)}
    layers = {"Layers": refined.lines()} if refined else {}
    return report.html(
        result,
        task.prompts,
        timings=session.timings,
        facts=layers | {"Recipe": recipe, "Placement": where},
        title=f"{plan.base.name} \N{LEFTWARDS ARROW} {plan.donor.name}",
    )
