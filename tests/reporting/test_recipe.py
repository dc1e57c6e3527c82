"""What a report says of how its search was made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lowmem_adamms.api import make_plan
from lowmem_adamms.demo.pair import Pair, export_demo
from lowmem_adamms.prompts import load_prompts
from lowmem_adamms.reporting.recipe import list_facts, spell_merge
from lowmem_adamms.searching.session import Timing
from lowmem_adamms.settings import SearchSettings


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return export_demo(tmp_path_factory.mktemp("a demo") / "pair")


def test_facts_tell_models_prompts_placement_and_time(demo: Pair) -> None:
    prompts = load_prompts(demo.prompts)
    where: Any = SimpleNamespace(batch_size=4, lines=("on the CPU",))
    timings = [Timing(0.1, 0.25, 5.0, 1000, 2000, 8000), Timing(0.2, 0.5, 20.0, 1000, 8000, 8000)]
    plan = make_plan(demo.base, demo.donor)
    facts = list_facts(plan, prompts, SearchSettings(seed=3), where, timings)
    recipe = facts["Recipe"]
    assert recipe["base"] == f"{demo.base} (Qwen2-VL)"
    assert recipe["donor"] == f"{demo.donor} (LLaVA-OneVision)"
    assert recipe["prompts"] == f"{demo.prompts}, 100 of them, seed 3"
    assert recipe["batch"] == "4" and facts["Placement"] == {"1": "on the CPU"}
    assert recipe["time"] == (
        "0.8 s to set 2 alphas, 25 s for answers of 2,000 tokens; with drafts,"
        " 62\N{NO-BREAK SPACE}% of the tokens had to be forwarded"
    )
    assert "time" not in list_facts(plan, prompts, SearchSettings(), where, [])["Recipe"]


def test_the_command_repeats_what_the_plan_was_made_with(demo: Pair) -> None:
    plan = make_plan(demo.base, demo.donor, embeddings="keep", dtype="fp32")
    assert spell_merge(plan, [0.25]) == (
        f"python -m lowmem_adamms '{demo.base}' '{demo.donor}' -o merged --embeddings keep"
        " --dtype f32 --alpha 0.25"
    )
