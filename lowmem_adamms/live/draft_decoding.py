"""Greedy decoding of one batch that verifies drafts first.

A draft follows its prompt, one forward pass tells how many of its tokens the model would have
chosen itself, and only from there tokens are generated one by one. This runs inside transformers'
generate(), which prepares the inputs that each family of models needs.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from ..answers import round_confidence
from ..settings import AnswerSettings
from .prompt_encoder import Inputs
from .transformers_model import quiet

Tokens = list[int]
ModelKwargs = dict[str, Any]
_POSITIONS_AT_ONCE = 8  # of a large vocabulary a position's probabilities take half a megabyte
_PLACEHOLDER_SETTING = re.compile(r"(image|video|audio|vision)\w*_token_(id|index)")


@dataclass(slots=True)
class Cost:
    """What answering took. Forward tokens are all positions computed, padding included.

    plain_tokens: forward tokens that the same answers would take without drafts.
    """

    seconds: float = 0.0
    forward_tokens: int = 0
    plain_tokens: int = 0
    answer_tokens: int = 0
    passes: int = 0


@dataclass(slots=True)
class DecodedAnswer:
    """The tokens of an answer, end token included, and how sure the model was of each.

    log_probabilities: natural logarithms of the tokens' probabilities. entropies: of the
    distributions that they were chosen from, in nats.
    """

    tokens: Tokens = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    @property
    def log_probability(self) -> float | None:
        """The mean over the tokens; None if it is no number."""
        return round_confidence(fmean(self.log_probabilities))

    @property
    def entropy(self) -> float | None:
        """The mean over the tokens; None if it is no number."""
        return round_confidence(fmean(self.entropies))

    def append(self, token: int, log_probability: float, entropy: float) -> None:
        """Add a token."""
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        self.entropies.append(entropy)


class CannotResumeError(Exception):
    """The model's cache cannot be cut back to where a draft was refused."""


