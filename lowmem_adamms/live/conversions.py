"""Which tensors of a checkpoint become which parameters, as transformers loads them.

It renames, and in some families it stacks, fuses, splits or transposes as well. What becomes what
is asked of transformers' own conversions. Each of their operations is then followed backwards, from
parameters to views of them. So a tensor can be written into the parameters, or compared with them,
window by window and without being converted. Uses private names of transformers, as
`transformers_model` does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RecipeError
from .transformers_model import is_quantized


@dataclass(frozen=True, slots=True)
class Pieces:
    """Views of parameters that hold one tensor: joined along `axis`, and read in C order."""

    views: tuple[torch.Tensor, ...]
    axis: int = 0

    @property
    def only(self) -> torch.Tensor:
        """The view, where there is one."""
        (view,) = self.views
        return view

    def select(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Views of elements `start` to `stop` of the tensor, in their order."""
        return _select(self.views, self.axis, start, stop)


Views = dict[str, list[Pieces]]
"""By key of a conversion: where each of the key's tensors is."""


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors on disk that are loaded together.

    names: on disk. targets: the parameters or buffers that they become. operations: how, in order;
    none where the numbers stay as they are. keys: for each name, how the first operation calls the
    tensors of its kind.
    """

    names: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    keys: tuple[str, ...] = ()

    def views(self, params: Mapping[str, torch.Tensor]) -> dict[str, Pieces]:
        """For each name, where its numbers are in the targets' tensors."""
        found = [[Pieces((params[target].detach(),))] for target in self.targets]
        if not self.operations:
            return {self.names[0]: found[0][0]}
        views: Views = dict(zip(self.operations[-1].outputs, found, strict=True))
        for operation in reversed(self.operations):
            views = operation.undo(views)
        queues = {key: iter(pieces) for key, pieces in views.items()}
        return {name: next(queues[key]) for name, key in zip(self.names, self.keys, strict=True)}


@dataclass(frozen=True, slots=True)
class Operation:
    """One of transformers' operations, as it is applied in a group.

    inputs: the shapes of its tensors by key, in order. outputs: its keys, in order. config: the
    model's.
    """

    own: Any
    inputs: Mapping[str, Sequence[torch.Size]]
    outputs: tuple[str, ...]
    config: Any

    def undo(self, views: Views) -> Views:
        """Where its inputs are, from where its outputs are."""
        return _UNDO[type(self.own).__name__](self, views)


def group_tensors(model: Any, tensors: Mapping[str, Any]) -> list[TensorGroup]:
    """Group the tensors of a checkpoint by the parameters that they become.

    Those that the model ignores are in no group. tensors: by name, anything with a `shape`.

    Raises RecipeError for a conversion that cannot be followed.
    """
    core = importlib.import_module("transformers.core_model_loading")
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [each for each in conversions if isinstance(each, core.WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, core.WeightConverter)]
    by_key = {key: each for each in converters for key in each.source_patterns}
    state = model.state_dict(keep_vars=True)
    prefix = model.base_model_prefix
    members: dict[str, dict[str, str | None]] = {}
    for name in sorted(tensors, key=core.dot_natural_key):  # the loader's order
        target, key = core.rename_source_key(name, renamings, converters, prefix, state)
        if target not in state:
            # As the loader does: a name may be right as it is, but for the base model's prefix.
            target, key = core.rename_source_key(name, [], [], prefix, state)
        if target in state:
            members.setdefault(target, {})[name] = key
    groups = []
    for target, keys in members.items():
        name, key = next(iter(keys.items()))
        if key is None:  # of several for one parameter it takes the first
            groups.append(TensorGroup((name,), (target,)))
        elif is_quantized(state[target]):
            raise RecipeError(
                f"transformers converts {name} before bitsandbytes quantizes it as {target}, which"
                " neither a search nor `quantize` follows; do without quantizing"
            )
        else:
            shapes = {name: torch.Size(tensors[name].shape) for name, key in keys.items() if key}
            groups.append(_read_conversion(model, by_key[key], target, keys, shapes))
    return groups


def _read_conversion(
    model: Any,
    converter: Any,
    target: str,
    keys: Mapping[str, str | None],
    shapes: Mapping[str, torch.Size],
) -> TensorGroup:
    """The group of a conversion, which is run on tensors without memory."""
    tensors: dict[str, Any] = {}
    for key in converter.source_patterns:
        if named := [name for name in shapes if keys[name] == key]:
            tensors[key] = [torch.empty(shapes[name], device="meta") for name in named]
    operations = []
    for own in converter.operations:
        if type(own).__name__ not in _UNDO:
            raise RecipeError(
                f"transformers converts {min(shapes)} by {type(own).__name__} as it loads it into"
                f" {type(model).__name__}, which neither a search nor `quantize` follows;"
                " merge at a given alpha, unquantized"
            )
        inputs = {key: [each.shape for each in _listed(value)] for key, value in tensors.items()}
        tensors = own.convert(
            tensors,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=target,
            model=model,
            config=model.config,
            missing_keys=None,
        )
        operations.append(Operation(own, inputs, tuple(tensors), model.config))
    first = next(key for key in tensors if key in target)
    before, _, after = target.partition(first)
    return TensorGroup(
        tuple(shapes),
        tuple(f"{before}{key}{after}" for key in tensors),
        tuple(operations),
        tuple(str(keys[name]) for name in shapes),
    )


