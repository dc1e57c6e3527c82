"""mergekit's YAML for a linear merge of two models, as `merge --config` takes it.

The meaning is mergekit's (github.com/arcee-ai/mergekit: README "Parameter Specification",
docs/merge_methods.md "Linear", config.py and plan.py for what these leave open):
- A list is interpolated over a slice's layers; embedding, final norm and head take its first value.
- Of a list of filters the first whose text occurs in the tensor's name counts, in the spelling of
  the model that the weight is for.
- A model's own parameters go before the slice's, these before the file's.
- Weights are divided by their sum unless normalize is false.
"""

from __future__ import annotations

import importlib
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import pydantic
from pydantic import Field, Tag

from ..architectures.layout import BUFFER
from ..errors import ConfigError, RecipeError, first_line
from ..values import parse_dtype
from .alphas import COMPUTED_DECIMALS, Alpha, blended_roles, from_roles, interpolate, relative_depth
from .plan import Plan

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

METHOD = "linear"
SUM_TOLERANCE = 1e-6  # weights given with six decimals need not add up any better


def read_recipe(path: Path) -> Recipe:
    """Read a YAML file; ConfigError names everything in it that is not taken, a line each."""
    loaded = _load_yaml(path)
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: found {_short(loaded)}, expected mergekit's YAML")
    method = loaded.get("merge_method")
    if method != METHOD:
        raise RecipeError(
            f"{path}: merge_method is {_short(method)}; only {METHOD} is taken: another method"
            " needs mergekit"
        )
    try:
        document = Document.model_validate(loaded)
    except pydantic.ValidationError as error:
        problems = [_describe(details) for details in error.errors()]
    else:
        recipe = _make_recipe(path, document)
        problems = list(_find_problems(recipe, document))
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return recipe


def _load_yaml(path: Path) -> Any:
    yaml: Any = importlib.import_module("yaml")  # it brings no types
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; --config takes mergekit's YAML")
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or first_line(error)
        raise RecipeError(f"{path}{line}: not YAML ({why})") from None
    except (ValueError, RecursionError) as error:  # what YAML allows and Python does not
        raise RecipeError(f"{path}: YAML that cannot be read ({first_line(error)})") from None


# What the document may say


def _check_model(ref: str) -> str:
    if ref.startswith("~"):
        ref = str(Path(ref).expanduser())
    if not ref.strip():
        raise ValueError("expected a folder or a Hub id")
    if "+" in ref and not Path(ref).exists():
        raise ValueError("a LoRA is not taken; merge it into its model before")
    return ref


def _check_dtype(dtype: str) -> str:
    try:
        return parse_dtype(dtype)
    except RecipeError as error:
        raise ValueError(str(error)) from None


def _form_of(value: Any) -> str:
    """Tell the forms of a setting apart; pydantic puts this into the location of an error."""
    if not isinstance(value, list):
        return "<number>"
    return "<cases>" if any(isinstance(item, dict) for item in value) else "<list>"


ModelRef = Annotated[pydantic.StrictStr, pydantic.AfterValidator(_check_model)]
DTypeName = Annotated[str, pydantic.AfterValidator(_check_dtype)]
Number = Annotated[pydantic.FiniteFloat, Tag("<number>")]
OverDepth = Annotated[list[pydantic.FiniteFloat], Tag("<list>"), Field(min_length=1)]


class _Mapping(pydantic.BaseModel):
    """Keys and values; a key whose value is null is as good as left out."""

    model_config = pydantic.ConfigDict(extra="forbid")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}


class Case(_Mapping):
    """A value for the tensors whose names contain `filter`."""

    filter: pydantic.StrictStr = "*"
    value: Annotated[Number | OverDepth, pydantic.Discriminator(_form_of)]


Cases = Annotated[list[Case], Tag("<cases>")]
Setting = Annotated[Number | OverDepth | Cases, pydantic.Discriminator(_form_of)]


class ModelParameters(_Mapping):
    """Parameters of one model."""

    weight: Setting | None = None


