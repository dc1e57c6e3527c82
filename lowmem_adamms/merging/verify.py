"""Whether a merged folder is what it says: its structure, and on request its bytes.

The deep check recomputes sampled rows from the inputs with the numpy reference, not with the kernel
that wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..architectures.declare import parse_declaration
from ..checkpoints.arranged import Arranged, take_alike
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.dtypes import DTYPES
from ..checkpoints.safetensors_header import read_header
from ..checkpoints.sampled_reads import SampledReader, evenly_spread
from ..checkpoints.span import Span
from ..errors import FormatError, RecipeError
from ..mapping.alphas import Alpha, alpha_from_json
from ..mapping.join import make_plan
from ..mapping.mixture import Mixture, make_mixture
from ..mapping.plan import Plan, Step
from ..methods import METHODS
from ..settings import MethodSettings
from .first_pass import find
from .journal import JOURNAL, WORK
from .loop import choose_work
from .mix import Mix, make_mixing
from .model_card import describe_nonfinite, digest_input
from .output_folder import INDEX, digest_file
from .sources import remote_shards
from .stretch import Blend, Copy

SAMPLES = 4
SAMPLE_ELEMENTS = 4096
"""Of each part, at most this many elements at each of SAMPLES places."""
SQUARE_ELEMENTS = 1024
"""The same of a part whose donor is in another order: to read a square takes the rows around it."""
_DIGESTS = ("sample_sha256", "sha256")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked. rows: stretches compared with the recipe; None if none was to be."""

    tensors: int
    shards: int
    bytes: int
    rows: int | None = None
    notes: tuple[str, ...] = ()


def verify(
    out: str | Path,
    *,
    deep: bool = False,
    base: str | Path | None = None,
    donor: str | Path | Sequence[str | Path] | None = None,
    ancestor: str | Path | None = None,
    progress: Say | None = None,
) -> Verification:
    """Check a merged folder. FormatError says what is wrong: header, index, digest or a row.

    deep: also compare the BLAKE3 digest of every file, and recompute sampled rows from the inputs
    (not those of a quantized output). base, donor, ancestor: where the inputs are now, of several
    donors all in their order; by default they are looked for beside `out`, or on the Hub if they
    came from there. progress: called with what is being looked at.
    """
    out = Path(out)
    if (out / WORK / JOURNAL).exists():
        raise FormatError(f"{out}: an unfinished merge; run its command again to resume")
    checkpoint = open_checkpoint(out, as_stored=True)
    recipe = _read_recipe(out)
    is_quantized = "quantized" in recipe
    if not is_quantized:
        open_checkpoint(out)
    _check_structure(out, checkpoint, recipe)
    rows, notes = None, []
    if nonfinite := recipe.get("nonfinite"):
        notes.append(describe_nonfinite(nonfinite))
    if deep:
        digests = {output["file"]: output["blake3"] for output in recipe["outputs"]}
        _check_digests(out, digests | recipe.get("sidecars", {}), progress)
        if is_quantized:
            notes.append("the output is quantized: its digests were checked, no rows recomputed")
        else:
            donors = [donor] if isinstance(donor, str | Path) else list(donor or ())
            given = _name_inputs(out, recipe, base, donors, ancestor)
            for side in recipe["inputs"]:
                recipe[side] = str(given.get(side) or _find_input(out, recipe, side))
            rows = _check_rows(out, checkpoint, recipe, progress)
    nbytes = sum(span.nbytes for span in checkpoint.tensors.values())
    return Verification(len(checkpoint.tensors), len(checkpoint.shards), nbytes, rows, tuple(notes))


def _read_recipe(out: Path) -> dict[str, Any]:
    """`adamms.json`, in so far as a check relies on it: keys and types."""
    path = out / "adamms.json"
    if not path.is_file():
        raise FormatError(f"{path}: missing; {out} was not written by lowmem-adamms")
    try:
        document = json.loads(path.read_bytes())
        is_valid = _is_recipe(document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RecipeError):
        is_valid = False
    if not is_valid:
        raise FormatError(f"{path}: not a recipe of lowmem-adamms")
    return dict(document)


