"""The answers of a search: prompts whose answers change along the grid, and those that keep one."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ..errors import PromptError
from ..prompts import Prompt, open_image
from ..searching.answer_text import normalise
from ..searching.search import Result
from .text import Excerpt, make_excerpt

MAX_IMAGES = 4  # of one prompt
ANSWER_LIMIT, PROMPT_LIMIT = 160, 260  # characters shown at once
FEW_IMAGES, LARGE_PIXELS, SMALL_PIXELS = 200, 480, 200
"""Pixels of the longer side of a page's images: large ones up to so many, of more all are small."""


@dataclass(frozen=True, slots=True)
class AnswerRun:
    """Neighbouring alphas with one answer: positions first..last in the grid, both included."""

    first: int
    last: int
    answer: str

    def covers(self, position: int | None) -> bool:
        """Whether a position of the grid lies in the run."""
        return position is not None and self.first <= position <= self.last


@dataclass(frozen=True, slots=True)
class PromptAnswers:
    """A prompt and its answers over the grid."""

    number: int
    prompt: Prompt
    runs: tuple[AnswerRun, ...]
    texts: tuple[int, ...] = ()  # by position of the grid: equal numbers for equal answers
    degenerate: frozenset[int] = frozenset()  # positions of the grid
    donor: str | None = None

    @property
    def changes(self) -> bool:
        """Whether not all alphas give one answer."""
        return len(self.runs) > 1

    def list_chips(self, position: int) -> list[str]:
        """What is remarkable about the answer at a position of the grid; the script does the same.

        changed: it is not that of a neighbouring alpha. differs: it is not the base's.
        """
        neighbours = self.texts[max(position - 1, 0) : position + 2]
        chips = {
            "changed": len(set(neighbours)) > 1,
            "differs": self.texts[position] != self.texts[0],
            "degenerate": position in self.degenerate,
        }
        return [name for name, applies in chips.items() if applies]

    @property
    def donor_excerpt(self) -> Excerpt | None:
        """The donor's answer, cut where it departs from the base's; None if it was not asked."""
        if self.donor is None:
            return None
        return make_excerpt(
            self.donor, ANSWER_LIMIT, _common_length(self.donor, self.runs[0].answer)
        )

    @property
    def text(self) -> Excerpt | None:
        """The prompt's text, if it has one."""
        return make_excerpt(self.prompt.text, PROMPT_LIMIT) if self.prompt.text else None

    @property
    def name(self) -> str:
        """Where the prompt stands."""
        return self.prompt.id[:PROMPT_LIMIT] or f"prompt {self.number}"

    @property
    def answers(self) -> list[tuple[AnswerRun, Excerpt]]:
        """Each run with its answer, cut so that it shows where it departs from its neighbour's."""
        if not self.changes:
            return [(run, make_excerpt(run.answer, ANSWER_LIMIT)) for run in self.runs]
        neighbours = (self.runs[1], *self.runs[:-1])
        return [
            (run, make_excerpt(run.answer, ANSWER_LIMIT, _common_length(run.answer, other.answer)))
            for run, other in zip(self.runs, neighbours, strict=True)
        ]

    @property
    def images(self) -> list[tuple[str, Path | bytes]]:
        """The first images, each with a name."""
        return [
            (image.name if isinstance(image, Path) else f"image {number}", image)
            for number, image in enumerate(self.prompt.images[:MAX_IMAGES], 1)
        ]

    @property
    def more_images(self) -> int:
        """Images that are not shown."""
        return max(0, len(self.prompt.images) - MAX_IMAGES)


def collect_answers(
    result: Result, prompts: Sequence[Prompt], donor_answers: Sequence[str] = ()
) -> list[PromptAnswers]:
    """Put the answers of each alpha together by prompt, those that change most first.

    prompts, donor_answers: in the order of the answers; may be fewer.
    """
    alphas = [candidate.alpha for candidate in result.candidates]
    answers = [result.answers.get(alpha, ()) for alpha in alphas]
    degenerate = [result.degenerate.get(alpha, frozenset()) for alpha in alphas]
    chosen = alphas.index(result.alpha) if result.alpha in alphas else None
    collected = []
    for i in range(min(map(len, answers), default=0)):
        texts = [row[i] for row in answers]
        collected.append(
            PromptAnswers(
                i + 1,
                prompts[i] if i < len(prompts) else Prompt(""),
                find_answer_runs(texts, chosen),
                _number_texts(texts),
                frozenset(p for p, places in enumerate(degenerate) if i in places),
                donor_answers[i] if i < len(donor_answers) else None,
            )
        )
    return sorted(collected, key=_by_change)


def _number_texts(texts: Sequence[str]) -> tuple[int, ...]:
    """A number for each text; those that are equal once normalised have the same."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(normalise(text), len(numbers)) for text in texts)


def _by_change(item: PromptAnswers) -> tuple[int, int, int]:
    different = len({normalise(run.answer) for run in item.runs})
    return -len(item.runs), -different, item.number


def find_answer_runs(answers: Sequence[str], prefer: int | None = None) -> tuple[AnswerRun, ...]:
    """Merge neighbouring answers that are equal once normalised.

    A run shows the spelling of its first answer, or of position `prefer` if that lies inside.
    """
    runs = []
    for _, group in groupby(range(len(answers)), key=lambda i: normalise(answers[i])):
        positions = list(group)
        shown = prefer if prefer is not None and prefer in positions else positions[0]
        runs.append(AnswerRun(positions[0], positions[-1], answers[shown]))
    return tuple(runs)


def _common_length(text: str, other: str) -> int:
    """How many characters two texts share before they differ."""
    for i, (first, second) in enumerate(zip(text, other, strict=False)):
        if first != second:
            return i
    return min(len(text), len(other))


def make_thumbnail(image: Path | bytes, pixels: int) -> str:
    """A JPEG with at most so many pixels a side as a data URI; empty if the image cannot be read.

    The page shows it small, and whole once it is enlarged.
    """
    try:
        small = open_image(image)
    except PromptError:
        return ""
    small.thumbnail((pixels, pixels))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
