"""Answers: whatever is saved by drafts and kept features, they are those of transformers itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import talk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_adamms.answers import Answer
from lowmem_adamms.live import answerer as answering
from lowmem_adamms.live.answerer import Answerer
from lowmem_adamms.live.draft_decoding import DecodedAnswer, _measure_confidence
from lowmem_adamms.prompts import Prompt
from lowmem_adamms.settings import AnswerSettings

if TYPE_CHECKING:
    from conftest import Talkers

    from lowmem_adamms import LiveModel

NEW = talk.NEW
SETTINGS = AnswerSettings(max_new_tokens=NEW)
NO_DRAFTS = AnswerSettings(max_new_tokens=NEW, drafts=False)
NO_FEATURES = AnswerSettings(max_new_tokens=NEW, vision_cache=False)
PLAIN = AnswerSettings(max_new_tokens=NEW, drafts=False, vision_cache=False)


def answerer_of(
    live: LiveModel, batch_size: int = 8, settings: AnswerSettings = SETTINGS
) -> Answerer:
    return live.make_answerer(settings, batch_size=batch_size)


def tokens_of(answerer: Answerer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The tokens of all answers."""
    return [list(answer.tokens) for answer in answers_of(answerer, prompts)]


def answers_of(answerer: Answerer, prompts: Sequence[Prompt]) -> list[Answer]:
    """All answers, which must be those that were told one by one."""
    found: dict[int, Answer] = {}
    answers = answerer.answer(prompts, answered=lambda place, answer: found.update({place: answer}))
    assert answers == [found[place] for place in range(len(prompts))]
    return answers


def asked_with(
    live: LiveModel, prompts: Sequence[Prompt], drafts: dict[int, list[int]], batch_size: int = 8
) -> tuple[list[list[int]], Answerer]:
    """Answers' tokens from these drafts, and the answerer, for what it took."""
    answerer = answerer_of(live, batch_size)
    answerer.set_drafts(prompts, {i: Answer("", tuple(row)) for i, row in drafts.items()})
    return tokens_of(answerer, prompts), answerer


def patched(model: Any) -> list[str]:
    """Modules with a method of their own, where their class has one."""
    names = ("forward", "get_image_features")
    return [path for path, module in model.named_modules() if set(names) & set(vars(module))]


VARIANTS = {
    "three": (3, SETTINGS),
    "nothing saved": (8, PLAIN),
    "one": (1, SETTINGS),
    "eight": (8, SETTINGS),
    "no drafts": (3, NO_DRAFTS),
    "no features": (3, NO_FEATURES),
}


# One for each way through the code: how images and positions are given, and what the cache holds
VISION = ("qwen2_vl", "qwen3_vl", "llava", "llava_onevision", "idefics3", "cogvlm", "mplug_owl2")


@pytest.mark.parametrize("family", [*VISION, "llama", "mistral"])
def test_at_every_alpha_answers_are_those_of_transformers(
    talker: Talkers, images: tuple[Path, ...], family: str
) -> None:
    live, prompts = talker(family), talk.ask(family, images)
    in_full = family in ("qwen2_vl", "cogvlm")
    names = list(VARIANTS)[: None if in_full else 2]
    answerers = {name: answerer_of(live, *VARIANTS[name]) for name in names}
    seen: list[list[list[int]]] = []
    for alpha in (0.0, 0.3, 0.6) if in_full else (0.0, 0.6):
        live.apply(alpha)
        seen.append(talk.reference(live, prompts))
        for name, answerer in answerers.items():
            assert tokens_of(answerer, prompts) == seen[-1], (name, alpha)
    flat = {tuple(answer) for answers in seen for answer in answers}
    assert len(flat) >= 6, "too few different answers to show anything"
    assert patched(live.model) == []


def test_a_cache_that_cannot_be_cut_switches_drafts_off_with_a_note(
    talker: Talkers, images: tuple[Path, ...]
) -> None:
    live, prompts = talker("mistral"), talk.ask("mistral", images)
    answerer = answerer_of(live, 3)
    for _ in range(3):
        tokens_of(answerer, prompts)
    assert answerer.notes == ["drafts are off: the cache of MistralForCausalLM cannot be cut"]
    assert answerer.cost.forward_tokens == answerer.cost.plain_tokens