def _is_recipe(document: Any) -> bool:
    """False, or one of the errors that `_read_recipe` expects, if something does not fit."""
    options, inputs, outputs = document["options"], document["inputs"], document["outputs"]
    alpha_from_json(document)
    return (
        isinstance(document["alpha"], int | float | list)
        and all(isinstance(document[side], str) for side in inputs)
        and _is_mixture(document.get("mixture"))
        and isinstance(document.get("declared", []), list)
        and isinstance(document.get("quantized", {}), dict)
        and isinstance(document.get("nonfinite", {}), dict)
        and all(isinstance(digest, str) for digest in document.get("sidecars", {}).values())
        and options["embeddings"] in ("merge", "keep")
        and options.get("unmatched", "keep") in ("stop", "keep")
        and options.get("rounding", "nearest") in ("stochastic", "nearest")
        and (options["dtype"] is None or DTYPES[options["dtype"]].blendable)
        and {"base", "donor"} <= set(inputs)
        and all(set(item) & set(_DIGESTS) for side in inputs.values() for item in side)
        and all(isinstance(item["blake3"], str) for item in outputs)
        and all(isinstance(item["file"], str) for item in outputs)
        and all(isinstance(item["size"], int) for item in outputs)
    )


def _is_mixture(mixture: Any) -> bool:
    """Whether it is none, or what `Mixture.parameters` gives."""
    return mixture is None or (
        mixture["method"] in METHODS
        and all(isinstance(value, int | float) for value in mixture["weights"])
        and all(0 < value <= 1 for value in mixture.get("densities", ()))
        and mixture.get("trim", "tensor") in ("tensor", "model")
        and isinstance(mixture.get("mask_seed", 0), int)
    )


def _donor_names(recipe: Mapping[str, Any]) -> list[str]:
    return [side for side in recipe["inputs"] if side.startswith("donor")]


def _name_inputs(
    out: Path,
    recipe: Mapping[str, Any],
    base: str | Path | None,
    donors: Sequence[str | Path],
    ancestor: str | Path | None,
) -> dict[str, str | Path | None]:
    """The places that were given, by the recipe's names; RecipeError for more than it has."""
    names = _donor_names(recipe)
    if len(donors) > len(names):
        raise RecipeError(f"{out} was merged from {len(names)} donors, found {len(donors)}")
    if ancestor and "ancestor" not in recipe["inputs"]:
        raise RecipeError(f"{out} was merged without an ancestor; leave out `ancestor`")
    return dict(zip(names, donors, strict=False)) | {"base": base, "ancestor": ancestor}


