"""The search for alpha: ask at every alpha of a grid, choose where answers change least.

AdaMMS's search step (arXiv 2503.23733, Algorithm 1), which knows no model: it takes a callable that
gives the answers. Where the paper is silent: ties go to the smaller alpha, collapsed answers cannot
win, and notes say what weakens the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, TypeVar

from ..answers import Answer
from ..errors import PromptError, RecipeError, SearchError
from ..settings import DEFAULT_ALPHAS, DEFAULT_TAGS, Measure
from ..values import Tags, check_grid
from .answer_text import drop_reasoning
from .notes import write_notes
from .resampling import resample
from .scoring import (
    AnswerComparison,
    GridPoint,
    Rounds,
    best_points,
    choose_alpha,
    earlier_points,
    latest_points,
    next_window,
    round_points,
)
from .verdict import Verdict, judge_merge

_UNFINISHED = 0.9
"""The share of answers without an end at which a search makes no sense."""
P = TypeVar("P")
Generate = Callable[[float, Sequence[P]], Sequence[str | Answer]]
"""generate(alpha, prompts): one answer for each prompt, in their order."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One alpha and how its answers differ from its neighbours'.

    diff_previous, diff_next: answers that differ; None without a neighbour.
    score: D, of the measures "relative" and "nuclear" in per cent, of "entropy" in nats; None at
        the two ends of the grid of measures that compare answers, and by "relative" where no answer
        has left the base's.
    degenerate: answers that are empty, repeating or constant.
    interval: 95 % bootstrap interval of the score over prompts.
    neighbours: the alphas that diff_previous and diff_next refer to.
    round: 0 for the grid, n for the n-th refinement. Closer neighbours differ less, so that scores
        are comparable within a round only.
    entropy, log_probability: means over the answers, per token; None where an answer has none.
    """

    alpha: float
    diff_previous: int | None
    diff_next: int | None
    score: float | None
    degenerate: int
    interval: tuple[float, float] | None = None
    neighbours: tuple[float | None, float | None] = (None, None)
    round: int = 0
    entropy: float | None = None
    log_probability: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The chosen alpha and everything that led to it.

    prompts: how many there were.
    candidates: one for each alpha, as of the last round in which it was scored.
    answers: by alpha, in the order of the prompts.
    ties: the alphas that share the best score if there are several.
    noise: answers that differ between two runs at the chosen alpha; None if not measured.
    notes: what weakens the choice.
    wins: how often (0..1) each alpha of the last round wins when prompts are resampled.
    earlier: candidates that a refinement scored anew, as they were before.
    degenerate: by alpha, the places of the answers that are empty, repeating or constant.
    unfinished: by alpha, how many answers end inside their reasoning, where any do; in `answers`
        these are empty, and of the others there is what follows the reasoning.
    verdict: whether to merge at all; None where the answers do not tell.
    """

    alpha: float
    measure: Measure
    prompts: int
    candidates: tuple[Candidate, ...]
    answers: Mapping[float, tuple[str, ...]]
    ties: tuple[float, ...] = ()
    noise: int | None = None
    notes: tuple[str, ...] = ()
    wins: Mapping[float, float] = field(default_factory=dict)
    earlier: tuple[Candidate, ...] = ()
    degenerate: Mapping[float, frozenset[int]] = field(default_factory=dict)
    unfinished: Mapping[float, int] = field(default_factory=dict)
    verdict: Verdict | None = None

    @property
    def rounds(self) -> tuple[Candidate, ...]:
        """All candidates of all rounds, round by round, by ascending alpha."""
        return tuple(sorted((*self.earlier, *self.candidates), key=lambda c: (c.round, c.alpha)))

    def to_json(self) -> dict[str, Any]:
        """The document of `search --json`, without base, donor and version."""
        return {
            "alpha": self.alpha,
            "measure": self.measure,
            "prompts": self.prompts,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "earlier": [asdict(candidate) for candidate in self.earlier],
            "wins": {str(alpha): share for alpha, share in self.wins.items()},
            "ties": list(self.ties),
            "noise": self.noise,
            "unfinished": {str(alpha): count for alpha, count in self.unfinished.items()},
            "verdict": self.verdict and asdict(self.verdict),
            "notes": list(self.notes),
        }


