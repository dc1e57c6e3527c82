"""A family declared by the user: a TOML file for --arch, with the fields of `arch.Arch` as keys.

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
the inherited names of the decoder. `source` and `classes` are not inherited. Leaves to others: what
a declaration means (`arch.py`), when it is taken (`recognise.py`).
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import DeclarationError, RecipeError
from .families import ARCHS
from .layout import ESSENTIAL, Arch

MOST_BYTES = 1 << 18
"""Of a file; the longest declaration of ours has a few thousand."""
MOST = 1 << 31
"""Of anything counted."""

_DEFAULTS: Mapping[str, Any] = {"source": "declared by the user", "classes": (), "others": {}}
_NOT_INHERITED = frozenset(("name", "source", "classes"))
_NOT_RENAMED = frozenset(("spellings", "others"))
_COMMENTS = {
    "name": "what it is called in plans",
    "source": "where its names come from",
    "classes": "what `architectures` in config.json may say",
    "spellings": "pairs: the decoder's prefix and the head's full name, as found on disk",
    "shared_ids": "how many leading token ids all descendants of its ancestor share",
    "decoder": "name after the prefix, layer number written #: the roles it holds, in memory order",
    "others": "prefixes of all other tensors, and what they are",
    "interleaved": "names of the decoder in which q, k and v alternate head by head",
    "head_dim": "rows of a head, for these, where config.json does not tell",
    "foreign_layers": "names that only layers have which the ancestor lacks, and what those are",
}
_ROLES = tuple(
    dict.fromkeys(
        role.partition("@")[0]
        for arch in ARCHS
        for held in arch.decoder.values()
        for role in held.split()
    )
)
"""Every role that some declaration of ours knows; any other could only be a mistake."""
_STREAMS = ("text", "vision")
_NAME = re.compile(r"[A-Za-z_.]+\.#\.[^#]+|[^#]+")


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

    At most MOST_BYTES are read; the file cannot make us run or open anything.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = error.strerror if isinstance(error, OSError) else error
        raise DeclarationError(f"--arch {path}: {why}") from None
    if len(raw) > MOST_BYTES:
        raise DeclarationError(f"{path}: more than {MOST_BYTES} bytes; not a declaration")
    return from_toml(raw, str(path))


def from_toml(raw: bytes, where: str) -> Arch:
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
    if not isinstance(table, dict):
        raise DeclarationError(f"{where}: found {_short(table)}, expected a table")
    given = dict(table)
    hints = get_type_hints(Arch)
    like, rename = given.pop("like", None), given.pop("rename", None)
    for key in given:
        if key not in hints:
            raise DeclarationError(
                f"{where}: unknown key {_short(key)}{_near(key, [*hints, 'like', 'rename'])}"
            )
    values = {key: _checked(value, hints[key], f"{where}: {key}") for key, value in given.items()}
    if like is not None:
        values = _extended(_inherited(like, rename, where), values)
    elif rename is not None:
        raise DeclarationError(f"{where}: rename: goes only with like, whose names it changes")
    values = {**_DEFAULTS, **values}
    for field in fields(Arch):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in values:
            raise DeclarationError(
                f"{where}: {field.name}: missing; expected {_COMMENTS[field.name]}"
            )
    arch = Arch(**values)
    _check(arch, where)
    return arch


def find_arch(name: str, archs: Sequence[Arch]) -> Arch:
    """The declaration of a name, upper and lower case alike. RecipeError if there is none."""
    for arch in archs:
        if arch.name.casefold() == name.casefold():
            return arch
    raise RecipeError(f"no declaration {_short(name)}{_near(name, [arch.name for arch in archs])}")


# From a file's values to an Arch's


def _checked(value: Any, hint: Any, where: str) -> Any:
    """A value read from TOML or JSON as a field of this type; DeclarationError if it is another."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # such as int | None, where None is the key left out
        (hint,) = (other for other in arguments if other is not types.NoneType)
        return _checked(value, hint, where)
    if origin is tuple and isinstance(value, list):
        if arguments[1:] == (...,):
            return tuple(
                _checked(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)
            )
        if len(value) == len(arguments):
            return tuple(map(_checked, value, arguments, [where] * len(value)))
    if origin is Mapping and isinstance(value, dict):
        for key in value:
            _checked(key, str, where)
        return {
            key: _checked(item, arguments[1], f"{where}.{json.dumps(key, ensure_ascii=False)}")
            for key, item in value.items()
        }
    if hint is str and isinstance(value, str):
        if not value.isprintable():
            raise DeclarationError(f"{where}: found {_short(value)}, expected printable text")
        return value
    if hint in (int, bool, float) and type(value) is hint:
        return value
    raise DeclarationError(f"{where}: found {_short(value)}, expected {_described(hint)}")


