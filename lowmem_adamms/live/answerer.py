"""Greedy answers of a model, with three ways to save time that leave the answers as they are.

Vision features are computed once and reused at every alpha. The answer at the previous alpha is a
draft that one forward pass verifies, so that tokens are generated one by one only from the first
that differs. Prompts whose answers are known are not asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from ..answers import Answer
from ..prompts import Prompt, as_prompt
from ..settings import AnswerSettings
from .draft_decoding import BatchDecoder, CannotResumeError, Cost, DecodedAnswer
from .prompt_encoder import Batch, Encoder, Inputs
from .transformers_model import check_runnable
from .vision_cache import VisionCache

VISION_CACHE_BYTES = 1 << 30

RunBatches = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""As `map`; what it returns may be in any order."""
Answered = Callable[[int, Answer], None]
"""Called with a prompt's place and its answer."""


class Answerer:
    """Answers prompt sets; remembers its last answers as drafts, and vision features.

    model: a transformers module. encoder: of that model. batch_size: prompts answered at a time.
    vision_names: the parameters outside the decoder, of which none may be merged; empty if there
    are none.

    `cost` is what the last call took; `notes` are what the user should know of the answers, those
    given first. run_batches: how batches are done, at first one after the other.
    """

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        settings: AnswerSettings,
        *,
        batch_size: int,
        vision_names: frozenset[str],
        notes: Iterable[str] = (),
        run_batches: RunBatches = map,
    ) -> None:
        check_runnable(model)
        self.settings, self.batch_size = settings, batch_size
        self.cost = Cost()
        self.notes = list(notes)
        self._model, self._encoder = model, encoder
        self._run_batches = run_batches
        self._vision_names = vision_names
        self._vision_cache = VisionCache(VISION_CACHE_BYTES)
        self._drafts: dict[Prompt, Sequence[int]] = {}
        self._use_drafts = settings.drafts

    def answer(
        self,
        prompts: Sequence[Prompt | str | Mapping[str, Any]],
        known: Mapping[int, Answer] | None = None,
        answered: Answered | None = None,
    ) -> list[Answer]:
        """One answer for each prompt, in their order.

        known: answers by place that need not be made again; a batch is left out if all of it is
        known. answered: called for each new answer as soon as it is there.
        """
        asked = tuple(map(as_prompt, prompts))
        self.cost = Cost()
        start = time.perf_counter()
        answers = dict(known or {})
        batches = self._encoder.split_into_batches(asked, self.batch_size)
        self._note_too_long(batches, asked)
        vision: AbstractContextManager[None] = nullcontext()
        if self.settings.vision_cache and self._vision_names:
            vision = self._vision_cache.patch(self._model, self._vision_names)
        todo = [batch for batch in batches if not answers.keys() >= set(batch.places)]
        with torch.inference_mode(), vision:
            for done in self._run_batches(partial(self._answer_batch, asked), todo):
                for place, answer in done:
                    if place in answers:
                        continue
                    answers[place] = answer
                    if answered:
                        answered(place, answer)
        self.cost.seconds = time.perf_counter() - start
        return [answers[place] for place in range(len(asked))]

    def set_drafts(self, prompts: Sequence[Prompt], answers: Mapping[int, Answer]) -> None:
        """Take the tokens of answers, by the prompt's place, as the drafts of the next ones."""
        self._drafts |= {prompts[place]: answer.tokens for place, answer in answers.items()}

    def _answer_batch(self, asked: Sequence[Prompt], batch: Batch) -> list[tuple[int, Answer]]:
        prompts = [asked[place] for place in batch.places]
        tags = self.settings.reasoning_tags
        inputs = self._encoder.encode(prompts)
        no_drafts: list[Sequence[int]] = [() for _ in prompts]
        drafts = no_drafts
        if self._use_drafts:
            drafts = [self._drafts.get(prompt, ()) for prompt in prompts]
        try:
            decoded = self._decode(inputs, drafts)
        except CannotResumeError as error:
            self._use_drafts = False
            if str(error) not in self.notes:
                self.notes.append(str(error))
            decoded = self._decode(inputs, no_drafts)
        answers = []
        for prompt, found in zip(prompts, decoded, strict=True):
            text = self._encoder.read_answer(prompt, found.tokens, tags)
            answer = Answer(text, tuple(found.tokens), found.log_probability, found.entropy)
            self._drafts[prompt] = answer.tokens
            answers.append(answer)
        return list(zip(batch.places, answers, strict=True))

    def _decode(self, inputs: Inputs, drafts: Sequence[Sequence[int]]) -> list[DecodedAnswer]:
        tokenizer = self._encoder.tokenizer
        return BatchDecoder(self._model, tokenizer, drafts, self.settings, self.cost).decode(inputs)

    def _note_too_long(self, batches: Sequence[Batch], asked: Sequence[Prompt]) -> None:
        """Beyond the positions of its training a model answers all the same, but badly."""
        config = self._model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None or not batches:
            return
        longest = batches[0]  # they begin with the longest prompt
        tokens = longest.longest_tokens + self.settings.max_new_tokens
        name = asked[longest.places[0]].id or "a prompt"
        note = f"{name}: {tokens} tokens with the answer, and the base was made for {limit}"
        if tokens > limit and note not in self.notes:
            self.notes.append(note)
