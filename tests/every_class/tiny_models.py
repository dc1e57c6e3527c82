"""Tiny random models of any class: a base, and donors that differ from it in every number."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny_config import shrink

NOISE = 0.1
"""Of each tensor's RMS, from base to donor: few enough for relatives, enough to see a blend."""

MOST_PARAMETERS = 4_000_000


def transformers() -> Any:
    """The library, without its types: mypy reads them for most of a minute."""
    return importlib.import_module("transformers")


def tiny_config(model_type: str, exceptions: dict[str, Any]) -> Any:
    """A small config of a model type."""
    config_class = transformers().CONFIG_MAPPING[model_type]
    return config_class.from_dict(shrink(config_class().to_dict(), exceptions))


def build(model_class: Any, config: Any, seed: int) -> Any:
    """A model in float32 with a random number in every parameter and float buffer."""
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    if (count := sum(param.numel() for param in model.parameters())) > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters: the rules of tiny_config.py miss a number of it")
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for tensor in _floats(model):
        tensor.copy_(torch.randn(tensor.shape, generator=random))
    return model


def make_relative(model: Any, language: set[str], seed: int) -> Any:
    """A copy whose language model is a little different and all else entirely."""
    relative = copy.deepcopy(model)
    random = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for name, tensor in relative.state_dict(keep_vars=True).items():
        if tensor.data_ptr() in seen or not tensor.is_floating_point():
            continue
        seen.add(tensor.data_ptr())
        drawn = torch.randn(tensor.shape, generator=random)
        if name in language:
            drawn = tensor + NOISE * tensor.square().mean().sqrt() * drawn
        tensor.data.copy_(drawn)
    return relative


def _floats(model: Any) -> Iterator[torch.Tensor]:
    """Each once, although tied ones have several names."""
    unique = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return (tensor for tensor in unique.values() if tensor.is_floating_point())


@contextmanager
def timm_stub() -> Iterator[None]:
    """Stands for timm, which holds towers of some classes and is not installed: a single layer."""
    wrapper = "transformers.models.timm_wrapper"
    modeling: Any = importlib.import_module(f"{wrapper}.modeling_timm_wrapper")
    if hasattr(modeling, "timm"):
        yield
        return

    def create_model(*_: Any, **__: Any) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4))

    before = modeling.requires_backends
    modeling.requires_backends = lambda *_: None
    modeling.timm = SimpleNamespace(create_model=create_model, __version__="0")
    try:
        yield
    finally:
        modeling.requires_backends = before
        del modeling.timm


def save(model: Any, folder: Path, *, hub_names: bool = True) -> Path:
    """Save a model, with the tensor names of the Hub or with those of its modules."""
    model.save_pretrained(folder, save_original_format=hub_names)
    return folder
