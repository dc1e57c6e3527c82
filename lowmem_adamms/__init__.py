"""Merge multimodal LLMs of different architecture in constant memory (AdaMMS, arXiv 2503.23733)."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels" / "reference.py").is_file():
    # In a checkout `kernels/` stands beside this package; installed, setuptools puts it inside.
    __path__.append(str(_root))

from .plan import make_plan  # noqa: E402  (the path must be complete first)
from .writer import merge  # noqa: E402

__all__ = ["__version__", "make_plan", "merge"]