def _described(hint: Any) -> str:
    """A field's type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple and arguments[1:] == (...,):
        return f"a list, each item {_described(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(map(_described, arguments))}"
    if origin is Mapping:
        return f"a table, each value {_described(arguments[1])}"
    return {str: "a text", int: "a whole number", bool: "true or false"}.get(hint, str(hint))


def _inherited(like: Any, rename: Any, where: str) -> dict[str, Any]:
    """The fields of a known declaration that another may start from."""
    if not isinstance(like, str):
        raise DeclarationError(f"{where}: like: found {_short(like)}, expected a text")
    try:
        arch = find_arch(like, ARCHS)
    except RecipeError as error:
        raise DeclarationError(f"{where}: like: {error}") from None
    changes = _checked({} if rename is None else rename, Mapping[str, str], f"{where}: rename")
    names = set(arch.decoder)
    for old, new in changes.items():
        if not old or not any(old in name for name in names):
            raise DeclarationError(
                f"{where}: rename: {_short(old)} is in no name of {arch.name}'s decoder"
                f" (`archs {json.dumps(arch.name)}` prints them)"
            )
        names = {name.replace(old, new) for name in names}
    values = {
        field.name: getattr(arch, field.name)
        for field in fields(Arch)
        if field.name not in _NOT_INHERITED
    }
    renamed = {
        key: value if key in _NOT_RENAMED else _renamed(value, changes)
        for key, value in values.items()
    }
    if len(names) < len(arch.decoder):
        raise DeclarationError(f"{where}: rename: makes two names of the decoder the same")
    return renamed


def _renamed(value: Any, changes: Mapping[str, str]) -> Any:
    """Names of the decoder, wherever a field holds them, after the changes in their order."""
    if isinstance(value, str):
        for old, new in changes.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, tuple):
        return tuple(_renamed(item, changes) for item in value)
    if isinstance(value, Mapping):
        return {_renamed(key, changes): item for key, item in value.items()}
    return value


def _extended(inherited: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given over what is inherited."""
    merged = {**inherited}
    taken = {role for held in given.get("decoder", {}).values() for role in held.split()}
    merged["decoder"] = {
        name: held for name, held in merged["decoder"].items() if not taken & set(held.split())
    }
    for key, value in given.items():
        tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if tables else value
    return merged


# What no type says


def _check(arch: Arch, where: str) -> None:
    """DeclarationError for a declaration that could not be of any decoder."""
    if not arch.name.strip():
        raise DeclarationError(f"{where}: name: empty; expected {_COMMENTS['name']}")
    if not arch.spellings:
        raise DeclarationError(f"{where}: spellings: empty; expected {_COMMENTS['spellings']}")
    for prefix, head in arch.spellings:
        if prefix and not prefix.endswith("."):
            raise DeclarationError(
                f"{where}: spellings: found the prefix {_short(prefix)}, expected one that ends"
                " in a dot, or an empty one"
            )
        if head.endswith("."):
            raise DeclarationError(
                f"{where}: spellings: found {_short(head)}, expected the head's full name, such as"
                " lm_head.weight"
            )
    for prefix, what in arch.others.items():
        if not prefix or not what:
            raise DeclarationError(
                f"{where}: others.{json.dumps(prefix)}: found {_short(what)}, expected a prefix and"
                " what its tensors are"
            )
    _check_decoder(arch.decoder, where)
    for field in fields(arch):
        _check_further(field.name, getattr(arch, field.name), arch.decoder, where)


