"""Vision features, computed once and taken from memory at every further alpha.

Right as long as no weight on the vision side is merged, which the plan shows. Leaves to others:
when to use it (`generate.py`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from blake3 import blake3

from .prompt_encoder import size_of


class FeatureCache:
    """What the vision side made of the images it was given, by the images' bytes.

    limit: bytes of features to keep; when they are spent, further ones are computed every time.
    """

    def __init__(self, limit: int) -> None:
        self._room = limit
        self._kept: dict[str, Any] = {}

    @contextmanager
    def over(self, model: Any, vision: frozenset[str]) -> Iterator[None]:
        """Inside the block, take the features from memory where they are there.

        vision: the parameters outside the decoder. transformers' own models have one method for
        features; of remote code, the largest modules made of those parameters alone are taken.
        """
        inner = model.base_model
        if hasattr(inner, "get_image_features"):
            places = [(inner, "get_image_features")]
        else:
            places = [(module, "forward") for module in _largest(model, vision)]
        # Others (accelerate) may have put a method of theirs on the same module.
        before = [vars(owner).get(name) for owner, name in places]
        for owner, name in places:
            setattr(owner, name, self._remembering(getattr(owner, name)))
        try:
            yield
        finally:
            for (owner, name), old in zip(places, before, strict=True):
                if old is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, old)

    def _remembering(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(compute)
        named = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]

        @functools.wraps(compute)  # transformers looks at the signature
        def remembered(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            key = _digest([(name, given[name]) for name in named if name in given])
            if key in self._kept:
                return _slim(self._kept[key])
            made = _slim(compute(*args, **kwargs))
            if (size := size_of(made)) <= self._room:
                self._kept[key] = made
                self._room -= size
            return _slim(made)

        return remembered


def _largest(model: Any, vision: frozenset[str], path: str = "") -> Iterator[Any]:
    """The modules, as near the top as can be, all of whose parameters are in `vision`."""
    for name, child in model.named_children():
        here = f"{path}{name}."
        held = {here + inner for inner, _ in child.named_parameters()}
        if held and held <= vision:
            yield child
        elif held & vision:
            yield from _largest(child, vision, here)


def _slim(made: Any) -> Any:
    """A copy of an output, without states of every vision layer: no decoder reads those."""
    if not isinstance(made, dict):
        return made
    left_out = ("hidden_states", "attentions")
    return type(made)(**{name: value for name, value in made.items() if name not in left_out})


def _digest(value: Any) -> str:
    """A digest of tensors and plain values, nested in lists, tuples and dicts."""
    digest = blake3()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
            flat = item.detach().cpu().contiguous().view(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        elif isinstance(item, dict):
            add(list(item.items()))
        elif isinstance(item, (list, tuple)):
            digest.update(f"[{len(item)}".encode())
            for inner in item:
                add(inner)
        else:
            digest.update(repr(item).encode())

    add(value)
    return digest.hexdigest()
