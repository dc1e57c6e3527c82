"""What a declaration may hold: a pydantic model of an Arch as users write it in TOML.

Imported only when a declaration is read or printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from ..values import suggest
from .families import ARCHS
from .layout import ESSENTIAL

_STREAMS = ("text", "vision")
_ROLES = tuple(
    dict.fromkeys(
        role.partition("@")[0]
        for arch in ARCHS
        for roles in arch.decoder.values()
        for role in roles.split()
    )
)
"""Every role that some declaration of ours knows; any other could only be a mistake."""


_TEXT = r"^(?:[^\p{C}\p{Z}]| )*$"
_FILLED_TEXT = r"^(?:[^\p{C}\p{Z}]| )*[^\p{C}\p{Z}]$"
_PREFIX = r"^(?:[^\p{C}\p{Z}]*\.)?$"
_HEAD = r"^(?:[^\p{C}\p{Z}]*[^.\p{C}\p{Z}])?$"
_TENSOR_NAME = r"^(?:[A-Za-z_.]+\.#\.)?[^#\p{C}\p{Z}]+$"
_LAYER_NAME = r"^[A-Za-z_.]+\.#\.[^#\p{C}\p{Z}]+$"
_EXPECTED_OF_PATTERN = {
    _TEXT: "printable text",
    _FILLED_TEXT: "printable text, not empty",
    _PREFIX: "a prefix that ends in a dot, or an empty one",
    _HEAD: "the head's full name, such as lm_head.weight",
    _TENSOR_NAME: "a tensor's name, its layer number, if it has one, as the first number in it,"
    " written # between dots",
    _LAYER_NAME: "the name of a tensor in a layer, its layer number written # between dots",
}
Text = Annotated[str, Field(pattern=_TEXT)]
FilledText = Annotated[str, Field(pattern=_FILLED_TEXT)]
Prefix = Annotated[str, Field(pattern=_PREFIX)]
Head = Annotated[str, Field(pattern=_HEAD)]
TensorName = Annotated[str, Field(pattern=_TENSOR_NAME)]
LayerName = Annotated[str, Field(pattern=_LAYER_NAME)]
Count = Annotated[int, Field(gt=0, lt=1 << 31)]
List = Strict(False)
"""A tuple, of which TOML and JSON know only lists."""


class Inheritance(BaseModel):
    """The keys of a declaration that starts from a known one."""

    model_config = ConfigDict(strict=True)

    like: Text
    rename: dict[Text, Text] = {}


class Declaration(BaseModel):
    """The fields of an Arch, each with the comment that stands over it in a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: FilledText = Field(description="what it is called in plans")
    source: Text = Field("declared by the user", description="where its names come from")
    classes: Annotated[tuple[Text, ...], List] = Field(
        (), description="what `architectures` in config.json may say"
    )
    spellings: Annotated[tuple[Annotated[tuple[Prefix, Head], List], ...], List] = Field(
        min_length=1,
        description="pairs: the decoder's prefix and the head's full name, as found on disk",
    )
    shared_ids: Count | None = Field(
        None, description="how many leading token ids all descendants of its ancestor share"
    )
    interleaved: Annotated[tuple[Text, ...], List] = Field(
        (), description="names of the decoder in which q, k and v alternate head by head"
    )
    head_dim: Count | None = Field(
        None, description="rows of a head, for these, where config.json does not tell"
    )
    decoder: dict[TensorName, Text] = Field(
        description="name after the prefix, layer number written #: the roles it holds, in memory"
        " order"
    )
    others: dict[FilledText, FilledText] = Field(
        {}, description="prefixes of all other tensors, and what they are"
    )
    foreign_layers: dict[LayerName, Text] = Field(
        {},
        description="names that only layers have which the ancestor lacks, and what those are",
    )

    @field_validator("decoder")
    @classmethod
    def _check_decoder(cls, decoder: dict[str, str]) -> dict[str, str]:
        for name, roles in decoder.items():
            for role in roles.split():
                _check_role(role, name)
        counts = Counter(role for roles in decoder.values() for role in roles.split())
        for role, count in counts.items():
            if count > 1:
                raise ValueError(f"{count} names hold {role}; expected one")
        held = {role.partition("@")[0] for role in counts}
        for role in ("embed", "norm", *(f"layers.#.{role}" for role in sorted(ESSENTIAL))):
            if role not in held:
                raise ValueError(f"no name holds {role}; expected one")
        if "embed" not in decoder.values():
            raise ValueError("embed must be alone in its tensor")
        return decoder

    @model_validator(mode="after")
    def _check_interleaved(self) -> Declaration:
        for name in self.interleaved:
            if name not in self.decoder:
                raise ValueError(
                    f"interleaved: {describe(name)} is no name of the decoder"
                    f"{suggest(name, self.decoder)}"
                )
        return self


def _check_role(role: str, name: str) -> None:
    """ValueError unless a tensor of this name can hold the role."""
    plain, at, stream = role.partition("@")
    place = f'"{name}"'
    if plain == "head":
        raise ValueError(f"{place}: the head stands in spellings, beside the prefix")
    if plain not in _ROLES:
        raise ValueError(f"{place}: unknown role {describe(role)}{suggest(plain, _ROLES)}")
    if at and stream not in _STREAMS:
        raise ValueError(
            f"{place}: unknown stream {describe(role)}; expected @{' or @'.join(_STREAMS)}"
        )
    if role.count("#") != name.count("#"):
        raise ValueError(
            f"{place}: holds {role}; expected a # in both the name and the role, or in neither"
        )


# What went wrong, in one line

_EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "dict_type": "a table",
    "greater_than": "1 or more; leave it out if it is not known",
    "less_than": "less than 2**31",
}
"""By pydantic's types of errors; of others the field's description tells."""


def explain(error: ValidationError) -> str:
    """What is wrong with a declaration, unknown keys first: key, what was found and expected."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda each: each["type"] != "extra_forbidden")
    path = [part for part in first["loc"] if part != "[key]"]
    if first["type"] == "extra_forbidden":
        known = [*Declaration.model_fields, *Inheritance.model_fields]
        return f"unknown key {describe(path[0])}{suggest(str(path[0]), known)}"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    else:
        found = "missing" if first["type"] == "missing" else f"found {describe(first['input'])}"
        message = f"{found}; expected {_expected(first, str(path[0]))}"
    return f"{_format_path(path)}: {message}" if path else message


def _expected(error: ErrorDetails, key: str) -> str | None:
    """What should have been written where an error is."""
    if error["type"] == "string_pattern_mismatch":
        return _EXPECTED_OF_PATTERN[error["ctx"]["pattern"]]
    if error["type"] in _EXPECTED:
        return _EXPECTED[error["type"]]
    field = Declaration.model_fields.get(key) or Inheritance.model_fields[key]
    return field.description


def _format_path(path: Iterable[str | int]) -> str:
    """A place in a file, as `spellings[0]` or `others."eye."`."""
    key, *inner = path
    parts = [f"[{part}]" if isinstance(part, int) else f'."{part}"' for part in inner]
    return "".join([str(key), *parts])


def describe(value: Any) -> str:
    """A value for an error message, in one short line whatever it is."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "an enormous number"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
