"""Bytes of a model in memory, held, streamed or quantized: sums over a plan's headers.

Exact but for quantized vision towers. Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from ..checkpoints.dtypes import DTYPES, DType
from ..mapping.mixture import Mixture
from ..mapping.plan import Plan, Step
from ..settings import Device, Quantization
from ..values import parse_dtype

SEQUENCE_TOKENS = 2048
"""Assumed length of a sequence: prompt, image and answer."""
HEAD_WINDOW_ROWS = 4096
"""Rows of a head that are blended and multiplied at a time, where it is not held."""

_LINEAR_KINDS = frozenset({"attention", "MLP", "vision tower", "connector"})
_CACHED_ROLE = re.compile(r"layers\.\d+\.attn\.[kv]\.weight")
_LAYER_ROLE = re.compile(r"layers\.(\d+)\.")


def choose_dtype(plan: Plan, dtype: str | None = None) -> DType:
    """The one asked for, else that of most of the output's bytes."""
    if dtype is not None:
        return DTYPES[parse_dtype(dtype)]
    sizes: Counter[str] = Counter()
    for step in plan.steps:
        if step.dtype.blendable:
            sizes[step.dtype.name] += step.nbytes
    return DTYPES[sizes.most_common(1)[0][0]]


def held_bytes(plan: Plan, dtype: DType, quantize: Quantization | None = None) -> int:
    """Bytes of the whole model."""
    return sum(_stored_bytes(step, _loaded_bytes(step, dtype), quantize) for step in plan.steps)


def output_bytes(plan: Plan, quantize: Quantization | None = None) -> int:
    """Bytes of the tensors that a merge writes; of a quantized output an estimate from headers."""
    return sum(_stored_bytes(step, step.nbytes, quantize) for step in plan.steps)


def streamed_bytes(
    plan: Plan, dtype: DType, device: Device, *, head_in_windows: bool
) -> int | None:
    """Bytes of two layers and of what is held beside them; None if there are no layers.

    What alpha does not change is used where it lies mapped, unless it must go to a card. Of an
    embedding there are only the rows in use, unless the head needs it whole or the method of a
    mixture does.
    """
    layers = layer_bytes(plan, dtype, device)
    total = 0
    has_head = any(part.role == "head" for _, part in plan.parts)
    for step in plan.steps:
        role = _role_of(step)
        nbytes = _loaded_bytes(step, dtype)
        if _LAYER_ROLE.match(role) or _stays_mapped(step, dtype, device):
            continue
        if role not in ("embed", "head") or step.action == "copy" or isinstance(plan, Mixture):
            total += nbytes
        elif role == "head" or not has_head:
            rows = step.shape[0]
            total += nbytes // rows * min(rows, HEAD_WINDOW_ROWS) if head_in_windows else nbytes
    return total + 2 * max(layers) if layers else None


def layer_bytes(plan: Plan, dtype: DType, device: Device) -> list[int]:
    """Bytes of each decoder layer, without what is used where it lies mapped."""
    layers: Counter[int] = Counter()
    for step in plan.steps:
        layer = _LAYER_ROLE.match(_role_of(step))
        if layer and not _stays_mapped(step, dtype, device):
            layers[int(layer[1])] += _loaded_bytes(step, dtype)
    return list(layers.values())


def layer_source_bytes(plan: Plan) -> int:
    """Bytes of base and donor that all decoder layers are blended from."""
    blended = (
        part for step, part in plan.parts if part.donor and _LAYER_ROLE.match(_role_of(step))
    )
    return sum(side.nbytes for part in blended for side in part.sides)


def _role_of(step: Step) -> str:
    """That of its first part that has one."""
    return next((part.role for part in step.parts if part.role), "")


def _stays_mapped(step: Step, dtype: DType, device: Device) -> bool:
    return device == "cpu" and step.action == "copy" and _loaded_bytes(step, dtype) == step.nbytes


def staging_bytes(plan: Plan, dtype: DType) -> int:
    """Taken while a tensor is quantized: its blend, a copy of it and the result exist at once."""
    return 3 * max((_loaded_bytes(s, dtype) for s in plan.steps if _is_quantizable(s)), default=0)


def kv_cache_bytes(plan: Plan, dtype: DType) -> int:
    """Bytes of the key-value cache of one sequence of SEQUENCE_TOKENS tokens.

    Streams of one layer (CogVLM's experts) share its cache: each token goes through one of them.
    """
    rows: Counter[str] = Counter()
    for _, part in plan.parts:
        if part.role and _CACHED_ROLE.fullmatch(part.role.partition("@")[0]):
            rows[part.role] += part.rows[1] - part.rows[0]
    widest: dict[str, int] = {}
    for role, count in rows.items():
        plain_role = role.partition("@")[0]
        widest[plain_role] = max(widest.get(plain_role, 0), count)
    return sum(widest.values()) * dtype.itemsize * SEQUENCE_TOKENS


def hidden_bytes(plan: Plan, dtype: DType) -> int:
    """Bytes of one token's hidden state."""
    width = max((step.shape[-1] for step, part in plan.parts if part.role == "embed"), default=0)
    return width * dtype.itemsize


def linear_weights(plan: Plan) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what would be quantized, without what is named a table of positions."""
    for step in plan.steps:
        if _is_quantizable(step) and "embed" not in step.name.split(".")[-2]:
            yield step.name, step.shape


def _loaded_bytes(step: Step, dtype: DType) -> int:
    """Bytes of an unquantized parameter: floats are cast to the model's dtype, others are not."""
    is_float = (step.dtype.torch or "").startswith(("float", "bfloat"))
    return (dtype if is_float else step.dtype).nbytes(step.elements)


def _stored_bytes(step: Step, whole_bytes: int, quantize: Quantization | None) -> int:
    """Bytes of a step's tensor: `whole_bytes`, or fewer if it is one that is quantized.

    int8 has a float32 scale for each row. NF4 with double quantization takes half a byte for each
    element, one for each 64 elements, and four for each 256 of these (QLoRA, arXiv 2305.14314,
    section 3).
    """
    if quantize in (None, "none") or not _is_quantizable(step):
        return whole_bytes
    if quantize == "int8":
        return step.elements + 4 * step.shape[0]
    scales = -(-step.elements // 64)
    return -(-step.elements // 2) + scales + 4 * -(-scales // 256)


def _is_quantizable(step: Step) -> bool:
    """Whether bitsandbytes would quantize it: the weight of an nn.Linear other than the head.

    A guess on the vision side, where a two-dimensional weight may also be a table of positions,
    which no name or shape tells from a Linear. Such tables are small.
    """
    return len(step.shape) == 2 and step.kind in _LINEAR_KINDS and step.name.endswith(".weight")
