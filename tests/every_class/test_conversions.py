"""Where transformers puts what it stacks, fuses, splits or transposes as it loads a checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import load_tensors, multimodal_case
from safetensors.torch import save_file
from tiny_models import build, save

from lowmem_adamms.errors import RecipeError
from lowmem_adamms.live.conversions import TensorGroup, group_tensors
from lowmem_adamms.live.transformers_model import quiet

OPERATIONS = {
    "ernie4_5_vl_moe": {"Chunk", "ErnieFuseAndSplitTextVisionExperts", "Transpose"},
    "inkling_mm_model": {"Chunk", "Interleave"},
    "kimi_k25": {"Chunk", "Concatenate", "MergeModulelist", "PermuteForRope"},
    "mistral_large4": {"MergeModulelist", "Concatenate", "PermuteForRope"},
    "molmo2": {"Chunk", "Concatenate", "Split"},
    "qwen3_omni_moe_thinker": {"Concatenate", "MergeModulelist"},
    "qwen3_vl_moe": {"Transpose"},
    "step3p7": {"Chunk", "Concatenate", "PermuteForRope"},
}
"""By model type: what transformers does as it loads it."""
WINDOW = 37
"""Elements written at a time: no divisor of a row, so that windows begin and end anywhere."""


def loaded(
    model_type: str, folder: Path, *, hub_names: bool = True
) -> tuple[Any, Mapping[str, Any]]:
    """A tiny model as transformers loads it, and the tensors on disk."""
    case = multimodal_case(model_type)
    with quiet():
        save(build(case.model_class, case.config, seed=0), folder, hub_names=hub_names)
        model = case.model_class.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False), load_tensors(folder)


def write(model: Any, groups: Iterable[TensorGroup], tensors: Mapping[str, Any]) -> set[str]:
    """Write tensors from disk into a model, in windows; gives the names of what was written."""
    state = model.state_dict(keep_vars=True)
    targets: set[str] = set()
    for group in groups:
        for name, pieces in group.views(state).items():
            flat = tensors[name].reshape(-1)
            for start in range(0, len(flat), WINDOW):
                values = flat[start : start + WINDOW]
                for view in pieces.select(start, start + len(values)):
                    view.copy_(values[: view.numel()].view(view.shape))
                    values = values[view.numel() :]
                assert len(values) == 0
        targets.update(group.targets)
    return targets


@pytest.mark.parametrize(
    ("model_type", "hub_names"), [*((name, True) for name in OPERATIONS), ("molmo2", False)]
)
def test_what_is_written_by_views_is_what_transformers_loads(
    model_type: str, hub_names: bool, tmp_path: Path
) -> None:
    model, tensors = loaded(model_type, tmp_path, hub_names=hub_names)
    groups = group_tensors(model, tensors)
    if hub_names:
        kinds = {type(each.own).__name__ for group in groups for each in group.operations}
        assert kinds == OPERATIONS[model_type]
    assert sorted(name for group in groups for name in group.names) == sorted(tensors)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for value in model.state_dict().values():
        value.zero_()
    state = model.state_dict()
    addresses = {state[name].data_ptr() for name in write(model, groups, tensors)}
    for name, value in state.items():
        if value.data_ptr() in addresses:  # tied ones have several names
            assert torch.equal(value, expected[name]), name
        else:
            assert not expected[name].is_floating_point(), name


def test_experts_are_turned_where_their_shape_asks_for_it(tmp_path: Path) -> None:
    """As Qwen3-VL-MoE is published; transformers turns what has not the module's shape."""
    _, tensors = loaded("qwen3_vl_moe", tmp_path)
    experts = [name for name in tensors if ".experts." in name]
    turned = {name: tensors[name].transpose(1, 2).contiguous() for name in experts}
    save_file({**tensors, **turned}, tmp_path / "model.safetensors", {"format": "pt"})
    with quiet():
        model = multimodal_case("qwen3_vl_moe").model_class.from_pretrained(tmp_path)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for name in experts:
        model.get_parameter(name).data.zero_()
    write(model, group_tensors(model, load_tensors(tmp_path)), load_tensors(tmp_path))
    for name in experts:
        assert torch.equal(model.get_parameter(name), expected[name])
        assert torch.equal(expected[name], tensors[name])


def test_a_stack_is_in_the_order_of_numbers_whatever_that_of_the_file(tmp_path: Path) -> None:
    model, tensors = loaded("qwen3_omni_moe_thinker", tmp_path)
    backwards = {name: tensors[name] for name in reversed(list(tensors))}
    assert group_tensors(model, backwards) == group_tensors(model, tensors)


def test_an_operation_that_is_unknown_is_named(tmp_path: Path) -> None:
    model, tensors = loaded("qwen3_vl_moe", tmp_path)
    core = importlib.import_module("transformers.core_model_loading")

    class Rotate(core.Transpose):  # type: ignore[misc, name-defined]
        """Not one of transformers' own."""

    for converter in model._weight_conversions:
        if isinstance(converter, core.WeightConverter):
            converter.operations = [Rotate(1, 2)]
    with pytest.raises(RecipeError, match=r"converts model.* by Rotate .* merge at a given alpha"):
        group_tensors(model, tensors)
