"""A search's session: what is known is not asked, a killed one goes on, a model is loaded late."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import talk

from lowmem_adamms import make_plan, search
from lowmem_adamms.answers import Answer
from lowmem_adamms.live.free_memory import Memory
from lowmem_adamms.live.placement import Placement
from lowmem_adamms.live.placing import place as choose_placement
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.merging.journal import AnswerJournal
from lowmem_adamms.prompts import Prompt
from lowmem_adamms.searching.session import Session, fingerprint
from lowmem_adamms.settings import AnswerSettings, PlacementSettings, SearchSettings

if TYPE_CHECKING:
    from conftest import Talkers

    from lowmem_adamms.searching.search import Result

ALPHAS = (0.0, 0.2, 0.4, 0.6)
BATCH_SIZE = 2
PROMPTS = tuple(Prompt(f"question {i}") for i in range(6))
SETTINGS = AnswerSettings(max_new_tokens=talk.NEW)


class FakeModel:
    """A live model whose answers say what was asked, and at which alpha."""

    notes: tuple[str, ...] = ("a note",)

    def __init__(self) -> None:
        self.applied: list[float] = []
        self.batches: list[tuple[int, ...]] = []
        self.drafts: list[dict[int, Answer]] = []
        self.closed = 0

    def apply(self, alpha: float) -> None:
        self.applied.append(alpha)

    def make_answerer(self, settings: AnswerSettings, *, batch_size: int) -> FakeAnswerer:
        assert settings == SETTINGS
        return FakeAnswerer(self, batch_size)

    def close(self) -> None:
        self.closed += 1


class FakeAnswerer:
    """Answers batch by batch, as the real one does; only whole batches are left out."""

    def __init__(self, model: FakeModel, batch_size: int) -> None:
        self.model, self.batch_size, self.notes = model, batch_size, list(model.notes)

    def set_drafts(self, prompts: Sequence[Prompt], answers: Mapping[int, Answer]) -> None:
        self.model.drafts.append(dict(answers))

    def answer(
        self, prompts: Sequence[Prompt], known: Mapping[int, Answer], answered: Any
    ) -> list[Answer]:
        answers = dict(known)
        alpha = self.model.applied[-1]
        for start in range(0, len(prompts), self.batch_size):
            places = range(start, start + self.batch_size)
            if all(place in answers for place in places):
                continue
            self.model.batches.append(tuple(places))
            for place in places:
                if place not in answers:
                    answers[place] = answer_at(alpha, place)
                    if answered:
                        answered(place, answers[place])
        self.cost = SimpleNamespace(
            seconds=2.0, answer_tokens=12, forward_tokens=30, plain_tokens=40
        )
        return [answers[place] for place in range(len(prompts))]


def answer_at(alpha: float, place: int) -> Answer:
    tokens = round(10 * alpha), place
    return Answer(f"{PROMPTS[place].text} at {alpha}", tokens, -alpha - place, alpha * place)


def answers_at(alpha: float) -> list[Answer]:
    return [answer_at(alpha, place) for place in range(len(PROMPTS))]


def drafts_at(alpha: float) -> dict[int, Answer]:
    return dict(enumerate(answers_at(alpha)))


@contextmanager
def opened(
    model: FakeModel | None, path: Path | None = None, batch_size: int = BATCH_SIZE, **hooks: Any
) -> Iterator[Session]:
    """A session on the model, with a journal if a path is given; None: it must not be loaded."""

    def load() -> Any:
        assert model is not None, "the model is loaded, though everything is known"
        return model

    with ExitStack() as stack:
        journal = stack.enter_context(AnswerJournal(path, "mine")) if path else None
        yield stack.enter_context(Session(load, SETTINGS, batch_size, journal, **hooks))


def ask_everything(session: Session) -> None:
    for alpha in ALPHAS:
        assert session(alpha, PROMPTS) == answers_at(alpha)


def test_answers_timings_and_hooks_alpha_by_alpha() -> None:
    model = FakeModel()
    begun: list[float] = []
    told: list[tuple[float, int]] = []
    with opened(model, asked=begun.append, answered=lambda *one: told.append(one)) as session:
        ask_everything(session)
        assert session.again(0.2, PROMPTS) == answers_at(0.2)
    assert begun == list(ALPHAS) and model.applied == [*ALPHAS, 0.2]
    assert told == [(alpha, 2) for alpha in ALPHAS for _ in PROMPTS]
    assert model.drafts == [drafts_at(alpha) for alpha in (*ALPHAS[:-1], 0.2)]
    assert [timing.alpha for timing in session.timings] == list(ALPHAS)
    for timing in session.timings:
        assert timing.apply_seconds > 0 and timing.seconds == 2
        counts = (timing.answer_tokens, timing.forward_tokens, timing.plain_tokens)
        assert counts == (12, 30, 40)
    assert session.notes == ["a note"]
    assert model.closed == 1


def test_a_model_that_cannot_be_asked_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(model, "make_answerer", refuse)
    with pytest.raises(ValueError, match="no"), opened(model) as session:
        session(0.0, PROMPTS)
    assert model.closed == 1


def test_what_is_all_known_needs_no_model(tmp_path: Path) -> None:
    told: list[tuple[float, int]] = []
    for model in (FakeModel(), None):
        told.clear()
        with opened(model, tmp_path / "a", answered=lambda *one: told.append(one)) as session:
            ask_everything(session)
            assert session.again(0.2, PROMPTS) == answers_at(0.2)
    assert session.timings == []
    assert told == [(alpha, 0) for alpha in ALPHAS for _ in PROMPTS]


def test_answers_stand_in_the_order_of_the_prompts_however_they_were_finished(
    tmp_path: Path,
) -> None:
    with AnswerJournal(tmp_path / "a", "mine") as journal:
        for place in reversed(range(len(PROMPTS))):
            journal.note(0.0, place, answer_at(0.0, place))
    with opened(None, tmp_path / "a") as session:
        assert session(0.0, PROMPTS) == answers_at(0.0)


def test_only_what_is_missing_of_an_alpha_is_asked(tmp_path: Path) -> None:
    path, model = tmp_path / "answers.jsonl", FakeModel()
    with opened(FakeModel(), path) as session:
        ask_everything(session)
    # All of the first alpha, and of the second two batches of three but for the last line's end
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: 1 + 6 + 3]) + lines[10][:-5])
    told: list[tuple[float, int]] = []
    with opened(model, path, answered=lambda *one: told.append(one)) as session:
        ask_everything(session)
    assert model.applied == [timing.alpha for timing in session.timings] == list(ALPHAS[1:])
    assert model.batches[:2] == [(2, 3), (4, 5)]
    assert model.drafts == [drafts_at(alpha) for alpha in ALPHAS[:-1]]
    assert told[:12] == [(0.0, 0)] * 6 + [(0.2, 0)] * 3 + [(0.2, 2)] * 3
    assert path.read_bytes().splitlines(keepends=True) == lines


@pytest.mark.parametrize(("batch_size", "batches"), [(1, 6), (2, 6), (4, 3)])
def test_noise_is_the_same_alpha_in_batches_of_half_the_size(
    tmp_path: Path, batch_size: int, batches: int
) -> None:
    """Its own answers are the drafts, also after a search that was resumed."""
    model = FakeModel()
    with opened(FakeModel(), tmp_path / "a") as session:
        ask_everything(session)
    with opened(model, tmp_path / "a", batch_size) as session:
        ask_everything(session)
        assert session.again(0.4, PROMPTS) == answers_at(0.4)
    with AnswerJournal(tmp_path / "a", "mine") as journal:
        assert journal.again == {0.4: dict(enumerate(answers_at(0.4)))}
        assert list(journal.answers) == list(ALPHAS)
    assert (model.applied, model.drafts) == ([0.4], [drafts_at(0.4)])
    assert len(model.batches) == batches


def test_the_donors_answers_are_asked_aside_and_kept(tmp_path: Path) -> None:
    """They are at alpha 1, which the search's own answers know nothing of."""
    for model in (FakeModel(), None):
        told: list[tuple[float, int]] = []
        begun: list[float] = []

        def answered(*one: Any, told: list[tuple[float, int]] = told) -> None:
            told.append((one[0], one[1]))

        with opened(model, tmp_path / "a", asked=begun.append, answered=answered) as session:
            assert session.ask_donor(PROMPTS) == answers_at(1.0)
            assert session.timings == []
        assert begun == [1.0]
        assert told == [(1.0, 2 if model else 0) for _ in PROMPTS]
    with AnswerJournal(tmp_path / "a", "mine") as journal:
        assert journal.donor == dict(enumerate(answers_at(1.0)))
        assert not journal.answers and not journal.again


