"""Inside each of vLLM's workers: the plan is carried out, and vLLM's own loaders take the result.

vLLM fuses, shards and packs weights as it loads them. So it is handed tensors under their names in
the checkpoint, blended one after the other by the loop that writes checkpoints.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..architectures.declare import parse_declaration
from ..checkpoints.mapped_files import MappedFiles
from ..errors import FormatError
from ..live.device_source import torch_dtype
from ..live.live_sink import TableSink
from ..mapping.join import make_plan
from ..mapping.plan import Plan
from ..merging.loop import run


class BlendingWorker:
    """Methods that vLLM adds to its worker (`worker_extension_cls`), called by `collective_rpc`."""

    vllm_config: Any
    model_runner: Any

    def set_merge_plan(self, recipe: Mapping[str, Any]) -> None:
        """Make the plan of `plan_recipe` here, where its files must be the same."""
        self._merge_plan = plan_from_recipe(recipe)
        self._merge_files = MappedFiles(keep=True)

    def apply_alpha(self, alpha: float) -> None:
        """Blend base and donor into the loaded weights.

        vLLM's worker would forget its encoder outputs as well. They stay valid, as no vision weight
        changes, so its function below that is called.
        """
        config = importlib.import_module("vllm.config")
        reload = importlib.import_module("vllm.model_executor.model_loader.reload.inplace")
        # It warns of every module outside the decoder that it gets no weights for
        logging.getLogger(reload.__package__).setLevel(logging.ERROR)
        with config.set_current_vllm_config(self.vllm_config):
            reload.reload_weights(
                self.vllm_config,
                self.model_runner.get_model(),
                weights_iterator=blend_tensors(self._merge_plan, alpha, self._merge_files),
                weights_path=None,
                is_checkpoint_format=True,
            )


def plan_recipe(plan: Plan) -> dict[str, Any]:
    """What a plan is made from, as plain data: `plan_from_recipe` makes the same plan of it."""
    return {
        "base": str(plan.base.path.absolute()),
        "donor": str(plan.donor.path.absolute()),
        "options": dict(plan.options),
        "declared": [arch.to_json() for arch in plan.declared],
        "digest": _digest(plan),
    }


def plan_from_recipe(recipe: Mapping[str, Any]) -> Plan:
    """Make the plan again. FormatError if its files are not the same here."""
    declared = [parse_declaration(arch, "the plan") for arch in recipe["declared"]]
    plan = make_plan(recipe["base"], recipe["donor"], **recipe["options"], declared=declared)
    if _digest(plan) != recipe["digest"]:
        raise FormatError(
            f"{plan.base.path} or {plan.donor.path} is not the same to a vLLM worker as it was to"
            " the plan; every machine must see the same files"
        )
    return plan


def _digest(plan: Plan) -> str:
    return hashlib.sha256(json.dumps(plan.identity()).encode()).hexdigest()


def blend_tensors(plan: Plan, alpha: float, files: MappedFiles) -> Iterator[tuple[str, Any]]:
    """Names in the checkpoint and blended tensors, one in memory at a time.

    All tensors of the decoder, also those that alpha leaves alone: vLLM loads a module anew as soon
    as one of its tensors comes, and then needs all. What lies outside the decoder is left out.
    """
    from ..kernels.select import select_kernel

    kernel, _ = select_kernel(plan.dtypes)
    for step in plan.steps:
        if any(part.role for part in step.parts):
            content = torch.empty(step.nbytes, dtype=torch.uint8)
            sink = TableSink(content, files)
            run(replace(plan, steps=(step,)), alpha, sink, kernel=kernel, source=files)
            yield step.name, content.view(torch_dtype(step.dtype)).view(step.shape)
