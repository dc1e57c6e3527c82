"""mergekit's YAML for a linear merge of two models, as `merge --config` takes it.

Semantics are mergekit's (github.com/arcee-ai/mergekit: README "Parameter Specification",
docs/merge_methods.md "Linear", config.py and plan.py for what these leave open): a list is
interpolated over a slice's layers, embedding, final norm and head take its first value; of a list
of filters the first whose text occurs in the tensor's name counts; a source's own parameters go
before the slice's, these before the file's; weights are divided by their sum unless normalize is
false. A filter sees the name under which the model it is for stores the tensor. What is not taken
is refused, all at once. Leaves to others: the join (`join.py`), arithmetic (`kernels/`).
"""

from __future__ import annotations

import importlib
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..architectures.layout import BUFFER
from ..checkpoints.dtypes import DType, parse_dtype
from ..errors import ConfigError, RecipeError, first_line
from ..home import at_home
from .alphas import COMPUTED_DECIMALS, Alpha, blended_roles, from_roles, interpolate, relative_depth
from .plan import Plan

METHOD = "linear"
_TAKEN = (
    *("merge_method", "models", "slices", "base_model", "parameters"),
    *("dtype", "out_dtype", "tokenizer_source", "tokenizer"),
)
_INSTEAD = {
    "modules": "give the models under models: only the decoder is blended",
    "chat_template": "the base's is kept: leave it out",
    "residual_weight": "leave it out",
}
_SUM = 1e-6  # weights given with six decimals need not add up any better


@dataclass(frozen=True, slots=True)
class _Case:
    """A value for the tensors whose names contain `filter`; None: for all."""

    filter: str | None
    value: float | tuple[float, ...]


Setting = float | tuple[float, ...] | tuple[_Case, ...]
"""A number, a list over depth, or cases."""
Parameters = Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class _Slice:
    """Layers first to stop - 1 (None: to the last), with the parameters that are for them."""

    first: int
    stop: int | None
    base: Parameters
    donor: Parameters
    shared: Parameters


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe file: which two models, the output's dtype, and the weights in it."""

    path: Path
    base: str
    donor: str
    dtype: DType | None
    slices: tuple[_Slice, ...]
    parameters: Parameters

    def alphas(self, plan: Plan) -> tuple[Alpha, tuple[str, ...]]:
        """The donor's weight for all that `plan` blends, and what the user should know.

        RecipeError where slices do not fit the layers, or weights are missing or not an average.
        """
        layers = plan.base_layout.layers
        stop = self.slices[-1].stop
        if stop not in (None, layers):
            raise RecipeError(
                f"{self.path}: its slices end at layer {stop}, the models have {layers};"
                " expected them to cover all, each layer at its own place"
            )
        lent = {name for name, blocks in plan.donor_layout.blocks.items() if _holds_embed(blocks)}
        names = {
            # To mergekit a tied head is called what it would be called were it there
            role: (base, base if role == "head" and donor in lent else donor)
            for role, (base, donor) in blended_roles(plan).items()
        }
        by_role = {role: self._alpha(role, *both, layers) for role, both in names.items()}
        return from_roles(by_role), tuple(self._notes(plan, list(names.values())))

    def _alpha(self, role: str, base: str, donor: str, layers: int) -> float:
        """The donor's share in one role; base and donor: the names of its tensors."""
        part, depth = self._place(role, layers)
        w_base = self._weight(part, part.base, base, depth, self.base)
        w_donor = self._weight(part, part.donor, donor, depth, self.donor)
        normalize = self._found("normalize", part, {}, base, depth)
        total = w_base + w_donor
        if normalize is None or normalize:
            if not total:
                raise RecipeError(f"{self.path}: the weights for {base} add up to 0")
            alpha = w_donor / total
        elif abs(total - 1) > _SUM:
            raise RecipeError(
                f"{self.path}: the weights for {base}, {w_base:g} and {w_donor:g}, add up to"
                f" {total:g} with normalize: false; expected 1: only averages can be written"
            )
        else:
            alpha = w_donor
        if not 0 <= alpha <= 1:
            raise RecipeError(
                f"{self.path}: the weights for {base}, {w_base:g} and {w_donor:g}, make the donor's"
                f" share {alpha:g}; expected 0 to 1"
            )
        return round(alpha, COMPUTED_DECIMALS)

    def _place(self, role: str, layers: int) -> tuple[_Slice, float]:
        """The slice a role belongs to, and how deep in it."""
        kind, _, rest = role.partition(".")
        if kind != "layers":
            return self.slices[0 if kind == "embed" else -1], 0.0
        layer = int(rest.partition(".")[0])
        for part in reversed(self.slices):
            if layer >= part.first:
                count = (layers if part.stop is None else part.stop) - part.first
                return part, relative_depth(layer - part.first, count)
        raise AssertionError(role)

    def _weight(self, part: _Slice, own: Parameters, name: str, depth: float, model: str) -> float:
        found = self._found("weight", part, own, name, depth)
        if found is None:
            raise RecipeError(
                f"{self.path}: no weight of {model} for {name}; give the model one under its"
                " parameters, or a last value without a filter"
            )
        return found

    def _found(
        self, key: str, part: _Slice, own: Parameters, name: str, depth: float
    ) -> float | None:
        for level in (own, part.shared, self.parameters):
            if key in level and (value := _evaluate(level[key], name, depth)) is not None:
                return value
        return None

    def _notes(self, plan: Plan, names: Sequence[tuple[str, str]]) -> Iterator[str]:
        ours, theirs = ([pair[side] for pair in names] for side in (0, 1))
        for part in self.slices:
            yield from _unused(part.base, ours, self.base)
            yield from _unused(part.donor, theirs, self.donor)
            yield from _unused(part.shared, ours + theirs, "either model")
        yield from _unused(self.parameters, ours + theirs, "either model")
        kept = sorted(set(plan.base_layout.kinds.values()) - {BUFFER})
        if kept:
            yield (
                f"only language weights are blended: {', '.join(kept)} stay the base's, also where"
                " mergekit would blend them"
            )


