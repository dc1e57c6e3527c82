"""Questions whose right answers are known, and how many of them a model answers right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..prompts import Prompt
from ..searching.answer_text import normalise

LONGEST = 12  # tokens of an answer
BATCH_SIZE = 50
Marks = dict[str, float]


@dataclass(frozen=True, slots=True)
class Question:
    """A question whose right answer is known, for judging only."""

    prompt: Prompt
    task: str
    answer: str


def load_exam(path: Path) -> list[Question]:
    """The questions of an eval.jsonl; images stand beside it."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        Question(
            Prompt(
                line["prompt"],
                images=(path.parent / line["image"],) if line["image"] else (),
                id=str(number),
            ),
            line["task"],
            line["answer"],
        )
        for number, line in enumerate(lines)
    ]


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> Marks:
    """Per cent right of each task, and of all tasks on average under "mean".

    An answer is right if it equals the known one but for case, spaces and a final full stop.
    """
    right: dict[str, list[bool]] = {}
    for question, answer in zip(questions, answers, strict=True):
        same = normalise(answer) == normalise(question.answer)
        right.setdefault(question.task, []).append(same)
    marks = {task: 100 * sum(found) / len(found) for task, found in right.items()}
    return {**marks, "mean": sum(marks.values()) / len(marks)}


def judge(
    base: Path, donor: Path, alphas: Sequence[float], exam: Sequence[Question]
) -> list[Marks]:
    """The marks of base and donor blended at each alpha (of one model, if both are the same)."""
    from ..live.live_model import LiveModel
    from ..mapping.join import make_plan
    from ..settings import AnswerSettings

    prompts = [question.prompt for question in exam]
    settings = AnswerSettings(max_new_tokens=LONGEST)
    out = []
    with LiveModel(make_plan(base, donor), device="cpu", quantize="none") as live:
        for alpha in alphas:
            live.apply(alpha)
            out.append(accuracy(exam, live.generate(prompts, settings, batch_size=BATCH_SIZE)))
    return out