def test_generate_remembers_from_call_to_call(talker: Talkers, images: tuple[Path, ...]) -> None:
    live, prompts = talker("llava"), talk.ask("llava", images)
    live.apply(0.2)
    first = live.generate(prompts, SETTINGS, batch_size=3)
    with talk.counted(live.model) as passes, talk.counted(talk.eye(live.model)) as seen:
        assert live.generate(prompts, SETTINGS) == first
        assert live.generate(prompts, batch_size=3) == first
        assert live.generate(prompts) == first
    assert (len(passes), len(seen)) == (6, 0)
    live.generate(prompts, batch_size=2)
    assert live._answerer is not None
    assert (live._answerer.settings, live._answerer.batch_size) == (SETTINGS, 2)


def test_plain_texts_repeated_ones_and_none_at_all_are_answered_in_order(talker: Talkers) -> None:
    live = talker("llava")
    live.apply(0.0)
    short, long = "Hm?", "What do you see on the way from the station to the old bridge?"
    one, other = (live.generate([text], SETTINGS, batch_size=1)[0] for text in (short, long))
    assert one != other
    asked: list[Prompt | str] = [short, long, short, Prompt(long)]
    assert live.generate(asked, batch_size=2) == [one, other, one, other]
    assert live.generate([]) == []


# How sure the model was


def is_as_sure(answers: Sequence[Answer], expected: Sequence[Answer]) -> bool:
    """Whether tokens are the same, and confidences but for what another order of sums makes."""
    return [answer.tokens for answer in answers] == [answer.tokens for answer in expected] and all(
        getattr(answer, name) == pytest.approx(getattr(other, name), abs=1e-4)
        for answer, other in zip(answers, expected, strict=True)
        for name in ("log_probability", "entropy")
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "cogvlm", "idefics3", "llama", "mistral"])
@pytest.mark.parametrize("how", ["three", "one", "eight", "no drafts"])
def test_confidences_are_those_of_transformers_own_logits(
    talker: Talkers, images: tuple[Path, ...], family: str, how: str
) -> None:
    """With drafts that are all right, partly right, and without any."""
    live, prompts = talker(family), talk.ask(family, images)
    answerer = answerer_of(live, *VARIANTS[how])
    for alpha in (0.0, 0.0, 0.3, 0.6):
        live.apply(alpha)
        assert is_as_sure(answers_of(answerer, prompts), talk.reference_answers(live, prompts))


def test_confidences_do_not_depend_on_drafts(talker: Talkers, images: tuple[Path, ...]) -> None:
    """Of any length, right as far as they go, and then wrong or longer than the answer."""
    live, prompts = talker("llava"), talk.ask("llava", images)
    live.apply(0.3)
    truth = talk.reference_answers(live, prompts)
    assert len({answer.log_probability for answer in truth}) > 3
    for right in range(NEW + 1):
        for rest in ([], [40, 41], [40] * NEW):
            answerer = answerer_of(live, 3)
            drafts = {i: Answer("", (*row.tokens[:right], *rest)) for i, row in enumerate(truth)}
            answerer.set_drafts(prompts, drafts)
            assert is_as_sure(answers_of(answerer, prompts), truth), (right, rest)


class LargestLogits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the positions of the largest float32 tensor over a vocabulary that is made."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.positions = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        is_float = isinstance(made, torch.Tensor) and made.dtype == torch.float32
        if is_float and made.shape[-1:] == (self.vocabulary,):
            self.positions = max(self.positions, made.numel() // self.vocabulary)
        return made


def test_no_copy_of_all_logits_is_made(
    talking: dict[str, Path], tiny_models: dict[str, Path], images: tuple[Path, ...]
) -> None:
    """The argmax takes one row of a batch in float32, its confidences eight positions of it."""
    prompts, vocabulary = talk.ask("llava", images), 0
    with talk.load(talking["llava"], tiny_models["llava_next"], "bf16") as live:
        vocabulary = live.model.get_output_embeddings().out_features
        answerer = answerer_of(live, 8)
        answerer.set_drafts(prompts, dict.fromkeys(range(len(prompts)), Answer("", (40,) * NEW)))
        with LargestLogits(vocabulary) as largest:
            answerer.answer(prompts)
    assert largest.positions == NEW + 1
    with LargestLogits(vocabulary) as largest:
        _measure_confidence(torch.zeros(100, vocabulary, dtype=torch.bfloat16))
    assert largest.positions == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confidences_of_known_distributions(dtype: torch.dtype) -> None:
    """More positions than are done at a time; a token ruled out adds nothing."""
    nan, inf = math.nan, math.inf
    even, sure, two, broken = [0.0] * 4, [-inf, 0.0, -inf, -inf], [0.0, 0.0, -inf, -inf], [nan] * 4
    logits = torch.tensor([even, sure, two, broken] * 5, dtype=dtype)
    found = zip(*_measure_confidence(logits), strict=True)
    half, quarter = math.log(1 / 2), math.log(1 / 4)
    expected = [(quarter, -quarter), (0, 0), (half, -half), (nan, nan)] * 5
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, nan_ok=True)
    decoded = DecodedAnswer([1, 1], [-0.0, -1e-8], [0.5, nan])
    assert (str(decoded.log_probability), decoded.entropy) == ("0.0", None)


