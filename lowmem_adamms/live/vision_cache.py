"""Vision features, computed once and taken from memory at every further alpha.

This is right as long as no weight on the vision side is merged, which the plan shows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from blake3 import blake3

from .prompt_encoder import tensor_bytes


class VisionCache:
    """Outputs of a model's vision side by the images it was given.

    limit_bytes: of features to keep; once they are used up, further ones are computed every time.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._free_bytes = limit_bytes
        self._outputs: dict[str, Any] = {}

    @contextmanager
    def patch(self, model: Any, vision_names: frozenset[str]) -> Iterator[None]:
        """Inside the block, have the model take features from here if they are known.

        vision_names: the parameters outside the decoder. Models of transformers have one method for
        features; of remote code, the largest modules made of these parameters alone are taken.
        """
        inner = model.base_model
        features = ("get_image_features", "get_audio_features")
        methods = [(inner, name) for name in features if hasattr(inner, name)]
        if not methods:
            methods = [(module, "forward") for module in _vision_modules(model, vision_names)]
        # Others (accelerate) may have put a method of theirs on the same module
        before = [vars(owner).get(name) for owner, name in methods]
        for owner, name in methods:
            setattr(owner, name, self._remember(getattr(owner, name)))
        try:
            yield
        finally:
            for (owner, name), old in zip(methods, before, strict=True):
                delattr(owner, name)
                if old is not None:
                    setattr(owner, name, old)

    def _remember(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(compute)
        names = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]

        @functools.wraps(compute)  # transformers looks at the signature
        def remembered(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            key = _digest([(name, given[name]) for name in names if name in given])
            if key in self._outputs:
                return _copy_features(self._outputs[key])
            features = _copy_features(compute(*args, **kwargs))
            nbytes = tensor_bytes(features)
            if nbytes <= self._free_bytes:
                self._outputs[key] = features
                self._free_bytes -= nbytes
            return _copy_features(features)

        return remembered


def _vision_modules(model: Any, vision_names: frozenset[str], path: str = "") -> Iterator[Any]:
    """The modules, as near the top as can be, that have vision parameters alone."""
    for name, child in model.named_children():
        child_path = f"{path}{name}."
        names = {child_path + inner for inner, _ in child.named_parameters()}
        if names and names <= vision_names:
            yield child
        elif names & vision_names:
            yield from _vision_modules(child, vision_names, child_path)


def _copy_features(output: Any) -> Any:
    """A copy of an output, without the states of every vision layer: no decoder reads those."""
    if not isinstance(output, dict):
        return output
    omitted = ("hidden_states", "attentions")
    return type(output)(**{name: value for name, value in output.items() if name not in omitted})


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
