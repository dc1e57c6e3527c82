"""Recorded answers: what models at several alphas have answered before, for `search --answers`.

One format is read, that of the answers.jsonl which a search writes: an object on each line, with
`alpha`, the `index` of the prompt, and the `answer`; if known, its `log_probability` and `entropy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from ..answers import Answer
from ..errors import PromptError
from ..prompts.entry import show_value
from ..prompts.json_files import read_json_lines


def read_answers(paths: Sequence[Path]) -> tuple[dict[float, list[Answer]], list[int]]:
    """The answers by ascending alpha, and the indices of the prompts, in the order of the answers.

    PromptError for a file that cannot be read, an answer that comes twice, and an alpha that lacks
    answers which others have.
    """
    answers: dict[float, dict[int, Answer]] = {}
    for path in paths:
        for number, record in read_json_lines(path):
            where = f"{path}:{number}"
            # Neither a search's first line, nor answers that it does not score
            if isinstance(record, dict) and {"search", "again", "donor"} & record.keys():
                continue
            alpha, index, answer = _parse_record(record, where)
            if index in answers.setdefault(alpha, {}):
                raise PromptError(
                    f"{where}: a second answer to prompt {index} at alpha {alpha}; remove one"
                )
            answers[alpha][index] = answer
    if not answers:
        raise PromptError("no answers found; give the answers.jsonl of a search")
    indices = sorted(set().union(*answers.values()))
    for alpha, found in answers.items():
        if missing := [index for index in indices if index not in found]:
            raise PromptError(
                f"no answer to prompt {missing[0]} at alpha {alpha}, and to {len(missing) - 1} more"
                " that other alphas have; record the rest, or leave this alpha out"
            )
    return {alpha: [answers[alpha][i] for i in indices] for alpha in sorted(answers)}, indices


def _parse_record(record: Any, where: str) -> tuple[float, int, Answer]:
    """Alpha to 6 decimals, index and answer."""
    if not isinstance(record, dict) or not {"alpha", "index", "answer"} <= record.keys():
        raise PromptError(
            f"{where}: found {show_value(record)}, expected an object with alpha, index and answer,"
            " as a search writes them"
        )
    alpha, index, answer = record["alpha"], record["index"], record["answer"]
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise PromptError(f"{where}: alpha is {show_value(alpha)}, expected a number in 0..1")
    if isinstance(index, bool) or not isinstance(index, int):
        raise PromptError(f"{where}: index is {show_value(index)}, expected a whole number")
    if not isinstance(answer, str):
        raise PromptError(f"{where}: answer is {show_value(answer)}, expected a text")
    known = (_parse_number(record, name, where) for name in ("log_probability", "entropy"))
    return round(float(alpha), 6), index, Answer(answer, (), *known)


def _parse_number(record: dict[str, Any], name: str, where: str) -> float | None:
    value = record.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or (is_number and isfinite(value)):
        return value
    raise PromptError(f"{where}: {name} is {show_value(value)}, expected a number or null")
