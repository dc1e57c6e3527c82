"""Whether a merged folder is what it says: its structure, and on request its bytes.

The deep check recomputes sampled rows from the inputs with the numpy reference, not with the kernel
that wrote them. Leaves to others: how a checkpoint is read (`checkpoint.py`), and tensors that
bitsandbytes quantized (`verify_quantized.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..architectures import declare
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.dtypes import DTYPES
from ..checkpoints.mapped_files import file_digest
from ..checkpoints.safetensors_header import read_header
from ..checkpoints.sampled_reads import SampledReader
from ..checkpoints.span import Span
from ..errors import FormatError, RecipeError
from ..mapping.alphas import Alpha, alpha_from_json, alpha_of
from ..mapping.join import make_plan
from ..mapping.plan import Part, Plan, Step
from ..quantizing.quantization import METHODS
from . import model_card as card
from .journal import NAME, WORK
from .sources import remote
from .writer import INDEX

SAMPLED_ROWS = 4
SAMPLED_ELEMENTS = 4096
"""Of each part, at most this many elements at each of SAMPLED_ROWS places."""
_DIGESTS = ("sample_sha256", "sha256")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was checked."""

    tensors: int
    shards: int
    bytes: int
    rows: int | None = None
    notes: tuple[str, ...] = ()


def verify(
    out: str | Path, *, deep: bool = False, progress: Callable[[str], None] | None = None
) -> Verdict:
    """Check the merged folder `out`; FormatError says what is wrong.

    Always: headers, index, total_size, metadata, recorded sizes. deep: also the BLAKE3 digest of
    every shard, and sampled rows against the inputs, which must still lie where `adamms.json` says
    (on the Hub, if they came from there). Rows of a quantized output are quantized again, for which
    bitsandbytes must be there; if it is not, a note says so.
    """
    out = Path(out)
    if (out / WORK / NAME).exists():
        raise FormatError(f"{out}: an unfinished merge; run its command again to resume")
    checkpoint = open_checkpoint(out, allow_quantized=True)
    recipe = _recipe(out)
    if "quantized" not in recipe:
        open_checkpoint(out)
    _check_structure(out, checkpoint, recipe)
    nbytes = sum(span.nbytes for span in checkpoint.tensors.values())
    rows, notes = _check_bytes(out, checkpoint, recipe, progress) if deep else (None, ())
    return Verdict(len(checkpoint.tensors), len(checkpoint.shards), nbytes, rows, notes)


def _recipe(out: Path) -> dict[str, Any]:
    """`adamms.json`, in so far as a check relies on it: keys and types."""
    path = out / "adamms.json"
    if not path.is_file():
        raise FormatError(f"{path}: missing; {out} was not written by lowmem-adamms")
    try:
        document = json.loads(path.read_bytes())
        options, inputs = document["options"], document["inputs"]
        fits = [
            isinstance(document["alpha"], (int, float)) and alpha_from_json(document) is not None,
            isinstance(document["base"], str) and isinstance(document["donor"], str),
            isinstance(document.get("declared", []), list),
            options["embeddings"] in ("merge", "keep"),
            options["dtype"] is None or DTYPES[options["dtype"]].blendable,
            all(set(item) & set(_DIGESTS) for side in inputs.values() for item in side),
            {"base", "donor"} <= set(inputs),
            all(isinstance(item["blake3"], str) for item in document["outputs"]),
            all(isinstance(item["file"], str) for item in document["outputs"]),
            all(isinstance(item["size"], int) for item in document["outputs"]),
            "quantized" not in document or _is_quantization(document["quantized"]),
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RecipeError):
        fits = [False]
    if not all(fits):
        raise FormatError(f"{path}: not a recipe of lowmem-adamms")
    return dict(document)


def _is_quantization(paper: Any) -> bool:
    return (
        paper["method"] in METHODS
        and DTYPES[paper["dtype"]].blendable
        and isinstance(paper["tensors"], int)
        and isinstance(paper["bitsandbytes"], str)
    )


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
            raise FormatError(f"{out / INDEX}: does not list {sorted(unlisted)[0]}")
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


