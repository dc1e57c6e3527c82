"""What lies beside merged weights: model card, `adamms.json`, and config.json in another dtype.

Front matter follows the Hub's model card specification (hf.co/docs/hub/model-cards).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.dtypes import DTYPES
from ..checkpoints.sampled_reads import SampledReader, evenly_spread
from ..checkpoints.span import Span
from ..checkpoints.weight_files import check_own_file
from ..errors import FormatError
from ..mapping.alphas import Alpha, Alphas, alpha_to_json, format_alpha, format_lines
from ..mapping.kinship import Kinship
from ..mapping.mixture import Mixture
from ..mapping.plan import KEPT, Plan

_SAMPLES = 64
_FRONT_MATTER_CHARS = 1 << 16
_SAMPLE_BYTES = 4096
_QUANTIZED_TO = {
    "nf4": ("4-bit", "4 bit (NF4, double quantization)"),
    "int8": ("8-bit", "8 bit (LLM.int8)"),
}
"""By method: the Hub's tag, and how the card puts it."""


def make_card(plan: Plan, alpha: Alpha, recipe: Mapping[str, Any]) -> str:
    """README.md of the merged model, with Hub front matter. recipe: what adamms.json will say."""
    multimodal = {"vision tower", "connector"} & set(plan.base_layout.kinds.values())
    task = "image-text-to-text" if multimodal else "text-generation"
    models = plan.checkpoints.values()
    licences = [_read_licence(model) for model in models]
    front = [
        *_parents(dict.fromkeys(model.name for model in models)),
        "library_name: transformers",
        f"pipeline_tag: {task}",
        "tags:\n- adamms\n- merge\n- lowmem-adamms",
        *_quantization_tags(recipe),
        *_licence_lines(licences),
    ]
    counts = plan.counts
    names = [plan.base.name, *(donor.name for donor in plan.donors)]
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {' + '.join(names)}, merged",
            "",
            "Made by [AdaMMS](https://arxiv.org/abs/2503.23733) parameter mapping and"
            f" {_method_name(plan)}",
            "with lowmem-adamms. Architecture, vision encoder, connector, tokenizer and processor",
            f"are those of `{plan.base.name}`; into its language model were blended the weights of",
            f"{' and '.join(f'`{name}`' for name in names[1:])}:",
            "",
            *_formula(plan, alpha),
            "",
            f"{counts['interpolate']} tensors were interpolated, {counts['copy']} copied from the",
            "base. `adamms.json` holds the whole recipe with digests of inputs and outputs.",
            *(f"{note[0].upper()}{note[1:]}." for note in plan.notes if note.endswith(KEPT)),
            *_quantization(recipe),
            *_choice(recipe),
            *_list_licences([model.name for model in models], licences),
            "",
        ]
    )


def _method_name(plan: Plan) -> str:
    """Of what was done with mapped parameters."""
    if not isinstance(plan, Mixture) or plan.method.name == "linear":
        return "linear interpolation"
    return f"the method {plan.method.name} ({plan.method.source})"


def _formula(plan: Plan, alpha: Alpha) -> list[str]:
    """What was computed; the weights, where layers have their own."""
    if isinstance(plan, Mixture):
        return [f"    out = {formula_of(plan)}", "", *_list_parameters(plan, alpha)]
    assert not isinstance(alpha, tuple)
    if not isinstance(alpha, Alphas):
        return [f"    out = (1 - {alpha:g}) * base + {alpha:g} * donor"]
    return [
        "    out = (1 - a) * base + a * donor",
        "",
        f"with a = {alpha.default:g}, apart from",
        "",
        *(f"- {line}" for line in format_lines(alpha)),
    ]


def formula_of(plan: Plan) -> str:
    """The formula of each element of what is blended."""
    if not isinstance(plan, Mixture):
        return "(1 - alpha) * base + alpha * donor"
    if plan.method.name == "linear" and len(plan.donors) > 1:
        return "(1 - sum of alpha) * base + sum of alpha * donor"
    return plan.method.formula


