"""A quantized output: which tensors bitsandbytes quantizes, what each becomes, and what is noted.

Which they are is transformers' own rule, asked of the model without weights, never a guess from
names: the output is what `save_pretrained` writes of the merged checkpoint once it is loaded with
the same settings. What becomes of a weight follows `Linear4bit` and `Linear8bitLt` of bitsandbytes
(`_save_to_state_dict`, 0.49 to 0.50). Leaves to others: making the bytes (`quantized_sink.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from ..checkpoints.dtypes import DTYPES, FROM_TORCH, DType
from ..errors import FormatError, MappingError, RecipeError
from ..live import transformers_model
from ..mapping.plan import Plan, Step
from ..merging.shard_layout import Entry

Method = Literal["nf4", "int8"]
METHODS = ("nf4", "int8")
BLOCK = 64
"""Elements of a weight that share a scale in NF4: the default of bitsandbytes and transformers."""
NESTED = 256
"""Scales that share a scale of their own: `quantize_4bit` with compress_statistics."""
STATE = "quant_state.bitsandbytes__nf4"
_STATE_ROOM = 512
"""Bytes that no quant state exceeds: its JSON holds a shape and one float beside fixed words."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """How an output is quantized.

    dtype: the model's, to which numbers are cast first, as at loading. names: of the steps that are
    quantized. casts: the dtypes of others that are stored as they would be loaded, since a loader
    does not cast beside quantized weights. settings: `quantization_config` of transformers.
    """

    method: Method
    dtype: DType
    names: frozenset[str]
    casts: Mapping[str, DType]
    settings: Mapping[str, Any]

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
            Entry(f"{step.name}.{STATE}", DTYPES["U8"], (_STATE_ROOM,), late=True),
        )

    def paper(self) -> dict[str, Any]:
        """What adamms.json says of it."""
        return {
            "method": self.method,
            "dtype": self.dtype.name,
            "tensors": len(self.names),
            "bitsandbytes": version("bitsandbytes"),
            "transformers": version("transformers"),
        }

    def identity(self) -> list[Any]:
        """Plain data that decides the bytes."""
        casts = sorted((name, dtype.name) for name, dtype in self.casts.items())
        return [self.paper(), sorted(self.names), casts]

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the output. Without a dtype in it a loader would take that of a scale."""
        told = {} if {"dtype", "torch_dtype"} & set(config) else {"torch_dtype": self.dtype.torch}
        return {**told, **config, "quantization_config": dict(self.settings)}


def prepare(plan: Plan, method: str, *, trust_remote_code: bool = False) -> Quantized:
    """How the merge of `plan` is quantized; imports torch and transformers, reads no weights.

    RecipeError for an unknown method, a missing package or what transformers converts as it loads;
    FormatError or MappingError if the output is not one that transformers would load.
    """
    if method not in METHODS:
        raise RecipeError(f"--quantize {method}: expected nf4 or int8")
    base = plan.base
    if base.folder is None:
        raise FormatError(f"{base.path}: a bare file cannot be quantized; give its folder")
    base.fetch_sidecars()  # of a base on the Hub: its config, and code if it brings any
    floats = (step.dtype.torch for step in plan.steps if step.dtype.blendable)
    spoken = plan.options["dtype"]
    model, quantizer = transformers_model.build_skeleton(
        base.folder,
        dtype=DTYPES[spoken].torch if spoken else None,
        first_dtype=next(floats, None) or "float32",
        quantize=method,
        trust_remote_code=trust_remote_code,
    )
    groups, ignored = transformers_model.group_tensors(model, [step.name for step in plan.steps])
    names = _names(plan, model, quantizer, groups, ignored)
    casts = _casts(plan, model, [group for group in groups if group.names[0] not in names])
    settings = quantizer.quantization_config.to_dict()
    kind: Method = "nf4" if method == "nf4" else "int8"
    return Quantized(kind, _dtype(model.config.dtype), names, casts, settings)


def _dtype(dtype: Any) -> DType:
    return FROM_TORCH[str(dtype).removeprefix("torch.")]


def _casts(
    plan: Plan, model: Any, groups: Sequence[transformers_model.TensorGroup]
) -> dict[str, DType]:
    """The steps that a loader casts, and to what."""
    steps = {step.name: step for step in plan.steps}
    state = transformers_model.get_state(model)
    casts = {}
    for group in groups:
        wanted = _dtype(transformers_model.loaded_dtype(model, group.target, state))
        for name in group.names:
            if steps[name].dtype.blendable and wanted.blendable and steps[name].dtype != wanted:
                casts[name] = wanted
    return casts


def _names(
    plan: Plan,
    model: Any,
    quantizer: Any,
    groups: Sequence[transformers_model.TensorGroup],
    ignored: Sequence[str],
) -> frozenset[str]:
    """The steps that become weights which the quantizer takes."""
    steps = {step.name: step for step in plan.steps}
    for name in ignored:
        if steps[name].action == "interpolate":
            raise MappingError(
                f"{plan.base.path}: transformers does not load {name} into"
                f" {type(model).__name__}, so a quantized output of it could not be loaded;"
                " merge without --quantize"
            )
    names = set()
    for group in groups:
        if not quantizer.param_needs_quantization(model, group.target):
            continue
        name, module = group.names[0], model.get_submodule(group.target.rpartition(".")[0])
        if group.converter is not None or module.source_cls.__name__ != "Linear":
            raise RecipeError(
                f"{plan.base.path}: transformers converts {name} as it loads it, which it does not"
                " do once it is quantized; merge without --quantize and quantize as you load"
            )
        if steps[name].shape != (module.out_features, module.in_features):
            raise FormatError(
                f"{plan.base.path}: {name} is {list(steps[name].shape)}, its config makes it"
                f" {[module.out_features, module.in_features]}"
            )
        if steps[name].elements:
            names.add(name)
    if not names:
        raise RecipeError(f"{plan.base.path}: holds no weights that transformers quantizes")
    return frozenset(names)
