"""A search's session: what is known is not asked, a killed one goes on, a model is loaded late."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
import talk

from lowmem_adamms import make_plan, search
from lowmem_adamms.errors import OutputError
from lowmem_adamms.live.free_memory import Memory
from lowmem_adamms.live.placement import Placement, place
from lowmem_adamms.mapping.alphas import Alpha
from lowmem_adamms.merging.journal import AnswerJournal
from lowmem_adamms.prompts import Prompt
from lowmem_adamms.searching.session import Session, fingerprint
from lowmem_adamms.settings import AnswerSettings, PlacementSettings

if TYPE_CHECKING:
    from conftest import Talkers

    from lowmem_adamms import LiveModel
    from lowmem_adamms.searching.search import Result

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY = "llava_onevision"
ALPHAS = (0.0, 0.2, 0.4, 0.6)
SETTINGS = AnswerSettings(max_new_tokens=talk.NEW)
BATCH_SIZE = 2
TESTS = Path(__file__).parents[1]


class Kept:
    """A live model that several sessions may use: closing one does not close it."""

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        self.model, self.plan, self.make_answerer = live.model, live.plan, live.make_answerer
        self.applied: list[float] = []
        self.closed = 0

    def apply(self, alpha: float) -> None:
        self.applied.append(alpha)
        self._live.apply(alpha)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def kept(talker: Talkers) -> Kept:
    return Kept(talker(FAMILY))


@pytest.fixture
def prompts(images: tuple[Path, ...]) -> tuple[Prompt, ...]:
    return talk.ask(FAMILY, images)


def opened(
    kept: Kept, journal: AnswerJournal | None = None, **hooks: Callable[..., None]
) -> Session:
    return Session(lambda: kept, SETTINGS, BATCH_SIZE, journal, **hooks)  # type: ignore[arg-type, return-value]


def unwanted() -> NoReturn:
    raise AssertionError("the model is loaded, though everything is known")


def asked_all(session: Session, prompts: tuple[Prompt, ...]) -> dict[float, list[str]]:
    return {alpha: session(alpha, prompts) for alpha in ALPHAS}


@pytest.fixture
def truth(talker: Talkers, prompts: tuple[Prompt, ...]) -> dict[float, list[str]]:
    """The answers at each alpha, without any session."""
    if not _truth:
        live = talker(FAMILY)
        plain = replace(SETTINGS, drafts=False, vision_cache=False)
        for alpha in ALPHAS:
            live.apply(alpha)
            _truth[alpha] = live.generate(prompts, plain, batch_size=BATCH_SIZE)
    assert len({tuple(answers) for answers in _truth.values()}) == len(ALPHAS)
    return _truth


_truth: dict[float, list[str]] = {}


def test_answers_timings_and_hooks_alpha_by_alpha(
    kept: Kept, prompts: tuple[Prompt, ...], truth: dict[float, list[str]]
) -> None:
    begun: list[float] = []
    told: list[tuple[float, int]] = []

    def answered(alpha: float, tokens: int) -> None:
        told.append((alpha, tokens))

    with opened(kept, asked=begun.append, answered=answered) as session:
        assert asked_all(session, prompts) == truth
    assert begun == kept.applied == list(ALPHAS)
    assert [alpha for alpha, _ in told] == [alpha for alpha in ALPHAS for _ in prompts]
    for timing in session.timings:
        tokens = [count for alpha, count in told if alpha == timing.alpha]
        assert min(tokens) > 0 and sum(tokens) == timing.answer_tokens
    assert [timing.alpha for timing in session.timings] == list(ALPHAS)
    for timing in session.timings:
        assert timing.apply_seconds > 0
        assert timing.seconds > 0
        assert len(prompts) <= timing.answer_tokens <= len(prompts) * talk.NEW
        assert timing.forward_tokens > timing.answer_tokens
        assert timing.plain_tokens > timing.answer_tokens
    assert session.timings[0].forward_tokens <= session.timings[0].plain_tokens
    assert session.notes == []
    assert kept.closed == 1


def test_notes_of_answering_reach_the_session(talker: Talkers, images: tuple[Path, ...]) -> None:
    with opened(Kept(talker("mistral"))) as session:
        for alpha in (0.0, 0.3):
            session(alpha, talk.ask("mistral", images))
    assert [note.split(":")[0] for note in session.notes] == ["drafts are off"]


def test_what_is_all_known_needs_no_model(
    kept: Kept, prompts: tuple[Prompt, ...], truth: dict[float, list[str]], tmp_path: Path
) -> None:
    with AnswerJournal(tmp_path / "a", "mine") as journal, opened(kept, journal) as session:
        asked_all(session, prompts)
        noise = session.again(0.2, prompts)
    told: list[Alpha] = []
    with (
        AnswerJournal(tmp_path / "a", "mine") as journal,
        Session(
            unwanted, SETTINGS, BATCH_SIZE, journal, answered=lambda alpha, _: told.append(alpha)
        ) as session,
    ):
        assert asked_all(session, prompts) == truth
        assert session.again(0.2, prompts) == noise
    assert session.timings == []
    assert told == [alpha for alpha in ALPHAS for _ in prompts]


def test_only_what_is_missing_of_an_alpha_is_asked(
    kept: Kept, prompts: tuple[Prompt, ...], truth: dict[float, list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerJournal(path, "mine") as journal, opened(kept, journal) as session:
        asked_all(session, prompts)
    # All of the first alpha, and two batches of three of the second
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: 1 + 6 + 4]) + lines[11][:-5])
    kept.applied.clear()
    told: list[Alpha] = []
    with (
        AnswerJournal(path, "mine") as journal,
        opened(kept, journal, answered=lambda alpha, _: told.append(alpha)) as session,
    ):
        assert asked_all(session, prompts) == truth
    assert kept.applied == list(ALPHAS[1:])
    assert [timing.alpha for timing in session.timings] == list(ALPHAS[1:])
    assert session.timings[0].answer_tokens <= 2 * talk.NEW
    assert told == [alpha for alpha in ALPHAS for _ in prompts]
    assert sorted(path.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())


def test_noise_is_the_same_alpha_in_other_batches_and_is_journalled(
    kept: Kept, prompts: tuple[Prompt, ...], truth: dict[float, list[str]], tmp_path: Path
) -> None:
    with AnswerJournal(tmp_path / "a", "mine") as journal, opened(kept, journal) as session:
        asked_all(session, prompts)
        with talk.counted(kept.model) as passes:
            # In float32 other batches make no difference
            assert session.again(0.2, prompts) == truth[0.2]
        assert len(passes) == len(prompts), "one by one, each with its own answer as the draft"
        assert kept.applied[-1] == 0.2
        assert session(0.6, prompts) == truth[0.6]
        assert list(journal.answers) == list(ALPHAS)
        assert journal.again == {0.2: dict(enumerate(truth[0.2]))}


def test_noise_is_measured_in_batches_of_half_the_size(
    kept: Kept, prompts: tuple[Prompt, ...], truth: dict[float, list[str]]
) -> None:
    session = Session(lambda: kept, SETTINGS, 4)  # type: ignore[arg-type, return-value]
    session(0.2, prompts)
    with talk.counted(kept.model) as passes:
        assert session.again(0.2, prompts) == truth[0.2]
    assert len(passes) == len(prompts) / 2


def test_noise_after_a_resumed_search_still_has_its_drafts(
    kept: Kept, prompts: tuple[Prompt, ...], truth: dict[float, list[str]], tmp_path: Path
) -> None:
    with AnswerJournal(tmp_path / "a", "mine") as journal, opened(kept, journal) as session:
        asked_all(session, prompts)
    kept.applied.clear()
    with AnswerJournal(tmp_path / "a", "mine") as journal, opened(kept, journal) as session:
        asked_all(session, prompts)
        with talk.counted(kept.model) as passes:
            assert session.again(0.4, prompts) == truth[0.4]
    assert kept.applied == [0.4]
    assert len(passes) == len(prompts)


# A killed search


KILLED = """
import os, signal, sys
from pathlib import Path
import talk, test_session, torch
from lowmem_adamms import make_plan

