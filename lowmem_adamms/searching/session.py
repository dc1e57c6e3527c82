"""The answers of one live model, alpha by alpha: journalled, timed, resumed after a kill.

This is what lies between the search, which knows no model, and the model, which knows no search.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..answers import Answer
from ..merging.journal import AnswerJournal, Asked
from ..prompts import Prompt, digest
from ..settings import AnswerSettings
from ..version import __version__

if TYPE_CHECKING:
    from ..live.draft_decoding import Cost
    from ..live.placement import Placement
    from ..mapping.plan import Plan
    from ..serving.vllm_model import EnginePlacement

    AnyPlacement = Placement | EnginePlacement


class SearchedModel(Protocol):
    """A model that a search asks: a `LiveModel`, or one that vLLM serves."""

    def apply(self, alpha: Any) -> None:
        """Blend at an alpha, or at one for each of several donors."""

    def make_answerer(self, settings: AnswerSettings, *, batch_size: int) -> SearchedAnswerer:
        """What asks it."""

    def close(self) -> None:
        """Drop it."""


class SearchedAnswerer(Protocol):
    """What asks such a model; see `live.answerer.Answerer`."""

    cost: Cost
    notes: list[str]

    def answer(
        self,
        prompts: Sequence[Prompt],
        known: Mapping[int, Answer] | None = None,
        answered: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """One answer for each prompt, in their order."""

    def set_drafts(self, prompts: Sequence[Prompt], answers: Mapping[int, Answer]) -> None:
        """What the next answers may be like."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What the answers at one alpha took, over all prompts. Seconds are wall time.

    forward_tokens: tokens that went through the model. plain_tokens: those that would have gone
    through it without drafts.
    """

    alpha: Asked
    apply_seconds: float
    seconds: float
    answer_tokens: int
    forward_tokens: int
    plain_tokens: int


class Session(AbstractContextManager["Session"]):
    """Answers prompts at an alpha; its instances are what `search` calls `generate`.

    timings: one for each alpha that was not all known. notes: what the user should know of the
    answers.
    """

    def __init__(
        self,
        load: Callable[[], SearchedModel],
        settings: AnswerSettings,
        batch_size: int,
        journal: AnswerJournal | None = None,
        *,
        asked: Callable[[Asked], None] | None = None,
        answered: Callable[[Asked, int], None] | None = None,
    ) -> None:
        """Prepare; nothing is loaded yet.

        load: makes the live model, at the first prompt that the journal has no answer to. asked:
        called with each alpha before its answers. answered: called after each answer with its
        alpha and number of tokens, which is 0 if the answer was known.
        """
        self.timings: list[Timing] = []
        self.notes: list[str] = []
        self._load, self._settings, self._batch_size = load, settings, batch_size
        self._journal = journal
        self._asked, self._answered = asked, answered
        self._answers: dict[Asked, dict[int, Answer]] = {}
        if journal:
            self._answers = {alpha: {**known} for alpha, known in journal.answers.items()}
        self._last_alpha: Asked | None = None
        self._loaded: tuple[SearchedModel, SearchedAnswerer] | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the model, if it was loaded."""
        if self._loaded is not None:
            self._loaded[0].close()
        self._loaded = None

    def __call__(self, alpha: Asked, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers at one alpha; the model is asked only for those that are not known."""
        known = self._journal.answers.get(alpha, {}) if self._journal else {}
        answers = self._ask(alpha, prompts, known)
        self._last_alpha = alpha
        return answers

    def ask_donor(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers at alpha 1, which are shown beside the others and not scored."""
        return self._ask(1.0, prompts, self._journal.donor if self._journal else {}, aside="donor")

    def again(self, alpha: Asked, prompts: Sequence[Prompt]) -> list[Answer]:
        """The same alpha once more, in batches of half the size: what differs is noise.

        Its own answers serve as drafts, so that it takes little more than one pass a batch.
        """
        known = self._journal.again.get(alpha, {}) if self._journal else {}
        if len(known) == len(prompts):
            return _in_order(known)
        live, _ = self._model()
        live.apply(alpha)
        half = max(1, min(self._batch_size, len(prompts)) // 2)
        answerer = live.make_answerer(self._settings, batch_size=half)
        answerer.set_drafts(prompts, self._answers[alpha])
        note = partial(self._journal.note, alpha, aside="again") if self._journal else None
        return answerer.answer(prompts, known, note)

    def _ask(
        self,
        alpha: Asked,
        prompts: Sequence[Prompt],
        known: Mapping[int, Answer],
        aside: Literal["donor"] | None = None,
    ) -> list[Answer]:
        """The answers at an alpha, of which some are known. aside: they are not scored."""
        if self._asked:
            self._asked(alpha)
        for _ in known:
            self._report_answer(alpha, 0)
        if len(known) == len(prompts):
            return _in_order(known)

        def record(place: int, answer: Answer) -> None:
            self._answers.setdefault(alpha, {})[place] = answer
            if self._journal:
                self._journal.note(alpha, place, answer, aside=aside)
            self._report_answer(alpha, len(answer.tokens))

        live, answerer = self._model()
        if self._last_alpha is not None:
            answerer.set_drafts(prompts, self._answers[self._last_alpha])
        start = time.perf_counter()
        live.apply(alpha)
        apply_seconds = time.perf_counter() - start
        answers = answerer.answer(prompts, known, record)
        if not aside:
            cost = answerer.cost
            counts = (cost.answer_tokens, cost.forward_tokens, cost.plain_tokens)
            self.timings.append(Timing(alpha, apply_seconds, cost.seconds, *counts))
        self.notes = answerer.notes
        return answers

    def _model(self) -> tuple[SearchedModel, SearchedAnswerer]:
        """The live model and what asks it, loaded at the first call."""
        if self._loaded is None:
            live = self._load()
            try:
                answerer = live.make_answerer(self._settings, batch_size=self._batch_size)
            except BaseException:
                live.close()
                raise
            self._loaded = live, answerer
        return self._loaded

    def _report_answer(self, alpha: Asked, token_count: int) -> None:
        if self._answered:
            self._answered(alpha, token_count)


def _in_order(answers: Mapping[int, Answer]) -> list[Answer]:
    return [answers[place] for place in sorted(answers)]


def fingerprint(
    plan: Plan, prompts: Sequence[Prompt], settings: AnswerSettings, placement: AnyPlacement
) -> str:
    """A digest of everything that decides the answers at an alpha."""
    folder = plan.base.path
    sidecars = [(str(name), (folder / name).stat()) for name in plan.base.sidecars()]
    document = [
        [__version__, version("transformers")],
        placement.identity(),
        [[name, stat.st_size, stat.st_mtime_ns] for name, stat in sidecars],
        plan.identity(),
        digest(prompts),
        {field.name: getattr(settings, field.name) for field in fields(AnswerSettings)},
    ]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