def _listed(value: Any) -> list[torch.Tensor]:
    return value if isinstance(value, list) else [value]


# Operations backwards


def _undo_stack(operation: Operation, views: Views) -> Views:
    pairs = zip(operation.inputs, operation.outputs, strict=True)
    return {
        key: [Pieces((view,)) for view in views[out][0].only.unbind(operation.own.dim)]
        for key, out in pairs
    }


def _undo_concatenate(operation: Operation, views: Views) -> Views:
    dim = operation.own.dim
    sizes = [shape[dim] for shapes in operation.inputs.values() for shape in shapes]
    parts = iter(torch.split(views[operation.outputs[0]][0].only, sizes, dim))
    return {
        key: [Pieces((next(parts),)) for _ in shapes] for key, shapes in operation.inputs.items()
    }


def _undo_split(operation: Operation, views: Views) -> Views:
    """Of `Chunk` and `Split`, which differ in how they find the sizes."""
    pieces = tuple(views[out][0].only for out in operation.outputs)
    return {key: [Pieces(pieces, operation.own.dim)] for key in operation.inputs}


def _undo_transpose(operation: Operation, views: Views) -> Views:
    ((key, (shape,)),) = operation.inputs.items()
    view, own = views[operation.outputs[0]][0].only, operation.own
    if not (own.check_dims and view.shape == shape):
        view = view.transpose(own.dim0, own.dim1)
    return {key: [Pieces((view,))]}


def _undo_interleave(operation: Operation, views: Views) -> Views:
    """Its input has the rows of two halves by turns, or (inverse) the even rows before the odd."""
    (key,), dim = operation.inputs, operation.own.dim
    pieces = views[operation.outputs[0]][0]
    if len(pieces.views) == 2 and pieces.axis == dim and not operation.own.inverse:
        return {key: [Pieces(tuple(half.unsqueeze(dim + 1) for half in pieces.views), dim + 1)]}
    halves = (-1, 2) if operation.own.inverse else (2, -1)
    view = torch.unflatten(pieces.only, dim, halves).transpose(dim, dim + 1)
    return {key: [Pieces((view,))]}


def _undo_permute(operation: Operation, views: Views) -> Views:
    """Its input has, in each head, the two halves of the output's rows by turns."""
    own, config = operation.own, operation.config
    heads = getattr(getattr(config, own.subconfig_key or "", config), "num_attention_heads", 1)
    before: Views = {}
    for key, out in zip(operation.inputs, operation.outputs, strict=True):
        before[key] = views[out]
        if own.permute_layer_names is None or any(name in key for name in own.permute_layer_names):
            sizes = (heads, -1, 2) if own.inverse else (heads, 2, -1)
            view = torch.unflatten(views[out][0].only, 0, sizes).transpose(1, 2)
            before[key] = [Pieces((view,))]
    return before


def _undo_text_and_vision_experts(operation: Operation, views: Views) -> Views:
    """ERNIE's: a list of experts is cut into the text's and the vision's, and each is stacked."""
    stacks = [views[out][0].only for out in operation.outputs]
    dim = operation.own.concat_dim - 1  # in an expert, after the stack's dimension
    before: Views = {}
    start = 0
    for key, shapes in operation.inputs.items():
        count = -(-len(shapes) // len(stacks))
        width = shapes[0][dim]
        experts = [stacks[place // count][place % count] for place in range(len(shapes))]
        before[key] = [Pieces((expert.narrow(dim, start, width),)) for expert in experts]
        start += width
    return before


_UNDO: dict[str, Callable[[Operation, Views], Views]] = {
    "Chunk": _undo_split,
    "Concatenate": _undo_concatenate,
    "ErnieFuseAndSplitTextVisionExperts": _undo_text_and_vision_experts,
    "Interleave": _undo_interleave,
    "MergeModulelist": _undo_stack,
    "PermuteForRope": _undo_permute,
    "Split": _undo_split,
    "Transpose": _undo_transpose,
}


# Ranges of elements


def _select(
    views: Sequence[torch.Tensor], axis: int, start: int, stop: int
) -> Iterator[torch.Tensor]:
    """Views of elements `start` to `stop` of what the views hold, joined along `axis`."""
    if axis:
        row = sum(view[0].numel() for view in views)
        for index in range(start // row, -(-stop // row)):
            first, last = max(start - index * row, 0), min(stop - index * row, row)
            yield from _select([view[index] for view in views], axis - 1, first, last)
        return
    for view in views:
        first, last = max(start, 0), min(stop, view.numel())
        if first < last:
            yield from _select_from(view, first, last)
        start, stop = start - view.numel(), stop - view.numel()


def _select_from(view: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    if view.dim() == 0 or view.is_contiguous():
        yield view.reshape(-1)[start:stop]
        return
    row = view[0].numel()
    if rest := start % row:
        end = min(stop, start - rest + row)
        yield from _select_from(view[start // row], rest, rest + end - start)
        start = end
    if whole := (stop - start) // row:
        yield view[start // row : start // row + whole]
        start += whole * row
    if start < stop:
        yield from _select_from(view[start // row], 0, stop - start)
