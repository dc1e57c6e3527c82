"""Every multimodal class of transformers, merged in full and searched, or refused for a reason.

Each is tried with tiny random models, see `harness.py`. A class that a later version of
transformers brings is tried as well. `python bench/class_table.py NAME` prints what becomes of one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from classes import (
    NOT_CARRIED,
    NOT_DECODER_ONLY,
    NOT_SEARCHED,
    NOT_YET,
    REFUSED_IN_LLAVA,
    multimodal_classes,
    text_decoders,
)
from harness import Outcome, llava_case, multimodal_case, try_case
from tiny_models import timm_stub


@pytest.fixture(scope="module", autouse=True)
def timm() -> Iterator[None]:
    with timm_stub():
        yield


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """These merges need not outlive a power cut; a thousand calls take a while."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that is emptied at once: pytest keeps its own for three sessions."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def multimodal() -> list[object]:
    """Every class; what fails today must begin to pass only with a change."""
    failing = pytest.mark.xfail(strict=True, reason="see NOT_YET in classes.py")
    return [
        pytest.param(name, marks=failing if name in NOT_YET else ())
        for name in multimodal_classes()
    ]


def check_merged(outcomes: dict[str, Outcome], searched: str) -> None:
    """All donors in full; one that is spelled otherwise may be refused, never merged in part."""
    found = {donor: outcome.merged for donor, outcome in outcomes.items()}
    expected = dict.fromkeys(found, "full")
    if found.get("module names") == "refused":
        expected["module names"] = "refused"
    assert found == expected, outcomes
    first, *_ = outcomes.values()
    assert first.searched == searched, outcomes


def check_refused(outcomes: dict[str, Outcome], folder: Path) -> None:
    for outcome in outcomes.values():
        assert outcome.merged == "refused"
        assert str(folder) in outcome.why
        assert "\n" not in outcome.why
        assert "get the files that lack" not in outcome.why  # nothing is missing


@pytest.mark.parametrize("model_type", multimodal())
def test_multimodal_class(model_type: str, folder: Path) -> None:
    outcomes = try_case(multimodal_case(model_type), folder)
    if model_type in NOT_DECODER_ONLY:
        check_refused(outcomes, folder)
    else:
        check_merged(outcomes, "refused" if model_type in NOT_SEARCHED else "full")


@pytest.mark.parametrize("text_type", [name for name in text_decoders() if name not in NOT_CARRIED])
def test_llava_around(text_type: str, folder: Path) -> None:
    outcomes = try_case(llava_case(text_type), folder, thorough=False)
    if text_type in REFUSED_IN_LLAVA:
        check_refused(outcomes, folder)
    else:
        check_merged(outcomes, "")


def test_the_tables_name_only_what_there_is() -> None:
    assert NOT_DECODER_ONLY.keys() | NOT_SEARCHED.keys() | NOT_YET <= multimodal_classes().keys()
    decoders = set(text_decoders())
    assert NOT_CARRIED | REFUSED_IN_LLAVA.keys() <= decoders
    assert not NOT_CARRIED & REFUSED_IN_LLAVA.keys()


def test_most_classes_work() -> None:
    refused = NOT_DECODER_ONLY.keys() | NOT_SEARCHED.keys()
    assert len(multimodal_classes()) - len(refused | NOT_YET) >= 100
    carried = len(text_decoders()) - len(NOT_CARRIED)
    assert carried - len(REFUSED_IN_LLAVA) >= 60
