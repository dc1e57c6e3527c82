"""Settings given in Python, and that every one has its option."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lowmem_adamms import settings
from lowmem_adamms.api import MergeSettings
from lowmem_adamms.cli import COMMANDS, parse
from lowmem_adamms.errors import RecipeError
from lowmem_adamms.settings import PlanSettings, SearchSettings, changed, combine

LEAST: dict[str, list[str]] = {
    "plan": ["a", "b"],
    "compare": ["a", "b"],
    "merge": ["-o", "out"],
    "verify": ["out"],
    "push": ["out", "org/name"],
}


def test_values_may_be_words_as_on_a_command_line() -> None:
    found = combine(SearchSettings, None, {"ram": "16GB", "alphas": [0, 0.5, 1], "samples": "9"})
    assert (found.ram, found.alphas, found.samples) == (16_000_000_000, (0.0, 0.5, 1.0), 9)
    assert combine(PlanSettings, None, {"dtype": torch.bfloat16}).dtype == "BF16"
    assert combine(PlanSettings, None, {"arch": "my.toml"}).arch == ("my.toml",)


@pytest.mark.parametrize(
    ("kind", "fields", "error", "says"),
    [
        (SearchSettings, {"alpha": 1}, TypeError, "no setting is called 'alpha'"),
        (SearchSettings, {"device": "gpu"}, RecipeError, "device 'gpu': expected cpu or cuda"),
        (SearchSettings, {"noise": "no"}, TypeError, "noise is 'no', expected True or False"),
        (SearchSettings, {"samples": 2.5}, TypeError, "expected a whole number, 1 or more"),
        (SearchSettings, {"samples": 0}, RecipeError, "expected a whole number, 1 or more"),
        (MergeSettings, {"max_shard_size": 1.5}, TypeError, "expected a number of bytes"),
        (
            MergeSettings,
            {"max_shard_size": "5"},
            RecipeError,
            "max_shard_size: '5': that many bytes",
        ),
        (SearchSettings, {"question": 3}, TypeError, "question is 3, expected a text"),
        (SearchSettings, {"alphas": 0.3}, TypeError, "^alphas is 0.3, expected numbers, such as"),
        (
            SearchSettings,
            {"alphas": [0, "b", 1]},
            TypeError,
            "one of them is 'b', expected numbers",
        ),
        (PlanSettings, {"dtype": "int8"}, RecipeError, "expected bf16, fp16 or fp32"),
    ],
)
def test_what_is_wrong_is_said(
    kind: Any, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        combine(kind, None, fields)
    with pytest.raises(error, match=says):
        combine(kind, kind(**fields) if "alpha" not in fields else None, fields)


def test_a_dataclass_that_is_given_whole_may_hold_words_too() -> None:
    found = combine(SearchSettings, SearchSettings(vram="8GB", alphas=[0, 0.5, 1]), {})  # type: ignore[arg-type]
    assert (found.vram, found.alphas) == (8_000_000_000, (0.0, 0.5, 1.0))
    with pytest.raises(RecipeError, match="ram: 'much': expected a size"):
        combine(SearchSettings, SearchSettings(ram="much"), {})  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"settings is \{\}, expected a PlanSettings, or its fields"
    ):
        combine(PlanSettings, {}, {})


@pytest.mark.parametrize("name", COMMANDS)
def test_unasked_an_option_has_the_default_of_its_setting(name: str) -> None:
    """And so the command line and Python calls mean the same."""
    command, found = parse([name, *LEAST.get(name, [])])
    given = {"a", "b", "base", "donor", "out", "push_to_hub"}
    assert {item.name for item in changed(found, command.takes)} <= given


def test_every_field_says_what_it_is_for() -> None:
    for kind in vars(settings).values():
        if dataclasses.is_dataclass(kind) and kind is not settings.Option:
            for item in dataclasses.fields(kind):
                assert item.metadata["option"].help
