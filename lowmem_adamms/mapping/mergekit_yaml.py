"""mergekit's YAML for the methods that we have, as `merge --config` takes it.

The meaning is mergekit's (github.com/arcee-ai/mergekit: README "Parameter Specification",
docs/merge_methods.md, config.py and plan.py for what these leave open):
- A list is interpolated over the layers; embedding, final norm and head take its first value.
- Of a list of filters the first whose text occurs in the tensor's name counts, in the spelling of
  the model that the weight is for.
- Weights are divided by their sum unless normalize is false.
- Not mergekit's: how values are rounded, which the option `rounding` says; it rounds to nearest.
- base_model is what slerp starts from; of methods that mix differences it is the ancestor, and the
  first other model is the base that the output is built on.
Rarer keys are refused by name.
"""

from __future__ import annotations

import importlib
import os.path
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from ..architectures.arch import BUFFER
from ..errors import ConfigError, RecipeError
from ..methods import METHODS, Method
from ..values import parse_alpha, parse_dtype
from .alphas import (
    COMPUTED_DECIMALS,
    Alpha,
    OneAlpha,
    blended_roles,
    from_roles,
    interpolate,
    relative_depth,
)
from .plan import Plan

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SUM_TOLERANCE = 1e-6  # weights given with six decimals need not add up any better


# What the document may say


def _to_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _to_cases(value: Any) -> Any:
    """Read a number or a list of numbers as the one case of every tensor."""
    cases = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    return value if cases else [{"value": value}]


def _only(value: float) -> pydantic.AfterValidator:
    """A number that mergekit lets one choose and we do not."""

    def check(found: float) -> float:
        if found != value:
            raise ValueError(f"expected {value}, which it always is here")
        return found

    return pydantic.AfterValidator(check)


Numbers = Annotated[list[pydantic.FiniteFloat], pydantic.Field(min_length=1)]
ModelRef = Annotated[str, pydantic.AfterValidator(os.path.expanduser)]
DTypeName = Annotated[str, pydantic.AfterValidator(parse_dtype)]
SOME = pydantic.Field(min_length=2)