class Parameters(ModelParameters):
    """Parameters of a slice or the whole file."""

    normalize: pydantic.FiniteFloat | None = None


class Model(_Mapping):
    """One of the two models."""

    model: ModelRef
    parameters: ModelParameters = ModelParameters()


class Source(Model):
    """Layers of a model, from the first number to before the second."""

    layer_range: tuple[pydantic.StrictInt, pydantic.StrictInt]


class Slice(_Mapping):
    """The same layers of both models."""

    sources: Annotated[list[Source], Field(min_length=2, max_length=2)]
    parameters: Parameters = Parameters()


class Tokenizer(_Mapping):
    """Whose tokens the output has."""

    source: ModelRef = "union"


class Document(_Mapping):
    """The whole file."""

    merge_method: str
    models: Annotated[list[Model], Field(min_length=1)] = []
    slices: Annotated[list[Slice], Field(min_length=1)] = []
    base_model: ModelRef | None = None
    parameters: Parameters = Parameters()
    dtype: DTypeName | None = None
    out_dtype: DTypeName | None = None
    tokenizer_source: ModelRef | None = None
    tokenizer: Tokenizer | None = None


_INSTEAD = {
    "modules": "give the models under models: only the decoder is blended",
    "chat_template": "the base's is kept: leave it out",
    "residual_weight": "leave it out",
}


def _describe(error: ErrorDetails) -> str:
    """Say in one line which key is wrong, what is found there and what is expected."""
    location = [key for key in error["loc"] if not str(key).startswith("<")]
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)
    where = where.removeprefix(".")
    if error["type"] == "extra_forbidden":
        taken = ", ".join(_keys_beside(location))
        return f"{where}: not taken; {_INSTEAD.get(str(location[-1]), f'expected {taken}')}"
    if error["type"] == "missing":
        return f"{where}: missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: found {_short(error['input'])}; {message[0].lower()}{message[1:]}"


