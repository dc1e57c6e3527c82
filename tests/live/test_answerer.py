"""Answers: whatever is saved by drafts and kept features, they are those of transformers itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import talk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem_adamms.live.answerer import Answerer
from lowmem_adamms.live.draft_decoding import Settings
from lowmem_adamms.prompts import Prompt

if TYPE_CHECKING:
    from conftest import Talkers

    from lowmem_adamms import LiveModel

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
NEW = talk.NEW
VISION = tuple(family for family in talk.DONORS if family not in talk.TEXT_ONLY)
ALWAYS = ("everything, one by one", "everything, by threes", "everything, all at once")
VARIANTS = {
    "everything, one by one": Settings(NEW, 1),
    "everything, by threes": Settings(NEW, 3),
    "everything, all at once": Settings(NEW, 8),
    "without drafts": Settings(NEW, 3, drafts=False),
    "without kept features": Settings(NEW, 3, vision_cache=False),
    "without room for features": Settings(NEW, 8, vision_bytes=0),
    "nothing": Settings(NEW, 8, drafts=False, vision_cache=False),
}


def tokens_of(answerer: Answerer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The tokens of all answers, which must be what the texts were made of."""
    found: dict[int, tuple[str, list[int]]] = {}
    answers = answerer(prompts, None, lambda place, text, ids: found.update({place: (text, ids)}))
    assert answers == [found[place][0] for place in range(len(prompts))]
    return [found[place][1] for place in range(len(prompts))]


def plain_answers(live: LiveModel, prompts: tuple[Prompt, ...]) -> list[list[int]]:
    """Tokens without any economy at the live model's alpha, made once."""
    key = (live.plan.base.path, live.alpha, prompts)
    if key not in _plain:
        _plain[key] = tokens_of(Answerer(live, VARIANTS["nothing"]), prompts)
    return _plain[key]


_plain: dict[Any, list[list[int]]] = {}


def asked_with(
    live: LiveModel, prompts: Sequence[Prompt], drafts: dict[int, list[int]], batch: int = 8
) -> tuple[list[list[int]], Answerer]:
    """Answers' tokens from these drafts, and the answerer, for what it spent."""
    answerer = Answerer(live, Settings(NEW, batch))
    answerer.expect(prompts, drafts)
    return tokens_of(answerer, prompts), answerer


def patched(model: Any) -> list[str]:
    """Modules with a method of their own, where their class has one."""
    names = ("forward", "get_image_features")
    return [path for path, module in model.named_modules() if set(names) & set(vars(module))]


@pytest.mark.parametrize("family", [*talk.DONORS, "mistral"])
def test_at_every_alpha_answers_are_those_of_transformers(
    talker: Talkers, images: tuple[Path, ...], family: str
) -> None:
    live, prompts = talker(family), talk.ask(family, images)
    answerers = {name: Answerer(live, settings) for name, settings in VARIANTS.items()}
    seen: dict[float, list[list[int]]] = {}
    for alpha in ALPHAS:
        live.apply(alpha)
        seen[alpha] = talk.reference(live, prompts)
        for name, answerer in answerers.items():
            if name not in ALWAYS and alpha not in (0.0, 0.3, 0.6):
                continue  # what it does not remember cannot be stale
            assert tokens_of(answerer, prompts) == seen[alpha], (name, alpha)
    flat = [tuple(answer) for answers in seen.values() for answer in answers]
    assert len(set(flat)) >= 15, "too few different answers to show anything"
    assert any(len(answer) < NEW for answer in flat)
    assert patched(live.model) == []


def test_a_cache_that_cannot_be_cut_switches_drafts_off_with_a_note(
    talker: Talkers, images: tuple[Path, ...]
) -> None:
    live, prompts = talker("mistral"), talk.ask("mistral", images)
    answerer = Answerer(live, Settings(NEW, 3))
    for alpha in (0.0, 0.2, 0.4):
        live.apply(alpha)
        tokens_of(answerer, prompts)
    assert answerer.notes == ["drafts are off: the cache of MistralForCausalLM cannot be cut"]
    assert answerer.spent.forward_tokens == answerer.spent.plain_tokens


def test_the_models_own_answerer_remembers_from_call_to_call(
    talker: Talkers, images: tuple[Path, ...]
) -> None:
    live, prompts = talker("llava"), talk.ask("llava", images)
    chosen = Settings(NEW, 3)
    live.apply(0.2)
    first = live.generate(prompts, chosen)
    with talk.counted(live.model) as passes, talk.counted(talk.eye(live.model)) as seen:
        assert live.generate(prompts, chosen) == first
        assert live.generate(prompts) == first
    assert (len(passes), len(seen)) == (4, 0)


