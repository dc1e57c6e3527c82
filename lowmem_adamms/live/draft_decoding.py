"""Greedy decoding of one batch, drafts first.

A draft is fed behind its prompt, one forward pass tells how much of it the model would have said
itself, and tokens are generated one by one only from there. Works inside transformers' generate(),
which prepares each family's own inputs. Leaves to others: where drafts come from (`generate.py`).
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .prompt_encoder import Inputs
from .transformers_model import quiet

Tokens = list[int]
_PLACEHOLDER = re.compile(r"(image|video|audio|vision)\w*_token_(id|index)")


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are made. Two runs are comparable if these and the prompts are the same.

    max_new_tokens, batch_size: of one answer, of one forward pass. drafts, vision_cache: the
    economies. vision_bytes: how much memory kept vision features may take.
    """

    max_new_tokens: int = 64
    batch_size: int = 8
    drafts: bool = True
    vision_cache: bool = True
    vision_bytes: int = 1 << 30


@dataclass(slots=True)
class Spent:
    """What answering took. Forward tokens count every position computed, padding included.

    plain_tokens: forward tokens that the same answers take without drafts.
    """

    seconds: float = 0.0
    forward_tokens: int = 0
    plain_tokens: int = 0
    answer_tokens: int = 0
    passes: int = 0


class CannotResumeError(Exception):
    """The model's cache cannot be cut back to where a draft was refused."""


