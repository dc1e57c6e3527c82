"""Measures the search: apply against the bare kernel, the whole against the authors' procedure.

    python bench/runnable.py PAIR --size small
    python bench/search.py PAIR [--prompts 16] [--tokens 4 64] [--batch 8] [--only apply]
                           [--device cuda] [--quantize nf4]

apply: `LiveModel.apply` against the kernel alone, called once per part on the same mapped bytes and
writing memory of the model's size; and the growth of RssAnon while it runs. search: one loaded
model, drafts and kept vision features, against what the authors' scripts do: for each alpha write
the merged checkpoint, load it, generate all answers with transformers' own generate() (our merge
writes it, faster than theirs). Once in our batches, once one by one, as the evaluation kits that
the authors use do. The load of the live model counts. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import MIB, timed, watched

from lowmem_adamms import LiveModel, make_plan, merge, search
from lowmem_adamms.checkpoints.mapped_files import MappedFiles
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.live.prompt_encoder import Encoder
from lowmem_adamms.live.transformers_model import quiet
from lowmem_adamms.mapping.plan import Plan
from lowmem_adamms.prompts import Prompt, load_prompts
from lowmem_adamms.settings import DEFAULT_ALPHAS, AnswerSettings


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", type=Path)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", choices=("apply", "search"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quantize", choices=("none", "int8", "nf4"), default="none")
    arguments = parser.parse_args()
    plan = make_plan(arguments.pair / "base", arguments.pair / "donor")
    prompts = load_prompts(arguments.pair / "prompts.jsonl")[: arguments.prompts]
    figures: dict[str, Any] = {"bytes": plan.bytes_written, "prompts": len(prompts)}
    where: dict[str, Any] = {"device": arguments.device, "quantize": arguments.quantize}
    if arguments.only != "search":
        figures["apply"] = show("apply", measure_apply(plan, where))
    if arguments.only != "apply":
        for tokens in arguments.tokens:
            settings = AnswerSettings(max_new_tokens=tokens)
            row = measure_search(plan, prompts, settings, arguments.batch, where)
            figures[f"search_{tokens}"] = show(f"search, {tokens} tokens", row)
    if arguments.device == "cuda":
        figures["peak_vram_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(figures | where))


def show(title: str, row: dict[str, Any]) -> dict[str, Any]:
    """Print a section; returns it."""
    print(title)
    for name, value in row.items():
        print(f"  {name:28} {value:.3f}" if isinstance(value, float) else f"  {name:28} {value}")
    return row


def measure_apply(plan: Plan, where: dict[str, Any]) -> dict[str, Any]:
    """Seconds of apply and of the CPU's kernel alone, in turn; and anonymous memory."""
    applied, bare = [], []
    with LiveModel(plan, **where) as live:
        live.apply(0.25)
        stream = bare_kernel(plan)
        memory: list[int] = []
        for alpha in (0.1, 0.2, 0.3, 0.4, 0.5):
            bare.append(timed(partial(stream, alpha))[0])
            with watched() as found:
                applied.append(timed(partial(live.apply, alpha))[0])
            memory += found
    pairs = zip(applied, bare, strict=True)
    return {
        "apply_s": statistics.median(applied),
        "kernel_s": statistics.median(bare),
        "ratio": statistics.median(a / b for a, b in pairs),
        "anonymous_growth_mib": (max(memory) - memory[0]) / MIB,
    }


def bare_kernel(plan: Plan) -> Callable[[float], None]:
    """The kernel over every part, mapped in, out to as much memory as the parts take."""
    from lowmem_adamms.kernels.select import select_kernel

    kernel, _ = select_kernel(plan.dtypes)
    files = MappedFiles()
    calls = []
    for step in plan.steps:
        for part in step.parts:
            if isinstance(part.donor, Span):
                dtypes = (part.base.dtype.name, part.donor.dtype.name, step.dtype.name)
                views = files.view(part.base), files.view(part.donor)
                size = part.base.nbytes // part.base.dtype.itemsize * step.dtype.itemsize
                calls.append(((*views, np.zeros(size, np.uint8)), dtypes))

    def stream(alpha: float) -> None:
        for views, dtypes in calls:
            kernel([views], dtypes, alpha)

    stream(0.5)
    return stream


def measure_search(
    plan: Plan,
    prompts: Sequence[Prompt],
    settings: AnswerSettings,
    batch_size: int,
    where: dict[str, Any],
) -> dict[str, Any]:
    """Both procedures on the same grid, and whether they agree."""
    costs: list[Any] = []

    def search_ours() -> Any:
        with LiveModel(plan, **where) as live:
            answerer = live.make_answerer(settings, batch_size=batch_size)

            def ours(alpha: float, asked: Sequence[Prompt]) -> list[str]:
                live.apply(alpha)
                answers = answerer.answer(asked)
                costs.append(answerer.cost)
                return [answer.text for answer in answers]

            return search(ours, prompts)

    mine_s, mine = timed(search_ours)
    row: dict[str, Any] = {"ours_s": mine_s, "alpha": mine.alpha}
    for batch in (batch_size, 1):
        ask = partial(authors, plan, settings, batch, where["device"])
        theirs_s, theirs = timed(partial(search, ask, prompts))
        row |= {
            f"authors_batch_{batch}_s": theirs_s,
            f"times_faster_batch_{batch}": theirs_s / mine_s,
            f"their_alpha_batch_{batch}": theirs.alpha,
            f"answers_that_differ_batch_{batch}": sum(
                a != b
                for alpha in DEFAULT_ALPHAS
                for a, b in zip(mine.answers[alpha], theirs.answers[alpha], strict=True)
            ),
        }
    changes = [c.diff_next for c in mine.candidates if c.diff_next is not None]
    return row | {
        "of": len(prompts) * len(DEFAULT_ALPHAS),
        "changed_between_neighbours": statistics.mean(changes) / len(prompts),
        "forward_tokens": [s.forward_tokens for s in costs],
        "without_drafts": [s.plain_tokens for s in costs],
        "passes": [s.passes for s in costs],
        "answer_tokens": [s.answer_tokens for s in costs],
    }


def authors(
    plan: Plan,
    settings: AnswerSettings,
    batch_size: int,
    device: str,
    alpha: float,
    asked: Sequence[Prompt],
) -> list[str]:
    """One alpha by the authors' procedure, never quantized."""
    transformers = importlib.import_module("transformers")
    with tempfile.TemporaryDirectory(dir=plan.base.path.parent) as folder:
        out = merge(plan, alpha, Path(folder) / "merged")
        with quiet():
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                out, dtype="auto", device_map={"": device}
            )
        encoder = Encoder(model.eval(), out)
        answers: dict[int, str] = {}
        for batch in encoder.split_into_batches(asked, batch_size):
            inputs = encoder.encode([asked[place] for place in batch.places])
            with quiet(), torch.inference_mode():
                made = model.generate(
                    **inputs, do_sample=False, max_new_tokens=settings.max_new_tokens
                )
            for place, row in zip(
                batch.places, made[:, inputs["input_ids"].shape[1] :], strict=True
            ):
                answers[place] = encoder.decode(row.tolist())
        shutil.rmtree(out)
    return [answers[place] for place in range(len(asked))]


if __name__ == "__main__":
    main()