def _keys_beside(location: Sequence[int | str]) -> list[str]:
    """The keys that are taken where an unknown one stands."""
    model: type[pydantic.BaseModel] = Document
    for key in location[:-1]:
        if isinstance(key, str):
            model = _model_in(model.model_fields[key].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _short(value: Any) -> str:
    """Show a value in bounded length, whatever aliases in the file make of it."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxdict = 2, 4, 4
    return short.repr(value)


# What it means


@dataclass(frozen=True, slots=True)
class Section:
    """Layers `first` to `stop` - 1 (None: to the last), and the parameters for them."""

    first: int
    stop: int | None
    weights: Mapping[str, Setting | None]
    shared: Parameters


def _make_recipe(path: Path, document: Document) -> Recipe:
    """Bring models and slices into one form: sections of layers."""
    models = document.models
    if document.base_model and len(models) == 1:  # mergekit adds it
        models = [*models, Model(model=document.base_model)]
    sections = [
        Section(
            *part.sources[0].layer_range,
            {source.model: source.parameters.weight for source in part.sources},
            part.parameters,
        )
        for part in document.slices
    ]
    if models:
        weights = {model.model: model.parameters.weight for model in models}
        sections.append(Section(0, None, weights, Parameters()))
    names = dict.fromkeys(name for section in sections for name in section.weights)
    base = document.base_model or next(iter(names), "")
    donor = next((name for name in names if name != base), "")
    dtype = document.out_dtype or document.dtype
    return Recipe(path, base, donor, dtype, tuple(sections), document.parameters)


def _find_problems(recipe: Recipe, document: Document) -> Iterator[str]:
    """Name what is well-formed but cannot be done."""
    if bool(document.models) == bool(document.slices):
        yield "models: expected the two models under models, or else under slices"
        return
    for section in recipe.sections:
        if section.weights.keys() != {recipe.base, recipe.donor}:
            yield (
                f"models: found {', '.join(section.weights)}; expected two, one of them the base,"
                f" {recipe.base}"
            )
    start = 0
    for i, part in enumerate(document.slices):
        ranges = [list(source.layer_range) for source in part.sources]
        if ranges[0] != ranges[1] or not start == ranges[0][0] < ranges[0][1]:
            yield (
                f"slices[{i}].sources: found layer_range {ranges[0]} and {ranges[1]}, expected"
                f" [{start}, N] for both: layers are not moved"
            )
            return
        start = ranges[0][1]
    tokenizer = document.tokenizer.source if document.tokenizer else document.tokenizer_source
    if tokenizer not in (None, "base", recipe.base):
        yield f"tokenizer_source: found {tokenizer}; the output has the base's: say base"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a file says: which two models, the output's dtype ("BF16"), and the weights."""

    path: Path
    base: str
    donor: str
    dtype: str | None
    sections: tuple[Section, ...]
    parameters: Parameters

    def alphas(self, plan: Plan) -> tuple[Alpha, tuple[str, ...]]:
        """The donor's weight for all that `plan` blends, and notes for the user.

        RecipeError where slices do not fit the layers, or weights are missing or not an average.
        """
        layers = plan.base_layout.layers
        stop = self.sections[-1].stop
        if stop not in (None, layers):
            raise RecipeError(
                f"{self.path}: its slices end at layer {stop}, the models have {layers};"
                " expected them to cover all, each layer at its own place"
            )
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
        total, alpha = base + donor, donor
        told = f"{self.path}: the weights for {base_name}, {base:g} and {donor:g},"
        normalize = section.shared.normalize
        if normalize is None:
            normalize = self.parameters.normalize
        if normalize is None or normalize:
            if not total:
                raise RecipeError(f"{told} add up to 0")
            alpha = donor / total
        elif abs(total - 1) > SUM_TOLERANCE:
            raise RecipeError(
                f"{told} add up to {total:g} with normalize: false; expected 1: only averages can"
                " be written"
            )
        if not 0 <= alpha <= 1:
            raise RecipeError(f"{told} make the donor's share {alpha:g}; expected 0 to 1")
        return round(alpha, COMPUTED_DECIMALS)

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
        for setting in (section.weights[model], section.shared.weight, self.parameters.weight):
            weight = _evaluate(setting, name, depth)
            if weight is not None:
                return weight
        raise RecipeError(
            f"{self.path}: no weight of {model} for {name}; give the model one under its"
            " parameters, or a last value without a filter"
        )

    def _notes(self, plan: Plan, names: Collection[tuple[str, str]]) -> Iterator[str]:
        base_names, donor_names = [base for base, _ in names], [donor for _, donor in names]
        everything = [*base_names, *donor_names]
        for section in self.sections:
            yield from _unused_filters(section.weights[self.base], base_names, self.base)
            yield from _unused_filters(section.weights[self.donor], donor_names, self.donor)
            yield from _unused_filters(section.shared.weight, everything, "either model")
        yield from _unused_filters(self.parameters.weight, everything, "either model")
        kept = sorted(set(plan.base_layout.kinds.values()) - {BUFFER})
        if kept:
            yield (
                f"only language weights are blended: {', '.join(kept)} stay the base's, also where"
                " mergekit would blend them"
            )


def _evaluate(setting: Setting | None, name: str, depth: float) -> float | None:
    """What a setting says about one tensor; None if it says nothing."""
    if setting is None or isinstance(setting, float):
        return setting
    numbers = [item for item in setting if isinstance(item, float)]
    if numbers:
        return interpolate(numbers, depth)
    fitting = (case for case in _cases(setting) if case.filter == "*" or case.filter in name)
    first = next(fitting, None)
    return _evaluate(first.value, name, depth) if first else None


def _cases(setting: Setting | None) -> list[Case]:
    items = setting if isinstance(setting, list) else []
    return [item for item in items if isinstance(item, Case)]


def _unused_filters(setting: Setting | None, names: Sequence[str], whose: str) -> Iterator[str]:
    for case in _cases(setting):
        if case.filter != "*" and not any(case.filter in name for name in names):
            yield f"filter {case.filter!r} matches no blended tensor of {whose}"