def test_a_live_model_answers_as_it_does_without_a_session(
    talker: Talkers, images: tuple[Path, ...], tmp_path: Path
) -> None:
    live, prompts = talker("llava_onevision"), talk.ask("llava_onevision", images)
    truth: dict[float, list[str]] = {}
    for alpha in ALPHAS:
        live.apply(alpha)
        plain = replace(SETTINGS, drafts=False, vision_cache=False)
        truth[alpha] = live.generate(prompts, plain, batch_size=BATCH_SIZE)
    assert len(set(map(tuple, truth.values()))) == len(ALPHAS)
    session = Session(lambda: live, SETTINGS, BATCH_SIZE)
    found = {alpha: session(alpha, prompts) for alpha in ALPHAS}
    assert {alpha: [a.text for a in answers] for alpha, answers in found.items()} == truth
    with talk.counted(live.model) as passes:
        assert [answer.text for answer in session.again(0.2, prompts)] == truth[0.2]
    assert len(passes) == len(prompts), "one by one, each with its own answer as the draft"
    for timing in session.timings:
        assert timing.forward_tokens > timing.answer_tokens > 0
        assert timing.seconds > 0 and timing.plain_tokens > timing.answer_tokens


# A killed search


def run(out: Path, model: FakeModel, **hooks: Any) -> Result:
    """A whole search with a journal."""
    with opened(model, out, **hooks) as session:
        return search(session, PROMPTS, ALPHAS, noise=session.again)