def _holds_embed(blocks: Sequence[Any]) -> bool:
    return any(block.role == "embed" for block in blocks)


def _evaluate(setting: Setting, name: str, depth: float) -> float | None:
    """What a setting says about one tensor; None if it says nothing."""
    if isinstance(setting, float):
        return setting
    for case in setting:
        if not isinstance(case, _Case):
            return interpolate([v for v in setting if isinstance(v, float)], depth)
        if case.filter in (None, "*") or str(case.filter) in name:
            return _evaluate(case.value, name, depth)
    return None


def _unused(parameters: Parameters, names: Sequence[str], whose: str) -> Iterator[str]:
    for setting in parameters.values():
        cases = setting if isinstance(setting, tuple) else ()
        for case in cases:
            if isinstance(case, _Case) and case.filter not in (None, "*"):
                text = str(case.filter)
                if not any(text in name for name in names):
                    yield f"filter {text!r} matches no blended tensor of {whose}"


# Reading


def read(path: Path) -> Recipe:
    """The recipe in a YAML file. ConfigError names everything in it that is not taken, at once."""
    document = _loaded(path)
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: found {_short(document)}, expected mergekit's YAML")
    method = document.get("merge_method")
    if method != METHOD:
        raise RecipeError(
            f"{path}: merge_method is {_short(method)}; only {METHOD} is taken: another method"
            " needs mergekit"
        )
    reader = _Reader()
    recipe = _recipe(path, document, reader)
    if reader.problems or recipe is None:
        raise ConfigError([f"{path}: {problem}" for problem in reader.problems])
    return recipe


def _loaded(path: Path) -> Any:
    yaml: Any = importlib.import_module("yaml")
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