# Drafts


@pytest.mark.parametrize("family", ["qwen2_vl", "cogvlm"])
def test_a_perfect_draft_costs_one_pass_a_batch(
    talker: Talkers, images: tuple[Path, ...], family: str
) -> None:
    live, prompts = talker(family), talk.ask(family, images)
    live.apply(0.3)
    answerer = answerer_of(live, 3)
    first = tokens_of(answerer, prompts)
    assert answerer.cost.passes > 2
    plain = answerer.cost.plain_tokens
    assert tokens_of(answerer, prompts) == first
    cost = answerer.cost
    assert cost.passes == 2
    assert cost.answer_tokens == sum(map(len, first))
    # The last token of an answer is verified as well, and need not go through the model otherwise
    assert cost.plain_tokens == plain
    assert cost.forward_tokens == plain + len(prompts)


@pytest.mark.parametrize("right", [0, 4, NEW - 1])
def test_only_what_follows_the_first_wrong_token_is_generated(
    talker: Talkers, images: tuple[Path, ...], right: int
) -> None:
    live = talker("llava_next")
    live.apply(0.1)
    prompts = talk.ask("llava_next", images)
    truth = talk.reference(live, prompts)
    place = next(place for place, answer in enumerate(truth) if len(answer) == NEW)
    prompt, answer = prompts[place : place + 1], truth[place]
    wrong = [token + 1 if token < 90 else token - 1 for token in answer[right:]]
    tokens, answerer = asked_with(live, prompt, {0: answer[:right] + wrong})
    assert tokens == [answer]
    assert answerer.cost.passes == NEW - right
    _, plain = asked_with(live, prompt, {})
    assert plain.cost.passes == NEW
    # The draft's ten tokens in the first pass, then one for each that was not kept
    assert answerer.cost.forward_tokens == plain.cost.forward_tokens + NEW - right


def test_drafts_may_be_longer_than_an_answer(talker: Talkers, images: tuple[Path, ...]) -> None:
    live, prompts = talker("qwen2_vl"), talk.ask("qwen2_vl", images)
    live.apply(0.2)
    longer = dict(enumerate(talk.reference(live, prompts, 2 * NEW)))
    assert any(len(answer) > NEW for answer in longer.values())
    tokens, answerer = asked_with(live, prompts, longer)
    assert tokens == [answer[:NEW] for answer in longer.values()]
    assert answerer.cost.passes == 1