def _check_further(field: str, value: Any, decoder: Mapping[str, str], where: str) -> None:
    """Counts are 1 or more; what lists or maps names, apart from the classes, means the decoder's.

    So holds for whatever fields Arch has, these or others.
    """
    if isinstance(value, int) and not isinstance(value, bool) and not 0 < value < MOST:
        raise DeclarationError(
            f"{where}: {field}: found {_short(value)}, expected 1 or more; leave it out if it is"
            " not known"
        )
    if isinstance(value, tuple) and field not in ("classes", "spellings"):
        for name in value:
            if name not in decoder:
                raise DeclarationError(
                    f"{where}: {field}: {_short(name)} is no name of the decoder"
                    f"{_near(name, decoder)}"
                )
    if isinstance(value, Mapping) and field not in ("decoder", "others"):
        for name in value:
            if "#" not in name or not _NAME.fullmatch(name):
                raise DeclarationError(
                    f"{where}: {field}.{json.dumps(name)}: not a tensor's name; expected one as in"
                    " the decoder, its layer number written #"
                )


def _check_decoder(decoder: Mapping[str, str], where: str) -> None:
    for name, held in decoder.items():
        place = f"{where}: decoder.{json.dumps(name, ensure_ascii=False)}"
        if not _NAME.fullmatch(name):
            raise DeclarationError(
                f"{place}: not a tensor's name; expected its layer number, if it has one, as the"
                " first number in it, written # between dots"
            )
        for role in held.split():
            _check_role(role, name, place)
    count = Counter(role for held in decoder.values() for role in held.split())
    for role, times in count.items():
        if times > 1:
            raise DeclarationError(f"{where}: decoder: {times} names hold {role}; expected one")
    needed = ["embed", "norm", *(f"layers.#.{role}" for role in sorted(ESSENTIAL))]
    there = {role.partition("@")[0] for role in count}
    for role in needed:
        if role not in there:
            raise DeclarationError(f"{where}: decoder: no name holds {role}; expected one")
    if "embed" not in decoder.values():
        raise DeclarationError(f"{where}: decoder: embed must be alone in its tensor")


def _check_role(role: str, name: str, place: str) -> None:
    plain, at, stream = role.partition("@")
    if plain == "head":
        raise DeclarationError(f"{place}: the head stands in spellings, beside the prefix")
    if plain not in _ROLES:
        raise DeclarationError(f"{place}: unknown role {_short(role)}{_near(plain, _ROLES)}")
    if at and stream not in _STREAMS:
        raise DeclarationError(
            f"{place}: unknown stream {_short(role)}; expected @{' or @'.join(_STREAMS)}"
        )
    if role.count("#") != name.count("#"):
        raise DeclarationError(
            f"{place}: holds {role}; expected a # in both the name and the role, or in neither"
        )


def _near(word: str, known: Iterable[str]) -> str:
    """What may have been meant."""
    folded = {each.casefold(): each for each in known}
    if close := difflib.get_close_matches(str(word)[:80].casefold(), folded, 1, 0.5):
        return f"; did you mean {folded[close[0]]!r}?"
    return f"; expected one of {', '.join(folded.values())}"


def _short(value: Any) -> str:
    """A value for an error message, in one short line whatever it is."""
    if isinstance(value, dict | list | tuple):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "an enormous number"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# From an Arch to a file


def to_toml(arch: Arch) -> str:
    """A declaration as a file for --arch, with a comment on each key."""
    lines, tables = [], []
    for key, value in arch.to_json().items():
        comment = [f"# {_COMMENTS[key]}"] if key in _COMMENTS else []
        if isinstance(value, dict):
            pairs = (f"{_quoted(name)} = {_toml(item)}" for name, item in value.items())
            tables += ["", *comment, f"[{key}]", *pairs]
        else:
            lines += [*comment, f"{key} = {_toml(value)}"]
    return "\n".join([*lines, *tables, ""])


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)} = {_toml(it)}" for key, it in value.items()) + "}"
    if isinstance(value, list):
        items = [_toml(item) for item in value]
        if any(isinstance(item, list) for item in value):
            return "[\n" + "".join(f"  {item},\n" for item in items) + "]"
        return f"[{', '.join(items)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    """A TOML string: as in JSON, whose escapes TOML has as well."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
