"""A family declared by the user: a TOML file for --arch, with the fields of `layout.Arch` as keys.

    name = "My-VL"
    like = "Llama"
    classes = ["MyVLForConditionalGeneration"]
    spellings = [["lm.model.", "lm.lm_head.weight"]]
    rename = { "self_attn." = "attention." }
    others = { "vision." = "vision tower", "bridge." = "connector" }

    [decoder]
    "layers.#.attention.qk.weight" = "layers.#.attn.q.weight layers.#.attn.k.weight"

`like` starts from a known declaration: the file's tables extend its tables, other keys replace its
values, a name in `decoder` displaces the names that held its roles, and `rename` replaces text in
the inherited names of the decoder. `source` and `classes` are not inherited.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DeclarationError, RecipeError
from ..values import suggest
from .arch import Arch
from .families import ARCHS

MAX_FILE_BYTES = 1 << 18  # the longest declaration of ours has a few thousand


def read_declarations(paths: Iterable[str | Path]) -> tuple[Arch, ...]:
    """Several files, each as by `read_declaration`; DeclarationError also if two share a name."""
    archs = tuple(map(read_declaration, paths))
    for name, count in Counter(arch.name for arch in archs).items():
        if count > 1:
            raise DeclarationError(f"`arch`: {count} declarations are named {name!r}")
    return archs


def read_declaration(path: str | Path) -> Arch:
    """The declaration in a TOML file. DeclarationError names the file and the key that is wrong.

    At most MAX_FILE_BYTES are read; the file cannot make us run or open anything.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DeclarationError(f"`arch` {path}: {error}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise DeclarationError(f"{path}: more than {MAX_FILE_BYTES} bytes; not a declaration")
    try:
        table = tomllib.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, beyond Python's limits
        raise DeclarationError(f"{path}: not TOML: {error}") from None
    return parse_declaration(table, str(path))


def parse_declaration(table: Any, where: str) -> Arch:
    """The declaration in a table as TOML or JSON gives it. DeclarationErrors begin with `where`.

    What `Arch.to_json` gives comes back as it was.
    """
    from pydantic import ValidationError

    from .declaration import Declaration, explain

    try:
        if isinstance(table, dict) and {"like", "rename"} & table.keys():
            table = _inherit(table)
        return Arch(**dict(Declaration.model_validate(table)))
    except ValidationError as error:
        raise DeclarationError(f"{where}: {explain(error)}") from None
    except RecipeError as error:
        raise DeclarationError(f"{where}: like: {error}") from None


def find_arch(name: str, archs: Sequence[Arch]) -> Arch:
    """The declaration of a name, upper and lower case alike. RecipeError if there is none."""
    for arch in archs:
        if arch.name.casefold() == name.casefold():
            return arch
    raise RecipeError(f"no declaration {name!r}{suggest(name, [arch.name for arch in archs])}")


def _inherit(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table without `like` and `rename`, completed by the declaration that is like it.

    Values of the table are taken as they are, of whatever type: the whole is checked afterwards.
    """
    from .declaration import Inheritance

    inheritance = Inheritance.model_validate(table)
    values = _rename(find_arch(inheritance.like, ARCHS), inheritance.rename).to_json()
    del values["source"], values["classes"]
    own = table.get("decoder")
    if isinstance(own, dict):
        roles = {role for held in own.values() if isinstance(held, str) for role in held.split()}
        values["decoder"] = {
            name: held for name, held in values["decoder"].items() if not roles & {*held.split()}
        }
    for key, value in table.items():
        inherited = values.get(key)
        if isinstance(value, dict) and isinstance(inherited, dict):
            values[key] = {**inherited, **value}
        elif key not in ("like", "rename"):
            values[key] = value
    return values


def _rename(arch: Arch, changes: Mapping[str, str]) -> Arch:
    """The declaration with text replaced in the names of its decoder, in the changes' order.

    RecipeError if two names become one.
    """

    def renamed(name: str) -> str:
        for old, new in changes.items():
            name = name.replace(old, new)
        return name

    decoder: dict[str, str] = {}
    for name, roles in arch.decoder.items():
        if decoder.setdefault(renamed(name), roles) != roles:
            raise RecipeError(f"rename: two names of {arch.name} become {renamed(name)!r}")
    return replace(
        arch,
        decoder=decoder,
        interleaved=tuple(map(renamed, arch.interleaved)),
    )


# An Arch as a file


def to_toml(arch: Arch) -> str:
    """A declaration as a file for --arch, with a comment over each key."""
    from .declaration import Declaration

    lines, tables = [], []
    for key, value in arch.to_json().items():
        comment = f"# {Declaration.model_fields[key].description}"
        if isinstance(value, dict):
            pairs = [f"{_quote(name)} = {_quote(text)}" for name, text in value.items()]
            tables += ["", comment, f"[{key}]", *pairs]
        else:
            lines += [comment, f"{key} = {_format_value(value)}"]
    return "\n".join([*lines, *tables, ""])


def _format_value(value: Any) -> str:
    """A number, a text, a list of texts, or a list of lists of texts, as TOML."""
    if not isinstance(value, list):
        return _quote(value) if isinstance(value, str) else str(value)
    items = [_format_value(item) for item in value]
    if any(isinstance(item, list) for item in value):
        return "[\n" + "".join(f"  {item},\n" for item in items) + "]"
    return f"[{', '.join(items)}]"


def _quote(text: str) -> str:
    """A TOML string: as in JSON, whose escapes TOML has as well."""
    return json.dumps(text, ensure_ascii=False)
