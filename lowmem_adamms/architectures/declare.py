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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeclarationError, RecipeError
from ..values import suggest
from .families import ARCHS
from .layout import Arch

if TYPE_CHECKING:
    from .declaration import Inheritance

MAX_FILE_BYTES = 1 << 18  # the longest declaration of ours has a few thousand


def read_declarations(paths: Iterable[str | Path]) -> tuple[Arch, ...]:
    """Several files, each as by `read_declaration`; DeclarationError also if two share a name."""
    found: dict[str, Path] = {}
    archs = []
    for path in map(Path, paths):
        arch = read_declaration(path)
        if arch.name in found:
            raise DeclarationError(
                f"{path}: name: {arch.name!r} is also that of {found[arch.name]}; give each its own"
            )
        found[arch.name] = path
        archs.append(arch)
    return tuple(archs)


def read_declaration(path: str | Path) -> Arch:
    """The declaration in a TOML file. DeclarationError says where it is wrong, and how to mend it.

    At most MAX_FILE_BYTES are read; the file cannot make us run or open anything.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise DeclarationError(f"--arch {path}: {reason}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise DeclarationError(f"{path}: more than {MAX_FILE_BYTES} bytes; not a declaration")
    return parse_toml(raw, str(path))


def parse_toml(raw: bytes, where: str) -> Arch:
    """The declaration in a file's content. DeclarationErrors begin with `where`."""
    try:
        table = tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DeclarationError(f"{where}, line {line}: not UTF-8; save the file as that") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, and Python's own limits
        raise DeclarationError(f"{where}: not TOML: {error}") from None
    return parse_declaration(table, where)


def parse_declaration(table: Mapping[str, Any], where: str) -> Arch:
    """The declaration in a table as TOML or JSON gives it. DeclarationErrors begin with `where`.

    What `Arch.to_json` gives comes back as it was.
    """
    from pydantic import ValidationError

    from .declaration import Declaration, Inheritance, describe, explain

    if not isinstance(table, dict):
        raise DeclarationError(f"{where}: found {describe(table)}, expected a table")
    values = dict(table)
    try:
        if "like" in values:
            values = _inherit(values, Inheritance.model_validate(values))
        elif "rename" in values:
            raise RecipeError("rename: goes only with like, whose names it changes")
        return Arch(**dict(Declaration.model_validate(values)))
    except ValidationError as error:
        raise DeclarationError(f"{where}: {explain(error)}") from None
    except RecipeError as error:
        raise DeclarationError(f"{where}: {error}") from None


def find_arch(name: str, archs: Sequence[Arch]) -> Arch:
    """The declaration of a name, upper and lower case alike. RecipeError if there is none."""
    for arch in archs:
        if arch.name.casefold() == name.casefold():
            return arch
    raise RecipeError(f"no declaration {name!r}{suggest(name, [arch.name for arch in archs])}")


# like and rename


def _inherit(table: Mapping[str, Any], inheritance: Inheritance) -> dict[str, Any]:
    """The table without `like` and `rename`, completed by the declaration that is like it.

    Values of the table are taken as they are, of whatever type: the whole is checked afterwards.
    """
    given = {key: value for key, value in table.items() if key not in ("like", "rename")}
    try:
        arch = find_arch(inheritance.like, ARCHS)
    except RecipeError as error:
        raise RecipeError(f"like: {error}") from None
    values = _rename(arch, inheritance.rename).to_json()
    del values["source"], values["classes"]
    if isinstance(own := given.get("decoder"), dict):
        roles = {role for held in own.values() if isinstance(held, str) for role in held.split()}
        values["decoder"] = {
            name: held for name, held in values["decoder"].items() if not roles & {*held.split()}
        }
    for key, value in given.items():
        inherited = values.get(key)
        if isinstance(value, dict) and isinstance(inherited, dict):
            values[key] = {**inherited, **value}
        else:
            values[key] = value
    return values


def _rename(arch: Arch, changes: Mapping[str, str]) -> Arch:
    """The declaration with text replaced in the names of its decoder, in the changes' order."""
    names = {name: name for name in (*arch.decoder, *arch.foreign_layers)}
    for old, new in changes.items():
        if not old or not any(old in names[name] for name in arch.decoder):
            raise RecipeError(
                f"rename: {old!r} is in no name of {arch.name}'s decoder"
                f" (`archs {json.dumps(arch.name)}` prints them)"
            )
        names = {name: renamed.replace(old, new) for name, renamed in names.items()}
    decoder = {names[name]: roles for name, roles in arch.decoder.items()}
    if len(decoder) < len(arch.decoder):
        raise RecipeError("rename: makes two names of the decoder the same")
    return replace(
        arch,
        decoder=decoder,
        interleaved=tuple(names[name] for name in arch.interleaved),
        foreign_layers={names[name]: kind for name, kind in arch.foreign_layers.items()},
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
