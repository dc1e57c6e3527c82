"""How long a search would take: sums done by hand, and what more of anything changes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lowmem_adamms import make_plan
from lowmem_adamms.live.free_memory import Memory
from lowmem_adamms.live.placement import Placement
from lowmem_adamms.live.placing import place
from lowmem_adamms.live.search_time import Speeds, describe_time, estimate_seconds, measure_speeds
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.settings import PlacementSettings
from lowmem_adamms.values import format_size

SPEEDS = Speeds(operations=1e9, copied_bytes=1e6, disk_bytes=1e5)
PASSES = 1 + 0.65 * 64


@pytest.fixture(scope="module")
def plan(tiny_models: dict[str, Path]) -> Plan:
    return make_plan(tiny_models["qwen2_vl"], tiny_models["llava_onevision"])


def placed(plan: Plan, live: str) -> Placement:
    settings = PlacementSettings(device="cpu", live=live, batch_size=8)  # type: ignore[arg-type]
    return place(plan, Memory(64 << 30, None, None), settings)


def sums(plan: Plan) -> tuple[int, int]:
    """Weights that are blended, and the bytes that blending moves."""
    blended = [step for step in plan.steps if step.action == "interpolate"]
    sources = sum(p.base.nbytes + p.donor.nbytes for step in blended for p in step.parts if p.donor)
    return sum(step.elements for step in blended), sources + sum(s.nbytes for s in blended)


def test_a_held_model_moves_its_weights_for_each_token(plan: Plan) -> None:
    weights, blended_bytes = sums(plan)
    placement = placed(plan, "held")
    products = 2 * weights * 20 * 576 / 1e9
    moved = 3 * PASSES * placement.model_bytes / 1e6
    expected = 7 * (products + moved + blended_bytes / 1e6)
    assert estimate_seconds(plan, placement, SPEEDS, 20, 7) == pytest.approx(expected)


def test_a_streamed_model_blends_for_each_token_of_all_batches_at_once(plan: Plan) -> None:
    weights, blended_bytes = sums(plan)
    products = 2 * weights * 20 * 576 / 1e9
    for at_once, rounds in ((1, 3), (2, 2), (16, 1)):
        placement = replace(placed(plan, "streamed"), batches_at_once=at_once)
        expected = 7 * (products + PASSES * rounds * blended_bytes / 1e6)
        assert estimate_seconds(plan, placement, SPEEDS, 20, 7) == pytest.approx(expected)


def test_kept_layers_are_blended_once_an_alpha(plan: Plan) -> None:
    placement = placed(plan, "streamed")
    sources = placement.cached_source_bytes
    kept = replace(placement, kept_source_bytes=sources // 2, page_cache_bytes=sources // 4)
    none = replace(kept, kept_source_bytes=0)
    saved = sum(sums(plan)[1:]) / 1e6 / 2 + sources / 2 / 1e5
    seconds = (estimate_seconds(plan, each, SPEEDS, 8, 3) for each in (none, kept))
    long, brief = seconds
    assert long - brief == pytest.approx(3 * (PASSES - 1) * saved, rel=1e-3)


def test_what_the_page_cache_cannot_hold_is_read_from_the_disk_each_time(plan: Plan) -> None:
    placement = replace(placed(plan, "streamed"), batches_at_once=16)
    short = replace(placement, page_cache_bytes=placement.cached_source_bytes - 10**5)
    long, brief = (estimate_seconds(plan, p, SPEEDS, 8, 3) for p in (short, placement))
    assert long - brief == pytest.approx(3 * PASSES)


def test_the_machine_is_measured_and_the_line_says_for_what(plan: Plan, tmp_path: Path) -> None:
    speeds = measure_speeds(plan.steps[0].parts[0].base.path)
    assert min(speeds.operations, speeds.copied_bytes, speeds.disk_bytes or 0) > 1e5
    assert measure_speeds(tmp_path / "not here").disk_bytes is None
    (line,) = describe_time(plan, placed(plan, "held"), 7, 100)
    assert line.startswith("time: about ")
    assert "for 100 questions of 512 tokens at 7 alphas, answered in 64" in line
    assert describe_time(plan, replace(placed(plan, "held"), device="cuda"), 7, 100) == []


def test_the_line_tells_both_ways(plan: Plan) -> None:
    """With what the other one takes, of memory that this machine may lack."""
    held, streamed = placed(plan, "held"), placed(plan, "streamed")
    for one, other in ((held, streamed), (streamed, held)):
        (line,) = describe_time(plan, one, 7, 100)
        size = format_size(other.required_bytes)
        assert re.match(
            rf"time: about [\w. ]+ {one.live}, or [\w. ]+ {other.live} in {size}, for 100", line
        )
    (line,) = describe_time(plan, held, 7, 100, longest=4)
    assert "at 7 alphas, answered in 4:" in line
    tight = replace(streamed, available_bytes=10**6)
    (line,) = describe_time(plan, tight, 7, 100)
    assert " held in " in line
    (line,) = describe_time(plan, replace(held, available_bytes=10**6), 7, 100)
    assert "streamed" not in line