torch.set_num_threads(1)
base, donor, out, after, *images = sys.argv[1:]
left = int(after)

def answered(alpha, tokens):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

prompts = talk.ask(test_session.FAMILY, [Path(image) for image in images])
plan = make_plan(base, donor)
test_session.run(lambda: talk.load(base, donor), plan, prompts, Path(out), answered)
"""


def run(
    load: Callable[[], LiveModel],
    plan: object,
    prompts: tuple[Prompt, ...],
    out: Path,
    answered: Callable[[Alpha, int], None] | None = None,
) -> Result:
    """A whole search with a journal in `out`."""
    key = fingerprint(plan, prompts, SETTINGS, small(plan))  # type: ignore[arg-type]
    with (
        AnswerJournal(out, key) as journal,
        Session(load, SETTINGS, BATCH_SIZE, journal, answered=answered) as session,
    ):
        return search(session, prompts, ALPHAS, noise=session.again)


def small(plan: object) -> Placement:
    """A placement that is the same in every process."""
    settings = PlacementSettings(device="cpu", live_dtype="fp32", batch_size=BATCH_SIZE)
    return place(plan, Memory(4 << 30, None, None), settings)  # type: ignore[arg-type]


def test_a_search_that_was_killed_goes_on_to_the_same_result(
    talking: dict[str, Path],
    tiny_models: dict[str, Path],
    kept: Kept,
    prompts: tuple[Prompt, ...],
    images: tuple[Path, ...],
    tmp_path: Path,
) -> None:
    base, donor = talking[FAMILY], tiny_models[talk.DONORS[FAMILY]]
    plan = make_plan(base, donor)
    undisturbed = run(lambda: kept, plan, prompts, tmp_path / "whole")  # type: ignore[arg-type, return-value]
    cut = tmp_path / "cut"
    after = len(prompts) + 3  # in the second batch of the second alpha
    arguments = [str(base), str(donor), str(cut), str(after), *map(str, images)]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(cut.read_bytes().splitlines()) == 1 + after
    kept.applied.clear()
    resumed = run(lambda: kept, plan, prompts, cut)  # type: ignore[arg-type, return-value]
    assert resumed == undisturbed
    assert kept.applied[:3] == list(ALPHAS[1:])
    assert sorted(cut.read_bytes().splitlines()) == sorted(
        (tmp_path / "whole").read_bytes().splitlines()
    )


def test_a_search_for_something_else_does_not_take_these_answers(
    kept: Kept, prompts: tuple[Prompt, ...], tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    run(lambda: kept, kept.plan, prompts, path)  # type: ignore[arg-type, return-value]
    with pytest.raises(OutputError, match="another search"):
        run(unwanted, kept.plan, prompts[:-1], path)


# Fingerprint


def test_a_fingerprint_tells_everything_apart_that_decides_an_answer(
    talking: dict[str, Path], tiny_models: dict[str, Path], images: tuple[Path, ...], tmp_path: Path
) -> None:
    donor = tiny_models[talk.DONORS[FAMILY]]
    plan, prompts = make_plan(talking[FAMILY], donor), talk.ask(FAMILY, images)
    there = small(plan)
    touched = Path(shutil.copytree(donor, tmp_path / "donor"))
    swapped = (replace(prompts[0], images=images[1:2]), *prompts[1:])
    variants = {
        "as it is": fingerprint(plan, prompts, SETTINGS, there),
        "a prompt less": fingerprint(plan, prompts[1:], SETTINGS, there),
        "another order": fingerprint(plan, prompts[::-1], SETTINGS, there),
        "another image": fingerprint(plan, swapped, SETTINGS, there),
        "longer answers": fingerprint(plan, prompts, replace(SETTINGS, max_new_tokens=9), there),
        "other batches": fingerprint(plan, prompts, SETTINGS, replace(there, batch_size=3)),
        "no drafts": fingerprint(plan, prompts, replace(SETTINGS, drafts=False), there),
        "quantized": fingerprint(plan, prompts, SETTINGS, replace(there, quantize="nf4")),
        "another device": fingerprint(plan, prompts, SETTINGS, replace(there, device="cuda")),
        "another dtype": fingerprint(plan, prompts, SETTINGS, replace(there, dtype="BF16")),
        "another donor": fingerprint(make_plan(talking[FAMILY], touched), prompts, SETTINGS, there),
        "other embeddings": fingerprint(
            make_plan(talking[FAMILY], donor, embeddings="keep"), prompts, SETTINGS, there
        ),
    }
    assert len(set(variants.values())) == len(variants)
    shard = next(touched.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    again = fingerprint(make_plan(talking[FAMILY], touched), prompts, SETTINGS, there)
    assert again not in variants.values(), "a file that was written since"


def test_a_fingerprint_does_not_depend_on_where_sources_lie_or_prompts_are_kept(
    talking: dict[str, Path], tiny_models: dict[str, Path], images: tuple[Path, ...], tmp_path: Path
) -> None:
    plan = make_plan(talking[FAMILY], tiny_models[talk.DONORS[FAMILY]])
    moved = [Path(shutil.copy(image, tmp_path / f"moved-{image.name}")) for image in images]
    here, there = talk.ask(FAMILY, images), talk.ask(FAMILY, moved)
    placement = small(plan)
    elsewhere = replace(placement, cached_source_bytes=0, pinned_source_bytes=1, lines=())
    assert fingerprint(plan, here, SETTINGS, placement) == fingerprint(
        plan, there, SETTINGS, elsewhere
    )
