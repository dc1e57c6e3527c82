"""kernels/gpu.py imported once more, as another environment makes it."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from lowmem_adamms.kernels import gpu

CARD = torch.cuda.is_available()


def copy_of_gpu(name: str) -> ModuleType:
    """The module under another name, as this moment's environment makes it."""
    spec = importlib.util.spec_from_file_location(f"lowmem_adamms.kernels.{name}", gpu.__file__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interpreted_gpu() -> ModuleType:
    """The module with its Triton kernels run by Triton's interpreter, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module = copy_of_gpu("interpreted_gpu")
    module.__dict__["BLOCK"] = 1 << 13  # its cost is per block, not per element
    return module