def _list_parameters(plan: Mixture, alpha: Alpha) -> Iterator[str]:
    """What stands for what in a mixture's formula."""
    yield f"- alpha: {format_alpha(alpha)}"
    if plan.ancestor_plan:
        yield f"- ancestor: `{plan.ancestor_plan.donor.name}`"
    for name, value in plan.parameters().items():
        if name not in ("method", "weights") or (name == "weights" and set(value) != {1.0}):
            yield f"- {name.replace('_', ' ')}: {', '.join(map(str, _to_list(value)))}"


def _to_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _quantization_tags(recipe: Mapping[str, Any]) -> list[str]:
    """The tags by which the Hub knows a bitsandbytes checkpoint."""
    if "quantized" not in recipe:
        return []
    tag, _ = _QUANTIZED_TO[recipe["quantized"]["method"]]
    return ["- bitsandbytes", f"- {tag}"]


def _quantization(recipe: Mapping[str, Any]) -> list[str]:
    """What was quantized, if anything."""
    if "quantized" not in recipe:
        return []
    quantized = recipe["quantized"]
    _, words = _QUANTIZED_TO[quantized["method"]]
    return [
        f"The weights of {quantized['tensors']} linear layers were quantized to {words} with"
        f" bitsandbytes {quantized['bitsandbytes']};",
        "loading it needs bitsandbytes. All else is as it was merged.",
    ]


def _parents(names: Iterable[str]) -> list[str]:
    """Which models it descends from: those whose names can be the Hub's; it refuses any other."""
    allowed = [
        name
        for name in names
        if re.fullmatch(r"(?:\w[\w.-]*/)?\w(?:[\w.-]{0,94}\w)?", name, re.ASCII)
        and not (re.search(r"--|\.\.", name) or name.endswith(".git"))
    ]
    listed = [f"- {json.dumps(name)}" for name in allowed]
    return ["base_model:", *listed, "base_model_relation: merge"] if listed else []


def _choice(recipe: Mapping[str, Any]) -> list[str]:
    """How alpha was chosen, if it was searched for."""
    if "candidates" not in recipe:
        return []
    moved = any(group["moved"] for group in recipe.get("layers", {}).get("groups", ()))
    tried = ", ".join(f"{candidate['alpha']:g}" for candidate in recipe["candidates"])
    return [
        f"Alpha was chosen without labels, by the answers to {recipe['prompts']} prompts",
        f"at the alphas {tried} (measure: {recipe['measure']}). `report.html`, where it lies",
        "beside this file, shows how.",
        *(["Groups of layers were then moved one by one, by the same measure."] * moved),
    ]


