"""Ask the zoo: raw answers of a pair at every alpha, for `bench/study.py` to judge.

    python bench/zoo/ask.py ZOO OUT [--pair BASE DONOR] [--fine 0.02 0.05] [--ablate [NAME …]]
    python bench/zoo/ask.py ZOO OUT --line smollm2 --scenes 210 --ablate

Writes OUT/BASE--DONOR--SEED.json (its keys are described in `bench/evidence.py`): alphas from 0
to --last by 0.1, and by each finer step as far as the paper's grid goes; ablations by 0.1. What
answers is the product's own live model. Around a published language model two donors that only read
are asked too, the ancestor among them, and what the ancestor knows by itself: an answer that names
the right word is written down as that word.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from family import LINES, MEMBERS, READERS, Member
from known import holds, known_questions
from train import keep_memory
from world import Question, letters_question, questions, scenes, text_question

from lowmem_adamms import LiveModel, make_plan
from lowmem_adamms.answers import Answer
from lowmem_adamms.live.answerer import Answerer
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.prompts import Prompt
from lowmem_adamms.settings import AnswerSettings

SETTINGS, BATCH_SIZE = AnswerSettings(max_new_tokens=10), 100
PAPER = 0.6  # where the paper's grid ends
Asked = Sequence[tuple[Question, Prompt, int]]
"""Questions, their prompts, and 0 for the half that is searched with, 1 for the one judged on."""
Change = Callable[[Any, dict[str, Any], float], bool]


def main() -> None:
    """Ask every ordered pair within a line of descent, or the one given."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("zoo", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--line", choices=LINES, action="append")
    options.add_argument("--pair", nargs=2)
    options.add_argument("--fine", type=float, nargs="*", default=[])
    options.add_argument("--last", type=float, default=1.0)
    options.add_argument("--scenes", type=int, default=490)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--rounding", default="stochastic")
    options.add_argument("--dtype", help="of the merged weights: fp32 leaves them unrounded")
    options.add_argument("--ablate", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    keep_memory()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    lines = given.line or [name for name, line in LINES.items() if not line.package]
    pairs = [(a, b) for a in MEMBERS for b in (*MEMBERS, *READERS) if kin(a, b)]
    with tempfile.TemporaryDirectory() as folder:
        asked = exam(given.scenes, Path(folder))
        if LINES[lines[0]].package:
            asked += reading_exam(given.zoo / lines[0])
        for a, b in pairs:
            if a.line not in lines:
                continue
            path = given.out / f"{a.name}--{b.name}--{given.seed}.json"
            if (given.pair and [a.name, b.name] != given.pair) or path.is_file():
                continue
            base, donor = (given.zoo / one.name / "model" for one in (a, b))
            changes = {name: VARIANTS[name] for name in given.ablate}
            alphas = {alpha for step in given.fine for alpha in grid(step, PAPER)}
            plan = make_plan(base, donor, rounding=given.rounding, dtype=given.dtype)
            made = ask_pair(plan, asked, sorted({*grid(0.1, given.last), *alphas}), changes)
            useless = bool(b.misled or b.noisy)
            names = {"base": a.name, "donor": b.name, "seed": given.seed, "useless": useless}
            path.write_text(json.dumps({**names, **made}))
            print(path, flush=True)


def kin(base: Member, donor: Member) -> bool:
    """Whether the pair is asked; misled and noisy members, and those that only read, are donors."""
    related = (donor.name, donor.misled, donor.noisy)
    return base.line == donor.line and not (base.misled or base.noisy) and base.name not in related


def exam(count: int, folder: Path) -> list[tuple[Question, Prompt, int]]:
    """Questions with their prompts and halves: pictures never stand in both halves."""
    from PIL import Image

    shown = scenes(count, 7, held_out=True)
    out: list[tuple[Question, Prompt, int]] = []
    for i, scene in enumerate(shown):
        half = i // 7 % 2  # Seven kinds of scenes stand in turn, and both halves need them all
        path = folder / f"{i}.png"
        Image.fromarray(scene.pixels).save(path)
        for q in questions([scene], i):
            out.append((q, Prompt(q.text, images=(path,), id=str(len(out))), half))
    dice = random.Random(8)
    for i in range(count // 3):
        q = text_question(dice)
        out.append((q, Prompt(q.text, id=str(len(out))), i % 2))
    return out


def reading_exam(home: Path) -> list[tuple[Question, Prompt, int]]:
    """Questions about lengths of words, and those that the ancestor answers right by itself.

    home: the ancestor's folder. Which questions these are is kept there, in known.json.
    """
    ancestor, kept = home / "model", home / "known.json"
    dice = random.Random(9)
    found = [letters_question(dice) for _ in range(80)]
    known = known_questions()
    if not kept.is_file():
        prompts = [Prompt(question.text) for question in known]
        with LiveModel(make_plan(ancestor, ancestor), device="cpu") as live:
            told = live.generate(prompts, SETTINGS, batch_size=BATCH_SIZE)
        kept.write_text(json.dumps([holds(a, q.answer) for a, q in zip(told, known, strict=True)]))
    right = json.loads(kept.read_text())
    found += [question for question, knows in zip(known, right, strict=True) if knows]
    return [(q, Prompt(q.text, id=f"{q.task} {i}"), i % 2) for i, q in enumerate(found)]


def grid(step: float, last: float) -> list[float]:
    """0, step, … up to `last`."""
    return [round(i * step, 4) for i in range(round(last / step) + 1)]


def ask_pair(
    plan: Plan, asked: Asked, alphas: Sequence[float], changes: Mapping[str, Change]
) -> dict[str, Any]:
    """Everything `bench/study.py` wants to know of one ordered pair."""
    donor = plan.donor.path
    coarse = [alpha for alpha in alphas if alpha in grid(0.1, 1.0)]
    with LiveModel(plan, device="cpu", trust_remote_code=True) as live:
        ask = partial(ask_all, live, live.make_answerer(SETTINGS, batch_size=BATCH_SIZE), asked)
        kept = {name: value.clone() for name, value in live.model.state_dict().items() if changes}
        merged: list[list[Answer]] = []
        variants: dict[str, list[list[str]]] = {name: [] for name in changes}
        for alpha in alphas:
            live.apply(alpha)
            merged.append(ask())
            for name, change in changes.items() if alpha in coarse else ():
                live.apply(alpha)
                if change(live.model, kept, alpha):
                    variants[name].append([answer.text for answer in ask()])
    with LiveModel(make_plan(donor, donor), device="cpu", trust_remote_code=True) as live:
        parent = ask_all(live, live.make_answerer(SETTINGS, batch_size=BATCH_SIZE), asked)
    return {
        "alphas": alphas,
        "questions": [{"task": q.task, "prompt": q.text, "answer": q.answer} for q, _, _ in asked],
        "half": [half for _, _, half in asked],
        "answers": [[answer.text for answer in row] for row in merged],
        "entropy": [[answer.entropy for answer in row] for row in merged],
        "log_probability": [[answer.log_probability for answer in row] for row in merged],
        "parent": {"answers": [answer.text for answer in parent]},
        "variants": {name: found for name, found in variants.items() if found},
        "variant_alphas": coarse,
    }


def ask_all(live: LiveModel, answerer: Answerer, asked: Asked) -> list[Answer]:
    """The model's answers; empty where it would have to see and cannot."""
    sees = hasattr(live.model.config, "vision_config")
    places = [i for i, (_, prompt, _) in enumerate(asked) if sees or not prompt.images]
    prompts = [asked[i][1] for i in places]
    out = [Answer("")] * len(asked)
    for place, answer in zip(places, answerer.answer(prompts), strict=True):
        question = asked[place][0]
        names_it = question.task == "known" and holds(answer.text, question.answer)
        out[place] = replace(answer, text=question.answer) if names_it else answer
    return out


def _rows(model: Any, kept: dict[str, Any], change: Callable[[Any], Any]) -> bool:
    state = model.state_dict()
    for name, value in kept.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            state[name].copy_(change(value))
    return True


def _shrink(model: Any, kept: dict[str, Any], alpha: float) -> bool:
    """The authors' script: embedding and head of the base times (1 - alpha), nothing added."""
    return _rows(model, kept, lambda value: value * (1 - alpha))


def _keep(model: Any, kept: dict[str, Any], alpha: float) -> bool:
    return _rows(model, kept, lambda value: value)


def _lone(model: Any, kept: dict[str, Any], alpha: float) -> bool:
    """Duplicated weights stay the base's; False where there are none."""
    state = model.state_dict()
    double = [name for name in kept if "vision_expert" in name or "vision_mlp" in name]
    for name in double:
        state[name].copy_(kept[name])
    return bool(double)


VARIANTS = {"shrunken": _shrink, "kept": _keep, "unduplicated": _lone}


if __name__ == "__main__":
    importlib.import_module("transformers").logging.set_verbosity_error()
    main()
