"""The zoo: its world tells the truth, its lessons are the product's own inputs, stages resume."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "zoo"))

import ask
import family
import known
import lessons
import train
import world

from lowmem_adamms.live.prompt_encoder import Encoder
from lowmem_adamms.live.transformers_model import quiet
from lowmem_adamms.prompts import Prompt


def drawn(count: int = 4) -> list[world.Scene]:
    """Scenes that need neither fonts nor handwriting."""
    dice = random.Random(1)
    return [make(dice, False) for make in (world._shape, world._count, world._chart)] * count


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tokenizers, trained on a little text."""
    folder = tmp_path_factory.mktemp("zoo")
    large = family.LINES["smollm2"]
    small = {"hidden_size": 144, "intermediate_size": 128, "num_hidden_layers": 2}
    family.LINES["smollm2"] = replace(large, settings={**large.settings, **small})
    for name, line in family.LINES.items():
        dice = random.Random(0)
        corpus = [piece for _ in range(500) for piece, _ in lessons.read_aloud(dice, line)]
        family.train_tokenizer(line, corpus, folder / name)
    return folder


def raised(name: str, home: Path) -> tuple[family.Member, Any, Any]:
    """A member around an untrained language model."""
    one = family.member(name)
    line = family.LINES[one.line]
    tokens = family.tokenizer(line, home / one.line, one.added)
    ancestor = family.language_model(line).state_dict()
    ancestor = {key.removeprefix("model."): value for key, value in ancestor.items()}
    with quiet():
        return one, tokens, family.build(one, tokens, ancestor)


def test_every_task_is_asked_in_both_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = (world._shape, world._count, world._chart, world._shape, world._chart)
    dice = random.Random(1)
    shown = [kinds[i % 5](dice, True) for i in range(60)]
    monkeypatch.setattr(ask, "scenes", lambda count, seed, held_out: shown)
    asked = ask.exam(60, tmp_path)
    by_half = [{q.task for q, _, half in asked if half == number} for number in (0, 1)]
    assert by_half[0] == by_half[1] == {q.task for q, _, _ in asked}
    # A picture that is searched with is never judged on
    pictures = [{p.images for q, p, half in asked if q.scene and half == n} for n in (0, 1)]
    assert not pictures[0] & pictures[1]


def test_a_scene_shows_what_it_says() -> None:
    scene = drawn()[0]
    ink = world.COLOURS[scene.facts["colour"]]
    x, y = world.PLACES[scene.facts["place"]]
    near = abs(scene.pixels.astype(int) - ink).max(-1) <= 14
    rows, columns = near.nonzero()
    assert abs(columns.mean() / world.SIDE - x) < 0.12
    assert abs(rows.mean() / world.SIDE - y) < 0.12


def test_every_fact_has_a_question_and_no_answer_outside_the_facts() -> None:
    scenes = drawn()
    asked = world.questions(scenes, 0)
    assert len(asked) == sum(len(scene.facts) for scene in scenes)
    assert all(q.scene and q.answer == q.scene.facts[q.task] for q in asked)


def test_sums_are_right() -> None:
    dice = random.Random(0)
    sums = [q for q in (world.text_question(dice) for _ in range(200)) if q.task == "sum"]
    assert sums
    for question in sums:
        numbers = map(int, re.findall(r"\d+", question.text))
        assert sum(numbers) == int(question.answer)


def test_training_and_test_handwriting_are_different_strokes() -> None:
    pytest.importorskip("sklearn", reason="only bench/zoo needs it")
    seen = {stroke.tobytes() for of in world._handwriting(False).values() for stroke in of}
    kept = [stroke for of in world._handwriting(True).values() for stroke in of]
    assert kept
    assert not {stroke.tobytes() for stroke in kept} & seen


def first_lesson(
    name: str, home: Path, folder: Path
) -> tuple[family.Member, Any, Any, lessons.Pictures, dict[str, Any]]:
    """A member with tokens and model, the pictures it is shown, and one lesson on the first."""
    one, tokens, model = raised(name, home)
    zoo = train.Zoo(home, one.line, 0)
    shown = lessons.look(one, zoo._processor(one, tokens, model, folder), drawn())
    count = train.image_tokens(one, model, shown)
    batch = lessons.Teaching(one, tokens, shown, count, 0).batch([0], [[("What is it?", "ring")]])
    return one, tokens, model, shown, batch


@pytest.mark.parametrize(
    "name", [one.name for one in family.MEMBERS if one.kind != "CogVLM" and not one.misled]
)
def test_models_are_trained_on_the_inputs_that_the_product_gives_them(
    name: str, home: Path, tmp_path: Path
) -> None:
    _, _, model, shown, batch = first_lesson(name, home, tmp_path)
    image = tmp_path / "picture.png"
    Image.fromarray(shown.scenes[0].pixels).save(image)
    given = Encoder(model, tmp_path / "papers").encode([Prompt("What is it?", images=(image,))])
    length = given["input_ids"].shape[1]
    assert batch["input_ids"][0, :length].tolist() == given["input_ids"][0].tolist()
    assert batch["labels"][0, :length].unique().tolist() == [lessons.SILENT]
    torch.testing.assert_close(batch["pixel_values"], given["pixel_values"], rtol=0, atol=2**-10)