def test_plain_texts_repeated_ones_and_none_at_all_are_answered_in_order(talker: Talkers) -> None:
    live = talker("llava")
    live.apply(0.0)
    short, long = "Hm?", "What do you see on the way from the station to the old bridge?"
    one, other = (live.generate([text], Settings(NEW, 1))[0] for text in (short, long))
    assert one != other
    asked: list[Prompt | str] = [short, long, short, Prompt(long)]
    assert live.generate(asked, Settings(NEW, 2)) == [one, other, one, other]
    assert live.generate([]) == []


# Drafts


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "llava_onevision", "cogvlm", "qwen2"])
def test_a_perfect_draft_costs_one_pass_a_batch(
    talker: Talkers, images: tuple[Path, ...], family: str
) -> None:
    live, prompts = talker(family), talk.ask(family, images)
    live.apply(0.3)
    answerer = Answerer(live, Settings(NEW, 3))
    first = tokens_of(answerer, prompts)
    assert answerer.spent.passes > 2
    plain = answerer.spent.plain_tokens
    assert tokens_of(answerer, prompts) == first
    spent = answerer.spent
    assert spent.passes == 2
    assert spent.answer_tokens == sum(map(len, first))
    # The last token of an answer is verified as well, and need not go through the model otherwise
    assert spent.plain_tokens == plain
    assert spent.forward_tokens == plain + len(prompts)


@pytest.mark.parametrize("right", [0, 1, 4, NEW - 1])
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
    assert answerer.spent.passes == NEW - right
    _, plain = asked_with(live, prompt, {})
    assert plain.spent.passes == NEW
    # The draft's ten tokens in the first pass, then one for each that was not kept
    assert answerer.spent.forward_tokens == plain.spent.forward_tokens + NEW - right


def test_drafts_may_be_longer_than_an_answer(talker: Talkers, images: tuple[Path, ...]) -> None:
    live, prompts = talker("qwen2_5_vl"), talk.ask("qwen2_5_vl", images)
    live.apply(0.2)
    longer = dict(enumerate(talk.reference(live, prompts, 2 * NEW)))
    assert any(len(answer) > NEW for answer in longer.values())
    tokens, answerer = asked_with(live, prompts, longer)
    assert tokens == [answer[:NEW] for answer in longer.values()]
    assert answerer.spent.passes == 1


def test_what_a_draft_holds_after_its_end_is_no_answer(
    talker: Talkers, images: tuple[Path, ...]
) -> None:
    live, prompts = talker("llava"), talk.ask("llava", images)
    live.apply(0.3)
    truth = talk.reference(live, prompts)
    assert any(len(answer) < NEW for answer in truth)
    drafts = {place: [*answer, 70, 71, 72, 73][:NEW] for place, answer in enumerate(truth)}
    tokens, answerer = asked_with(live, prompts, drafts)
    assert tokens == truth
    assert answerer.spent.passes == 1


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next", "mplug_owl2", "llama"])
def test_empty_short_and_long_drafts_share_a_batch(
    talker: Talkers, images: tuple[Path, ...], family: str
) -> None:
    live, prompts = talker(family), talk.ask(family, images)
    live.apply(0.4)
    truth = talk.reference(live, prompts)
    drafts = {1: truth[1], 2: [*truth[2][:3], 50, 51, 52, 53, 54], 3: [60], 4: truth[4][:1]}
    tokens, _ = asked_with(live, prompts, drafts)
    assert tokens == truth


@pytest.mark.parametrize("family", VISION)
def test_tokens_that_stand_for_images_in_a_draft_are_no_images(
    talker: Talkers, images: tuple[Path, ...], family: str
) -> None:
    live, prompts = talker(family), talk.ask(family, images)
    live.apply(0.0)
    config = live.model.config
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    marks = [token for name in names if (token := getattr(config, name, None)) is not None]
    truth = talk.reference(live, prompts)
    drafts = {place: [*answer[:2], *marks, 40] for place, answer in enumerate(truth)}
    assert asked_with(live, prompts, drafts)[0] == truth


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava", "cogvlm", "mplug_owl2"])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_draft_whatever_changes_an_answer(
    talker: Talkers, images: tuple[Path, ...], family: str, data: st.DataObject
) -> None:
    live, prompts = talker(family), talk.ask(family, images)
    if live.alpha != 0.5:
        live.apply(0.5)
    truth = plain_answers(live, prompts)
    junk = st.lists(st.integers(0, live.model.get_output_embeddings().out_features - 1), max_size=8)
    drafts = {
        place: answer[: data.draw(st.integers(0, NEW))] + data.draw(junk)
        for place, answer in enumerate(truth)
    }
    batch = data.draw(st.integers(1, 7))
    assert asked_with(live, prompts, drafts, batch)[0] == truth


