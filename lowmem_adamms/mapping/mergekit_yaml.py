"""mergekit's YAML for a linear merge of two models, as `merge --config` takes it.

The meaning is mergekit's (github.com/arcee-ai/mergekit: README "Parameter Specification",
docs/merge_methods.md "Linear", config.py and plan.py for what these leave open):
- A list is interpolated over a slice's layers; embedding, final norm and head take its first value.
- Of a list of filters the first whose text occurs in the tensor's name counts, in the spelling of
  the model that the weight is for.
- Weights are divided by their sum unless normalize is false.
Rarer keys are refused by name.
"""

from __future__ import annotations

import importlib
import os.path
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from ..architectures.layout import BUFFER
from ..errors import ConfigError, RecipeError
from ..values import parse_dtype
from .alphas import COMPUTED_DECIMALS, Alpha, blended_roles, from_roles, interpolate, relative_depth
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


Numbers = Annotated[list[pydantic.FiniteFloat], pydantic.Field(min_length=1)]
ModelRef = Annotated[str, pydantic.AfterValidator(os.path.expanduser)]
DTypeName = Annotated[str, pydantic.AfterValidator(parse_dtype)]
TWO = pydantic.Field(min_length=2, max_length=2)


class _Mapping(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class Case(_Mapping):
    """Weights over depth for the tensors whose names contain `filter`."""

    filter: str = "*"
    value: Annotated[Numbers, pydantic.BeforeValidator(_to_list)]

    def fits(self, name: str) -> bool:
        """Whether the case is for a tensor of this name."""
        return self.filter == "*" or self.filter in name


class ModelParameters(_Mapping):
    """Parameters of one model."""

    weight: Annotated[list[Case], pydantic.BeforeValidator(_to_cases)]


class Model(_Mapping):
    """One of the two models."""

    model: ModelRef
    parameters: ModelParameters


class Source(Model):
    """Layers of a model, from the first number to before the second."""

    layer_range: tuple[int, int]


class Slice(_Mapping):
    """The same layers of both models."""

    sources: Annotated[list[Source], TWO]


class Parameters(_Mapping):
    """Parameters of the whole file."""

    normalize: bool = True


class Document(_Mapping):
    """The whole file."""

    merge_method: str
    models: Annotated[list[Model], TWO] = []
    slices: list[Slice] = []
    base_model: ModelRef | None = None
    parameters: Parameters = Parameters()
    dtype: DTypeName | None = None
    out_dtype: DTypeName | None = None
    tokenizer_source: ModelRef | None = None


# Reading it


def read_recipe(path: Path) -> Recipe:
    """Read a YAML file; ConfigError names every key in it that is not taken, a line each."""
    yaml: Any = importlib.import_module("yaml")  # it brings no types
    try:
        loaded = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise RecipeError(f"{path}: cannot be read as YAML: {why}") from None
    method = loaded.get("merge_method") if isinstance(loaded, dict) else None
    if method != "linear":
        raise RecipeError(
            f"{path}: merge_method is {_shorten(method)}; only linear is taken: another method"
            " needs mergekit"
        )
    try:
        return _make_recipe(path, Document.model_validate(loaded))
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


def _make_recipe(path: Path, document: Document) -> Recipe:
    """Bring models and slices into one form; RecipeError for what cannot be done."""
    if bool(document.models) == bool(document.slices):
        raise RecipeError("expected the two models under models, or else under slices")
    sections = [Section(0, None, _weights(document.models))] if document.models else []
    for part in document.slices:
        start = sections[-1].stop if sections else 0
        (first, stop), other = (source.layer_range for source in part.sources)
        if other != (first, stop) or first != start or first >= stop:
            raise RecipeError(
                f"slices: found layer_range {[first, stop]} and {list(other)}, expected"
                f" [{start}, N] for both: layers are not moved"
            )
        sections.append(Section(first, stop, _weights(part.sources)))
    names = list(sections[0].weights)
    base = document.base_model or names[0]
    for section in sections:
        if len(section.weights) != 2 or section.weights.keys() != {base, *names}:
            raise RecipeError(
                f"found models {', '.join(section.weights)}; expected two, one of them the base,"
                f" {base}"
            )
    if document.tokenizer_source not in (None, "base", base):
        raise RecipeError(
            f"tokenizer_source: found {document.tokenizer_source}; the output has the base's: say"
            " base"
        )
    (donor,) = (name for name in names if name != base)
    dtype = document.out_dtype or document.dtype
    return Recipe(path, base, donor, dtype, sections, document.parameters.normalize)


def _weights(models: Sequence[Model]) -> dict[str, list[Case]]:
    return {model.model: model.parameters.weight for model in models}


# What it means


@dataclass(frozen=True, slots=True)
class Section:
    """Layers `first` to `stop` - 1 (None: to the last), and each model's weights for them."""

    first: int
    stop: int | None
    weights: Mapping[str, Sequence[Case]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a file says: which two models, the output's dtype ("BF16"), and the weights."""

    path: Path
    base: str
    donor: str
    dtype: str | None
    sections: Sequence[Section]
    normalize: bool

    def alphas(self, plan: Plan) -> tuple[Alpha, tuple[str, ...]]:
        """The donor's weight for all that `plan` blends, and notes for the user.

        RecipeError where slices do not fit the layers, or weights are missing or no average.
        """
        layers = plan.base_layout.layers
        stop = self.sections[-1].stop
        if stop not in (None, layers):
            raise RecipeError(f"{self.path}: slices end at layer {stop}, the models have {layers}")
        names = blended_roles(plan)
        if "head" in names and names["head"][1] == names.get("embed", ("", ""))[1]:
            # mergekit calls a tied head what it would be called if it were there
            names["head"] = (names["head"][0], names["head"][0])
        by_role = {role: self._alpha(role, *names[role], layers) for role in names}
        return from_roles(by_role), tuple(self._notes(plan, names.values()))

    def _alpha(self, role: str, base_name: str, donor_name: str, layers: int) -> float:
        """The donor's share in one role, which both sides call differently."""
        section, depth = self._locate(role, layers)
        base = self._weight(section, self.base, base_name, depth)
        donor = self._weight(section, self.donor, donor_name, depth)
        total = base + donor
        adds_up = total > 0 if self.normalize else abs(total - 1) <= SUM_TOLERANCE
        if min(base, donor) < 0 or not adds_up:
            raise RecipeError(
                f"{self.path}: the weights for {base_name}, {base:g} and {donor:g}, make no"
                " average; expected 0 or more, not both 0, and 1 in all with normalize: false"
            )
        return round(donor / total if self.normalize else donor, COMPUTED_DECIMALS)

    def _locate(self, role: str, layers: int) -> tuple[Section, float]:
        """The section a role belongs to, and its relative depth in it."""
        kind, _, rest = role.partition(".")
        if kind != "layers":
            return self.sections[0 if kind == "embed" else -1], 0.0
        layer = int(rest.partition(".")[0])
        section = next(one for one in reversed(self.sections) if one.first <= layer)
        stop = layers if section.stop is None else section.stop
        return section, relative_depth(layer - section.first, stop - section.first)

    def _weight(self, section: Section, model: str, name: str, depth: float) -> float:
        for case in section.weights[model]:
            if case.fits(name):
                return interpolate(case.value, depth)
        raise RecipeError(
            f"{self.path}: no weight of {model} for {name}; add a last value without a filter"
        )

    def _notes(self, plan: Plan, names: Collection[tuple[str, str]]) -> Iterator[str]:
        for section in self.sections:
            for side, model in enumerate((self.base, self.donor)):
                for case in section.weights[model]:
                    if not any(case.fits(pair[side]) for pair in names):
                        yield f"filter {case.filter!r} matches no blended tensor of {model}"
        kept = sorted(set(plan.base_layout.kinds.values()) - {BUFFER})
        if kept:
            yield (
                f"only language weights are blended: {', '.join(kept)} stay the base's, also where"
                " mergekit would blend them"
            )
