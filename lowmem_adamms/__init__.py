"""Merge multimodal LLMs of different architecture in constant memory (AdaMMS, arXiv 2503.23733)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .live.live_model import LiveModel

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels" / "reference.py").is_file():
    # In a checkout `kernels/` stands beside this package; installed, setuptools puts it inside.
    __path__.append(str(_root))

from .answers import Answer  # noqa: E402  (the path must be complete first)
from .api import find_alpha, make_plan, merge  # noqa: E402
from .mapping.alphas import Alphas  # noqa: E402
from .searching.search import search  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = [
    "Alphas",
    "Answer",
    "LiveModel",
    "__version__",
    "find_alpha",
    "make_plan",
    "merge",
    "search",
]


def __getattr__(name: str) -> Any:
    """LiveModel needs torch, which takes seconds to import: only those who use it wait."""
    if name == "LiveModel":
        from .live.live_model import LiveModel

        return LiveModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