def test_without_drafts_all_rows_stay_and_every_position_is_counted(
    talker: Talkers, images: tuple[Path, ...]
) -> None:
    live, prompts = talker("llava"), talk.ask("llava", images)
    live.apply(0.2)
    answerer = Answerer(live, Settings(NEW, 8, drafts=False))
    for _ in range(2):
        with talk.counted(live.model) as passes:
            tokens = tokens_of(answerer, prompts)
        spent, longest = answerer.spent, max(map(len, tokens))
        assert spent.passes == len(passes) == longest
        assert spent.forward_tokens == spent.plain_tokens
        assert (spent.plain_tokens / len(prompts)) % 1 == 0
        assert spent.answer_tokens == sum(map(len, tokens))


# Vision features


@pytest.mark.parametrize("family", VISION)
def test_the_tower_looks_once_at_each_batch_of_images(
    talker: Talkers, images: tuple[Path, ...], family: str
) -> None:
    live = talker(family)
    prompts = [Prompt(text, (images[i % 3],)) for i, text in enumerate(talk.TEXTS)]
    looks: dict[str, list[int]] = {}
    for name in ("everything, by threes", "without kept features"):
        answerer = Answerer(live, VARIANTS[name])
        looks[name] = []
        for alpha in (0.0, 0.3, 0.6):
            live.apply(alpha)
            with talk.counted(talk.eye(live.model)) as seen:
                answerer(prompts)
            looks[name].append(len(seen))
    assert looks == {"everything, by threes": [2, 0, 0], "without kept features": [2, 2, 2]}


def test_features_are_kept_as_far_as_memory_allows(
    talker: Talkers, images: tuple[Path, ...]
) -> None:
    live = talker("cogvlm")
    prompts = [Prompt(text, (images[i % 3],)) for i, text in enumerate(talk.TEXTS)]
    batch = 3 * 6 * 64 * 4  # images, tokens of each, hidden size, bytes of a float
    live.apply(0.0)
    looks = []
    for room in (0, batch - 1, batch, 2 * batch):
        answerer = Answerer(live, Settings(NEW, 3, vision_bytes=room))
        answerer(prompts)
        with talk.counted(talk.eye(live.model)) as seen:
            answerer(prompts)
        looks.append(len(seen))
    assert looks == [2, 2, 1, 0]


@pytest.mark.parametrize("family", ["qwen3_vl", "cogvlm"])
def test_nothing_stays_patched_after_an_error(
    talker: Talkers, images: tuple[Path, ...], family: str
) -> None:
    live = talker(family)

    def interrupt(place: int, answer: str, tokens: list[int]) -> None:
        assert patched(live.model)
        raise KeyboardInterrupt

    before = live.model.generation_config
    with pytest.raises(KeyboardInterrupt):
        Answerer(live, Settings(NEW))(talk.ask(family, images), None, interrupt)
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
    live.apply(0.0)
    Answerer(live, Settings(NEW))([Prompt("?", (images[0],))])
    assert vars(live.model.model.vision)["forward"] is hooked
    assert calls == [1]


def test_a_text_only_base_has_nothing_to_look_with(talker: Talkers) -> None:
    assert talker("llama").vision == frozenset()


# What the checkpoint says about generation


@pytest.fixture
def told(talking: dict[str, Path], tiny_models: dict[str, Path], tmp_path: Path) -> Any:
    """Loads a llava whose generation_config.json, or tokenizer's settings, are changed."""

    def load(file: str, **changes: Any) -> LiveModel:
        shutil.copytree(talking["llava"], tmp_path / "told")
        path = tmp_path / "told" / file
        document = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        kept = {key: value for key, value in document.items() if value is not None}
        path.write_text(json.dumps(kept), encoding="utf-8")
        return talk.load(tmp_path / "told", tiny_models["llava_next"])

    return load


