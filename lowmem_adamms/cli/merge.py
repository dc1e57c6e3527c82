"""The command `merge`: at a given alpha or a searched one, with its upload if one is asked for."""

from __future__ import annotations

import os
import shlex
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import api
from ..errors import RecipeError
from ..mapping.alphas import as_tuple, format_alpha, parse_alpha_layers
from ..methods import METHODS
from ..prompts import load_prompts
from ..settings import (
    AnswerSettings,
    EngineSettings,
    GridSettings,
    MethodSettings,
    PlacementSettings,
    PlanSettings,
    PromptSettings,
    SearchSettings,
    changed,
    setting,
)
from ..values import format_duration, format_size, parse_alphas
from .console import (
    print_info,
    print_line,
    print_note,
    print_notes,
    progress_bar,
    shows_progress,
)
from .options import Command, program, spelled
from .pair import OptionalPairOptions, make_plan, out_option, parse_path, prompts_option
from .push import show_upload
from .search import find_alpha, show_found

if TYPE_CHECKING:
    from ..mapping.alphas import Alpha
    from ..mapping.mergekit_yaml import Recipe
    from ..mapping.plan import Plan
    from ..merging.writer import Output


@dataclass(frozen=True, kw_only=True)
class MergeOptions(OptionalPairOptions, PlanSettings, api.MergeSettings, SearchSettings):
    """What `merge` takes."""

    out: Path = out_option("the folder to write, which must be new or empty", required=True)
    alpha: float | tuple[float, ...] | None = setting(
        None,
        "the donor's weight: 0 is the base, 1 the donor; one for each of several donors; without it"
        " give --prompts. Of ties, dare-ties, metagpt and ram the factor of what all models add;"
        " default: 1",
        metavar="ALPHA",
        parse=parse_alphas,
    )
    prompts: str | None = prompts_option()
    alpha_layers: str | None = setting(
        None,
        "a weight for each layer: 0.1,0.3,0.5 is spread from the first layer to the last (the"
        " embedding gets the first, norm and head the last, or all three --alpha);"
        " 0-9:0.2,10-27:0.5,head:0 names layers, embed, norm and head, or attn, mlp, router,"
        " experts and shared_expert of all layers, and the rest gets --alpha",
        metavar="ALPHAS",
    )
    config: Path | None = setting(
        None,
        "take models, method and weights from mergekit's recipe; its base_model, or else its first"
        " model, is BASE; of methods that use an ancestor base_model is that",
        metavar="YAML",
        parse=parse_path,
    )


def run(options: MergeOptions) -> int:
    """Check what can be checked, search if that is asked for, write, upload."""
    start = time.perf_counter()
    _check_options(options)
    recipe = _read_recipe(options)
    numbers: dict[str, Any] = {}
    if recipe:
        numbers = {"weights": recipe.weights, "densities": recipe.densities}
        options = replace(
            options,
            base=recipe.base,
            donor=recipe.donors[0],
            more=recipe.donors[1:],
            method=recipe.method,
            ancestor=recipe.ancestor,
            dtype=options.dtype or recipe.dtype,
        )
    assert options.base and options.donor
    prompts = load_prompts(options.prompts, options) if options.prompts else None
    if prompts is None:  # numpy's threads would spin as they start; a merge has no use for them
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    plan = make_plan(options.base, (options.donor, *options.more), options, **numbers)
    given = _given_alpha(options, plan, recipe)
    print_notes(plan.notes)
    with api.prepare_merge(plan, options.out, options) as job:
        alpha: Alpha | api.FoundAlpha | None = given
        if prompts:
            quantize = options.quantize
            alpha = find_alpha(plan, prompts, options, job.answers, quantize=quantize)
            show_found(alpha)
        assert alpha is not None
        with progress_bar("merging", plan.bytes_written) as progress:
            job.write(alpha, progress=progress, note=print_note, show_bars=shows_progress())
        print_line(f"{options.out}: {_summary(job.output)}")
        found = alpha.alpha if isinstance(alpha, api.FoundAlpha) else alpha
        _say_what_next(plan, found, options.out, time.perf_counter() - start)
        if job.upload:
            show_upload(job.upload, options.out, job.finish_upload)
    return 0


def _check_options(options: MergeOptions) -> None:
    """RecipeError where the words contradict each other, before anything is opened."""
    is_searched = options.prompts is not None
    is_given = options.alpha is not None or options.alpha_layers is not None
    if not is_searched and METHODS[options.method].alpha is not None:
        is_given = True  # by the method's default
    if options.config is not None:
        names = ["base", "donor", "more", "alpha", "alpha_layers", "prompts"]
        names += [item.name for item in changed(options, MethodSettings)]
        given = [item for item in changed(options, MergeOptions) if item.name in names]
        if given:
            raise RecipeError(f"--config names models and weights; leave out {spelled(given)}")
    elif not (options.base and options.donor):
        raise RecipeError("merge needs BASE and DONOR, or --config with mergekit's YAML")
    elif is_given == is_searched:
        raise RecipeError(
            "give either --alpha, the donor's weight (0.1 to 0.3 is usual), or --prompts, questions"
            " to search it with"
        )
    if not is_searched:
        kinds = (PromptSettings, GridSettings, AnswerSettings, EngineSettings, PlacementSettings)
        if unused := changed(options, *kinds):
            raise RecipeError(
                f"no search is made at a given alpha: leave out {spelled(unused)}, or give"
                " --prompts instead of the alpha"
            )
    elif options.no_cache:
        raise RecipeError(
            "a search loads the model from files: leave out --no-cache, or search first and merge"
            " at the --alpha it finds"
        )