def _read_licence(model: Checkpoint) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of a model's own card, if it has any."""
    path = model.folder / "README.md" if model.folder else None
    if path is None or not path.is_file():
        return {}
    try:
        check_own_file(path, path.parent)
    except FormatError:  # a link to somewhere else
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\n(.*?)\n---", file.read(_FRONT_MATTER_CHARS), re.DOTALL)
    lines = front[1].splitlines() if front else []
    found = (re.fullmatch(r"(license(?:_name|_link)?): *(\S.*)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def _name_licence(licence: Mapping[str, str]) -> str:
    return licence.get("license_name") or licence.get("license", "not stated")


def _licence_lines(licences: Sequence[Mapping[str, str]]) -> list[str]:
    """What the front matter says: the base's licence, or `other` where a model has another."""
    base, *others = licences
    if base and any(other and _name_licence(other) != _name_licence(base) for other in others):
        return ["license: other"]
    return [f"{key}: {value}" for key, value in base.items()]


def _list_licences(names: Sequence[str], licences: Sequence[Mapping[str, str]]) -> list[str]:
    """The licences that the models' cards state, each of which applies."""
    models = zip(names, map(_name_licence, licences), strict=True)
    return ["The licences of all models apply:", "", *(f"- `{name}`: {of}" for name, of in models)]


def set_config_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A copy of a config.json that announces another dtype, at each level that announced one."""
    dtype_name = DTYPES[dtype].torch

    def change(key: str, value: Any) -> Any:
        if key in ("dtype", "torch_dtype"):
            return dtype_name
        if isinstance(value, dict):
            return {inner: change(inner, value[inner]) for inner in value}
        return value

    return {"torch_dtype": dtype_name} | {key: change(key, config[key]) for key in config}


def make_recipe(
    plan: Plan,
    alpha: Alpha,
    kinships: Sequence[Kinship],
    kernel: str,
    search: Mapping[str, Any],
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """What `adamms.json` says apart from the outputs: enough to repeat the merge and check it.

    search: the document of the search that found alpha, or nothing. inputs: from `digest_inputs`.
    """
    from ..version import __version__

    lowest = min(kinships, key=lambda kin: kin.lowest[1] if kin.cosines else 2.0)
    mixture: dict[str, Any] = {}
    if isinstance(plan, Mixture):
        models = list(plan.checkpoints)[1:]
        mixture = {
            "mixture": plan.parameters(),
            "kinships": dict(zip(models, map(_kinship_to_json, kinships), strict=True)),
        }
    return {
        **search,
        **alpha_to_json(alpha),
        **{side: checkpoint.public_ref for side, checkpoint in plan.checkpoints.items()},
        "version": __version__,
        "formula": formula_of(plan),
        **mixture,
        "options": dict(plan.options),
        "architectures": {
            "base": plan.base_layout.arch,
            **{
                side: pair.donor_layout.arch
                for side, pair in zip(list(plan.checkpoints)[1:], plan.pairs, strict=True)
            },
        },
        "declared": [arch.to_json() for arch in plan.declared],
        "counts": plan.counts,
        "notes": [*plan.notes, *search.get("notes", ())],
        "kinship": _kinship_to_json(lowest),
        "made_with": {"python": platform.python_version(), "kernel": kernel},
        "inputs": inputs,
    }


def _kinship_to_json(kinship: Kinship) -> dict[str, Any]:
    group, cosine = kinship.lowest if kinship.cosines else (None, None)
    return {"lowest": group, "cosine": cosine and round(cosine, 6)}


def describe_nonfinite(counts: Mapping[str, int]) -> str:
    """What to say of values that are NaN or infinite; counts: how many, by tensor."""
    (tensor, count), *others = counts.items()
    more = f", and values of {len(others)} other tensors" if others else ""
    return f"{tensor}: {count} blended values are NaN or infinite{more}"


def digest_inputs(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """What `digest_input` says of every shard of every input."""
    return {
        side: [digest_input(checkpoint, shard) for shard in checkpoint.shards]
        for side, checkpoint in plan.checkpoints.items()
    }


def digest_input(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """Size and a sampled digest of an input file, and its full sha256 where the Hub noted it.

    Of a repository's file only the sha256 that the Hub gives: it need not be here.
    sample_sha256 covers 64 evenly spread blocks of 4096 bytes, the first and the last included:
    enough to tell two files apart without reading 16 GB.
    """
    listed = checkpoint.repo.files.get(path.name) if checkpoint.repo else None
    if listed is not None and listed.sha256:
        return {"file": path.name, "size": listed.size, "sha256": listed.sha256}
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    length = min(_SAMPLE_BYTES, size)
    with SampledReader() as reader:
        for start in evenly_spread(size, length, _SAMPLES):
            stretch = Span(path, DTYPES["U8"], start, start + length, (length,))
            digest.update(reader.read_bytes(stretch))
    noted = _hub_sha256(path)
    return {
        "file": path.name,
        "size": size,
        "sample_sha256": digest.hexdigest(),
        **({"sha256": noted} if noted else {}),
    }


def _hub_sha256(path: Path) -> str | None:
    """The file's sha256 where huggingface_hub noted it: as a cached blob's name, or in a note."""
    blob = Path(os.path.realpath(path)).name
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    lines = note.read_text().splitlines() if note.is_file() else []
    for candidate in (blob, lines[1] if len(lines) > 1 else ""):
        if re.fullmatch(r"[0-9a-f]{64}", candidate):
            return candidate
    return None
