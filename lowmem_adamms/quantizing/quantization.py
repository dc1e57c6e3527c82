"""How the output of a plan is quantized: what the writer of a merge is handed for `--quantize`.

Which tensors are quantized is transformers' own rule, asked of the model without weights, never a
guess from names: the output is what `save_pretrained` writes of the merged checkpoint once it is
loaded with the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch

from ..checkpoints.dtypes import DTYPES, FROM_TORCH, DType
from ..errors import FormatError, MappingError, RecipeError
from ..live import transformers_model
from ..live.conversions import TensorGroup, group_tensors
from ..live.cpu_4bit import find_obstacle, repacks_4bit
from ..mapping.plan import Plan
from ..merging.disk_sink import DiskSink
from .quantized_layout import Method, QuantizedLayout
from .quantizing_sink import QuantizingSink


@dataclass(frozen=True, slots=True)
class Quantization(QuantizedLayout):
    """The `merging.writer.Quantizer` of one plan. settings: transformers' `quantization_config`."""

    settings: Mapping[str, Any]

    def open_sink(self, disk: DiskSink, work: Path) -> QuantizingSink:
        """A sink that quantizes and hands on to the disk. work: a folder for scratch."""
        return QuantizingSink(disk, self, work)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the output. Without a dtype in it a loader would take that of a scale."""
        dtype = {} if {"dtype", "torch_dtype"} & set(config) else {"torch_dtype": self.dtype.torch}
        return {**dtype, **config, "quantization_config": dict(self.settings)}

    def describe(self) -> dict[str, Any]:
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
        return [self.describe(), sorted(self.names), casts]

    def note_machine(self, plan: Plan) -> str | None:
        """Why bitsandbytes cannot run the output on this machine, if it cannot."""
        if self.method != "nf4" or torch.cuda.is_available() or not repacks_4bit():
            return None
        shapes = ((step.name, step.shape) for step in plan.steps if step.name in self.names)
        obstacle = find_obstacle(shapes)
        return obstacle and f"the output is for other machines: {obstacle}"


def prepare(plan: Plan, method: str, *, trust_remote_code: bool = False) -> Quantization:
    """How the merge of `plan` is quantized; imports torch and transformers, reads no weights.

    RecipeError for an unknown method, a missing package, or tensors that transformers converts as
    it loads them; FormatError or MappingError if transformers would not load the output.
    """
    if method not in get_args(Method):
        raise RecipeError(f"`quantize` {method!r}: expected nf4 or int8")
    base = plan.base
    folder = base.require_loadable("quantized")
    base.fetch_sidecars()  # of a base on the Hub: its config, and code if it brings any
    output_dtype = plan.options["dtype"]
    floats = (step.dtype.torch for step in plan.steps if step.dtype.blendable)
    model, quantizer = transformers_model.build_skeleton(
        folder,
        dtype=DTYPES[output_dtype].torch if output_dtype else None,
        first_dtype=next(floats, None) or "float32",
        quantize=method,
        trust_remote_code=trust_remote_code,
    )
    groups = group_tensors(model, {step.name: step for step in plan.steps})
    _check_ignored(plan, model, groups)
    names = _quantized_names(plan, model, quantizer, groups)
    casts = _casts(plan, model, [group for group in groups if group.names[0] not in names])
    return Quantization(
        "nf4" if method == "nf4" else "int8",
        _dtype_of(model.config.dtype),
        names,
        casts,
        quantizer.quantization_config.to_dict(),
    )


def _check_ignored(plan: Plan, model: Any, groups: Sequence[TensorGroup]) -> None:
    """Raise MappingError if transformers does not load a tensor that is merged."""
    merged = {step.name for step in plan.steps if step.action == "interpolate"}
    if lost := merged - {name for group in groups for name in group.names}:
        raise MappingError(
            f"{plan.base.path}: transformers does not load {min(lost)} into"
            f" {type(model).__name__}, so a quantized output of it could not be loaded;"
            " merge without `quantize`"
        )


def _quantized_names(
    plan: Plan, model: Any, quantizer: Any, groups: Sequence[TensorGroup]
) -> frozenset[str]:
    """The steps that become weights which the quantizer takes."""
    steps = {step.name: step for step in plan.steps}
    names = set()
    for group in groups:
        name, target = group.names[0], group.targets[0]
        if not quantizer.param_needs_quantization(model, target):
            continue
        module = model.get_submodule(target.rpartition(".")[0])
        if module.source_cls.__name__ != "Linear":
            raise RecipeError(
                f"{plan.base.path}: transformers converts {name} as it loads it, which it does not"
                " do once it is quantized; merge without `quantize` and quantize as you load"
            )
        shape = (module.out_features, module.in_features)
        if steps[name].shape != shape:
            raise FormatError(
                f"{plan.base.path}: {name} is {list(steps[name].shape)}, its config makes it"
                f" {list(shape)}"
            )
        if steps[name].elements:
            names.add(name)
    if not names:
        raise RecipeError(f"{plan.base.path}: holds no weights that transformers quantizes")
    return frozenset(names)


def _casts(plan: Plan, model: Any, groups: Sequence[TensorGroup]) -> dict[str, DType]:
    """The steps that a loader casts, and to what."""
    steps = {step.name: step for step in plan.steps}
    state = model.state_dict(keep_vars=True)
    casts = {}
    for group in groups:
        wanted = _dtype_of(transformers_model.loaded_dtype(model, group.targets[0], state))
        for name in group.names:
            if steps[name].dtype.blendable and wanted.blendable and steps[name].dtype != wanted:
                casts[name] = wanted
    return casts


def _dtype_of(torch_dtype: Any) -> DType:
    return FROM_TORCH[str(torch_dtype).removeprefix("torch.")]