def test_a_search_that_was_killed_goes_on_to_the_same_result(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    told: list[float] = []

    def answered(alpha: float, tokens: int) -> None:
        told.append(alpha)
        if len(told) == len(PROMPTS) + 3:  # in the second batch of the second alpha
            shutil.copy(whole, cut)  # what a kill at this moment would leave

    undisturbed = run(whole, FakeModel(), answered=answered)
    assert len(cut.read_bytes().splitlines()) == 1 + len(PROMPTS) + 3
    model = FakeModel()
    assert run(cut, model) == undisturbed
    assert model.applied[:3] == list(ALPHAS[1:])
    assert cut.read_bytes() == whole.read_bytes()


# Fingerprint


def placement_for(plan: Plan) -> Placement:
    settings = PlacementSettings(device="cpu", live_dtype="fp32", batch_size=BATCH_SIZE)
    return choose_placement(plan, Memory(4 << 30, None, None), settings)


def test_a_fingerprint_tells_everything_apart_that_decides_an_answer(
    pair: tuple[Path, Path], images: tuple[Path, ...], tmp_path: Path
) -> None:
    base, donor = pair
    plan, prompts = make_plan(base, donor), talk.ask("llava_onevision", images)
    where = placement_for(plan)
    touched = Path(shutil.copytree(donor, tmp_path / "donor"))
    swapped = (replace(prompts[0], images=images[1:2]), *prompts[1:])
    variants = {
        fingerprint(plan, prompts, SETTINGS, where),
        fingerprint(plan, prompts[1:], SETTINGS, where),
        fingerprint(plan, prompts[::-1], SETTINGS, where),
        fingerprint(plan, swapped, SETTINGS, where),
        fingerprint(plan, prompts, replace(SETTINGS, max_new_tokens=9), where),
        fingerprint(plan, prompts, replace(SETTINGS, drafts=False), where),
        fingerprint(plan, prompts, SETTINGS, replace(where, batch_size=3)),
        fingerprint(plan, prompts, SETTINGS, replace(where, quantize="nf4")),
        fingerprint(plan, prompts, SETTINGS, replace(where, device="cuda")),
        fingerprint(plan, prompts, SETTINGS, replace(where, dtype="BF16")),
        fingerprint(make_plan(base, touched), prompts, SETTINGS, where),
        fingerprint(make_plan(base, donor, embeddings="keep"), prompts, SETTINGS, where),
    }
    assert len(variants) == 12
    os.utime(next(touched.glob("*.safetensors")), ns=(1, 1))
    again = fingerprint(make_plan(base, touched), prompts, SETTINGS, where)
    assert again not in variants, "a file that was written since"


def test_a_fingerprint_does_not_depend_on_where_files_lie_or_on_the_search(
    pair: tuple[Path, Path], images: tuple[Path, ...], tmp_path: Path
) -> None:
    plan = make_plan(*pair)
    where, prompts = placement_for(plan), talk.ask("llava_onevision", images)
    expected = fingerprint(plan, prompts, SETTINGS, where)
    moved = [Path(shutil.copy(image, tmp_path / f"moved-{image.name}")) for image in images]
    elsewhere = replace(where, cached_source_bytes=0, pinned_source_bytes=1, lines=())
    assert fingerprint(plan, talk.ask("llava_onevision", moved), SETTINGS, elsewhere) == expected
    more = SearchSettings(max_new_tokens=talk.NEW, refine=3, ram=1 << 30)
    assert fingerprint(plan, prompts, more, where) == expected
