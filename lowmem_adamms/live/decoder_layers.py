"""Load a base without its decoder layers, and tell where the tensors of each layer belong.

transformers makes the model as it always does; only its reading of the weight files is replaced.
What is outside of the layers is given to it as it lies mapped, so that it takes no memory of its
own on a CPU. A layer can be loaded by itself, by transformers too, to be checked. Uses private
names of transformers, as `transformers_model` does.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..checkpoints.mapped_files import MappedFiles
from ..errors import PlacementError
from ..mapping.plan import Plan, Step
from .conversions import TensorGroup, group_tensors
from .device_source import torch_dtype
from .load_check import view_tensor
from .transformers_model import find_tensor, load_model, quiet

ALIGNMENT = 64
"""Of each tensor in a layer's buffer, in bytes: what the vector units of processors like."""


class CannotStreamError(PlacementError):
    """The decoder's layers cannot be filled one by one as they run."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor of a layer is kept: in the layer's buffer, and in which module.

    empty: what stands in for it while the layer is in no buffer; using it is an error to torch.
    """

    module: Any
    attribute: str
    empty: torch.Tensor
    offset: int

    def put(self, tensor: torch.Tensor) -> None:
        is_parameter = self.attribute in self.module._parameters
        registry = self.module._parameters if is_parameter else self.module._buffers
        if is_parameter and not isinstance(tensor, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=False)
        registry[self.attribute] = tensor


