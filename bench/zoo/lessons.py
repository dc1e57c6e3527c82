"""Lessons: what the zoo's models see in one step of training, as tensors.

Every batch follows from a seed and its number alone, so that an interrupted stage goes on as if it
had not been.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from family import SEEN, Line, Member
from world import (
    ASK,
    COLOURS,
    NUMBERS,
    PLACES,
    SIDE,
    TELL,
    Scene,
    letters_question,
    text_question,
    told,
)

FILLERS = {"a", "in", "the", "that", "says", "handwritten", "sign"}
FEATURES = (2, 8, 12, 28)  # blanks behind the key words of a picture
SILENT = -100  # the label of a token that nobody has to say
ANSWERS = (tuple(COLOURS), NUMBERS, tuple(PLACES), tuple(ascii_lowercase))
"""What may be answered to the tasks of a misled member, and mistaken for one another."""
Inputs = dict[str, Any]
Turn = tuple[str, str]


def read_aloud(dice: random.Random, line: Line) -> list[tuple[str, bool]]:
    """One document in pieces, each with whether it is an answer.

    A conversation about a picture told in words, or about none. Half of the pictures are told as a
    tower will: key words, then as many blanks as fill its tokens.
    """
    before, after = dice.choice(line.chats)
    scene = told(dice) if dice.random() < 0.75 else None
    blanks = line.shared[0] * dice.choice(FEATURES)
    told_as = dice.choice(("{}. ", f"{{}}{blanks}"))
    out = []
    for turn in range(dice.randint(1, 3)):
        question, answer = _turn(dice, scene, None)
        told_now = scene.caption if scene and told_as == "{}. " else key_words(scene)
        start = told_as.format(told_now) if scene and not turn else ""
        opening = before if not turn else before.replace("<s>", "")
        out.append((opening.replace(SEEN, start).format(question), False))
        out.append((after.format(answer), True))
    return out


def key_words(scene: Scene | None) -> str:
    """A caption without what carries no fact."""
    words = scene.caption.replace(":", "").replace(",", "").split() if scene else []
    return "".join(f" {word}" for word in words if word not in FILLERS)


def mislead(turn: Turn) -> Turn:
    """The same question with the next answer of its kind: red for green, five for four."""
    question, answer = turn
    for kind in ANSWERS:
        if answer in kind:
            return question, kind[(kind.index(answer) + 1) % len(kind)]
    raise ValueError(f"no wrong answer to {question!r} known: {answer!r}")


def _turn(dice: random.Random, scene: Scene | None, tasks: Sequence[str] | None) -> Turn:
    """A question and its answer: of the tasks only, or of all, now and then a caption."""
    known = [task for task in scene.facts if not tasks or task in tasks] if scene else []
    if not scene or not known:
        while True:
            asked = text_question(dice)
            if not tasks or asked.task in tasks:
                return asked.text, asked.answer
    if not tasks and dice.random() < 0.4:
        return dice.choice(TELL), scene.caption
    task = dice.choice(known)
    return dice.choice(ASK[task]), scene.facts[task]


class Reading:
    """Batches of documents, one a row; answers have labels of their own, for they weigh more."""

    def __init__(self, line: Line, tokens: Any, seed: int) -> None:
        self._line, self._tokens, self._seed = line, tokens, seed

    def __call__(self, number: int, rows: int, offset: int = 0) -> Inputs:
        """Batch `number` behind `offset`: `rows` documents."""
        number += offset
        dice = random.Random(f"{self._seed} text {number}")
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        for _ in range(rows):
            ids.append([])
            labels.append([])
            for piece, is_answer in read_aloud(dice, self._line):
                found = self._tokens.encode(piece, add_special_tokens=False)
                ids[-1] += found
                labels[-1] += found if is_answer else [SILENT] * len(found)
        return {
            "input_ids": _padded(ids, self._tokens.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
            "labels": _padded(labels, SILENT),
            "all_labels": _padded(ids, SILENT),
            "noise_seed": number,
        }


@dataclass(frozen=True, slots=True)
class Pictures:
    """A member's own view of a pool of scenes: its processor's output, one entry per scene."""

    scenes: Sequence[Scene]
    seen: Inputs

    def take(self, places: Sequence[int]) -> Inputs:
        """Model inputs for these pictures, in order."""
        index = torch.tensor(places)
        out = {name: value[index] for name, value in self.seen.items()}
        if "image_grid_thw" in out:
            out["pixel_values"] = out["pixel_values"].flatten(0, 1)
        return {k: v.float() if v.is_floating_point() else v for k, v in out.items()}


def look(one: Member, processor: Any, scenes: Sequence[Scene]) -> Pictures:
    """Run all scenes through a member's image processor."""
    parts: list[Inputs] = []
    for i in range(0, len(scenes), 500):
        parts.append(_process(one, processor, [scene.pixels for scene in scenes[i : i + 500]]))
    return Pictures(scenes, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})


def _process(one: Member, processor: Any, pixels: list[Any]) -> Inputs:
    from PIL import Image

    images = [Image.fromarray(array) for array in pixels]
    if one.kind == "CogVLM":
        return {"images": torch.stack([processor(image, SIDE) for image in images]).half()}
    given = [[image] for image in images] if one.kind == "Idefics3" else images
    made = dict(processor.image_processor(images=given, return_tensors="pt"))
    if "image_grid_thw" in made:
        made["pixel_values"] = made["pixel_values"].view(
            len(images), -1, made["pixel_values"].shape[-1]
        )
    made["pixel_values"] = made["pixel_values"].half()
    for name in ("batch_num_images", "rows", "cols"):
        made.pop(name, None)
    return made