class Decoding:
    """One batch, from its prompts to its answers, verifying drafts first.

    drafts: per row, tokens that the answer is expected to begin with (may be empty). spent: what
    it takes is added there.
    """

    def __init__(
        self, model: Any, drafts: Sequence[Tokens], settings: Settings, spent: Spent
    ) -> None:
        self._model, self._settings, self._spent = model, settings, spent
        self._drafts = [_usable(draft, model, settings) for draft in drafts]
        self._longest = max(map(len, self._drafts))
        self._ends: frozenset[int] = frozenset()
        self._answers: list[Tokens] = [[] for _ in drafts]

    def run(self, inputs: Inputs, tokenizer: Any) -> list[Tokens]:
        """The answers' tokens, the end token included."""
        generation = importlib.import_module("transformers").GenerationConfig(
            do_sample=False,
            max_new_tokens=self._settings.max_new_tokens + self._longest,
            eos_token_id=_end_tokens(self._model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
        )
        self._ends = frozenset(generation.eos_token_id)
        extended = self._extended(inputs, tokenizer.pad_token_id)
        # transformers fills what is unset from the model's own, such as beams or a kind of cache.
        own, self._model.generation_config = self._model.generation_config, generation
        try:
            with quiet():
                self._model.generate(
                    **extended, generation_config=generation, custom_generate=self._decode
                )
        finally:
            self._model.generation_config = own
        width = inputs["input_ids"].shape[1] + max(map(len, self._answers)) - 1
        self._spent.plain_tokens += len(self._answers) * width
        self._spent.answer_tokens += sum(map(len, self._answers))
        return self._answers

    def _extended(self, inputs: Inputs, pad: int) -> Inputs:
        """The inputs with each row's draft behind its prompt, and its token types as for text."""
        if not self._longest:
            return inputs
        ids = inputs["input_ids"]
        rows = [draft + [pad] * (self._longest - len(draft)) for draft in self._drafts]
        tail = torch.tensor(rows, dtype=ids.dtype, device=ids.device)
        out = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.shape == ids.shape:
                filled = torch.full_like(tail, int(name == "attention_mask"), dtype=value.dtype)
                out[name] = torch.cat([value, tail if name == "input_ids" else filled], dim=1)
        if "logits_to_keep" in _parameters(self._model):
            out["logits_to_keep"] = self._longest + 1
        return out

    def _decode(self, model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The decoding loop that transformers' generate() hands over to."""
        for name in ("logits_processor", "stopping_criteria", "generation_config"):
            kwargs.pop(name, None)
        prepared = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        outputs = model(**prepared, return_dict=True)
        self._spend(input_ids)
        chosen = outputs.logits[:, -(self._longest + 1) :].float().argmax(-1)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        kwargs.pop("logits_to_keep", None)
        if "logits_to_keep" in _parameters(model):
            kwargs["logits_to_keep"] = 1
        resumes = _can_resume(outputs)
        if self._longest and not resumes:
            raise CannotResumeError(
                f"drafts are off: the cache of {type(model).__name__} cannot be cut"
            )
        leaving = self._settings.drafts and resumes
        taken = self._verify(chosen.tolist(), leaving=leaving)
        going = [row for row, count in enumerate(taken) if count is not None]
        if going and self._longest:
            input_ids, kwargs = _resume(input_ids, kwargs, self._longest, taken)
        elif going:
            input_ids, kwargs = _select(input_ids, kwargs, going)
        return self._go_on(model, input_ids, kwargs, going, leaving)

    def _go_on(
        self,
        model: Any,
        input_ids: torch.Tensor,
        kwargs: dict[str, Any],
        going: list[int],
        leaving: bool,
    ) -> torch.Tensor:
        """Token by token, for the rows that are still `going`; leaving: those that end drop out."""
        last = [self._answers[row][-1] for row in going]
        while going:
            ids = torch.tensor(last, dtype=input_ids.dtype, device=input_ids.device)
            input_ids = torch.cat([input_ids, ids[:, None]], dim=1)
            prepared = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1, **kwargs
            )
            outputs = model(**prepared, return_dict=True)
            self._spend(ids)
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
            found = outputs.logits[:, -1].float().argmax(-1).tolist()
            for row, token in zip(going, found, strict=True):
                if not self._ended(row):
                    self._answers[row].append(token)
            left = [i for i, row in enumerate(going) if not self._ended(row)]
            if leaving and left:
                input_ids, kwargs = _select(input_ids, kwargs, left)
                going, last = [going[i] for i in left], [found[i] for i in left]
            else:
                going, last = (going if left else []), found
        return input_ids

    def _verify(self, chosen: list[list[int]], *, leaving: bool) -> list[int | None]:
        """How many draft tokens each row keeps, given the model's choice after each of them.

        None for a row whose answer is complete; the others' answers get the choice that follows.
        leaving: whether complete rows leave the batch; if not, they stay till all are done.
        """
        taken: list[int | None] = []
        for row, (draft, choice) in enumerate(zip(self._drafts, chosen, strict=True)):
            count = next((i for i, token in enumerate(draft) if choice[i] != token), len(draft))
            # Nothing is said behind an end, even if the model happened to agree with what is there
            last = next((i for i, token in enumerate(draft[:count]) if token in self._ends), count)
            count = min(count, last + 1)
            self._answers[row] = draft[:count]
            if not self._ended(row):
                self._answers[row].append(choice[count])
            taken.append(None if self._ended(row) else count)
        if not leaving and any(count is not None for count in taken):
            return [count or 0 for count in taken]
        return taken

    def _ended(self, row: int) -> bool:
        answer = self._answers[row]
        return len(answer) >= self._settings.max_new_tokens or (
            bool(answer) and answer[-1] in self._ends
        )

    def _spend(self, computed: torch.Tensor) -> None:
        self._spent.forward_tokens += computed.numel()
        self._spent.passes += 1


def _usable(draft: Tokens, model: Any, settings: Settings) -> Tokens:
    """A draft up to the first token that a prompt may only hold where an image or video stands.

    A broken model may well answer with one; read as part of a prompt it would ask for features.
    """
    settled = model.config.to_dict()
    places = {settled[name] for name in settled if _PLACEHOLDER.fullmatch(name)}
    end = next((i for i, token in enumerate(draft) if token in places), len(draft))
    return draft[: min(end, settings.max_new_tokens)]


def _resume(
    input_ids: torch.Tensor, kwargs: dict[str, Any], longest: int, taken: Sequence[int | None]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The state after a verified draft, for the rows that go on.

    Rows keep different numbers of draft tokens. The cache is cut behind the longest that is kept;
    in shorter rows what was refused stays in it but is masked, and positions go on from each row's
    own last token.
    """
    rows = [row for row, count in enumerate(taken) if count is not None]
    counts = [count for count in taken if count is not None]
    start = input_ids.shape[1] - longest
    width = start + max(counts)
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = input_ids.new_ones(input_ids.shape[0], input_ids.shape[1] + 1)
    mask = torch.cat([mask[:, :width], mask[:, -1:]], dim=1)
    for row, count in zip(rows, counts, strict=True):
        mask[row, start + count : width] = 0
    out: dict[str, Any] = {**kwargs, "attention_mask": mask}
    for name, value in kwargs.items():
        if name.endswith("token_type_ids") and isinstance(value, torch.Tensor):
            out[name] = torch.cat([value[:, :width], value[:, -1:]], dim=1)
    if (positions := kwargs.get("position_ids")) is not None:
        batch = input_ids.shape[0]
        positions = positions.expand(*positions.shape[:-2], batch, positions.shape[-1])
        ends = torch.tensor([start + (count or 0) - 1 for count in taken], device=positions.device)
        index = ends.view(-1, 1).expand(*positions.shape[:-1], 1)
        following = positions.gather(-1, index) + 1
        out["position_ids"] = torch.cat([positions[..., :width], following], dim=-1)
    _cut(out["past_key_values"], width)
    return _select(input_ids[:, :width], out, rows)


def _select(
    input_ids: torch.Tensor, kwargs: dict[str, Any], rows: Sequence[int]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Only these rows of the batch."""
    if len(rows) == input_ids.shape[0]:
        return input_ids, kwargs
    index = torch.tensor(rows, device=input_ids.device)
    out = dict(kwargs)
    for name, value in kwargs.items():
        if name == "position_ids" and value is not None:
            wide = value.expand(*value.shape[:-2], input_ids.shape[0], value.shape[-1])
            out[name] = wide.index_select(-2, index)
        elif (name == "attention_mask" or name.endswith("token_type_ids")) and value is not None:
            out[name] = value.index_select(0, index)
    for layer in kwargs["past_key_values"].layers:
        layer.keys = layer.keys.index_select(0, index)
        layer.values = layer.values.index_select(0, index)
    return input_ids.index_select(0, index), out


def _cut(cache: Any, width: int) -> None:
    """Only the first `width` positions of every layer."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :width, :], layer.values[..., :width, :]


def _can_resume(outputs: Any) -> bool:
    """Whether the cache can be cut: every layer keeps all positions (no sliding window)."""
    layers = getattr(outputs.get("past_key_values"), "layers", [None])
    return all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the generation config's, or else the tokenizer's."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


def _parameters(model: Any) -> Any:
    return inspect.signature(model.forward).parameters