def _short(value: Any) -> str:
    """Bounded, whatever aliases in the file make of a value."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxdict = 2, 4, 4
    return short.repr(value)


@dataclass(slots=True)
class _Reader:
    """Reads one value after the other and remembers what is wrong with them."""

    problems: list[str] = field(default_factory=list)

    def wrong(self, where: str, why: str) -> None:
        """Note a problem at a key."""
        self.problems.append(f"{where}: {why}")

    def mapping(self, value: Any, where: str, taken: Sequence[str]) -> dict[str, Any]:
        """The keys that are taken and not null; the others are problems."""
        if not isinstance(value, dict):
            self.wrong(where, f"found {_short(value)}, expected keys and values")
            return {}
        for key in value:
            if key not in taken and value[key] is not None:
                name = f"{where}.{key}" if where else str(key)
                why = _INSTEAD.get(str(key), f"expected {', '.join(taken)}")
                self.wrong(name, f"not taken; {why}")
        return {key: value[key] for key in taken if value.get(key) is not None}

    def listed(self, value: Any, where: str, count: int | None = None) -> list[Any]:
        """A list, of so many items."""
        if not isinstance(value, list) or not value or (count or len(value)) != len(value):
            self.wrong(where, f"found {_short(value)}, expected a list of {count or 'one or more'}")
            return []
        return value

    def model(self, value: Any, where: str) -> str:
        """A folder or Hub id as text."""
        if not isinstance(value, str) or not value.strip():
            self.wrong(where, f"found {_short(value)}, expected a folder or a Hub id")
            return ""
        ref = at_home(value)
        if "+" in ref and not Path(ref).exists():
            self.wrong(where, f"{ref!r}: a LoRA is not taken; merge it into its model before")
        return ref

    def parameters(self, value: Any, where: str, taken: Sequence[str]) -> Parameters:
        """`weight` and, where it can stand, `normalize`."""
        given = self.mapping({} if value is None else value, where, taken)
        return {
            key: setting
            for key in given
            if (setting := self.setting(given[key], f"{where}.{key}", key == "normalize"))
            is not None
        }

    def setting(self, value: Any, where: str, truth: bool) -> Setting | None:
        """A number, a list over depth, or cases; truth: yes and no are numbers as well."""
        if not isinstance(value, list):
            return self.number(value, where, truth)
        if not any(isinstance(item, dict) for item in value):
            return self.gradient(value, where, truth)
        cases: list[_Case] = []
        for i, item in enumerate(value):
            given = self.mapping(item, f"{where}[{i}]", ("filter", "value"))
            if not isinstance(given.get("filter", ""), str):
                self.wrong(f"{where}[{i}].filter", f"found {_short(given['filter'])}, not a text")
                continue
            inner = given.get("value")
            found = (
                self.gradient(inner, f"{where}[{i}].value", truth)
                if isinstance(inner, list)
                else self.number(inner, f"{where}[{i}].value", truth)
            )
            if found is not None:
                cases.append(_Case(given.get("filter"), found))
        return tuple(cases)

    def gradient(self, value: list[Any], where: str, truth: bool) -> tuple[float, ...] | None:
        """A list of numbers."""
        found = [self.number(item, f"{where}[{i}]", truth) for i, item in enumerate(value)]
        if not found:
            self.wrong(where, "found an empty list, expected numbers")
        return tuple(number for number in found if number is not None) or None

    def number(self, value: Any, where: str, truth: bool) -> float | None:
        """A finite number; YAML takes 1e-1 for a text, mergekit for a number."""
        try:
            sound = not isinstance(value, bool) or truth
            number = float(value) if sound else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            self.wrong(where, f"found {_short(value)}, expected a number")
            return None
        return number


_Bounds = tuple[int, int | None]
_Sources = dict[str, Parameters]
"""By model, its own parameters in one slice."""


def _recipe(path: Path, document: dict[str, Any], reader: _Reader) -> Recipe | None:
    """All of a file; None only if the reader has found problems."""
    given = reader.mapping(document, "", _TAKEN)
    parameters = reader.parameters(given.get("parameters"), "parameters", ("weight", "normalize"))
    base = reader.model(given["base_model"], "base_model") if "base_model" in given else None
    found: list[tuple[_Bounds, _Sources, Parameters]] = []
    if ("models" in given) == ("slices" in given):
        reader.wrong("models", "expected the two models under models, or else under slices")
    elif "models" in given:
        sources = _models(given["models"], reader)
        if base is not None and len(sources) == 1:
            sources.setdefault(base, {})  # as mergekit adds it
        found = [((0, None), sources, {})]
    else:
        found = list(_slices(given["slices"], reader))
    names = list(dict.fromkeys(name for _, sources, _ in found for name in sources))
    dtype = _dtype(given, reader)
    base = base or next(iter(names), "")
    _check_tokenizer(given, base, reader)
    if not reader.problems and (len(names) != 2 or base not in names):
        listed = ", ".join(dict.fromkeys([base, *names]))
        reader.wrong("models", f"found {listed}; expected two, one of them the base_model")
    if reader.problems:
        return None
    donor = next(name for name in names if name != base)
    slices = [
        _Slice(*bounds, sources[base], sources[donor], shared) for bounds, sources, shared in found
    ]
    return Recipe(path, base, donor, dtype, tuple(slices), parameters)


def _models(value: Any, reader: _Reader) -> _Sources:
    """What stands under `models`."""
    sources: _Sources = {}
    for i, item in enumerate(reader.listed(value, "models")):
        where = f"models[{i}]"
        given = reader.mapping(item, where, ("model", "parameters"))
        model = reader.model(given.get("model"), f"{where}.model")
        if model and model in sources:
            reader.wrong(f"{where}.model", f"{model} is there twice")
        own = reader.parameters(given.get("parameters"), f"{where}.parameters", ("weight",))
        sources[model] = own
    return sources


def _slices(value: Any, reader: _Reader) -> Iterator[tuple[_Bounds, _Sources, Parameters]]:
    """What stands under `slices`: each layer must stay where it is, in both models."""
    end = 0
    for i, item in enumerate(reader.listed(value, "slices")):
        where = f"slices[{i}]"
        given = reader.mapping(item, where, ("sources", "parameters"))
        shared = reader.parameters(
            given.get("parameters"), f"{where}.parameters", ("weight", "normalize")
        )
        sources: _Sources = {}
        ranges: list[Any] = []
        for j, source in enumerate(reader.listed(given.get("sources"), f"{where}.sources", 2)):
            at = f"{where}.sources[{j}]"
            inner = reader.mapping(source, at, ("model", "layer_range", "parameters"))
            model = reader.model(inner.get("model"), f"{at}.model")
            ranges.append(inner.get("layer_range"))
            sources[model] = reader.parameters(
                inner.get("parameters"), f"{at}.parameters", ("weight",)
            )
        for j, bounds in enumerate(ranges):
            if not _is_range(bounds) or bounds[0] != end or bounds != ranges[0]:
                reader.wrong(
                    f"{where}.sources[{j}].layer_range",
                    f"found {_short(bounds)}, expected [{end}, N], the same for both: layers are"
                    " not moved",
                )
                return
        if ranges:
            yield (end, ranges[0][1]), sources, shared
            end = ranges[0][1]


def _is_range(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)
    return whole and 0 <= value[0] < value[1]


def _dtype(given: Mapping[str, Any], reader: _Reader) -> DType | None:
    """Of the output: out_dtype before dtype; None keeps the base's."""
    found = None
    for key in ("dtype", "out_dtype"):
        if key in given:
            try:
                found = parse_dtype(str(given[key]))
            except RecipeError as error:
                reader.wrong(key, str(error))
    return found


def _check_tokenizer(given: Mapping[str, Any], base: str, reader: _Reader) -> None:
    """The base's tokenizer is the output's, always; another cannot be asked for."""
    where, source = "tokenizer_source", given.get("tokenizer_source")
    if "tokenizer" in given:
        where = "tokenizer.source"
        inner = reader.mapping(given["tokenizer"], "tokenizer", ("source",))
        source = inner.get("source", "union")  # mergekit's default there
    if isinstance(source, str):
        source = at_home(source)
    if source not in (None, "base", base):
        reader.wrong(where, f"{_short(source)} is not taken; the output has the base's: say base")
