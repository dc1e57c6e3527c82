"""The command `merge`: at a given alpha or a searched one, with its upload if one is asked for."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, RecipeError
from ..merging.journal import ANSWERS, NAME, WORK
from .arguments import fetching, make_plan, quantizing
from .console import print_notes, progress_bar
from .options import OF_A_SEARCH, given
from .push import finish, pushing
from .searching import load_prompts, search_for_alpha, show_found

if TYPE_CHECKING:
    from ..mapping.mergekit_yaml import Recipe
    from ..mapping.plan import Plan
    from ..merging.writer import Options, Output


def run(arguments: argparse.Namespace) -> int:
    """Check what can be checked, search if that is asked for, write, upload."""
    from ..merging import writer

    recipe = _read_config(arguments)
    _check_weights(arguments)
    options = _options(arguments)
    prompts = load_prompts(arguments) if arguments.prompts else None
    if prompts is None:  # numpy's threads would spin as they start; a merge has no use for them
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    plan, out = make_plan(arguments), arguments.out
    alpha = _given_alpha(arguments, plan, recipe)
    print_notes(plan.notes)
    upload = arguments.push_to_hub is not None
    output = writer.prepare(plan, out, options)
    output.check(room=options.fetch.disk_budget or 0, push=upload)
    with pushing(arguments, plan) if upload else nullcontext() as push:
        if prompts:
            found = search_for_alpha(arguments, plan, prompts, _answers_in(out))
            show_found(found)
            alpha, beside = found.alpha, {"report.html": found.page.encode()}
            options = replace(options, search=found.to_json(), beside=beside)
        with progress_bar("merging", plan.bytes_written) as progress:
            writer.write(output, alpha, replace(options, push=push, progress=progress))
        print(f"{out}: {_summary(output)}")
        if push:
            finish(arguments, push)
    return 0


def _options(arguments: argparse.Namespace) -> Options:
    """How it is written, so far as the words say; RecipeError where they contradict each other."""
    from ..merging.writer import Options

    fetch = fetching(arguments)
    if arguments.prompts and not fetch.cached:
        raise RecipeError(
            "a search loads the model from files: leave out --no-cache and --disk-budget, or search"
            " first and merge at the --alpha it finds"
        )
    if arguments.push_to_hub is None and (arguments.private or arguments.replace_repo):
        raise RecipeError("--private and --replace-repo go with --push-to-hub ORG/NAME")
    return Options(
        max_shard_size=arguments.max_shard_size,
        quantize=quantizing(arguments),
        trust_remote_code=arguments.trust_remote_code,
        force=arguments.force,
        fetch=fetch,
        note=lambda line: print_notes([line]),
    )


def _summary(output: Output) -> str:
    """What was written, in a line."""
    from ..reporting.terminal import size

    counts, how = output.plan.counts, output.how
    written = output.plan.bytes_written
    if how:
        written = sum(path.stat().st_size for path in output.folder.glob("*.safetensors"))
    quantized = f", {len(how.names)} of them quantized to {how.method}" if how else ""
    return (
        f"{counts['interpolate']} tensors interpolated, {counts['copy']} copied{quantized},"
        f" {size(written)}"
    )


def _read_config(arguments: argparse.Namespace) -> Recipe | None:
    """What --config says; models and dtype are then taken from it."""
    if arguments.config is None:
        return None
    from ..mapping.mergekit_yaml import read

    if names := given(arguments, ("base", "donor", "alpha", "alpha_layers", "prompts")):
        raise RecipeError(f"--config names models and weights; leave out {', '.join(names)}")
    recipe = read(arguments.config)
    arguments.base, arguments.donor = recipe.base, recipe.donor
    arguments.dtype = arguments.dtype or recipe.dtype
    return recipe


def _check_weights(arguments: argparse.Namespace) -> None:
    """Two models and one way to their weights, so far as can be seen without opening anything."""
    if arguments.donor is None:
        raise RecipeError("merge needs BASE and DONOR, or --config with mergekit's YAML")
    weights = given(arguments, ("alpha", "alpha_layers"))
    if arguments.config is None and bool(weights) == (arguments.prompts is not None):
        raise RecipeError(
            "give either --alpha, the donor's weight (0.1 to 0.3 is usual), or --prompts, questions"
            " to search it with"
        )
    if arguments.prompts is None and (idle := given(arguments, OF_A_SEARCH)):
        raise RecipeError(
            f"no search is made at a given alpha: leave out {', '.join(idle)}, or give --prompts"
            " instead of the alpha"
        )


def _given_alpha(arguments: argparse.Namespace, plan: Plan, recipe: Recipe | None) -> Any:
    """What the command line or --config says about weights; None: they are to be searched."""
    if recipe is not None:
        alpha, notes = recipe.alphas(plan)
        print_notes(notes)
        return alpha
    if arguments.alpha_layers is None:
        return arguments.alpha
    from ..mapping.alphas import parse_layers

    return parse_layers(arguments.alpha_layers, plan.base_layout.layers, arguments.alpha)


def _answers_in(out: Path) -> Path:
    """Where the answers of a search for `out` are kept: at their final place once they got there.

    OutputError if a merge at a given alpha was begun in `out`: it would be met only after hours.
    """
    final, ours = out / ANSWERS, out / WORK / ANSWERS
    if (out / WORK / NAME).is_file() and not (final.is_file() or ours.is_file()):
        raise OutputError(
            f"{out} holds an unfinished merge at a given --alpha; delete {out / WORK} or choose"
            " another -o"
        )
    return final if final.is_file() else ours