def _check_structure(out: Path, checkpoint: Checkpoint, recipe: dict[str, Any]) -> None:
    nbytes = sum(span.nbytes for span in checkpoint.tensors.values())
    if (out / INDEX).is_file():
        index = json.loads((out / INDEX).read_bytes())
        metadata = index.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != nbytes:
            raise FormatError(f"{out / INDEX}: total_size is {total}, the tensors take {nbytes}")
        unlisted = set(checkpoint.tensors) - set(index["weight_map"])
        if unlisted:
            raise FormatError(f"{out / INDEX}: does not list {min(unlisted)}")
    for shard in checkpoint.shards:
        if read_header(shard).metadata.get("format") != "pt":
            raise FormatError(f'{shard}: header metadata lacks {{"format": "pt"}}')
    listed = sorted(output["file"] for output in recipe["outputs"])
    if listed != sorted(shard.name for shard in checkpoint.shards):
        raise FormatError(f"{out / 'adamms.json'}: its outputs are not the shards of {out}")
    for output in recipe["outputs"]:
        path = out / output["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != output["size"]:
            raise FormatError(f"{path}: {size} bytes, adamms.json says {output['size']}")


def _check_digests(out: Path, digests: dict[str, str], progress: Say | None) -> None:
    for name, digest in digests.items():
        if progress:
            progress(f"BLAKE3 of {name}")
        path = out / name
        if not path.is_file():
            raise FormatError(f"{path}: missing, adamms.json lists it")
        found = digest_file(path)
        if found != digest:
            raise FormatError(f"{path}: BLAKE3 is {found}, adamms.json says {digest}")


def _find_input(out: Path, recipe: dict[str, Any], side: str) -> str:
    """Where the recipe's base or donor is: beside the output, else what the recipe calls it."""
    ref: str = recipe[side]
    beside = out.absolute().parent / ref
    if not beside.exists() and "/" not in ref:
        raise FormatError(
            f"{out}: its {side}, called {ref}, does not lie beside it; give its place as"
            f" `{side.split()[0]}`"
        )
    return str(beside) if beside.exists() else ref


def _check_rows(
    out: Path, checkpoint: Checkpoint, recipe: dict[str, Any], progress: Say | None
) -> int:
    """Compare sampled stretches of every tensor with the inputs; returns how many there were."""
    plan, alpha = _plan_again(recipe), alpha_from_json(recipe)
    planned = {step.name for step in plan.steps}
    if odd := planned ^ set(checkpoint.tensors):
        raise FormatError(f"{out}: {min(odd)} is in only one of the output and its plan")
    rows = 0
    if isinstance(plan, Mixture):  # here, as what reads samples may run in threads
        for step in plan.steps:
            if step.action != "copy":
                find(plan, step)
    with SampledReader(remote_shards(plan)) as reader:
        counts = reader.map(
            lambda step: _check_step(plan, step, checkpoint.tensors[step.name], alpha, reader),
            plan.steps,
        )
        for step, count in zip(plan.steps, counts, strict=True):
            if progress:
                progress(f"rows of {step.name}")
            rows += count
    return rows


def _plan_again(recipe: dict[str, Any]) -> Plan:
    """The plan of the recipe; FormatError unless its inputs are the ones that were merged."""
    options = recipe["options"]
    declared = [
        parse_declaration(table, f"adamms.json: declared[{i}]")
        for i, table in enumerate(recipe.get("declared", ()))  # not in those of version 0.1
    ]
    how = {
        "embeddings": options["embeddings"],
        "dtype": options["dtype"],
        "unmatched": options.get("unmatched", "keep"),  # earlier versions kept them without a word
        "rounding": options.get("rounding", "nearest"),  # as earlier versions did
        "declared": declared,
    }
    donors = [recipe[side] for side in _donor_names(recipe)]
    if mixture := recipe.get("mixture"):
        settings = MethodSettings(
            method=mixture["method"],
            trim=mixture.get("trim", "tensor"),
            mask_seed=mixture.get("mask_seed", 0),
        )
        numbers = {key: mixture.get(key) for key in ("weights", "densities")}
        plan: Plan = make_mixture(
            recipe["base"], donors, settings, ancestor=recipe.get("ancestor"), **how, **numbers
        )
    else:
        plan = make_plan(recipe["base"], donors[0], **how)
    for side, checkpoint in plan.checkpoints.items():
        noted = recipe["inputs"][side]
        if len(checkpoint.shards) != len(noted):
            raise FormatError(f"{checkpoint.path}: not the {side} that was merged (other shards)")
        for shard, before in zip(checkpoint.shards, noted, strict=True):
            now = digest_input(checkpoint, shard)
            common = [name for name in _DIGESTS if name in before and name in now]
            if not common or any(now[name] != before[name] for name in common):
                raise FormatError(f"{shard}: not the file that was merged (its digest differs)")
    return plan


def _check_step(plan: Plan, step: Step, out: Span, alpha: Alpha, reader: SampledReader) -> int:
    """Compare sampled stretches of one tensor with the reference; returns how many there were."""
    if out.shape != step.shape or out.dtype != step.dtype:
        raise FormatError(
            f"{out.path}: {step.name} is {out.dtype.name} {list(out.shape)},"
            f" expected {step.dtype.name} {list(step.shape)}"
        )
    rows, part_start = 0, 0
    for part in step.parts:
        written = out.flat_slice(part_start, part.base.elements)
        count = min(part.base.elements, SAMPLE_ELEMENTS)
        whole = choose_work(plan, step, step.dtype.nbytes(part_start), part, alpha)
        if whole.is_arranged:
            count = min(count, SQUARE_ELEMENTS)
        for first in evenly_spread(part.base.elements, count, SAMPLES):
            found, *inputs = _take_sample((written, *whole.sides), whole, first, count)
            if reader.read_bytes(found) != _recompute(reader, plan, whole, inputs, first):
                start = part_start + first
                raise FormatError(
                    f"{out.path}: {step.name} differs from its recipe in elements"
                    f" {start} to {start + count}"
                )
            rows += 1
        part_start += part.base.elements
    return rows


def _take_sample(
    sides: Sequence[Span | Arranged], whole: Blend | Mix | Copy, first: int, count: int
) -> Sequence[Span | Arranged]:
    """The same sample of all sides; consecutive elements where their places decide."""
    if isinstance(whole, Mix) and whole.mixture.method.by_chance:
        return [side.flat_slice(first, count) for side in sides]
    return take_alike(sides, first, count)


def _recompute(
    reader: SampledReader,
    plan: Plan,
    whole: Blend | Mix | Copy,
    inputs: Sequence[Span | Arranged],
    first: int,
) -> bytes:
    """What the reference makes of a part's sample from its element `first` on."""
    from ..kernels import reference

    if isinstance(whole, Copy):
        return b"".join(bytes(reader.read_bytes(side)) for side in inputs)
    bits = [reader.read_bits(side) for side in inputs]
    if isinstance(whole, Mix):
        mixing = make_mixing(whole.mixture, whole.step, whole.shares)
        mixed = reference.mix(bits, whole.dtypes, mixing, whole.first + first)
        return bytes(mixed.tobytes())
    how = whole.dtypes, whole.alpha, plan.rounds_stochastically
    return bytes(reference.blend(bits[0], bits[-1], *how).tobytes())