class _Mapping(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class Case(_Mapping):
    """Weights over depth for the tensors whose names contain `filter`."""

    filter: str = "*"
    value: Annotated[Numbers, pydantic.BeforeValidator(_to_list)]

    def fits(self, name: str) -> bool:
        """Whether the case is for a tensor of this name."""
        return self.filter == "*" or self.filter in name


Cases = Annotated[list[Case], pydantic.BeforeValidator(_to_cases)]


class ModelParameters(_Mapping):
    """Parameters of one model of a linear merge."""

    weight: Cases


class Model(_Mapping):
    """One of the models of a linear merge."""

    model: ModelRef
    parameters: ModelParameters


class Parameters(_Mapping):
    """Parameters of a linear merge."""

    normalize: bool = True


class _Document(_Mapping):
    """What every file may say."""

    merge_method: str
    dtype: DTypeName | None = None
    out_dtype: DTypeName | None = None
    tokenizer_source: ModelRef | None = None


class Document(_Document):
    """A linear merge."""

    models: Annotated[list[Model], SOME]
    base_model: ModelRef | None = None
    parameters: Parameters = Parameters()


class BareModel(_Mapping):
    """A model that has no parameters."""

    model: ModelRef


class SlerpParameters(_Mapping):
    """How far a slerp goes from the base."""

    t: Cases


class SlerpDocument(_Document):
    """A slerp."""

    models: Annotated[list[BareModel], SOME]
    base_model: ModelRef
    parameters: SlerpParameters


class TaskModelParameters(_Mapping):
    """Parameters of a model whose difference from the ancestor is mixed."""

    weight: Cases = [Case(value=[1.0])]
    density: float = pydantic.Field(default=1.0, gt=0, le=1)
    gamma: Annotated[float, _only(0.01)] = 0.01


class TaskModel(_Mapping):
    """One of these models, or the ancestor."""

    model: ModelRef
    parameters: TaskModelParameters | None = None


class TaskParameters(_Mapping):
    """Parameters of a mixture of differences."""

    factor: float = pydantic.Field(default=1.0, alias="lambda")
    normalize: bool | None = None
    rescale: bool | None = None
    int8_mask: bool = False
    epsilon: Annotated[float, _only(1e-5)] = 1e-5


class TaskDocument(_Document):
    """A mixture of differences from an ancestor."""

    models: Annotated[list[TaskModel], SOME]
    base_model: ModelRef
    parameters: TaskParameters = TaskParameters()


# Reading it


def read_recipe(path: Path) -> Recipe:
    """Read a YAML file; ConfigError names every key in it that is not taken, a line each."""
    yaml: Any = importlib.import_module("yaml")  # it brings no types
    try:
        loaded = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise RecipeError(f"{path}: cannot be read as YAML: {why}") from None
    name = loaded.get("merge_method") if isinstance(loaded, dict) else None
    known = {each.replace("-", "_"): each for each in METHODS if each != "metagpt"}
    if name not in known:
        raise RecipeError(
            f"{path}: merge_method is {_shorten(name)}; taken are {', '.join(known)}: another"
            " method needs mergekit"
        )
    try:
        if name == "linear":
            return _read_linear(path, Document.model_validate(loaded))
        if name == "slerp":
            return _read_slerp(path, SlerpDocument.model_validate(loaded))
        return _read_tasks(path, METHODS[known[name]], TaskDocument.model_validate(loaded))
    except pydantic.ValidationError as error:
        raise ConfigError([f"{path}: {_describe(details)}" for details in error.errors()]) from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def _describe(error: ErrorDetails) -> str:
    key = ".".join(map(str, error["loc"]))
    return f"{key}: {error['msg']}; found {_shorten(error['input'])}"


def _shorten(value: Any) -> str:
    """Show a value in bounded length, whatever aliases in the file make of it."""
    return reprlib.repr(value)[:80]


def _read_linear(path: Path, document: Document) -> Recipe:
    cases = {model.model: model.parameters.weight for model in document.models}
    names = list(cases)
    base = document.base_model or names[0]
    if len(names) < 2 or base not in names:
        raise RecipeError(
            f"found models {', '.join(names)}; expected two or more, one of them the base, {base}"
        )
    donors = tuple(name for name in names if name != base)
    normalize = document.parameters.normalize
    return _make_recipe(path, document, "linear", base, donors, cases, normalize=normalize)


def _read_slerp(path: Path, document: SlerpDocument) -> Recipe:
    names = [model.model for model in document.models]
    others = [name for name in names if name != document.base_model]
    if len(names) != 2 or len(others) != 1:
        raise RecipeError(
            f"found models {', '.join(names)}; expected two, one of them the base,"
            f" {document.base_model}"
        )
    cases = {others[0]: document.parameters.t}
    return _make_recipe(path, document, "slerp", document.base_model, tuple(others), cases)


def _read_tasks(path: Path, method: Method, document: TaskDocument) -> Recipe:
    """The first model that is not the ancestor is the base."""
    ancestor, parameters = document.base_model, document.parameters
    models = {each.model: each.parameters or TaskModelParameters() for each in document.models}
    models.pop(ancestor, None)
    if len(models) < 2:
        raise RecipeError(
            f"found models {', '.join(models) or 'none'} beside the ancestor, {ancestor}; expected"
            " two or more: the first is the base"
        )
    _check_task_parameters(method, parameters, models)
    base, *donors = models
    scale = parameters.factor if method.alpha_of_each else 1.0
    # Numbers are weights whatever their size; what differs by layer becomes the donor's alpha
    numbers = [_number(each.weight) for each in models.values()]
    if numbers[0] is None or (None in numbers and not method.alpha_of_each):
        raise RecipeError(
            f"weight of {base if numbers[0] is None else 'a model'}: expected one number; only"
            " a donor's weight may differ by layer, and only where differences are added up"
        )
    weights = tuple(scale * (1.0 if number is None else number) for number in numbers)
    varying = {
        name: each.weight
        for name, each, number in zip(models, models.values(), numbers, strict=True)
        if number is None
    }
    return _make_recipe(
        path,
        document,
        method.name,
        base,
        tuple(donors),
        varying,
        ancestor=ancestor,
        weights=weights,
        densities=tuple(each.density for each in models.values()) if method.takes_density else None,
        factor=None if method.alpha_of_each else parse_alpha(parameters.factor),
    )


def _number(cases: Sequence[Case]) -> float | None:
    """The one number that the cases are, if they are."""
    value = cases[0].value
    return value[0] if cases[0].filter == "*" and len(set(value)) == 1 else None


def _check_task_parameters(
    method: Method, parameters: TaskParameters, models: Mapping[str, TaskModelParameters]
) -> None:
    """RecipeError for what mergekit can do and we cannot."""
    default = method.name == "ties"  # of normalize, in mergekit
    normalize = default if parameters.normalize is None else parameters.normalize
    if normalize != method.mean and method.name != "ram":
        does = "averages what has the elected sign" if method.mean else "adds up"
        raise RecipeError(
            f"parameters.normalize: found {str(normalize).lower()}, but {method.name} {does} here;"
            f" say normalize: {str(method.mean).lower()}"
        )
    if parameters.rescale is not None and parameters.rescale != method.by_chance:
        raise RecipeError(
            f"parameters.rescale: {method.name} does it only with {str(method.by_chance).lower()}"
        )
    if not method.takes_density and any(each.density != 1 for each in models.values()):
        raise RecipeError(f"density: {method.name} keeps all values")


def _make_recipe(
    path: Path,
    document: _Document,
    method: str,
    base: str,
    donors: tuple[str, ...],
    cases: Mapping[str, Sequence[Case]],
    **more: Any,
) -> Recipe:
    if document.tokenizer_source not in (None, "base", base):
        raise RecipeError(
            f"tokenizer_source: found {document.tokenizer_source}; the output has the base's: say"
            " base"
        )
    dtype = document.out_dtype or document.dtype
    return Recipe(path, method, base, donors, dtype, cases, **more)


# What it means


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a file says: how which models are merged, the output's dtype ("BF16"), and the weights.

    cases: each model's weights, by tensor name and depth.
    ancestor, weights, densities: as for `make_mixture`, of methods that mix differences.
    factor: of what all models add, of methods that have it.
    """

    path: Path
    method: str
    base: str
    donors: tuple[str, ...]
    dtype: str | None
    cases: Mapping[str, Sequence[Case]]
    normalize: bool = True
    ancestor: str | None = None
    weights: tuple[float, ...] | None = None
    densities: tuple[float, ...] | None = None
    factor: float | None = None

    def alphas(self, plan: Plan) -> tuple[Alpha, tuple[str, ...]]:
        """The donors' weights for all that `plan` blends, and notes for the user.

        RecipeError where weights are missing or no average.
        """
        layers = plan.base_layout.layers
        names = [_name_roles(pair) for pair in plan.donor_plans]
        notes = tuple(self._notes(plan, names))
        if self.factor is not None:
            return self.factor, notes
        alphas = tuple(self._alpha_of_donor(i, names, layers) for i in range(len(names)))
        return alphas if len(alphas) > 1 else alphas[0], notes

    def _alpha_of_donor(
        self, donor: int, names: Sequence[Mapping[str, tuple[str, str]]], layers: int
    ) -> OneAlpha:
        if self.ancestor and self.donors[donor] not in self.cases:
            return 1.0  # its weight is a number, in `weights`
        return from_roles({role: self._alpha(donor, role, names, layers) for role in names[donor]})

    def _alpha(
        self, donor: int, role: str, names: Sequence[Mapping[str, tuple[str, str]]], layers: int
    ) -> float:
        """A donor's share in one role, which every model calls differently."""
        depth = _relative_depth_of(role, layers)
        own = names[donor][role]
        if self.method != "linear":
            name = own[0] if self.method == "slerp" else own[1]
            return round(self._weight(self.donors[donor], name, depth), COMPUTED_DECIMALS)
        weights = [self._weight(self.base, own[0], depth)]
        # A donor that lacks the role is called by the base's name, and its share stays the base's
        for model, calls in zip(self.donors, names, strict=True):
            called = calls[role][1] if role in calls else own[0]
            weights.append(self._weight(model, called, depth))
        total = sum(weights)
        adds_up = total > 0 if self.normalize else abs(total - 1) <= SUM_TOLERANCE
        if min(weights) < 0 or not adds_up:
            *most, last = (f"{weight:g}" for weight in weights)
            raise RecipeError(
                f"{self.path}: the weights for {own[0]}, {', '.join(most)} and {last}, make no"
                " average; expected 0 or more, not all 0, and 1 in all with normalize: false"
            )
        share = weights[donor + 1] / total if self.normalize else weights[donor + 1]
        return round(share, COMPUTED_DECIMALS)

    def _weight(self, model: str, name: str, depth: float) -> float:
        for case in self.cases[model]:
            if case.fits(name):
                return interpolate(case.value, depth)
        raise RecipeError(
            f"{self.path}: no weight of {model} for {name}; add a last value without a filter"
        )

    def _notes(self, plan: Plan, names: Sequence[Mapping[str, tuple[str, str]]]) -> Iterator[str]:
        called = {self.base: {pair[0] for calls in names for pair in calls.values()}}
        for donor, calls in zip(self.donors, names, strict=True):
            side = 0 if self.method == "slerp" else 1
            called[donor] = {pair[side] for pair in calls.values()}
        for model in (self.base, *self.donors):
            for case in self.cases.get(model, ()):
                if not any(case.fits(name) for name in called[model]):
                    yield f"filter {case.filter!r} matches no blended tensor of {model}"
        if METHODS[self.method].by_chance:
            yield "what is kept is divided by the density, where mergekit restores the norm"
        kept = sorted(set(plan.base_layout.kinds.values()) - {BUFFER})
        if kept:
            yield (
                f"only language weights are blended: {', '.join(kept)} stay the base's, also where"
                " mergekit would blend them"
            )


def _relative_depth_of(role: str, layers: int) -> float:
    """What lies outside of the layers has the weight of the first."""
    kind, _, rest = role.partition(".")
    return relative_depth(int(rest.partition(".")[0]), layers) if kind == "layers" else 0.0


def _name_roles(plan: Plan) -> dict[str, tuple[str, str]]:
    """What base and donor call each role that is blended."""
    names = blended_roles(plan)
    if "head" in names and names["head"][1] == names.get("embed", ("", ""))[1]:
        # mergekit calls a tied head what it would be called if it were there
        names["head"] = (names["head"][0], names["head"][0])
    return names
