"""Load a base through transformers, and handle its parameters, quantized or not.

Uses private names of transformers and bitsandbytes. Nothing here knows a plan or an alpha.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, PlacementError, RecipeError, first_line
from .cpu_4bit import find_obstacle

if TYPE_CHECKING:
    import torch

AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForTextToWaveform",
)
"""Those that load what answers in words, the first that knows a config."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and bitsandbytes inside the block, and restore their settings."""
    transformers_logging = importlib.import_module("transformers.utils.logging")
    verbosity = transformers_logging.get_verbosity()
    progress_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    bitsandbytes_logger = logging.getLogger("bitsandbytes")  # warns of every cast
    level = bitsandbytes_logger.level
    bitsandbytes_logger.setLevel("ERROR")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bitsandbytes_logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if progress_bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def translate_errors(folder: Path) -> Iterator[None]:
    """Raise errors of ours for what transformers and torch say of a model that cannot be loaded.

    RecipeError: a package is missing. FormatError: transformers does not know the architecture.
    PlacementError: out of memory. Anything else stays as it is.
    """
    try:
        yield
    except ImportError as error:
        raise RecipeError(f"{folder}: {first_line(error)}") from None
    except ValueError as error:
        if not re.search("model type|architecture", str(error), re.IGNORECASE):
            raise
        raise FormatError(f"{folder}: {first_line(error)}") from None
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        raise PlacementError(f"{folder}: {first_line(error)}") from None


# Loading


def load_model(
    folder: Path, *, device: str, dtype: str, quantize: str | None, trust_remote_code: bool
) -> Any:
    """Load the checkpoint in `folder` as a transformers module in eval mode, on one device.

    dtype: a torch name, or "auto" for the config's own. quantize: None, "nf4" or "int8".

    Raises FormatError if transformers does not know the architecture, RecipeError if the model
    needs remote code that was not allowed or a package that is missing, and PlacementError if
    memory runs out.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantize:
        options["quantization_config"] = quantization_config(quantize)
    if device != "cpu" or quantize:
        options["device_map"] = {"": device}
    with quiet(), translate_errors(folder):
        _, auto_class = _read_config(folder, trust_remote_code)
        model = auto_class.from_pretrained(folder, **options)
    return model.eval().requires_grad_(False)


def build_skeleton(
    folder: Path, *, dtype: str | None, first_dtype: str, quantize: str, trust_remote_code: bool
) -> tuple[Any, Any]:
    """Build the module that `load_model` would quantize, without weights, and its quantizer.

    It is on the meta device, which takes no memory. dtype: a torch name; None for the config's own
    or, if it has none, `first_dtype`, that of the checkpoint's first tensor: this is what "auto"
    means to transformers. Raises the errors of `load_model`.
    """
    import torch

    with quiet(), translate_errors(folder):
        config, auto_class = _read_config(folder, trust_remote_code)
        model_dtype = getattr(torch, dtype) if dtype else config.dtype
        model_dtype = model_dtype or getattr(torch, first_dtype)
        with torch.device("meta"):
            model = auto_class.from_config(
                config, dtype=model_dtype, trust_remote_code=trust_remote_code
            )
        quantizers = importlib.import_module("transformers.quantizers")
        quantizer = quantizers.AutoHfQuantizer.from_config(
            quantization_config(quantize), pre_quantized=False
        )
        modeling = importlib.import_module("transformers.modeling_utils")
        with modeling.local_torch_dtype(model_dtype):  # of the biases it makes
            quantizer.preprocess_model(model=model, dtype=model_dtype, device_map={"": "cpu"})
        mapping = importlib.import_module("transformers.conversion_mapping")
        model._weight_conversions = mapping.get_model_conversion_mapping(model, None, None)
    return model, quantizer


def quantization_config(quantize: str) -> Any:
    """What transformers is told for "nf4" or "int8"; RecipeError where bitsandbytes is missing."""
    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"{quantize} needs bitsandbytes, which is not installed (there is no build of it for"
            " some platforms): pip install bitsandbytes, or do without quantizing"
        )
    transformers = importlib.import_module("transformers")
    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def refuse_remote_code(folder: Path, allowed: bool) -> None:
    """Raise RecipeError if the model needs code that is in `folder` and was not allowed."""
    transformers = importlib.import_module("transformers")
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if config.get("auto_map") and not allowed and config.get("model_type") not in known:
        raise RecipeError(
            f"{folder}: its model is Python code that comes with it (auto_map in config.json);"
            " read that code, then allow it with `trust_remote_code=True`"
        )


def _read_config(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """The config of the model in a folder, and the auto class that loads it."""
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder}: no config.json in it; transformers cannot tell what it is")
    refuse_remote_code(folder, trust_remote_code)
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return config, _choose_auto_class(transformers, config, trust_remote_code)


def _choose_auto_class(transformers: Any, config: Any, trust_remote_code: bool) -> Any:
    """The class that allowed remote code is announced for, else the first that knows the config.

    Where none does: a class of the config's own family, which transformers lists in no mapping, or
    AutoModelForCausalLM, whose error says what is unknown.
    """
    announced = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    for name in AUTO_CLASSES:
        auto_class = getattr(transformers, name)
        known = auto_class._model_mapping.keys()  # a lazy mapping without __contains__
        if name in announced or type(config) in known:
            return auto_class
    return transformers.AutoModelForCausalLM


# Parameters


def loaded_dtype(model: Any, name: str, state: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which a loader keeps a parameter of a skeleton. state: of its `state_dict`."""
    for pattern, dtype in model._get_dtype_plan(model.config.dtype).items():
        if re.search(rf"(^|\.){pattern}($|\.)", name):
            return dtype  # type: ignore[no-any-return]
    return state[name].dtype  # type: ignore[no-any-return]