def test_what_a_draft_holds_after_its_end_is_no_answer(
    talker: Talkers, images: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if it is what the model would go on with."""
    live, prompts = talker("llava"), talk.ask("llava", images)
    live.apply(0.3)
    truth = talk.reference(live, prompts)
    with monkeypatch.context() as endless:
        endless.setattr(live.model.generation_config, "eos_token_id", None)
        longer = talk.reference(live, prompts)
    assert [answer[: len(truth[place])] for place, answer in enumerate(longer)] == truth != longer
    tokens, answerer = asked_with(live, prompts, dict(enumerate(longer)))
    assert tokens == truth
    assert answerer.cost.passes == 1


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "cogvlm"])
def test_tokens_that_stand_for_images_in_a_draft_are_no_images(
    talker: Talkers, images: tuple[Path, ...], family: str
) -> None:
    """And drafts of all lengths share a batch."""
    live, prompts = talker(family), talk.ask(family, images)
    live.apply(0.0)
    config = live.model.config
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    marks = [token for name in names if (token := getattr(config, name, None)) is not None]
    truth = talk.reference(live, prompts)
    drafts = {place: [*answer[:place], *marks, 40] for place, answer in enumerate(truth[:5])}
    assert asked_with(live, prompts, drafts)[0] == truth


@pytest.mark.parametrize("family", ["qwen2_vl", "cogvlm", "llama"])
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_draft_whatever_changes_an_answer(
    talker: Talkers, images: tuple[Path, ...], family: str, data: st.DataObject
) -> None:
    live, prompts = talker(family), talk.ask(family, images)
    if live.alpha != 0.5 or family not in _plain:
        live.apply(0.5)
        _plain[family] = tokens_of(answerer_of(live, 8, PLAIN), prompts)
    truth = _plain[family]
    junk = st.lists(st.integers(0, live.model.get_output_embeddings().out_features - 1), max_size=8)
    drafts = {
        place: answer[: data.draw(st.integers(0, NEW))] + data.draw(junk)
        for place, answer in enumerate(truth)
    }
    batch_size = data.draw(st.integers(1, 7))
    assert asked_with(live, prompts, drafts, batch_size)[0] == truth


_plain: dict[str, list[list[int]]] = {}


def test_without_drafts_all_rows_stay_and_every_position_is_counted(
    talker: Talkers, images: tuple[Path, ...]
) -> None:
    live, prompts = talker("llava"), talk.ask("llava", images)
    live.apply(0.2)
    answerer = answerer_of(live, 8, NO_DRAFTS)
    for _ in range(2):
        with talk.counted(live.model) as passes:
            tokens = tokens_of(answerer, prompts)
        cost, longest = answerer.cost, max(map(len, tokens))
        assert cost.passes == len(passes) == longest
        assert cost.forward_tokens == cost.plain_tokens
        assert cost.plain_tokens % len(prompts) == 0
        assert cost.answer_tokens == sum(map(len, tokens))


# Vision features


def test_a_dict_with_a_pillow_image_is_a_prompt(talker: Talkers, images: tuple[Path, ...]) -> None:
    answerer = answerer_of(talker("qwen3_vl"))
    with Image.open(images[0]) as image:
        given = {"prompt": "What?", "image": image}
        assert answerer.answer([given]) == answerer.answer([Prompt("What?", (images[0],))])


@pytest.mark.parametrize("family", ["qwen3_vl", "cogvlm", "mplug_owl2"])
def test_the_tower_looks_once_at_each_batch_of_images(
    talker: Talkers, images: tuple[Path, ...], family: str
) -> None:
    live = talker(family)
    prompts = [Prompt(text, (images[i % 3],)) for i, text in enumerate(talk.TEXTS)]
    for batch_settings, looks in ((SETTINGS, [2, 0]), (NO_FEATURES, [2, 2])):
        answerer = answerer_of(live, 3, batch_settings)
        for alpha, expected in zip((0.0, 0.6), looks, strict=True):
            live.apply(alpha)
            with talk.counted(talk.eye(live.model)) as seen:
                answerer.answer(prompts)
            assert len(seen) == expected


def test_features_are_kept_as_far_as_memory_allows(
    talker: Talkers, images: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = talker("cogvlm")
    prompts = [Prompt(text, (images[i % 3],)) for i, text in enumerate(talk.TEXTS)]
    batch = 3 * 6 * 64 * 4  # images, tokens of each, hidden size, bytes of a float
    looks = []
    for limit in (0, batch - 1, batch, 2 * batch):
        monkeypatch.setattr(answering, "VISION_CACHE_BYTES", limit)
        answerer = answerer_of(live, 3)
        answerer.answer(prompts)
        with talk.counted(talk.eye(live.model)) as seen:
            answerer.answer(prompts)
        looks.append(len(seen))
    assert looks == [2, 2, 1, 0]


@pytest.mark.parametrize("family", ["qwen3_vl", "cogvlm"])
def test_nothing_stays_patched_after_an_error(
    talker: Talkers, images: tuple[Path, ...], family: str
) -> None:
    live = talker(family)

    def interrupt(place: int, answer: Answer) -> None:
        assert patched(live.model)
        raise KeyboardInterrupt

    before = live.model.generation_config
    with pytest.raises(KeyboardInterrupt):
        answerer_of(live).answer(talk.ask(family, images), None, interrupt)
    assert patched(live.model) == []
    assert live.model.generation_config is before


def test_a_method_that_others_put_on_a_module_is_there_again(
    talker: Talkers, images: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = talker("cogvlm")
    own, calls = live.model.model.vision.forward, []

    def hooked(pixels: torch.Tensor) -> Any:
        calls.append(len(pixels))
        return own(pixels)

    monkeypatch.setattr(live.model.model.vision, "forward", hooked)
    answerer_of(live).answer([Prompt("?", (images[0],))])
    assert vars(live.model.model.vision)["forward"] is hooked
    assert calls == [1]


# What the checkpoint says about generation


@pytest.fixture
def changed(
    talking: dict[str, Path], tiny_models: dict[str, Path], tmp_path: Path
) -> Callable[..., LiveModel]:
    """Loads a llava whose generation_config.json, or tokenizer's settings, are changed."""

    def load(file: str, **changes: Any) -> LiveModel:
        shutil.copytree(talking["llava"], tmp_path / "changed")
        path = tmp_path / "changed" / file
        document = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        kept = {key: value for key, value in document.items() if value is not None}
        path.write_text(json.dumps(kept), encoding="utf-8")
        return talk.load(tmp_path / "changed", tiny_models["llava_next"])

    return load


@pytest.fixture
def truth(talker: Talkers, images: tuple[Path, ...]) -> list[list[int]]:
    """What the unchanged llava answers at alpha 0."""
    talker("llava").apply(0.0)
    return talk.reference(talker("llava"), talk.ask("llava", images))


def up_to_first(answer: list[int], ends: Sequence[int]) -> list[int]:
    body = list(takewhile(lambda token: token not in ends, answer))
    return answer[: len(body) + 1]


@pytest.mark.parametrize(
    "said",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 50, "num_return_sequences": 2},
        {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 9},
        {"num_beams": 3},
        {"max_new_tokens": 2, "max_length": 3},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda said: "-".join(said),
)
def test_greedy_is_greedy_whatever_the_checkpoint_prefers(
    images: tuple[Path, ...],
    truth: list[list[int]],
    changed: Callable[..., LiveModel],
    said: dict[str, Any],
) -> None:
    with changed("generation_config.json", **said) as live:
        answerer = answerer_of(live, 3)
        for _ in range(2):
            assert tokens_of(answerer, talk.ask("llava", images)) == truth
        assert answerer.cost.passes == 2
        assert answerer.notes == []