class DecoderLayer:
    """One decoder layer whose tensors come and go.

    module: it runs as one. plan: the steps that fill it. groups: of `group_tensors`, its own.
    """

    def __init__(self, module: Any, plan: Plan, model: Any, groups: Sequence[TensorGroup]) -> None:
        self.module, self.plan, self.groups = module, plan, groups
        self.nbytes = 0
        self._places = [self._place(model, target) for target in self.targets]

    @property
    def targets(self) -> list[str]:
        """The names of its parameters and buffers in the model."""
        return [target for group in self.groups for target in group.targets]

    @property
    def names(self) -> set[str]:
        """The names on disk of the tensors that it is made of."""
        return {name for group in self.groups for name in group.names}

    def _place(self, model: Any, target: str) -> _Place:
        path, _, attribute = target.rpartition(".")
        module = model.get_submodule(path)
        empty = getattr(module, attribute)
        place = _Place(module, attribute, empty, self.nbytes)
        self.nbytes += -(-empty.nbytes // ALIGNMENT) * ALIGNMENT
        return place

    def bind(self, memory: torch.Tensor) -> None:
        """Let the module's tensors be views of a buffer of `nbytes` or more."""
        with torch.inference_mode(False):  # or they could be filled in that mode only
            for place in self._places:
                shape, dtype = place.empty.shape, place.empty.dtype
                content = memory[place.offset : place.offset + place.empty.nbytes]
                place.put(content.view(dtype).view(shape))

    def unbind(self) -> None:
        """Take the tensors away."""
        for place in self._places:
            place.put(place.empty)


class LayeredLoader:
    """Loads a plan's base without its decoder layers.

    After `load`: model; groups, of `group_tensors`, of all of it; layers, without tensors.
    """

    def __init__(self, plan: Plan, files: MappedFiles) -> None:
        self.model: Any = None
        self.groups: list[TensorGroup] = []
        self.layers: list[DecoderLayer] = []
        self._plan, self._files = plan, files
        self._core = importlib.import_module("transformers.core_model_loading")
        self._load_config: Any = None

    def load(self, *, device: str, dtype: str, trust_remote_code: bool) -> None:
        """Load all but the layers. dtype: as for `load_model`, whose errors it raises.

        CannotStreamError if there are no layers that can be filled one by one.
        """
        folder = self._plan.base.folder
        assert folder is not None
        self._device = device
        with self._replace_reading():
            self.model = load_model(
                folder,
                device=device,
                dtype=dtype,
                quantize=None,
                trust_remote_code=trust_remote_code,
            )

    def load_layer(self, layer: DecoderLayer) -> None:
        """Have transformers load one layer as it would load the whole model."""
        conversions = self.model._weight_conversions
        with quiet():
            self._convert(self.model, layer.names)
        self.model._weight_conversions = conversions

    def find_owners(self) -> list[Any]:
        """The modules that the layers are inside of, from the model down."""
        inside = {id(layer.module) for layer in self.layers}
        modules = self.model.modules()
        return [
            each for each in modules if inside & {id(part) for part in each.modules()} - {id(each)}
        ]

    @contextmanager
    def _replace_reading(self) -> Iterator[None]:
        """Inside the block, have from_pretrained take its tensors from here."""
        owner = importlib.import_module("transformers.modeling_utils").PreTrainedModel
        reading = vars(owner)["_load_pretrained_model"]
        owner._load_pretrained_model = staticmethod(self._read)
        try:
            yield
        finally:
            owner._load_pretrained_model = reading

    def _read(self, model: Any, _state: Any, _files: Any, load_config: Any, *_: Any) -> Any:
        """What from_pretrained calls to read a model's weights; the layers stay on meta."""
        self._load_config = load_config
        model._weight_conversions = load_config.weight_mapping
        self.groups = group_tensors(model, self._plan.base.tensors)
        self.layers = find_layers(model, self._plan, self.groups, self._device)
        absent = {name for layer in self.layers for name in layer.names}
        info, index = self._convert(model, self._plan.base.tensors.keys() - absent)
        model._weight_conversions = load_config.weight_mapping
        for target in (target for layer in self.layers for target in layer.targets):
            info.missing_keys.discard(target)
            find_tensor(model, target)._is_hf_initialized = True  # type: ignore[attr-defined]
        return info, index

    def _convert(self, model: Any, names: Iterable[str]) -> Any:
        tensors = {name: view_tensor(self._plan.base.tensors[name], self._files) for name in names}
        return self._core.convert_and_load_state_dict_in_model(model, tensors, self._load_config)


def find_layers(
    model: Any, plan: Plan, groups: Sequence[TensorGroup], device: str
) -> list[DecoderLayer]:
    """The decoder's layers, in their order: the list items that hold blended tensors.

    Raises CannotStreamError if there are none, or they do not run as modules, or share tensors.
    """
    steps = {step.name: step for step in plan.steps}
    by_layer: dict[str, list[TensorGroup]] = {}
    for group in groups:
        path = _path_of_list_item(model, group.targets[0])
        is_written = steps.keys() >= set(group.names)
        if path and is_written and not _lies_ready(model, group, steps, device):
            by_layer.setdefault(path, []).append(group)
    layers = []
    for path, own in by_layer.items():
        names = {name for group in own for name in group.names}
        if all(steps[name].action == "copy" for name in names):
            continue  # another list, such as the layers of the vision tower
        layer_plan = replace(plan, steps=tuple(step for step in plan.steps if step.name in names))
        layers.append(DecoderLayer(model.get_submodule(path), layer_plan, model, own))
    _check_layers(model, layers)
    return layers


def _lies_ready(model: Any, group: TensorGroup, steps: Mapping[str, Step], device: str) -> bool:
    """Whether a tensor can be used as it lies in its file, whatever alpha is."""
    if device != "cpu" or group.operations:
        return False
    step = steps[group.names[0]]
    same_dtype = find_tensor(model, group.targets[0]).dtype == torch_dtype(step.dtype)
    return step.action == "copy" and same_dtype


def _path_of_list_item(model: Any, target: str) -> str | None:
    """The path of the outermost list item that a tensor is in; None if it is in none."""
    names = target.split(".")[:-1]
    module = model
    for depth, name in enumerate(names, 1):
        in_list = isinstance(module, torch.nn.ModuleList)
        module = getattr(module, name)
        if in_list:
            return ".".join(names[:depth])
    return None


def _check_layers(model: Any, layers: list[DecoderLayer]) -> None:
    name = type(model).__name__
    if not layers:
        raise CannotStreamError(f"{name} has no list of layers with blended weights")
    if any(type(layer.module).forward is torch.nn.Module.forward for layer in layers):
        raise CannotStreamError(f"the layers of {name} do not run as modules")
    users = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
    for layer in layers:
        for target in layer.targets:
            if users[id(find_tensor(model, target))] > 1:
                raise CannotStreamError(f"{name} uses {target} in more than one layer")
