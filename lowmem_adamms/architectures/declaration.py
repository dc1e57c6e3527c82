"""What a declaration may hold: a pydantic model of an Arch as users write it in TOML.

Imported only when a declaration is read or printed.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

_ROLE = re.compile(r"(?:layers\.#\.)?[\w.*-]+(?:@text|@vision|@vision_expert|@audio)?", re.ASCII)
_NAME = re.compile(r"(?:[A-Za-z_.]+\.#\.)?[^#]+")


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected printable text")
    return text


def _check_prefix(prefix: str) -> str:
    if prefix and not prefix.endswith("."):
        raise ValueError("expected a prefix that ends in a dot, or an empty one")
    return prefix


Text = Annotated[str, AfterValidator(_check_printable)]
FilledText = Annotated[str, Field(min_length=1), AfterValidator(_check_printable)]
Prefix = Annotated[Text, AfterValidator(_check_prefix)]
Count = Annotated[int, Field(gt=0, lt=1 << 31)]
List = Strict(False)
"""A tuple, of which TOML and JSON know only lists."""


class Inheritance(BaseModel):
    """The keys of a declaration that starts from a known one."""

    model_config = ConfigDict(strict=True)

    like: str
    rename: dict[str, str] = {}


class Declaration(BaseModel):
    """The fields of an Arch, each with the comment that stands over it in a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: FilledText = Field(description="what it is called in plans")
    source: Text = Field("declared by the user", description="where its names come from")
    classes: Annotated[tuple[Text, ...], List] = Field(
        (), description="what `architectures` in config.json may say"
    )
    spellings: Annotated[tuple[Annotated[tuple[Prefix, Text], List], ...], List] = Field(
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
    decoder: dict[Text, Text] = Field(
        description="name after the prefix, layer number written #: the roles it holds, in memory"
        " order"
    )
    others: dict[FilledText, FilledText] = Field(
        {}, description="prefixes of all other tensors, and what they are"
    )

    @model_validator(mode="after")
    def _check_decoder(self) -> Declaration:
        for name, roles in self.decoder.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"decoder: {name!r}: expected its first number written .#.")
            for role in roles.split():
                if not _ROLE.fullmatch(role) or role == "head":
                    raise ValueError(f"decoder: {name!r}: {role!r} cannot be a role")
                if ("#" in role) != ("#" in name):
                    raise ValueError(f"decoder: {name!r}: # in the name or the role, not in both")
        if "embed" not in self.decoder.values():
            raise ValueError("decoder: no name holds embed, alone")
        if unknown := set(self.interleaved) - self.decoder.keys():
            raise ValueError(f"interleaved: {min(unknown)!r} is no name of the decoder")
        return self


def explain(error: ValidationError) -> str:
    """The key that is wrong and pydantic's message in one line; unknown keys first."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda each: each["type"] != "extra_forbidden")
    message = first["msg"].removeprefix("Value error, ")
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    return f"{key!r:.200}: {message:.500}" if key else f"{message:.500}"