class BatchDecoder:
    """Decodes one batch.

    drafts: for each row, tokens that its answer is expected to begin with (may be empty). cost:
    what it takes is added there.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        drafts: Sequence[Sequence[int]],
        settings: AnswerSettings,
        cost: Cost,
    ) -> None:
        self._model, self._settings, self._cost = model, settings, cost
        self._pad_token: int = tokenizer.pad_token_id
        self._end_tokens = _find_end_tokens(model, tokenizer)
        self._drafts = [_cut_draft(draft, model, settings.max_new_tokens) for draft in drafts]
        self._draft_width = max(map(len, self._drafts))
        self._answers = [DecodedAnswer() for _ in drafts]

    def decode(self, inputs: Inputs) -> list[DecodedAnswer]:
        """Each row's answer.

        Raises CannotResumeError if there are drafts and the model's cache cannot be cut.
        """
        config = importlib.import_module("transformers").GenerationConfig(
            do_sample=False,
            max_new_tokens=self._settings.max_new_tokens + self._draft_width,
            eos_token_id=self._end_tokens,
            pad_token_id=self._pad_token,
            use_cache=True,
        )
        inputs_and_drafts = self._append_drafts(inputs)
        # transformers fills what is unset from the model's own, such as beams or a kind of cache
        own_config, self._model.generation_config = self._model.generation_config, config
        try:
            with quiet():
                self._model.generate(
                    **inputs_and_drafts, generation_config=config, custom_generate=self._run
                )
        finally:
            self._model.generation_config = own_config
        lengths = [len(answer.tokens) for answer in self._answers]
        width = inputs["input_ids"].shape[1] + max(lengths) - 1
        self._cost.plain_tokens += len(lengths) * width
        self._cost.answer_tokens += sum(lengths)
        return self._answers

    def _append_drafts(self, inputs: Inputs) -> Inputs:
        """The inputs with each row's draft behind its prompt, and token types as for text."""
        if not self._draft_width:
            return inputs
        ids = inputs["input_ids"]
        padding = [self._pad_token]
        rows = [draft + padding * (self._draft_width - len(draft)) for draft in self._drafts]
        tail = torch.tensor(rows, dtype=ids.dtype, device=ids.device)
        extended = dict(inputs)
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor) or value.shape != ids.shape:
                continue
            addition = tail
            if name != "input_ids":
                addition = torch.full_like(tail, int(name == "attention_mask"), dtype=value.dtype)
            extended[name] = torch.cat([value, addition], dim=1)
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            extended["logits_to_keep"] = self._draft_width + 1
        return extended

    def _run(self, model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The decoding loop that transformers' generate() hands over to."""
        for name in ("logits_processor", "stopping_criteria", "generation_config"):
            kwargs.pop(name, None)
        outputs, kwargs = self._forward(
            input_ids, kwargs, input_ids.numel(), is_first_iteration=True
        )
        can_resume = _can_cut_cache(outputs)
        if self._draft_width and not can_resume:
            raise CannotResumeError(
                f"drafts are off: the cache of {type(model).__name__} cannot be cut"
            )
        logits = outputs.logits[:, -(self._draft_width + 1) :]
        # Row by row: in float32 all rows together may take more memory than the model's own logits
        kept_tokens = self._verify_drafts([row.float().argmax(-1).tolist() for row in logits])
        for answer, row in zip(self._answers, logits, strict=True):
            confidence = _measure_confidence(row[: len(answer.tokens)])
            answer.log_probabilities, answer.entropies = confidence
        rows = self._unfinished(range(len(self._answers)))
        if not rows:
            return input_ids
        if self._draft_width:
            start = input_ids.shape[1] - self._draft_width
            width = start + max(kept_tokens[row] for row in rows)
            ends = [start + count for count in kept_tokens]
            input_ids, kwargs = _cut_behind(input_ids, kwargs, width, ends)
        self._generate(input_ids, kwargs, drop_finished=self._settings.drafts and can_resume)
        return input_ids

    def _verify_drafts(self, chosen: list[list[int]]) -> list[int]:
        """Begin the answers with what the model agrees to; returns how much of each draft that is.

        chosen: for each row, the model's choice after the prompt and after each draft token.
        Unless that ends an answer, it gets the model's choice that follows.
        """
        kept_tokens = []
        for row, (draft, choices) in enumerate(zip(self._drafts, chosen, strict=True)):
            kept: Tokens = []
            for token, choice in zip(draft, choices, strict=False):
                # Nothing follows an end, even if the model happens to agree with it
                if token != choice or self._is_end(kept):
                    break
                kept.append(token)
            self._answers[row].tokens = kept
            kept_tokens.append(len(kept))
            if not self._is_finished(row):
                self._answers[row].tokens = [*kept, choices[len(kept)]]
        return kept_tokens

    def _generate(
        self, input_ids: torch.Tensor, kwargs: ModelKwargs, *, drop_finished: bool
    ) -> None:
        """Token by token. drop_finished: whether rows that end leave the batch."""
        rows = list(range(len(self._answers)))
        while unfinished := self._unfinished(rows):
            if drop_finished and len(unfinished) < len(rows):
                kept = [rows.index(row) for row in unfinished]
                input_ids, kwargs = _select_rows(input_ids, kwargs, kept)
                rows = unfinished
            last = [[self._answers[row].tokens[-1]] for row in rows]
            input_ids = torch.cat([input_ids, input_ids.new_tensor(last)], dim=1)
            outputs, kwargs = self._forward(input_ids, kwargs, len(rows), next_sequence_length=1)
            logits = outputs.logits[:, -1].float()
            chosen = logits.argmax(-1).tolist(), *_measure_confidence(logits)
            for row, *choice in zip(rows, *chosen, strict=True):
                if not self._is_finished(row):
                    self._answers[row].append(*choice)

    def _forward(
        self, input_ids: torch.Tensor, kwargs: ModelKwargs, tokens: int, **options: Any
    ) -> tuple[Any, ModelKwargs]:
        """One pass over the last `tokens` of all rows together; also the next pass's arguments."""
        prepared = self._model.prepare_inputs_for_generation(input_ids, **options, **kwargs)
        outputs = self._model(**prepared, return_dict=True)
        self._cost.forward_tokens += tokens
        self._cost.passes += 1
        return outputs, self._model._update_model_kwargs_for_generation(outputs, kwargs)

    def _unfinished(self, rows: Sequence[int]) -> list[int]:
        return [row for row in rows if not self._is_finished(row)]

    def _is_finished(self, row: int) -> bool:
        answer = self._answers[row].tokens
        return len(answer) >= self._settings.max_new_tokens or self._is_end(answer)

    def _is_end(self, answer: Tokens) -> bool:
        return bool(answer) and answer[-1] in self._end_tokens


def _measure_confidence(logits: torch.Tensor) -> tuple[list[float], list[float]]:
    """Log-probability of the likeliest token, and entropy, at each position.

    logits: [positions, vocabulary], of any float dtype. A few positions at a time, so that a long
    draft of a large vocabulary takes no second copy of all its logits.
    """
    found = []
    for some in torch.split(logits, _POSITIONS_AT_ONCE):
        # Tokens that the model rules out have -inf, and are to add nothing instead of NaN
        logs = some.float().log_softmax(-1).clamp_(min=torch.finfo(torch.float32).min)
        found.append(torch.stack([logs.amax(-1), -(logs.exp() * logs).sum(-1)]))
    log_probabilities, entropies = torch.cat(found, 1).tolist()
    return log_probabilities, entropies


def _find_end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the generation config's, or else the tokenizer's."""
    tokens = getattr(model.generation_config, "eos_token_id", None)
    tokens = tokenizer.eos_token_id if tokens is None else tokens
    return list(tokens) if isinstance(tokens, (list, tuple)) else [tokens]


def _cut_draft(draft: Sequence[int], model: Any, max_new_tokens: int) -> Tokens:
    """A draft up to the first token that a prompt may only hold where an image or video is.

    A broken model may well answer with one; read as part of a prompt it would ask for features.
    """
    config = model.config.to_dict()
    placeholders = {config[name] for name in config if _PLACEHOLDER_SETTING.fullmatch(name)}
    first = next((i for i, token in enumerate(draft) if token in placeholders), len(draft))
    return list(draft[: min(first, max_new_tokens)])


# The state between two passes: all tokens so far, and the arguments of the next pass


def _cut_behind(
    input_ids: torch.Tensor, kwargs: ModelKwargs, width: int, ends: Sequence[int]
) -> tuple[torch.Tensor, ModelKwargs]:
    """The first `width` positions, of which each row keeps those before its end.

    What lies between stays in the cache but is masked, and positions go on from each row's own last
    token.
    """
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = input_ids.new_ones(input_ids.shape[0], input_ids.shape[1] + 1)
    mask = torch.cat([mask[:, :width], mask[:, -1:]], dim=1)
    for row, end in enumerate(ends):
        mask[row, end:width] = 0
    cut: ModelKwargs = {**kwargs, "attention_mask": mask}
    for name, value in kwargs.items():
        if name.endswith("token_type_ids") and isinstance(value, torch.Tensor):
            cut[name] = torch.cat([value[:, :width], value[:, -1:]], dim=1)
    if (positions := kwargs.get("position_ids")) is not None:
        positions = _expand_rows(positions, input_ids.shape[0])
        last = torch.tensor([end - 1 for end in ends], device=positions.device)
        index = last.view(-1, 1).expand(*positions.shape[:-1], 1)
        following = positions.gather(-1, index) + 1
        cut["position_ids"] = torch.cat([positions[..., :width], following], dim=-1)
    for layer in kwargs["past_key_values"].layers:
        layer.keys, layer.values = layer.keys[..., :width, :], layer.values[..., :width, :]
    return input_ids[:, :width], cut


def _select_rows(
    input_ids: torch.Tensor, kwargs: ModelKwargs, rows: Sequence[int]
) -> tuple[torch.Tensor, ModelKwargs]:
    """Only these rows of the batch."""
    index = torch.tensor(rows, device=input_ids.device)
    selected = dict(kwargs)
    for name, value in kwargs.items():
        if value is None:
            continue
        if name == "position_ids":
            selected[name] = _expand_rows(value, input_ids.shape[0]).index_select(-2, index)
        elif name == "attention_mask" or name.endswith("token_type_ids"):
            selected[name] = value.index_select(0, index)
    kwargs["past_key_values"].batch_select_indices(index)
    return input_ids.index_select(0, index), selected


def _expand_rows(positions: torch.Tensor, rows: int) -> torch.Tensor:
    """Position ids of shape [..., rows, width], of which one row may stand for all."""
    return positions.expand(*positions.shape[:-2], rows, positions.shape[-1])


def _can_cut_cache(outputs: Any) -> bool:
    """Whether every layer of the cache keeps all positions (there is no sliding window)."""
    layers = getattr(outputs.get("past_key_values"), "layers", [None])
    return all(type(layer).__name__ == "DynamicLayer" for layer in layers)
