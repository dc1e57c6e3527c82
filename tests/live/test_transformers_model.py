"""Transformers' side of the live model: what loads, what is refused, and the join of names.

The join is held against transformers itself: whatever `convert` makes of a checkpoint's tensors
must be what from_pretrained made of them.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lowmem_adamms.errors import FormatError, PlacementError, RecipeError
from lowmem_adamms.live import transformers_model
from lowmem_adamms.live.conversions import group_tensors


def library(name: str = "transformers") -> Any:
    return importlib.import_module(name)


def load(folder: Path, **options: Any) -> Any:
    settings = {"device": "cpu", "dtype": "auto", "quantize": None, "trust_remote_code": False}
    return transformers_model.load_model(folder, **{**settings, **options})


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    flat = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*flat)


def change_config(folder: Path, out: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other settings; None removes one."""
    tiny.respell(folder, lambda name: name, out)
    config = json.loads((out / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (out / "config.json").write_text(json.dumps(config))
    return out


# Loading


@pytest.mark.parametrize(
    ("family", "dtype", "name"),
    [
        ("qwen2_vl", "auto", "Qwen2VLForConditionalGeneration"),
        ("llama", "float16", "LlamaForCausalLM"),
    ],
)
def test_a_model_loads_as_its_class_in_its_dtype_frozen_and_for_evaluation(
    family: str, dtype: str, name: str, tiny_models: dict[str, Path]
) -> None:
    model = load(tiny_models[family], dtype=dtype)
    assert type(model).__name__ == name
    assert not model.training
    assert not any(param.requires_grad for param in model.parameters())
    expected = torch.bfloat16 if dtype == "auto" else torch.float16
    assert {param.dtype for param in model.parameters()} == {expected}


@pytest.mark.parametrize(
    ("width", "height", "packs", "refused"),
    [
        (96, 32, True, True),
        (96, 32, False, False),
        (128, 32, True, False),
        (128, 48, True, True),
        (128, 48, False, False),
    ],
)
def test_four_bit_layers_that_this_cpu_cannot_run_are_refused(
    width: int, height: int, packs: bool, refused: bool
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(width, height))
    layer: Any = model[0]
    layer.support_avx512bf16_for_cpu = packs  # as bitsandbytes marks its layers
    if refused:
        with pytest.raises(
            PlacementError,
            match=rf"cannot run 0 in 4 bit .* {height} x {width}, expected multiples",
        ):
            transformers_model.check_runnable(model)
    else:
        transformers_model.check_runnable(model)


def test_remote_code_is_loaded_only_on_request(
    ancestors: dict[str, tiny.Tensors], tmp_path: Path
) -> None:
    # A name of its own: transformers keeps remote code by the name of its folder
    made = tiny.make("cogvlm", tmp_path / "asked-for", ancestor=ancestors["llama"])
    folder = tiny.add_remote_code(made)
    (folder / "modeling_cogvlm.py").write_text(
        (folder / "modeling_cogvlm.py").read_text()
        + f"\n__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
    with pytest.raises(RecipeError, match=r"auto_map in config\.json.*`trust_remote_code=True`"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    assert type(load(folder, trust_remote_code=True)).__name__ == "CogVLMForCausalLM"
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("family", ["llava", "llama"])
def test_code_that_comes_with_a_known_model_is_neither_needed_nor_run(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_gone.Gone"}
    folder = change_config(tiny_models[family], tmp_path / family, auto_map=auto_map)
    model = load(folder)
    assert type(model) is type(load(tiny_models[family]))


@pytest.mark.parametrize("model_type", ["no_such_model", None, "clip"])
def test_an_architecture_that_is_unknown_or_does_not_answer_is_a_clear_error(
    model_type: str | None, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = change_config(tiny_models["llama"], tmp_path / "m", model_type=model_type)
    with pytest.raises(FormatError, match=str(folder)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_quantizing_without_bitsandbytes_says_what_to_install(
    tiny_models: dict[str, Path], hide_package: Callable[[str], None]
) -> None:
    hide_package("bitsandbytes")
    with pytest.raises(RecipeError, match=r"nf4 needs bitsandbytes.*pip install bitsandbytes"):
        load(tiny_models["llama"], quantize="nf4")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"), PlacementError),
        (RuntimeError("Out Of Memory"), PlacementError),
        (RuntimeError("a bug"), RuntimeError),
        (ValueError("a bug"), ValueError),
        (ImportError("This needs torchvision"), RecipeError),
    ],
)
def test_errors_of_transformers_are_told_apart(
    raised: Exception,
    expected: type[Exception],
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(library().LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(expected) as caught:
        load(tiny_models["llama"])
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)
    assert str(raised).splitlines()[0] in str(caught.value)


def test_quiet_silences_and_puts_back(capfd: pytest.CaptureFixture[str]) -> None:
    logging = library("transformers.utils.logging")
    logger = logging.get_logger("transformers.modeling_utils")
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), transformers_model.quiet():
        logger.warning("nobody hears this")
        warnings.warn("nor this", UserWarning, stacklevel=1)
        raise KeyError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
    with pytest.warns(UserWarning, match="but this"):
        warnings.warn("but this", UserWarning, stacklevel=1)


# The join


def test_a_name_that_is_right_as_it_is_need_not_be_renamed(tiny_models: dict[str, Path]) -> None:
    model = load(tiny_models["llama"])
    renaming = library("transformers.core_model_loading").WeightRenaming(r"^model\.", "gone.")
    model._weight_conversions = [renaming]
    tensors = tiny.load(tiny_models["llama"])
    groups = group_tensors(model, tensors)
    assert sorted(group.names for group in groups) == sorted((name,) for name in tensors)


def test_what_the_model_has_no_place_for_is_left_out(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Buffers of older exports, and a weight that stands twice, of which one is loaded."""
    twice = "layers.1.mlp.up_proj.weight"
    double = tiny.load(tiny_models["llama"])[f"model.{twice}"] * 2
    extra = {twice: double, **tiny.inv_freq()}
    folder = tiny.respell(tiny_models["llama"], lambda name: name, tmp_path / "m", extra=extra)
    model, tensors = load(folder), tiny.load(folder)
    for names in (list(tensors), list(reversed(tensors))):
        groups = group_tensors(model, {name: tensors[name] for name in names})
        targets = [target for group in groups for target in group.targets]
        assert sorted(targets) == sorted(name for name, _ in model.named_parameters())
        for group in groups:
            (name,), (target,) = group.names, group.targets
            assert same_bits(tensors[name], model.get_parameter(target))


# Parameters


def test_assigning_casts_and_keeps_the_memory() -> None:
    model = torch.nn.Linear(8, 4, dtype=torch.bfloat16).requires_grad_(False)
    weight, address = model.weight, model.weight.data_ptr()
    value = torch.randn(4, 8)
    transformers_model.assign_parameter(model, "weight", value)
    assert model.weight is weight
    assert weight.data_ptr() == address
    assert same_bits(weight, value.bfloat16())


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_an_assigned_value_is_quantized_as_at_loading(
    quantize: str, tiny_models: dict[str, Path]
) -> None:
    pytest.importorskip("bitsandbytes")
    model = load(tiny_models["llama"], quantize=quantize)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not transformers_model.is_quantized(model.lm_head.weight)

    def parts() -> list[torch.Tensor]:
        param = model.get_parameter(name)
        assert transformers_model.is_quantized(param)
        return [part.clone() for part in transformers_model.quantized_tensors(param)]

    loaded = parts()
    value = tiny.load(tiny_models["llama"])[name]
    transformers_model.assign_parameter(model, name, 2 * value)
    # Twice as much has the same codes and other scales
    codes, *scales = (same_bits(a, b) for a, b in zip(loaded, parts(), strict=True))
    assert codes and not all(scales)
    if quantize == "nf4":  # the layer falls back on its own where the weight lost it
        layer = model.model.layers[0].mlp.up_proj
        assert layer.quant_state is layer.weight.quant_state
    transformers_model.assign_parameter(model, name, value)
    assert all(same_bits(a, b) for a, b in zip(loaded, parts(), strict=True))


def test_a_head_gets_its_input_in_memory_of_its_own() -> None:
    """Of a slice torch would copy the whole weight for each prompt, in bf16 on a CPU."""
    seen = []

    class Head(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden)
            return hidden

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Head()

        def get_output_embeddings(self) -> Head:
            return self.head

    model = Model()
    transformers_model.copy_head_inputs(model)
    hidden = torch.randn(2, 3, 4)
    model.head(hidden[:, -1:])
    assert torch.equal(seen[0], hidden[:, -1:])
    assert seen[0].stride() == (4, 4, 1)
