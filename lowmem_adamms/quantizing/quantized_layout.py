"""Which tensors of an output bitsandbytes quantizes, and the tensors that each becomes.

What becomes of a weight follows `Linear4bit` and `Linear8bitLt` of bitsandbytes
(`_save_to_state_dict`, 0.49 to 0.50).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..checkpoints.dtypes import DTYPES, DType
from ..mapping.plan import Step
from ..merging.shard_layout import Entry

Method = Literal["nf4", "int8"]
BLOCK = 64
"""Elements of a weight that share a scale in NF4: the default of bitsandbytes and transformers."""
NESTED = 256
"""Scales that share a scale of their own: `quantize_4bit` with compress_statistics."""
QUANT_STATE = "quant_state.bitsandbytes__nf4"
_MAX_STATE_BYTES = 512
"""Bytes that no quant state exceeds: its JSON holds a shape and one float beside fixed words."""


@dataclass(frozen=True, slots=True)
class QuantizedLayout:
    """What of an output is quantized, and how.

    dtype: the model's, to which numbers are cast first, as at loading. names: of the steps that are
    quantized. casts: the dtypes of others that are stored as they would be loaded, since a loader
    does not cast beside quantized weights.
    """

    method: Method
    dtype: DType
    names: frozenset[str]
    casts: Mapping[str, DType]

    def entries(self, step: Step) -> tuple[Entry, ...]:
        """What a step becomes: the weight and what belongs to it, or what it was."""
        if step.name not in self.names:
            return (Entry(step.name, self.casts.get(step.name, step.dtype), step.shape),)
        if self.method == "int8":
            stem = step.name.removesuffix("weight")
            return (
                Entry(step.name, DTYPES["I8"], step.shape),
                Entry(f"{stem}SCB", DTYPES["F32"], step.shape[:1]),
                Entry(f"{stem}weight_format", DTYPES["U8"], ()),
            )
        blocks = -(-step.elements // BLOCK)
        nested = -(-blocks // NESTED)
        return (
            Entry(step.name, DTYPES["U8"], (-(-step.elements // 2), 1)),
            Entry(f"{step.name}.absmax", DTYPES["U8"], (blocks,)),
            Entry(f"{step.name}.nested_absmax", DTYPES["F32"], (nested,)),
            Entry(f"{step.name}.nested_quant_map", DTYPES["F32"], (256,)),
            Entry(f"{step.name}.quant_map", DTYPES["F32"], (16,)),
            Entry(
                f"{step.name}.{QUANT_STATE}", DTYPES["U8"], (_MAX_STATE_BYTES,), quant_state=True
            ),
        )