def search(
    generate: Generate[P],
    prompts: Sequence[P],
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    *,
    measure: Measure | None = None,
    refine: int = 0,
    noise: Generate[P] | None = None,
    seed: int = 0,
    reasoning_tags: Tags | None = DEFAULT_TAGS,
    progress: Callable[[float, tuple[Candidate, ...]], None] | None = None,
) -> Result:
    """Ask for the answers at every alpha and choose where they change least.

    Args:
        generate: Called as `generate(alpha, prompts)` once for each alpha, in ascending order;
            returns strings or `Answer`s.
        prompts: Any objects that `generate` understands; equal ones count as one prompt where a
            constant answer is looked for.
        alphas: Ascending, in 0..1, three or more; taken to 6 decimals.
        measure: "pairwise" (Algorithm 1), "joint" (Appendix B), "relative" (pairwise in per cent of
            the answers that have left the base's), "nuclear" (how far answers are from sure and all
            different) or "entropy" (how unsure the model is), both of `Answer`s that know it.
            None: relative where answers at alpha 0 have probabilities, else pairwise.
        refine: How many times to go on between the best alpha and its neighbours: the two alphas
            halfway are asked, and the best of the inner three goes on.
        noise: Called once, at the chosen alpha, by measures that compare answers. The same model in
            another batch size shows how many differences mean nothing.
        seed: Of the bootstrap.
        reasoning_tags: Answers are compared by what follows the reasoning between these; one that
            ends inside it counts as empty. None: whole answers are compared.
        progress: Called after each alpha with it and the candidates as far as they are known.

    Raises:
        RecipeError: An argument is out of range. As the next one, it is raised before the first
            call of `generate`.
        PromptError: There are no prompts.
        SearchError: Nearly all answers at the smallest alpha end inside their reasoning, or lack
            the confidence that the measure takes.
        ValueError: `generate` broke its contract.

    Example:
        >>> def generate(alpha, prompts):
        ...     return [f"{prompt} {round(3 * alpha)}" for prompt in prompts]
        >>> search(generate, ["one", "two", "three"]).alpha
        0.3

    """
    grid = check_grid(alphas)
    if refine < 0:
        raise RecipeError(f"refine is {refine}, expected a number of rounds, 0 or more")
    if len(prompts) == 0:
        raise PromptError("no prompts to search with; give at least one")
    comparison = AnswerComparison(measure, _first_of_each(prompts))
    rounds: list[list[GridPoint]] = []

    def ask(alpha: float, answered: Sequence[float]) -> None:
        """Ask at one alpha. answered: the alphas of this round whose answers are there then."""
        answers = _check_answers(generate(alpha, prompts), len(prompts), alpha)
        _add_answers(comparison, alpha, answers, reasoning_tags)
        if progress is not None:
            known = latest_points([*rounds, round_points(answered, len(rounds))])
            progress(alpha, tuple(_candidate(comparison, point) for point in known))

    for count, alpha in enumerate(grid, 1):
        ask(alpha, grid[:count])
    rounds.append(round_points(grid, 0))
    while len(rounds) <= refine and (window := next_window(comparison, rounds)):
        ask(window[1], window[:3])
        ask(window[3], window)
        rounds.append(round_points(window, len(rounds)))
    again = None
    if noise is not None and comparison.rule.compares:
        alpha = choose_alpha(comparison, rounds)
        answers = _check_answers(noise(alpha, prompts), len(prompts), alpha)
        finals = drop_reasoning([answer.text for answer in answers], reasoning_tags)
        again = tuple(final or "" for final in finals)
    return _conclude(comparison, rounds, seed, again)


def choose(
    answers: Mapping[float, Sequence[str | Answer]],
    *,
    measure: Measure | None = None,
    seed: int = 0,
    reasoning_tags: Tags | None = DEFAULT_TAGS,
) -> Result:
    """What `search` makes of answers that exist already.

    Args:
        answers: By alpha, all in one order of prompts.
        measure: As for `search`.
        seed: Of the bootstrap.
        reasoning_tags: As for `search`.

    Raises:
        RecipeError: The alphas are no grid, or there is no such measure.
        PromptError: There are no answers.
        ValueError: The alphas have different numbers of answers.

    Example:
        >>> choose({0.0: ["a", "b"], 0.2: ["a", "c"], 0.4: ["a", "c"], 0.6: ["d", "e"]}).alpha
        0.2

    """
    grid = check_grid(sorted(answers))
    by_alpha = {round(alpha, 6): found for alpha, found in answers.items()}
    count = len(by_alpha[grid[0]])
    if not count:
        raise PromptError("no answers to choose by; give at least one for each alpha")
    comparison = AnswerComparison(measure, range(count))
    for alpha in grid:
        found = _check_answers(by_alpha[alpha], count, alpha)
        _add_answers(comparison, alpha, found, reasoning_tags)
    return _conclude(comparison, [round_points(grid, 0)], seed, None)


