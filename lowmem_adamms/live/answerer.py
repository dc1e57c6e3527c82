"""Greedy answers of a live model, with three economies that leave them as they are.

Vision features are computed once and reused at every alpha (no vision weight is merged); the answer
at the previous alpha is a draft that one forward pass verifies, so that tokens are generated one by
one only from the first that differs; and prompts whose answers are known are not asked again. Each
can be switched off. Leaves to others: processors and chat templates (`encode.py`), the loop that
verifies and generates (`decoding.py`), the memory of features (`features.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..prompts import Prompt
from .draft_decoding import CannotResumeError, Decoding, Settings, Spent, Tokens
from .prompt_encoder import Inputs
from .transformers_model import check_can_run
from .vision_cache import FeatureCache

if TYPE_CHECKING:
    from .live_model import LiveModel


class Answerer:
    """Answers prompt sets with one live model; remembers its last answers as drafts for the next.

    Also remembers vision features and encoded prompts.
    """

    def __init__(self, live: LiveModel, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.spent = Spent()
        self.notes: list[str] = []
        self._live = live
        check_can_run(live.model)
        self._encoder = live.encoder
        self._features = FeatureCache(self.settings.vision_bytes)
        self._drafts: dict[Prompt, Tokens] = {}
        self._drafting = self.settings.drafts
        self._layout: tuple[tuple[Prompt, ...], Any] | None = None

    def __call__(
        self,
        prompts: Sequence[Prompt | str],
        known: Mapping[int, str] | None = None,
        answered: Callable[[int, str, Tokens], None] | None = None,
    ) -> list[str]:
        """One answer per prompt.

        known: answers by place that need not be made again; a batch is left out if all of it is
        known. answered: called with place, answer and its tokens as they come.
        """
        asked = tuple(p if isinstance(p, Prompt) else Prompt(p) for p in prompts)
        self.spent = Spent()
        start = time.perf_counter()
        answers = dict(known or {})
        if self._layout is None or self._layout[0] != asked:
            self._layout = asked, self._encoder.batches(asked, self.settings.batch_size)
            self._note_length(asked)
        with torch.inference_mode(), self._vision():
            for batch in self._layout[1]:
                if all(place in answers for place in batch.places):
                    continue
                for place, answer, tokens in self._answer(batch.places, asked):
                    if answered and place not in answers:
                        answered(place, answer, tokens)
                    answers.setdefault(place, answer)
        self.spent.seconds = time.perf_counter() - start
        return [answers[place] for place in range(len(asked))]

    def expect(self, prompts: Sequence[Prompt], tokens: Mapping[int, Tokens]) -> None:
        """Take tokens, by place, as the drafts of the next answers."""
        self._drafts |= {prompts[place]: found for place, found in tokens.items()}

    def _answer(
        self, places: Sequence[int], asked: Sequence[Prompt]
    ) -> Iterator[tuple[int, str, Tokens]]:
        prompts = [asked[place] for place in places]
        drafts = [self._drafts.get(prompt, []) if self._drafting else [] for prompt in prompts]
        inputs = self._encoder(prompts)
        try:
            tokens = self._decode(inputs, drafts)
        except CannotResumeError as error:
            self._drafting = False
            self.notes.append(str(error))
            tokens = self._decode(inputs, [[] for _ in prompts])
        for place, prompt, found in zip(places, prompts, tokens, strict=True):
            self._drafts[prompt] = found
            yield place, self._encoder.decode(found), found

    def _decode(self, inputs: Inputs, drafts: Sequence[Tokens]) -> list[Tokens]:
        decoding = Decoding(self._live.model, drafts, self.settings, self.spent)
        return decoding.run(inputs, self._encoder.tokenizer)

    def _note_length(self, asked: Sequence[Prompt]) -> None:
        """Positions beyond those of the training give answers all the same, of whatever worth."""
        assert self._layout
        said = [
            level.get("max_position_embeddings") for level in self._live.plan.base.config_levels
        ]
        most = next((number for number in reversed(said) if isinstance(number, int)), None)
        longest = max(self._layout[1], key=lambda batch: batch.length, default=None)
        if longest and most and (length := longest.length + self.settings.max_new_tokens) > most:
            name = asked[longest.places[0]].id or "a prompt"
            self.notes.append(
                f"{name}: {length} tokens with the answer, and the base was made for {most}"
            )

    @contextmanager
    def _vision(self) -> Iterator[None]:
        """Vision features from memory inside the block, if no weight they depend on is merged."""
        if self.settings.vision_cache and self._live.vision:
            with self._features.over(self._live.model, self._live.vision):
                yield
        else:
            yield
