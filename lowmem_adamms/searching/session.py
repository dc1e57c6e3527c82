"""One search on one live model: answers alpha by alpha, journalled, timed, resumed after a kill.

What lies between the search, which knows no model, and the model, which knows no search. The model
is loaded at the first question that the journal cannot answer. Leaves to others: choosing
(`search.py`), showing (`cli/`, `report.py`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from ..closing import Closing
from ..mapping.alphas import Alpha
from ..merging.journal import AnswerJournal
from ..prompts import Prompt, digest

if TYPE_CHECKING:
    from ..live.answerer import Answerer
    from ..live.live_model import LiveModel
    from ..live.placement import Placement
    from ..mapping.plan import Plan
    from ..settings import AnswerSettings


@dataclass(frozen=True, slots=True)
class Timing:
    """What the answers at one alpha took, over all prompts. Seconds are wall time.

    forward_tokens: tokens that went through the model. plain_tokens: those that would have gone
    through it without drafts.
    """

    alpha: Alpha
    apply_seconds: float
    seconds: float
    answer_tokens: int
    forward_tokens: int
    plain_tokens: int


class Session(Closing):
    """Callable as `search.Generate`. `timings` has a line for each alpha that was not all known.

    An alpha may be one by layer (`Alphas`).

    load: makes the live model. batch_size: prompts answered at a time. journal: None keeps no
    record. asked: called before each alpha's answers, and `answered` after each with its tokens (0:
    known before), for progress.
    """

    def __init__(
        self,
        load: Callable[[], LiveModel],
        settings: AnswerSettings,
        batch_size: int,
        journal: AnswerJournal | None = None,
        *,
        asked: Callable[[Alpha], None] | None = None,
        answered: Callable[[Alpha, int], None] | None = None,
    ) -> None:
        self.timings: list[Timing] = []
        self.notes: list[str] = []
        self._load, self._settings, self._batch_size = load, settings, batch_size
        self._journal = journal
        self._asked, self._answered = asked, answered
        self._tokens = {**journal.tokens} if journal else {}
        self._last: Alpha | None = None
        self._loaded: tuple[LiveModel, Answerer] | None = None

    def close(self) -> None:
        """Drop the model, if it was loaded."""
        if self._loaded is not None:
            self._loaded[0].close()
        self._loaded = None

    def __call__(self, alpha: Alpha, prompts: Sequence[Prompt]) -> list[str]:
        """The answers at one alpha, from the journal as far as it knows them."""
        if self._asked:
            self._asked(alpha)
        known = dict(self._journal.answers.get(alpha, {})) if self._journal else {}
        for _ in known:
            self._tell(alpha, 0)
        if len(known) < len(prompts):
            return self._ask(alpha, prompts, known)
        self._last = alpha
        return [known[place] for place in range(len(prompts))]

    def again(self, alpha: Alpha, prompts: Sequence[Prompt]) -> list[str]:
        """The same alpha once more, in batches of half the size: what differs is noise.

        Its own answers serve as drafts, so that it takes little more than one pass a batch.
        """
        known = dict(self._journal.again.get(alpha, {})) if self._journal else {}
        if len(known) < len(prompts):
            live, _ = self._ready()
            live.apply(alpha)
            answerer = live.make_answerer(self._settings, batch_size=max(1, self._batch_size // 2))
            answerer.set_drafts(prompts, self._tokens[alpha])
            note = self._journal.note if self._journal else lambda *_, **__: None
            answers = answerer.answer(prompts, known, partial(note, alpha, again=True))
            known = dict(enumerate(answers))
        return [known[place] for place in range(len(prompts))]

    def _ask(self, alpha: Alpha, prompts: Sequence[Prompt], known: dict[int, str]) -> list[str]:
        live, answerer = self._ready()
        if self._last is not None:
            answerer.set_drafts(prompts, self._tokens[self._last])
        self._last = alpha
        start = time.perf_counter()
        live.apply(alpha)
        applied = time.perf_counter() - start

        def answered(place: int, answer: str, tokens: list[int]) -> None:
            self._tokens.setdefault(alpha, {})[place] = tokens
            if self._journal:
                self._journal.note(alpha, place, answer, tokens)
            self._tell(alpha, len(tokens))

        answers = answerer.answer(prompts, known, answered)
        cost = answerer.cost
        self.timings.append(
            Timing(
                alpha,
                applied,
                cost.seconds,
                cost.answer_tokens,
                cost.forward_tokens,
                cost.plain_tokens,
            )
        )
        self.notes = answerer.notes
        return answers

    def _ready(self) -> tuple[LiveModel, Answerer]:
        if self._loaded is None:
            live = self._load()
            try:
                answerer = live.make_answerer(self._settings, batch_size=self._batch_size)
                self._loaded = live, answerer
            except BaseException:
                live.close()
                raise
        return self._loaded

    def _tell(self, alpha: Alpha, tokens: int) -> None:
        if self._answered:
            self._answered(alpha, tokens)


def fingerprint(
    plan: Plan, prompts: Sequence[Prompt], settings: AnswerSettings, placement: Placement
) -> str:
    """A digest of everything that decides the answers at an alpha."""
    from ..version import __version__

    folder = plan.base.path
    papers = [(str(name), (folder / name).stat()) for name in plan.base.sidecars()]
    document = [
        [__version__, version("transformers")],
        [placement.device, placement.quantize, placement.dtype, placement.batch_size],
        [[name, stat.st_size, stat.st_mtime_ns] for name, stat in papers],
        plan.identity(),
        digest(prompts),
        asdict(settings),
    ]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