def _check_bytes(
    out: Path,
    checkpoint: Checkpoint,
    recipe: dict[str, Any],
    progress: Callable[[str], None] | None,
) -> tuple[int, tuple[str, ...]]:
    """Digests of the outputs, then sampled rows against the inputs: how many, and notes."""
    _check_digests(out, recipe["outputs"], progress)
    plan, alpha = _plan_again(recipe), alpha_from_json(recipe)
    with SampledReader(remote(plan)) as reads:
        quantized = None
        if "quantized" in recipe:
            from ..quantizing.verify_quantized import Check

            quantized = Check(out, checkpoint, plan, recipe["quantized"], reads)
        entries = quantized.how.entries if quantized else lambda step: (step,)
        wanted = {entry.name for step in plan.steps for entry in entries(step)}
        if wanted != set(checkpoint.tensors):
            odd = sorted(wanted ^ set(checkpoint.tensors))[0]
            raise FormatError(f"{out}: {odd} is in only one of the output and its plan")

        def check(step: Step) -> int:
            if quantized and quantized.handles(step):
                return quantized.rows(step, partial(_stretch, reads, step, alpha))
            return _check_step(step, checkpoint.tensors[step.name], alpha, reads)

        rows = 0
        for step, count in zip(plan.steps, reads.map(check, plan.steps), strict=True):
            if progress:
                progress(f"rows of {step.name}")
            rows += count
    return rows, quantized.notes if quantized else ()


def _check_digests(
    out: Path, outputs: list[dict[str, Any]], progress: Callable[[str], None] | None
) -> None:
    for output in outputs:
        if progress:
            progress(f"BLAKE3 of {output['file']}")
        found = file_digest(out / output["file"], blake3())
        if found != output["blake3"]:
            raise FormatError(
                f"{out / output['file']}: BLAKE3 is {found}, adamms.json says {output['blake3']}"
            )


def _plan_again(recipe: dict[str, Any]) -> Plan:
    """The plan of the recipe, its inputs being the ones that were merged."""
    options = recipe["options"]
    dtype = DTYPES[options["dtype"]] if options["dtype"] else None
    declared = [
        declare.parse_declaration(table, f"adamms.json: declared[{i}]")
        for i, table in enumerate(recipe.get("declared", ()))  # not in those of version 0.1
    ]
    plan = make_plan(
        recipe["base"],
        recipe["donor"],
        embeddings=options["embeddings"],
        dtype=dtype,
        declared=declared,
    )
    for side, opened in (("base", plan.base), ("donor", plan.donor)):
        if len(opened.shards) != len(recipe["inputs"][side]):
            raise FormatError(f"{opened.path}: not the {side} that was merged (other shards)")
        for shard, noted in zip(opened.shards, recipe["inputs"][side], strict=True):
            found = card.input_digest(opened, shard)
            common = [name for name in _DIGESTS if name in noted and name in found]
            if not common or any(found[name] != noted[name] for name in common):
                raise FormatError(f"{shard}: not the file that was merged (its digest differs)")
    return plan


def _check_step(step: Step, out: Span, alpha: Alpha, reads: SampledReader) -> int:
    """Compare sampled stretches of one tensor with the reference; returns how many there were."""
    if out.shape != step.shape or out.dtype != step.dtype:
        raise FormatError(
            f"{out.path}: {step.name} is {out.dtype.name} {list(out.shape)},"
            f" expected {step.dtype.name} {list(step.shape)}"
        )
    done, position = 0, 0
    for part in step.parts:
        count = part.base.elements
        take = min(count, SAMPLED_ELEMENTS)
        for first in sorted(
            {(count - take) * i // (SAMPLED_ROWS - 1) for i in range(SAMPLED_ROWS)}
        ):
            found = reads.read_bytes(out.flat_slice(position + first, take))
            if found != _expected(reads, step, part, first, take, alpha):
                raise FormatError(
                    f"{out.path}: {step.name} differs from its recipe in elements"
                    f" {position + first} to {position + first + take}"
                )
            done += 1
        position += count
    return done


def _stretch(reads: SampledReader, step: Step, alpha: Alpha, first: int, count: int) -> bytes:
    """What the reference makes of `count` elements of a tensor from element `first`."""
    made, position = b"", 0
    for part in step.parts:
        size = part.base.elements
        start, stop = max(first - position, 0), min(first + count - position, size)
        if start < stop:
            made += _expected(reads, step, part, start, stop - start, alpha)
        position += size
    return made


def _expected(
    reads: SampledReader, step: Step, part: Part, first: int, count: int, alpha: Alpha
) -> bytes | bytearray:
    """What the reference makes of `count` elements of a part from element `first`."""
    from ..kernels import reference

    if part.donor is None and part.base.dtype == step.dtype:
        return reads.read_bytes(part.base.flat_slice(first, count))
    donor, weight = (part.donor, alpha_of(alpha, part.role)) if part.donor else (part.base, 0.0)
    dtypes = (part.base.dtype.name, donor.dtype.name, step.dtype.name)
    sides = (reads.read_bits(span.flat_slice(first, count)) for span in (part.base, donor))
    return bytes(reference.blend(*sides, dtypes, weight).tobytes())
