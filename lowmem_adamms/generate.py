"""Greedy answers of a live model, with three economies that leave them as they are.

Vision features are computed once and reused at every alpha (no vision weight is merged); the answer
at the previous alpha is a draft that one forward pass verifies, so that tokens are generated one by
one only from the first that differs; and prompts whose answers are known are not asked again. Each
can be switched off. Leaves to others: processors and chat templates (`encode.py`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from .encode import Encoder, Inputs, size_of
from .loading import quiet
from .prompts import Prompt

if TYPE_CHECKING:
    from .live import LiveModel

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


class Answerer:
    """Answers prompt sets with one live model; remembers its last answers as drafts for the next.

    Also remembers vision features and encoded prompts.
    """

    def __init__(self, live: LiveModel, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.spent = Spent()
        self.notes: list[str] = []
        self._live = live
        folder = live.plan.base.path
        self._encoder = Encoder(live.model, folder, trust_remote_code=live.trust_remote_code)
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
            decoding = Decoding(self._live.model, drafts, self.settings)
            tokens = decoding.run(inputs, self._encoder.tokenizer)
        except CannotResumeError as error:
            self._drafting = False
            self.notes.append(str(error))
            self._count(decoding.spent)
            decoding = Decoding(self._live.model, [[] for _ in prompts], self.settings)
            tokens = decoding.run(inputs, self._encoder.tokenizer)
        self._count(decoding.spent)
        for place, prompt, found in zip(places, prompts, tokens, strict=True):
            self._drafts[prompt] = found
            yield place, self._encoder.decode(found), found

    def _count(self, spent: Spent) -> None:
        mine = self.spent
        mine.forward_tokens += spent.forward_tokens
        mine.plain_tokens += spent.plain_tokens
        mine.answer_tokens += spent.answer_tokens
        mine.passes += spent.passes

    @contextmanager
    def _vision(self) -> Iterator[None]:
        """Vision features from memory inside the block, if no weight they depend on is merged."""
        if self.settings.vision_cache and self._live.vision:
            with self._features.over(self._live.model, self._live.vision):
                yield
        else:
            yield


class CannotResumeError(Exception):
    """The model's cache cannot be cut back to where a draft was refused."""


class FeatureCache:
    """What the vision side made of the images it was given, by the images' bytes.

    limit: bytes of features to keep; when they are spent, further ones are computed every time.
    """

    def __init__(self, limit: int) -> None:
        self._room = limit
        self._kept: dict[str, Any] = {}

    @contextmanager
    def over(self, model: Any, vision: frozenset[str]) -> Iterator[None]:
        """Inside the block, take the features from memory where they are there.

        vision: the parameters outside the decoder. transformers' own models have one method for
        features; of remote code, the largest modules made of those parameters alone are taken.
        """
        inner = model.base_model
        if hasattr(inner, "get_image_features"):
            places = [(inner, "get_image_features")]
        else:
            places = [(module, "forward") for module in _largest(model, vision)]
        # Others (accelerate) may have put a method of theirs on the same module.
        before = [vars(owner).get(name) for owner, name in places]
        for owner, name in places:
            setattr(owner, name, self._remembering(getattr(owner, name)))
        try:
            yield
        finally:
            for (owner, name), old in zip(places, before, strict=True):
                if old is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, old)

    def _remembering(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(compute)
        named = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]

        @functools.wraps(compute)  # transformers looks at the signature
        def remembered(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            key = _digest([(name, given[name]) for name in named if name in given])
            if key in self._kept:
                return _slim(self._kept[key])
            made = _slim(compute(*args, **kwargs))
            if (size := size_of(made)) <= self._room:
                self._kept[key] = made
                self._room -= size
            return _slim(made)

        return remembered


def _largest(model: Any, vision: frozenset[str], path: str = "") -> Iterator[Any]:
    """The modules, as near the top as can be, all of whose parameters are in `vision`."""
    for name, child in model.named_children():
        here = f"{path}{name}."
        held = {here + inner for inner, _ in child.named_parameters()}
        if held and held <= vision:
            yield child
        elif held & vision:
            yield from _largest(child, vision, here)


def _slim(made: Any) -> Any:
    """A copy of an output, without states of every vision layer: no decoder reads those."""
    if not isinstance(made, dict):
        return made
    left_out = ("hidden_states", "attentions")
    return type(made)(**{name: value for name, value in made.items() if name not in left_out})


def _digest(value: Any) -> str:
    """A digest of tensors and plain values, nested in lists, tuples and dicts."""
    digest = blake3()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
            flat = item.detach().cpu().contiguous().view(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        elif isinstance(item, dict):
            add(list(item.items()))
        elif isinstance(item, (list, tuple)):
            digest.update(f"[{len(item)}".encode())
            for inner in item:
                add(inner)
        else:
            digest.update(repr(item).encode())

    add(value)
    return digest.hexdigest()


class Decoding:
    """One batch, from its prompts to its answers, verifying drafts first.

    drafts: per row, tokens that the answer is expected to begin with (may be empty).
    """

    def __init__(self, model: Any, drafts: Sequence[Tokens], settings: Settings) -> None:
        self._model, self._settings = model, settings
        self._drafts = [_usable(draft, model, settings) for draft in drafts]
        self._longest = max(map(len, self._drafts))
        self._ends: frozenset[int] = frozenset()
        self._answers: list[Tokens] = [[] for _ in drafts]
        self.spent = Spent()

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
        self.spent.plain_tokens = len(self._answers) * width
        self.spent.answer_tokens = sum(map(len, self._answers))
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
        taken = self._verify(chosen.tolist(), leaving=self._settings.drafts and resumes)
        going = [row for row, count in enumerate(taken) if count is not None]
        if going and self._longest:
            input_ids, kwargs = _resume(input_ids, kwargs, self._longest, taken)
        elif going:
            input_ids, kwargs = _select(input_ids, kwargs, going)
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
            if self._settings.drafts and resumes and left:
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
        self.spent.forward_tokens += computed.numel()
        self.spent.passes += 1


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