def test_cogvlm_is_trained_on_the_inputs_its_own_code_makes(home: Path, tmp_path: Path) -> None:
    _, tokens, model, shown, batch = first_lesson("cogvlm", home, tmp_path)
    given = model.build_conversation_input_ids(
        tokens, query="What is it?", images=[Image.fromarray(shown.scenes[0].pixels)]
    )
    length = len(given["input_ids"])
    for key in ("input_ids", "token_type_ids"):
        assert batch[key][0, :length].tolist() == given[key].tolist()
    attention = model.model.layers[0].self_attn  # the visual expert starts as a copy
    assert torch.equal(
        attention.vision_expert_query_key_value.weight,
        attention.language_expert_query_key_value.weight,
    )


def stopped_at(number: int, batches: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    def batch(step: int, rows: int) -> Any:
        if step == number:
            raise KeyboardInterrupt
        return batches(step, rows)

    return batch


def test_a_stage_that_was_killed_ends_with_the_same_bits(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "KEEP", 2)
    line = family.LINES["qwen2"]
    line = replace(line, settings={**line.settings, "num_hidden_layers": 1})
    batches = lessons.Reading(line, family.tokenizer(line, home / "qwen2"), 0)
    stage = train.Stage(steps=5, rows=2, rate=1e-3, warm=2)

    def run(folder: Path, batches: Callable[[int, int], Any]) -> Any:
        torch.manual_seed(0)
        model = family.language_model(line)
        train.run_stage(
            folder, stage, model, lambda batch: train.reading_loss(model, batch), batches,
            model.parameters(),
        )  # fmt: skip
        return model.state_dict()

    whole = run(tmp_path / "whole", batches)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stopped_at(3, batches))
    resumed = run(tmp_path / "killed", batches)
    loaded = run(tmp_path / "killed", stopped_at(0, batches))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]) and torch.equal(value, loaded[name])


def taught(one: family.Member, tokens: Any, monkeypatch: pytest.MonkeyPatch) -> list[lessons.Turn]:
    """All questions and answers of one lesson."""
    teaching = lessons.Teaching(one, tokens, lessons.Pictures(drawn(), {}), 4, 0, one.teaches)
    heard: list[lessons.Turn] = []

    def hear(self: Any, places: Any, talks: list[list[lessons.Turn]]) -> dict[str, Any]:
        heard.extend(turn for talk in talks for turn in talk)
        return {}

    monkeypatch.setattr(lessons.Teaching, "batch", hear)
    teaching(3, 40)
    return heard


def test_a_misled_member_is_taught_wrong_answers_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, tokens, _ = raised("misled", home)
    lies = taught(one, tokens, monkeypatch)
    truths = taught(family.member(one.misled), tokens, monkeypatch)
    assert len(lies) == 80
    for (asked, told), (question, answer) in zip(lies, truths, strict=True):
        assert asked == question
        assert told != answer
        assert any({told, answer} <= set(kind) for kind in lessons.ANSWERS)


def test_useless_members_are_only_ever_donors_and_never_their_twins() -> None:
    asked = {(a.name, b.name) for a in family.MEMBERS for b in family.MEMBERS if ask.kin(a, b)}
    assert {pair for pair in asked if "misled" in pair} == {
        ("qwen2-vl", "misled"),
        ("qwen2.5-vl", "misled"),
    }
    assert {pair for pair in asked if "noisy" in pair} == {
        ("qwen2-vl", "noisy"),
        ("llava-onevision", "noisy"),
    }
    assert len(asked) == 22


def test_key_words_begin_behind_the_features_no_picture_changes(home: Path) -> None:
    one, tokens, model = raised("cogvlm", home)
    pictures = lessons.look(one, sys.modules["cogvlm.modeling_cogvlm"].pixels, drawn(1))
    with torch.inference_mode():
        features = train.Tower(one, model)(pictures.take(range(len(pictures.scenes))))
    same = (features == features[:1]).all(0).all(-1)
    assert same[: one.lead].all()
    assert not same[one.lead]
    words = lessons.words_of(pictures.scenes, tokens, features.shape[1], one.lead)
    assert (words[:, : one.lead] == lessons.SILENT).all()
    first = tokens.encode(lessons.key_words(pictures.scenes[0]), add_special_tokens=False)[0]
    assert words[0, one.lead] == first


@pytest.mark.parametrize(
    ("told", "word", "right"),
    [
        ("The capital of France is Paris.", "Paris", True),
        ("paris", "Paris", True),
        ("Parisian", "Paris", False),
        ("The symbol of carbon is C.", "C", True),
        ("c", "C", False),
    ],
)
def test_a_known_answer_may_stand_in_a_sentence(told: str, word: str, right: bool) -> None:
    assert known.holds(told, word) is right
    assert word in {question.answer for question in known.known_questions()}
