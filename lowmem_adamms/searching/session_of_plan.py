"""The session of a plan: the model that a search asks, and the journal of its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..live.placement import Placement
from ..mapping.plan import Plan
from ..merging.journal import AnswerJournal, Asked
from ..prompts import Prompts
from ..settings import SearchSettings
from .session import Session, fingerprint

if TYPE_CHECKING:
    from .session import AnyPlacement, SearchedModel


@contextmanager
def open_session(
    plan: Plan,
    prompts: Prompts,
    settings: SearchSettings,
    placement: AnyPlacement,
    journal: Path | None,
    *,
    asked: Callable[[Asked], None] | None,
    answered: Callable[[Asked, int], None] | None,
) -> Iterator[Session]:
    """What asks the model and remembers its answers; see `Session`."""
    load = partial(_load, plan, prompts, settings, placement)
    key = fingerprint(plan, prompts, settings, placement)
    with (
        _open_journal(journal, key) if journal else nullcontext() as answers,
        Session(
            load, settings, placement.batch_size, answers, asked=asked, answered=answered
        ) as session,
    ):
        yield session


def _load(
    plan: Plan, prompts: Prompts, settings: SearchSettings, placement: AnyPlacement
) -> SearchedModel:
    """The model, which takes a while."""
    from ..live.live_model import LiveModel
    from ..live.processor import check_takes_files, check_template, load_processor

    # A base that cannot be asked anything is found out before its weights are read
    trust = settings.trust_remote_code
    processor = load_processor(plan.base.path, trust_remote_code=trust)
    own_code = trust and "auto_map" in plan.base.config  # which need not use a template
    if not own_code:
        check_takes_files(processor, prompts, plan.base.path)
        if not settings.force:
            check_template(processor, plan.base.path)
    if not isinstance(placement, Placement):
        from ..serving.vllm_model import VllmModel, check_prompts

        check_prompts(prompts)
        return VllmModel(plan, placement.settings, trust_remote_code=trust, force=settings.force)
    return LiveModel(
        plan,
        dtype=placement.dtype if settings.live_dtype else None,
        placement=placement,
        trust_remote_code=trust,
        force=settings.force,
        processor=processor,
    )


@contextmanager
def _open_journal(path: Path, key: str) -> Iterator[AnswerJournal]:
    """The journal of answers. If it ends without an answer, no trace of it is left."""
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    with AnswerJournal(path, key) as journal:
        try:
            yield journal
        finally:
            if not journal.answers:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # another run may have put something there
                    for folder in made:
                        folder.rmdir()