# Checks


def _check_answers(answers: Sequence[str | Answer], count: int, alpha: float) -> tuple[Answer, ...]:
    if isinstance(answers, str) or not all(isinstance(answer, str | Answer) for answer in answers):
        raise ValueError(f"alpha {alpha}: expected a sequence of strings or Answers")
    if len(answers) != count:
        raise ValueError(f"alpha {alpha}: found {len(answers)} answers, expected {count}")
    return tuple(Answer(answer) if isinstance(answer, str) else answer for answer in answers)


def _add_answers(
    comparison: AnswerComparison, alpha: float, answers: Sequence[Answer], tags: Tags | None
) -> None:
    """Compare answers by what follows their reasoning, and count those that end inside it.

    SearchError if that is so of nearly all at the smallest alpha, where there is nothing to
    compare, and if answers there lack the confidence that the measure takes.
    """
    finals = drop_reasoning([answer.text for answer in answers], tags)
    if count := finals.count(None):
        comparison.unfinished[alpha] = count
    if not comparison.answers and count >= _UNFINISHED * len(answers):
        raise SearchError(
            f"{count} of {len(answers)} answers at alpha {alpha} end inside their reasoning, before"
            f" {tags[1] if tags else ''}: allow more tokens for an answer (max_new_tokens)"
        )
    is_first = not comparison.answers
    comparison.add(
        alpha, [replace(a, text=text or "") for a, text in zip(answers, finals, strict=True)]
    )
    if is_first and (count := comparison.count_unknown(alpha)):
        raise SearchError(
            f"{count} of {len(answers)} answers at alpha {alpha} have no {comparison.rule.lacks}:"
            f" {comparison.rule.why_unknown}; choose another measure than {comparison.measure}"
        )


def _first_of_each(prompts: Sequence[P]) -> list[int]:
    """Where each different prompt stands first. Those without a hash count as different."""
    first: dict[Any, int] = {}
    try:
        for i, prompt in enumerate(prompts):
            first.setdefault(_asked(prompt), i)
    except TypeError:
        return list(range(len(prompts)))
    return list(first.values())


def _asked(prompt: Any) -> Any:
    """What a prompt asks: its text but for white space, and its files, wherever it stands."""
    text = getattr(prompt, "text", prompt)
    words = " ".join(text.split()) if isinstance(text, str) else text
    return words, getattr(prompt, "images", ()), getattr(prompt, "audio", ())


# Conclusion


def _conclude(
    comparison: AnswerComparison, rounds: Rounds, seed: int, again: tuple[str, ...] | None
) -> Result:
    """The result. again: a second run's answers at the chosen alpha, if there was one."""
    chosen = choose_alpha(comparison, rounds)
    best = best_points(comparison, rounds)
    intervals, wins = resample(comparison, rounds, seed)
    noise = None if again is None else comparison.noise(chosen, again)

    def candidates(points: Sequence[GridPoint]) -> tuple[Candidate, ...]:
        return tuple(_candidate(comparison, point, intervals.get(point)) for point in points)

    return Result(
        alpha=chosen,
        measure=comparison.measure,
        prompts=comparison.prompt_count,
        candidates=candidates(latest_points(rounds)),
        answers={
            alpha: tuple(answer.text for answer in answers)
            for alpha, answers in sorted(comparison.answers.items())
        },
        ties=tuple(point.alpha for point in best) if len(best) > 1 else (),
        noise=noise and noise[0],
        notes=tuple(write_notes(comparison, rounds, wins, noise)),
        wins=wins,
        earlier=candidates(earlier_points(rounds)),
        degenerate=dict(comparison.degenerate_places),
        unfinished=dict(sorted(comparison.unfinished.items())),
        verdict=judge_merge(comparison, chosen, seed),
    )


def _candidate(
    comparison: AnswerComparison, point: GridPoint, interval: tuple[float, float] | None = None
) -> Candidate:
    entropies = comparison.entropies(point.alpha)
    log_probability = comparison.mean_log_probability[point.alpha]
    return Candidate(
        point.alpha,
        comparison.difference(point.previous, point.alpha),
        comparison.difference(point.alpha, point.next),
        comparison.score(point),
        comparison.degenerate[point.alpha],
        interval,
        (point.previous, point.next),
        point.round,
        None if entropies is None else round(fmean(entropies), 9),
        None if log_probability is None else round(log_probability, 9),
    )
