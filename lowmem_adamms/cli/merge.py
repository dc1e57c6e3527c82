"""The command `merge`: at a given alpha or a searched one, with its upload if one is asked for."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, RecipeError
from ..journal import ANSWERS, NAME, WORK
from .arguments import fetching, make_plan, parse_size, quantizing
from .console import print_notes, progress_bar
from .push import finish, pushing
from .searching import load_prompts, search_for_alpha, show_found

if TYPE_CHECKING:
    from ..plan import Plan
    from ..quantized import Quantized
    from ..recipe import Recipe
    from ..writer import Options


def run(arguments: argparse.Namespace) -> int:
    """Check what can be checked, search if that is asked for, write, upload."""
    from .. import writer

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
    how = writer.prepare(plan, out, options, push=upload).how
    with pushing(arguments, plan) if upload else nullcontext() as push:
        found = None
        if prompts:
            found = search_for_alpha(arguments, plan, prompts, _answers_in(out))
            show_found(found)
            alpha = found.alpha
        search = found.to_json() if found else None
        beside = {"report.html": found.page.encode()} if found else None
        with progress_bar("merging", plan.bytes_written) as progress:
            more = {"push": push, "progress": progress, "search": search, "beside": beside}
            writer.merge(plan, alpha, out, options, **more)
        print(f"{out}: {_summary(plan, out, how)}")
        if push:
            finish(arguments, push)
    return 0


def _options(arguments: argparse.Namespace) -> Options:
    """How it is written, so far as the words say; RecipeError where they contradict each other."""
    from ..writer import Options

    fetch = fetching(arguments)
    if arguments.prompts and not fetch.cached:
        raise RecipeError(
            "a search loads the model from files: leave out --no-cache and --disk-budget, or search"
            " first and merge at the --alpha it finds"
        )
    if arguments.push_to_hub is None and (arguments.private or arguments.replace_repo):
        raise RecipeError("--private and --replace-repo go with --push-to-hub ORG/NAME")
    shard = arguments.max_shard_size
    return Options(
        max_shard_size=parse_size(shard, "--max-shard-size") if shard else None,
        quantize=quantizing(arguments),
        trust_remote_code=arguments.trust_remote_code,
        force=arguments.force,
        fetch=fetch,
        note=lambda line: print_notes([line]),
    )


def _summary(plan: Plan, out: Path, how: Quantized | None) -> str:
    """What was written, in a line."""
    from ..show import size

    counts = plan.to_json()["counts"]
    written = plan.bytes_written
    if how:
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    quantized = f", {len(how.names)} of them quantized to {how.method}" if how else ""
    return (
        f"{counts['interpolate']} tensors interpolated, {counts['copy']} copied{quantized},"
        f" {size(written)}"
    )


def _read_config(arguments: argparse.Namespace) -> Recipe | None:
    """What --config says; models and dtype are then taken from it."""
    if arguments.config is None:
        return None
    from ..recipe import read

    ways = ("base", "alpha", "alpha_layers", "prompts")
    if given := [way for way in ways if getattr(arguments, way) is not None]:
        names = ["BASE" if way == "base" else f"--{way.replace('_', '-')}" for way in given]
        raise RecipeError(f"--config names models and weights; leave out {', '.join(names)}")
    recipe = read(arguments.config)
    arguments.base, arguments.donor = recipe.base, recipe.donor
    arguments.dtype = arguments.dtype or recipe.dtype
    return recipe


def _check_weights(arguments: argparse.Namespace) -> None:
    """Two models and one way to their weights, so far as can be seen without opening anything."""
    from ..alphas import check_alpha

    if arguments.donor is None:
        raise RecipeError("merge needs BASE and DONOR, or --config with mergekit's YAML")
    given = [way for way in ("alpha", "alpha_layers") if getattr(arguments, way) is not None]
    if arguments.config is None and bool(given) == (arguments.prompts is not None):
        raise RecipeError(
            "give either --alpha, the donor's weight (0.1 to 0.3 is usual), or --prompts, questions"
            " to search it with"
        )
    if arguments.alpha is not None:
        check_alpha(arguments.alpha)
    if arguments.refine_layers and arguments.prompts is None:
        raise RecipeError("--refine-layers is a second stage of the search; give --prompts")


def _given_alpha(arguments: argparse.Namespace, plan: Plan, recipe: Recipe | None) -> Any:
    """What the command line or --config says about weights; None: they are to be searched."""
    if recipe is not None:
        alpha, notes = recipe.alphas(plan)
        print_notes(notes)
        return alpha
    if arguments.alpha_layers is None:
        return arguments.alpha
    from ..alphas import parse_layers

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