def find_tensor(model: Any, name: str) -> torch.Tensor:
    """A parameter or buffer by its name."""
    return _find_parameter(model, name)[2]  # type: ignore[no-any-return]


def is_quantized(param: Any) -> bool:
    """Whether bitsandbytes holds the parameter in 4 or 8 bit."""
    return type(param).__name__ in ("Params4bit", "Int8Params")


def assign_parameter(model: Any, name: str, value: torch.Tensor) -> None:
    """Give a parameter new numbers: cast to its dtype, or quantized again as at loading."""
    module, attribute, param = _find_parameter(model, name)
    if not is_quantized(param):
        param.data.copy_(value)
        return
    fresh = quantize_like(param, value.to(model.dtype))
    if type(param).__name__ == "Int8Params":
        module._parameters[attribute] = fresh
        return
    # Data and state belong together; a forward pass on the CPU may have repacked both.
    param.data, param.quant_state = fresh.data, fresh.quant_state
    module.quant_state = fresh.quant_state


def untie_parameter(model: Any, name: str) -> None:
    """Give a parameter memory of its own."""
    import torch

    module, attribute, param = _find_parameter(model, name)
    module._parameters[attribute] = torch.nn.Parameter(param.detach().clone(), requires_grad=False)


def _find_parameter(model: Any, name: str) -> tuple[Any, str, Any]:
    """The module that has it, its name there, and the parameter."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    return module, attribute, getattr(module, attribute)


def quantize_like(like: Any, value: torch.Tensor) -> Any:
    """`value` quantized on its device with the settings of the parameter `like`."""
    bnb = importlib.import_module("bitsandbytes")
    if type(like).__name__ == "Int8Params":
        return bnb.nn.Int8Params(value.cpu(), requires_grad=False).to(value.device)
    return bnb.nn.Params4bit(
        value,
        requires_grad=False,
        blocksize=like.blocksize,
        compress_statistics=like.compress_statistics,
        quant_type=like.quant_type,
        quant_storage=like.quant_storage,
    ).to(value.device)


def quantized_tensors(param: Any) -> list[torch.Tensor]:
    """All tensors that a quantized parameter consists of."""
    if type(param).__name__ == "Int8Params":
        return [param.data, param.SCB]
    state = param.quant_state
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [param.data, state.absmax, *nested]


# Running


def copy_head_inputs(model: Any) -> None:
    """Hand the head its inputs as memory of their own.

    A model hands it a slice, such as `hidden[:, -1:]`. In bf16 on a CPU torch then copies the whole
    weight for each prompt: gigabytes, where the vocabulary is large.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_copy_input)


def _copy_input(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    torch = importlib.import_module("torch")
    return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])


def find_answering_part(model: Any) -> Any:
    """The model, or the part of it that answers in words: the first that has a forward pass.

    Of Qwen-Omni, the thinker: the whole can only be asked for speech.
    """
    import torch

    if type(model).forward is not torch.nn.Module.forward:
        return model
    parts = (part for part in model.children() if hasattr(part, "generate"))
    return next(parts, model)


def check_runnable(model: Any) -> None:
    """Raise PlacementError if bitsandbytes would fail in the middle of a forward pass.

    Its 4-bit layers for CPUs with avx512_bf16 take only weights of certain shapes.
    """
    for name, module in model.named_modules():
        packs = getattr(module, "support_avx512bf16_for_cpu", False)
        if packs and module.weight.device.type == "cpu":
            shape = (module.out_features, module.in_features)
            if obstacle := find_obstacle([(name, shape)]):
                raise PlacementError(obstacle)