@pytest.mark.parametrize("early", [0, 2])
def test_an_answer_ends_at_whichever_end_token_comes_first(
    talker: Talkers,
    images: tuple[Path, ...],
    truth: list[list[int]],
    changed: Callable[..., LiveModel],
    early: int,
) -> None:
    last = talker("llava").model.generation_config.eos_token_id
    ends = [last, truth[0][early], truth[1][4]]
    expected = [up_to_first(answer, ends) for answer in truth]
    assert len({len(answer) for answer in expected}) > 2
    with changed("generation_config.json", eos_token_id=ends) as live:
        answerer = answerer_of(live, 3)
        for _ in range(2):
            assert tokens_of(answerer, talk.ask("llava", images)) == expected


def test_where_the_checkpoint_names_no_end_the_tokenizer_does(
    images: tuple[Path, ...], truth: list[list[int]], changed: Callable[..., LiveModel]
) -> None:
    with changed("generation_config.json", eos_token_id=None) as live:
        live.model.generation_config.eos_token_id = None
        end = live._encoder.tokenizer.eos_token_id
        tokens = tokens_of(answerer_of(live, 3), talk.ask("llava", images))
    assert tokens == [up_to_first(answer, [end]) for answer in truth]


# What is known already


def test_a_batch_is_asked_again_only_if_an_answer_in_it_is_missing(
    talker: Talkers, images: tuple[Path, ...]
) -> None:
    live, prompts = talker("llava_onevision"), talk.ask("llava_onevision", images)
    live.apply(0.0)
    truth = answerer_of(live, 2).answer(prompts)
    missing = live._encoder.split_into_batches(prompts, 2)[1].places[0]
    known = {i: Answer(f"known {i}") for i in range(len(prompts)) if i != missing}
    told: list[int] = []
    answerer = answerer_of(live, 2)
    answers = answerer.answer(prompts, known, lambda place, *_: told.append(place))
    assert told == [missing]
    assert answers == [truth[i] if i == missing else known[i] for i in range(len(prompts))]
    assert 0 < answerer.cost.passes <= NEW
    with talk.counted(live.model) as passes:
        assert answerer.answer(prompts, dict(enumerate(truth))) == truth
    assert passes == []


def test_a_prompt_too_long_for_the_base_is_noted_once(
    talker: Talkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = talker("llava")
    monkeypatch.setattr(live.model.config.get_text_config(), "max_position_embeddings", 40)
    prompts = [Prompt("red", (), "a.jsonl:1"), Prompt("red " * 40, (), "a.jsonl:2")]
    answerer = answerer_of(live, 1, AnswerSettings(max_new_tokens=1))
    answerer.answer(prompts[:1])
    assert answerer.notes == []
    for _ in range(2):
        answerer.answer(prompts)
    (note,) = answerer.notes
    assert note.startswith("a.jsonl:2: ")
    assert note.endswith(" tokens with the answer, and the base was made for 40")
