"""transformers' side of the live model: load the base, and join names on disk to parameters.

A checkpoint's names differ from its module's: transformers renames, fuses and splits as it loads.
The join asks transformers' own conversions, never a guess, and `live.py` then compares every
parameter with its bytes on disk. Nothing here knows a plan or an alpha.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, PlacementError, RecipeError, first_line

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors on disk that are loaded together, and how.

    names: on disk. target: the parameter or buffer they become, the first if there are several.
    converter and patterns (one per name) are transformers' own; None: the numbers stay as they are.
    """

    names: tuple[str, ...]
    target: str
    converter: Any = None
    patterns: tuple[str, ...] = ()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and warnings inside the block, and put its settings back."""
    logging = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bitsandbytes = getLogger("bitsandbytes")  # warns of every cast and every missing extra
    level = bitsandbytes.level
    bitsandbytes.setLevel("ERROR")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bitsandbytes.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_model(
    folder: Path, *, device: str, dtype: str, quantize: str | None, trust_remote_code: bool
) -> Any:
    """The checkpoint in `folder` as a transformers module in eval mode, on one device.

    dtype: a torch name, or "auto" for the config's own. quantize: None, "nf4" or "int8" through
    bitsandbytes. FormatError if transformers does not know the architecture, RecipeError if it
    needs remote code that was not allowed or a package that is missing.
    """
    transformers = _transformers(folder, trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantize:
        options["quantization_config"] = quantization(quantize)
    if device != "cpu" or quantize:
        options["device_map"] = {"": device}
    with quiet(), _told(folder):
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        loader = _auto_class(transformers, config, trust_remote_code)
        model = loader.from_pretrained(folder, **options)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What transformers says of a model that it cannot load here, as errors of ours."""
    try:
        yield
    except ImportError as error:
        raise RecipeError(f"{folder}: {first_line(error)}") from None
    except ValueError as error:
        if not re.search("model type|architecture", str(error), re.IGNORECASE):
            raise
        raise FormatError(f"{folder}: {first_line(error)}") from None
    except RuntimeError as error:
        if "out of memory" in str(error).lower():
            raise PlacementError(f"{folder}: {first_line(error)}") from None
        raise


def skeleton(
    folder: Path, *, dtype: str | None, first: str, quantize: str, trust_remote_code: bool
) -> tuple[Any, Any]:
    """The module that `load_model` would quantize, without numbers, and transformers' quantizer.

    On the meta device: it costs no memory for weights. dtype: a torch name; None for the config's
    own, or `first`, that of the checkpoint's first tensor, where the config has none: what "auto"
    means to transformers. Errors as of `load_model`.
    """
    import torch

    transformers = _transformers(folder, trust_remote_code)
    settings = quantization(quantize)
    with quiet(), _told(folder):
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        wanted = getattr(torch, dtype) if dtype else (config.dtype or getattr(torch, first))
        loader = _auto_class(transformers, config, trust_remote_code)
        with torch.device("meta"):
            model = loader.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
        auto = importlib.import_module("transformers.quantizers").AutoHfQuantizer
        quantizer = auto.from_config(settings, pre_quantized=False)
        with _default_dtype(wanted):  # of the biases it makes
            quantizer.preprocess_model(model=model, dtype=wanted, device_map={"": "cpu"})
        mapping = importlib.import_module("transformers.conversion_mapping")
        model._weight_conversions = mapping.get_model_conversion_mapping(model, None, None)
    return model, quantizer


@contextlib.contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def dtype_of(model: Any, name: str, state: Mapping[str, Any]) -> Any:
    """The torch dtype in which a loader would keep a parameter or buffer of a `skeleton`.

    state: its `state_of`.
    """
    for pattern, dtype in model._get_dtype_plan(model.config.dtype).items():
        if re.search(rf"(^|\.){pattern}($|\.)", name):
            return dtype
    return state[name].dtype


def join(model: Any, names: Sequence[str]) -> tuple[list[Group], list[str]]:
    """Groups of the checkpoint's tensors by what they become, and the names the model ignores."""
    core = importlib.import_module("transformers.core_model_loading")
    transforms = getattr(model, "_weight_conversions", None) or []
    renamings = [t for t in transforms if isinstance(t, core.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, core.WeightConverter)]
    state = state_of(model)
    prefix = model.base_model_prefix
    found: dict[str, list[tuple[str, str | None]]] = {}
    ignored: list[str] = []
    for name in sorted(names, key=core.dot_natural_key):  # the loader's order
        target, pattern = core.rename_source_key(name, renamings, converters, prefix, state)
        if target not in state:
            # As the loader does: a name may be right as it is, but for the base model's prefix.
            target, pattern = core.rename_source_key(name, [], [], prefix, state)
        if target in state:
            found.setdefault(target, []).append((name, pattern))
        else:
            ignored.append(name)
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups = [_group(target, members, by_pattern) for target, members in found.items()]
    # Of two tensors for one parameter the loader takes the first
    taken = {name for group in groups for name in group.names}
    return groups, [
        *ignored,
        *(n for members in found.values() for n, _ in members if n not in taken),
    ]