def _read_recipe(options: MergeOptions) -> Recipe | None:
    """What --config says."""
    if options.config is None:
        return None
    from ..mapping import mergekit_yaml

    return mergekit_yaml.read_recipe(options.config)


def _given_alpha(options: MergeOptions, plan: Plan, recipe: Recipe | None) -> Alpha | None:
    """What the command line or --config says about weights; None: they are to be searched."""
    if recipe is not None:
        alpha, notes = recipe.alphas(plan)
        print_notes(notes)
        return alpha
    if options.alpha_layers is None:
        return METHODS[options.method].alpha if options.alpha is None else options.alpha
    if isinstance(options.alpha, tuple) or plan.coefficients > 1:
        raise RecipeError("--alpha-layers is for one donor; in Python each donor takes an Alphas")
    return parse_alpha_layers(options.alpha_layers, plan.base_layout.layers, options.alpha)


def _summary(output: Output) -> str:
    """What was written, in a line."""
    plan, quantizer = output.plan, output.quantizer
    written = plan.bytes_written
    quantized = ""
    if quantizer:
        written = sum(path.stat().st_size for path in output.folder.glob("*.safetensors"))
        about = quantizer.describe()
        quantized = f", {about['tensors']} of them quantized to {about['method']}"
    return (
        f"{plan.counts['interpolate']} tensors interpolated, {plan.counts['copy']} copied"
        f"{quantized}, {format_size(written)}"
    )


def _say_what_next(plan: Plan, alpha: Alpha, out: Path, seconds: float) -> None:
    """How the output came about, how to load it and how to check it."""
    has_numbers = all(isinstance(one, float) for one in as_tuple(alpha))
    weight = f"alpha {format_alpha(alpha)}" if has_numbers else "an alpha for each layer or role"
    donors = " + ".join(donor.name for donor in plan.donors)
    print_info(f"{weight}, {plan.base.name} <- {donors}, {format_duration(seconds)}")
    print_info("\nload it:\n" + textwrap.indent(_loading_code(plan.base.config, out), "  "))
    places = [
        f" --{side.split()[0]} {shlex.quote(str(checkpoint.path))}"
        for side, checkpoint in plan.checkpoints.items()
        if not checkpoint.repo
    ]
    folders = {each.path.absolute().parent for each in plan.checkpoints.values() if not each.repo}
    elsewhere = places if folders - {out.absolute().parent} else []
    print_info(f"check it:\n  {program()} verify {out} --deep{''.join(elsewhere)}")


def _loading_code(config: Mapping[str, Any], out: Path) -> str:
    """Python that loads a merged checkpoint of a base with this config."""
    names = config.get("architectures") or []
    model_class = str(names[0]) if names else ""
    options = 'dtype="auto"'
    if "auto_map" in config or not model_class.isidentifier():
        model_class = "AutoModelForCausalLM"
        options += ", trust_remote_code=True"
    return (
        f"from transformers import AutoProcessor, {model_class}\n"
        f"model = {model_class}.from_pretrained({str(out)!r}, {options})\n"
        f"processor = AutoProcessor.from_pretrained({str(out)!r})"
        "  # some, such as Qwen2-VL's, need torchvision installed"
    )


COMMAND = Command(
    takes=MergeOptions,
    run=run,
    help="map and merge, at a given alpha or a searched one",
    description="Writes a checkpoint that loads like BASE, in one pass over both models.",
    usage="%(prog)s BASE DONOR [DONOR ...] -o OUT (--alpha ALPHA [ALPHA ...] | --prompts SET)"
    " [options]",
    examples="""\
examples:
  alpha is known (0.1 to 0.3 is usual):
    %(prog)s BASE DONOR -o OUT --alpha 0.3
  alpha is searched for, with questions that need no answers:
    %(prog)s BASE DONOR -o OUT --prompts questions.jsonl
  a text model's reasoning and a listener's ears into a base, each with its own weight:
    %(prog)s BASE DONOR OTHER -o OUT --alpha 0.2 0.3
  by another method:
    %(prog)s BASE DONOR -o OUT --method ties --ancestor ANCESTOR
  of the Hub, without keeping the inputs on the disk:
    %(prog)s org/base org/donor@main -o OUT --alpha 0.3 --no-cache

A line of questions.jsonl: {"prompt": "What is this?", "image": "cat.png"}
Killed or interrupted, the same command goes on where it was.""",
)
