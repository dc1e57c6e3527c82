"""Measures a search inside vLLM: one engine for all alphas, and its answers beside transformers'.

    python bench/runnable.py PAIR --size medium
    ENV/bin/python bench/engine.py PAIR [--prompts 8] [--tokens 8 64] [--option NAME=VALUE ...]

ENV is an environment with vLLM and this package; its real-engine tests are run there by
`ENV/bin/python -m pytest tests/engines -W default -p no:unraisableexception`.

start: seconds to start an engine and to set an alpha in it, against an engine started anew on the
merged checkpoint of each alpha. answers: per second, both ways, at each number of tokens; the
second call, so that vision features and drafts are kept where they are. Prints a table and, last,
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from measure import timed

from lowmem_adamms import LiveModel, make_plan, merge
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.prompts import Prompt, load_prompts
from lowmem_adamms.serving.vllm_model import VllmModel
from lowmem_adamms.settings import AnswerSettings, EngineSettings

ALPHAS = (0.1, 0.3, 0.5)


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--option", action="append", default=["max_model_len=2048"])
    arguments = parser.parse_args()
    plan = make_plan(arguments.pair / "base", arguments.pair / "donor")
    prompts = load_prompts(arguments.pair / "prompts.jsonl")[: arguments.prompts]
    settings = EngineSettings(engine="vllm", vllm_option=tuple(arguments.option))
    figures: dict[str, Any] = {}

    def note(found: dict[str, Any]) -> None:
        figures.update(found)
        for name, value in found.items():
            shown = f"{value:.2f}" if isinstance(value, float) else value
            print(f"{name:36} {shown}", flush=True)

    note({"bytes": plan.bytes_written, "prompts": len(prompts)})
    start, vllm = timed(lambda: VllmModel(plan, settings))
    with vllm:
        applies = [timed(partial(vllm.apply, alpha))[0] for alpha in ALPHAS]
        note({"vllm_start_s": start, "vllm_apply_s": statistics.median(applies)})
        note(measure_answers("vllm", vllm, prompts, arguments.tokens))
    note({"vllm_start_on_merged_s": start_on_merged(plan, settings)})
    start, live = timed(lambda: LiveModel(plan, device="cpu"))
    with live:
        applies = [timed(partial(live.apply, alpha))[0] for alpha in ALPHAS]
        note({"transformers_start_s": start, "transformers_apply_s": statistics.median(applies)})
        note(measure_answers("transformers", live, prompts, arguments.tokens))
    print(json.dumps(figures))


def measure_answers(
    name: str, model: Any, prompts: tuple[Prompt, ...], lengths: list[int]
) -> dict[str, float]:
    """Answers a second at each length, at the second alpha a search would ask at."""
    rates = {}
    for tokens in lengths:
        answerer = model.make_answerer(AnswerSettings(max_new_tokens=tokens), batch_size=8)
        for alpha in (0.3, 0.4):
            model.apply(alpha)
            seconds, _ = timed(partial(answerer.answer, prompts))
        rates[f"{name}_answers_per_s_{tokens}_tokens"] = len(prompts) / seconds
    return rates


def start_on_merged(plan: Plan, settings: EngineSettings) -> float:
    """Seconds to write a checkpoint at one alpha and start an engine on it."""
    with tempfile.TemporaryDirectory(dir=plan.base.path.parent) as folder:

        def start() -> VllmModel:
            merged = merge(plan, ALPHAS[0], Path(folder) / "merged")
            return VllmModel(make_plan(merged, plan.donor.path), settings)

        seconds, model = timed(start)
        model.close()
    return seconds


if __name__ == "__main__":
    main()