@pytest.mark.parametrize(
    "said",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.9},
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"min_new_tokens": 9},
        {"max_new_tokens": 2, "max_length": 3},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda said: "-".join(said),
)
def test_greedy_is_greedy_whatever_the_checkpoint_prefers(
    talker: Talkers, images: tuple[Path, ...], told: Any, said: dict[str, Any]
) -> None:
    prompts = talk.ask("llava", images)
    talker("llava").apply(0.0)
    expected = talk.reference(talker("llava"), prompts)
    with told("generation_config.json", **said) as live:
        answerer = Answerer(live, Settings(NEW, 3))
        for _ in range(2):
            assert tokens_of(answerer, prompts) == expected
        assert answerer.spent.passes == 2
        assert answerer.notes == []


@pytest.mark.parametrize("early", [0, 2])
def test_an_answer_ends_at_whichever_end_token_comes_first(
    talker: Talkers, images: tuple[Path, ...], told: Any, early: int
) -> None:
    prompts = talk.ask("llava", images)
    talker("llava").apply(0.0)
    whole = talk.reference(talker("llava"), prompts)
    last = talker("llava").model.generation_config.eos_token_id
    ends = [last, whole[0][early], whole[1][4]]
    expected = []
    for answer in whole:
        body = list(takewhile(lambda token: token not in ends, answer))
        expected.append(answer[: len(body) + 1])
    assert len({len(answer) for answer in expected}) > 2
    with told("generation_config.json", eos_token_id=ends) as live:
        answerer = Answerer(live, Settings(NEW, 3))
        for _ in range(2):
            assert tokens_of(answerer, prompts) == expected


def test_where_the_checkpoint_names_no_end_the_tokenizer_does(
    talker: Talkers, images: tuple[Path, ...], told: Any
) -> None:
    prompts = talk.ask("llava", images)
    with told("generation_config.json", eos_token_id=None) as live:
        live.model.generation_config.eos_token_id = None
        tokens = tokens_of(Answerer(live, Settings(NEW, 3)), prompts)
        end = Answerer(live)._encoder.tokenizer.eos_token_id
    live = talker("llava")
    live.apply(0.0)
    expected = []
    for answer in talk.reference(live, prompts):
        body = list(takewhile(lambda token: token != end, answer))
        expected.append(answer[: len(body) + 1])
    assert tokens == expected


def test_batches_need_no_pad_token(talker: Talkers, images: tuple[Path, ...], told: Any) -> None:
    prompts = talk.ask("llava", images)
    talker("llava").apply(0.0)
    expected = talk.reference(talker("llava"), prompts)
    with told("tokenizer_config.json", pad_token=None) as live:
        live.model.generation_config.pad_token_id = None
        assert Answerer(live, Settings(NEW, 8))(prompts)
        assert tokens_of(Answerer(live, Settings(NEW, 8)), prompts) == expected


# What is known already


def test_a_batch_is_asked_again_only_if_an_answer_in_it_is_missing(
    talker: Talkers, images: tuple[Path, ...]
) -> None:
    live, prompts = talker("llava_onevision"), talk.ask("llava_onevision", images)
    live.apply(0.0)
    answerer = Answerer(live, Settings(NEW, 2))
    truth = answerer(prompts)
    batches = answerer._encoder.batches(prompts, 2)
    missing = batches[1].places[0]
    known = {place: f"known {place}" for place in range(len(prompts)) if place != missing}
    told: list[int] = []
    fresh = Answerer(live, Settings(NEW, 2))
    answers = fresh(prompts, known, lambda place, *_: told.append(place))
    assert told == [missing]
    assert answers == [
        truth[place] if place == missing else f"known {place}" for place in range(len(prompts))
    ]
    assert 0 < fresh.spent.passes <= NEW
    with talk.counted(live.model) as passes:
        assert fresh(prompts, dict(enumerate(truth))) == truth
    assert passes == []


def test_a_prompt_too_long_for_the_base_is_noted_once(
    talker: Talkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = talker("llava")
    monkeypatch.setitem(live.plan.base.config_levels[-1], "max_position_embeddings", 40)
    prompts = [Prompt("red", (), "a.jsonl:1"), Prompt("red " * 40, (), "a.jsonl:2")]
    answerer = Answerer(live, Settings(1, 1))
    answerer(prompts[:1])
    assert answerer.notes == []
    for _ in range(2):
        answerer(prompts)
    (note,) = answerer.notes
    assert note.startswith("a.jsonl:2: ")
    assert note.endswith(" tokens with the answer, and the base was made for 40")