def _group(
    target: str, members: list[tuple[str, str | None]], by_pattern: Mapping[str, Any]
) -> Group:
    patterns = tuple(pattern for _, pattern in members if pattern is not None)
    names = tuple(name for name, _ in members)
    if not patterns:
        return Group(names[:1], target)
    return Group(names, target, by_pattern[patterns[0]], patterns)


def convert(group: Group, tensors: Sequence[Tensor], model: Any) -> dict[str, Tensor]:
    """What the model's parameters become from a group's tensors, by transformers' operations."""
    if group.converter is None:
        return {group.target: tensors[0]}
    converter = copy.deepcopy(group.converter)
    for name, pattern, tensor in zip(group.names, group.patterns, tensors, strict=True):
        converter.add_tensor(group.target, name, pattern, tensor)
    made = converter.convert(group.target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def state_of(model: Any) -> dict[str, Any]:
    """Parameters and persistent buffers by name, those under two names under both."""
    state = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                state[f"{path}.{name}" if path else name] = buffer
    return state


def _auto_class(transformers: Any, config: Any, trust_remote_code: bool) -> Any:
    """The class that loads it: what allowed code announces, else by what the config is for."""
    announced = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    for name in ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM"):
        if name in announced and hasattr(transformers, name):  # 5 has no Vision2Seq
            return getattr(transformers, name)
    known = transformers.AutoModelForImageTextToText._model_mapping
    if type(config) in known.keys():  # noqa: SIM118  (a lazy mapping without __contains__)
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _transformers(folder: Path, trust_remote_code: bool) -> Any:
    """The library, if it can be asked about the model in a folder; errors as of `load_model`."""
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder}: no config.json in it; transformers cannot tell what it is")
    transformers = importlib.import_module("transformers")
    refuse_remote_code(folder, trust_remote_code)
    return transformers


def refuse_remote_code(folder: Path, allowed: bool) -> None:
    """RecipeError if transformers knows the model only by code in `folder` that is not allowed."""
    transformers = importlib.import_module("transformers")
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if config.get("auto_map") and not allowed and config.get("model_type") not in known:
        raise RecipeError(
            f"{folder}: its model is Python code that comes with it (auto_map in config.json);"
            " read that code, then allow it with --trust-remote-code"
        )


def quantization(quantize: str) -> Any:
    """What transformers is told for "nf4" or "int8", of the live model and of what is written.

    RecipeError if a package that does it is missing.
    """
    import torch

    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise RecipeError(f"--quantize needs {package}: pip install 'lowmem-adamms[bnb]'")
    transformers = importlib.import_module("transformers")
    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_can_run(model: Any) -> None:
    """PlacementError if bitsandbytes would fail in the middle of a forward pass.

    Its 4-bit layers for CPUs with avx512_bf16 take widths that are multiples of 64 only.
    """
    for name, module in model.named_modules():
        packs = getattr(module, "support_avx512bf16_for_cpu", False)
        if packs and module.weight.device.type == "cpu" and module.in_features % 64:
            raise PlacementError(
                f"bitsandbytes cannot run {name} in 4 bit on this CPU: it is"
                f" {module.in_features} wide, which is no multiple of 64; use --live-quantize"
                " int8 or none, or a card"
            )


def is_quantized(param: Any) -> bool:
    """Whether bitsandbytes holds the parameter in 4 or 8 bit."""
    return type(param).__name__ in ("Params4bit", "Int8Params")


def assign(model: Any, name: str, value: Tensor) -> None:
    """Give a parameter new numbers: cast to its dtype, or quantized again as at loading."""
    module, attribute, param = _place(model, name)
    if not is_quantized(param):
        param.data.copy_(value)
        return
    fresh = _quantize(param, value.to(model.dtype))
    if type(param).__name__ == "Int8Params":
        module._parameters[attribute] = fresh
        return
    # Data and state belong together; a forward pass on the CPU may have repacked both.
    param.data, param.quant_state = fresh.data, fresh.quant_state
    module.quant_state = fresh.quant_state


def untie(model: Any, name: str) -> None:
    """Give a parameter memory of its own."""
    import torch

    module, attribute, param = _place(model, name)
    module._parameters[attribute] = torch.nn.Parameter(param.detach().clone(), requires_grad=False)


def equals(model: Any, name: str, value: Tensor) -> bool:
    """Whether a freshly loaded parameter holds `value`, bit for bit, as `assign` would store it."""
    import torch

    _, _, param = _place(model, name)
    if is_quantized(param):
        fresh = _quantize(param, value.to(model.dtype))
        pairs = list(zip(_stored(param), _stored(fresh), strict=True))
    else:
        pairs = [(param.detach(), value.to(param.dtype))]
    return all(
        a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in pairs
    )


def _place(model: Any, name: str) -> tuple[Any, str, Any]:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    return module, attribute, getattr(module, attribute)


def _quantize(like: Any, value: Tensor) -> Any:
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


def _stored(param: Any) -> list[Tensor]:
    """All numbers a quantized parameter consists of."""
    if type(param).__name__ == "Int8Params":
        return [param.data, param.SCB]
    state = param.quant_state
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [param.data, state.absmax, *nested]
