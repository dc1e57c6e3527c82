"""What a report says of how its search was made, and the command that merges what it found."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..mapping.mixture import Mixture
from ..mapping.plan import Plan
from ..prompts import Prompts
from ..settings import SearchSettings
from ..values import format_duration
from ..version import __version__
from .text import format_percent

if TYPE_CHECKING:
    from ..searching.session import AnyPlacement, Timing


def list_facts(
    plan: Plan,
    prompts: Prompts,
    settings: SearchSettings,
    placement: AnyPlacement,
    timings: Sequence[Timing],
) -> dict[str, dict[str, str]]:
    """Sections of key and value for the end of a report."""
    recipe = {
        "base": f"{plan.base.ref} ({plan.base_layout.arch})",
        **_list_models(plan),
        "prompts": f"{prompts.ref}, {len(prompts)} of them, seed {settings.seed}",
        "answers": f"greedy, {settings.max_new_tokens} tokens at most",
        "batch": str(placement.batch_size),
        **({"time": _describe_time(timings)} if timings else {}),
        "embeddings": str(plan.options["embeddings"]),
        "version": __version__,
    }
    lines = {str(i): line for i, line in enumerate(placement.lines, 1)}
    return {"Recipe": recipe, "Placement": lines}


def _list_models(plan: Plan) -> dict[str, str]:
    """What is merged into the base, and how if not by linear interpolation."""
    others = list(plan.checkpoints)[1:]
    models = {
        side: f"{pair.donor.ref} ({pair.donor_layout.arch})"
        for side, pair in zip(others, plan.pairs, strict=True)
    }
    if isinstance(plan, Mixture):
        settings = plan.parameters()
        models["method"] = ", ".join([settings.pop("method"), *_spell(settings)])
    return models


def _describe_time(timings: Sequence[Timing]) -> str:
    """What the answers took, of those alphas at which not all were known before."""
    answering = sum(timing.seconds for timing in timings)
    applying = sum(timing.apply_seconds for timing in timings)
    tokens = sum(timing.answer_tokens for timing in timings)
    forwarded = sum(timing.forward_tokens for timing in timings)
    without_drafts = sum(timing.plain_tokens for timing in timings)
    saved = ""
    if without_drafts:
        share = format_percent(forwarded, without_drafts)
        saved = f"; with drafts, {share} of the tokens had to be forwarded"
    return (
        f"{format_duration(applying)} to set {len(timings)} alphas, {format_duration(answering)}"
        f" for answers of {tokens:,} tokens{saved}"
    )


def _spell(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        yield f"{name.replace('_', ' ')} {' '.join(map(str, values))}"


def spell_merge(plan: Plan, alphas: Sequence[float]) -> str:
    """The command that merges at these alphas and one more, which is to follow as its last word."""
    words = [plan.base.ref, *(donor.ref for donor in plan.donors), "-o", "merged"]
    if isinstance(plan, Mixture):
        words += plan.options_of_method()
    words += ["--embeddings", "keep"] if plan.options["embeddings"] == "keep" else []
    words += ["--unmatched", "keep"] if plan.options["unmatched"] == "keep" else []
    words += ["--dtype", plan.options["dtype"].lower()] if plan.options["dtype"] else []
    words += ["--rounding", "nearest"] if not plan.rounds_stochastically else []
    words += ["--arch", "FILE"] if plan.declared else []
    words += ["--alpha", *(f"{alpha:g}" for alpha in alphas)]
    return shlex.join(["python", "-m", "lowmem_adamms", *words])