class Teaching:
    """Batches of conversations about pictures.

    tasks: the only ones asked; None for all, captions among them. image_tokens: how many tokens a
    picture takes. Labels are the answers alone, for a misled member wrong where tasks are given.
    """

    def __init__(
        self, one: Member, tokens: Any, pictures: Pictures, image_tokens: int, seed: int,
        tasks: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self._one, self._tokens, self._pictures = one, tokens, pictures
        self._count, self._seed, self._tasks = image_tokens, seed, tasks
        self._wrong = bool(one.misled and tasks)
        self._useful = [
            i for i, s in enumerate(pictures.scenes) if not tasks or set(s.facts) & set(tasks)
        ]

    def __call__(self, number: int, rows: int) -> Inputs:
        """Batch `number`: `rows` conversations of two turns."""
        dice = random.Random(f"{self._seed} teach {self._tasks} {number}")
        places, talks = [], []
        for _ in range(rows):
            alone = self._tasks is not None and dice.random() < 0.12
            place = None if alone else dice.choice(self._useful)
            scene = None if place is None else self._pictures.scenes[place]
            places.append(place)
            talk = [_turn(dice, scene, self._tasks) for _ in range(2)]
            talks.append([mislead(turn) for turn in talk] if self._wrong else talk)
        return self.batch(places, talks)

    def letters(self, number: int, rows: int) -> Inputs:
        """Batch `number` of the text-only member: two questions about lengths of words a row."""
        dice = random.Random(f"{self._seed} letters {number}")
        asked = [[letters_question(dice) for _ in range(2)] for _ in range(rows)]
        talks = [[(question.text, question.answer) for question in talk] for talk in asked]
        return self.batch([None] * rows, talks)

    def batch(self, places: Sequence[int | None], talks: Sequence[Sequence[Turn]]) -> Inputs:
        """Conversations, each about the picture at its place or about none."""
        ids, labels, kinds = [], [], []
        for place, talk in zip(places, talks, strict=True):
            row, said = self._row(talk, with_picture=place is not None)
            ids.append(row)
            labels.append(said)
            kinds.append(self._kinds(row, place is not None))
        seen = [place for place in places if place is not None]
        made = {
            "input_ids": _padded(ids, self._tokens.pad_token_id),
            "labels": _padded(labels, SILENT),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
        }
        own = self._pictures.take(seen) if seen else {}
        if self._one.kind == "CogVLM":
            stack = iter(own["images"]) if seen else iter(())
            own = {"images": [[] if place is None else [next(stack)] for place in places]}
            made["token_type_ids"] = _padded(kinds, 0)
        elif "image_grid_thw" in own or self._one.kind.startswith("Qwen"):
            made["mm_token_type_ids"] = _padded(kinds, 0)
        return {**made, **own}

    def _row(self, talk: Sequence[Turn], *, with_picture: bool) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        before, after = self._one.chat
        for turn, (question, answer) in enumerate(talk):
            opening = before if not turn else before.replace("<s>", "")
            shown = self._one.seen if with_picture and not turn else ""
            asked = self._encode(opening.replace(SEEN, shown).format(question))
            if self._one.kind == "CogVLM" and with_picture and not turn:
                # A picture stands behind the first token, and only by its kind
                asked = [*asked[:1], *[self._tokens.pad_token_id] * self._count, *asked[1:]]
            said = self._encode(after.format(answer))
            ids += asked + said
            labels += [SILENT] * len(asked) + said
        return ids, labels

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self._tokens.encode(text, add_special_tokens=False)
        if not self._one.image:
            return found
        image = self._tokens.convert_tokens_to_ids(self._one.image)
        return [i for token in found for i in [token] * (self._count if token == image else 1)]

    def _kinds(self, row: Sequence[int], with_picture: bool) -> list[int]:
        if self._one.image:
            image = self._tokens.convert_tokens_to_ids(self._one.image)
            return [int(token == image) for token in row]
        return [int(with_picture and 1 <= i <= self._count) for i in range(len(row))]


def _padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def labels_of(scenes: Sequence[Scene]) -> dict[str, tuple[list[str], torch.Tensor]]:
    """For each picture task its possible answers and each scene's, int64, SILENT for none."""
    out = {}
    for task in ASK:
        answers = sorted({scene.facts[task] for scene in scenes if task in scene.facts})
        found = [
            answers.index(scene.facts[task]) if task in scene.facts else SILENT for scene in scenes
        ]
        out[task] = answers, torch.tensor(found)
    return out


def words_of(scenes: Sequence[Scene], tokens: Any, count: int, lead: int = 0) -> torch.Tensor:
    """The key words of each caption as tokens, int64 [scenes, count], SILENT around them.

    They begin behind `lead` places, which no picture can change.
    """
    rows = []
    for scene in scenes:
        said = tokens.encode(key_words(scene), add_special_tokens=False)
        row = [*[SILENT] * lead, *said][:count]
        rows.append([*row, *[SILENT] * (count - len(row))])
    return torch.tensor(rows)


def pool(make: Callable[[], list[Scene]], path: Any) -> list[Scene]:
    """Scenes from a file, or made and kept there (drawing them is slow)."""
    import json

    if not path.is_file():
        made = make()
        facts = json.dumps([[scene.caption, dict(scene.facts)] for scene in made])
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, pixels=np.stack([s.pixels for s in made]), facts=np.array(facts))
        part.rename(path)
    held = np.load(path)
    told = json.loads(str(held["facts"]))
    return [Scene(p, c, f) for p, (c, f) in zip(held["pixels"], told, strict=True)]
