"""The embedded pair: two small trained multimodal models of one ancestor, and questions for them.

`base` (Qwen2-VL) was tuned on colours, shapes, counts and sums, `donor` (LLaVA-OneVision) on
charts, counts, places and first letters; `bench/zoo/` trained both. `prompts.jsonl` has questions
without answers, for the search; `eval.jsonl` others with them, to judge the result. Leaves to
others: merging, searching, answering, and every word on the screen (`cli/`).
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError
from ..prompts import Prompt
from ..searching.answer_text import normalise

HERE = Path(__file__).parent
QUESTIONS = "questions.zip"  # prompts.jsonl, eval.jsonl and images/
LONGEST, ROWS = 12, 50  # tokens of an answer, answers of a batch
Marks = dict[str, float]


@dataclass(frozen=True, slots=True)
class Pair:
    """Where an exported demo lies."""

    base: Path
    donor: Path
    prompts: Path
    exam: Path


@dataclass(frozen=True, slots=True)
class Question:
    """A question whose right answer is known, for judging only."""

    prompt: Prompt
    task: str
    answer: str


def export(folder: Path) -> Pair:
    """Write base, donor, prompts.jsonl, eval.jsonl and images to a new or empty folder.

    OutputError if it is a file or has anything in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise OutputError(f"{folder} {what}; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("base", "donor"):
        shutil.copytree(HERE / side, folder / side, copy_function=shutil.copyfile)
    with zipfile.ZipFile(HERE / QUESTIONS) as questions:
        questions.extractall(folder)
    return Pair(folder / "base", folder / "donor", folder / "prompts.jsonl", folder / "eval.jsonl")


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
            out.append(accuracy(exam, live.generate(prompts, settings, batch_size=ROWS)))
    return out
