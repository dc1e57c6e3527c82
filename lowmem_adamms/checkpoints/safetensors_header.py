"""One safetensors header: parse, validate, build. Knows bytes and names, not folders or models.

Follows the format description of huggingface/safetensors (README, "Format"): 8 bytes of
little-endian length, that many bytes of JSON, then the data without holes. A Header that exists
is valid: offsets lie inside the file, neither overlap nor leave gaps, and agree with dtype x shape.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .dtypes import DTYPES, DType

MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader
_SIZE_LIMIT = 1 << 64  # safetensors counts in 64 bits
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # git-lfs/git-lfs, docs/spec.md


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor in a file: `start` and `stop` are absolute byte positions."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """All tensors of one file in the order of their bytes, and its string metadata."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int


def refuse_lfs_pointer(path: Path) -> None:
    """Raise FormatError if `path` holds a Git LFS pointer instead of the file itself."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise FormatError(
                f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
                " or download it"
            )


def read_header(path: Path) -> Header:
    """The header of `path`, read without touching its data. FormatError names what is wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length_field = file.read(8)
        length = int.from_bytes(length_field, "little")
        if len(length_field) < 8:
            raise FormatError(f"{path}: {size} bytes is too short for a safetensors file")
        if length > MAX_HEADER_BYTES:
            refuse_lfs_pointer(path)  # whose first letters make a number as large
            raise FormatError(
                f"{path}: not a safetensors file, or a damaged one: its header would be {length}"
                f" bytes long, and at most {MAX_HEADER_BYTES} are allowed"
            )
        if 8 + length > size:
            raise FormatError(
                f"{path}: header says it is {length} bytes long, the file has {size}; truncated?"
                " Download it again"
            )
        raw = file.read(length)
    try:
        return parse_header(raw, size)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def parse_header(raw: bytes, file_size: int) -> Header:
    """Validate the JSON of a header, without its length field, of a file of `file_size` bytes."""
    document = _parse_json(raw)
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("header __metadata__ is not a map of strings to strings")
    data_start = 8 + len(raw)
    shapes: dict[Shape, Shape] = {}  # one tuple in memory for all experts of one size
    infos = [_parse_entry(name, document.pop(name), data_start, shapes) for name in [*document]]
    infos.sort(key=lambda info: (info.start, info.stop))
    position = data_start
    for info in infos:
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "follows a hole"
            raise FormatError(
                f"tensor {info.name} {what}: it starts at byte {info.start}, expected {position}"
            )
        position = info.stop
    if position != file_size:
        raise FormatError(
            f"header describes {position} bytes, the file has {file_size};"
            f" {'truncated? Download it again' if position > file_size else 'trailing bytes'}"
        )
    return Header(tuple(infos), metadata, data_start)


def build_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    min_bytes: int = 0,
) -> bytes:
    """Length field, JSON and padding for tensors laid out one after the other, in this order.

    min_bytes: a multiple of 8; a shorter header is padded to it.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        stop = position + dtype.nbytes(math.prod(shape))
        document[name] = {
            "dtype": dtype.name,
            "shape": list(shape),
            "data_offsets": [position, stop],
        }
        position = stop
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * max(-len(raw) % 8, min_bytes - 8 - len(raw))
    return len(raw).to_bytes(8, "little") + raw


def _parse_json(raw: bytes) -> dict[str, Any]:
    """The header's JSON object, read as strictly as safetensors reads it."""
    try:
        document = json.loads(
            raw.decode(),
            object_pairs_hook=_refuse_twins,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
        )
        if b"\\u" in raw:
            # Half a character outside the basic plane, which no UTF-8 file could hold again
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"header is not JSON ({error})") from None
    if not isinstance(document, dict):
        raise FormatError("header is not a JSON object")
    return document


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twin, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise FormatError(f"header names {twin!r} twice")
    return found


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _parse_int(text: str) -> int | float:
    """Safetensors takes `-0` for a fraction, which is no size."""
    return -0.0 if text == "-0" else int(text)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < _SIZE_LIMIT for item in value
    )


def _parse_entry(name: str, entry: Any, data_start: int, shapes: dict[Shape, Shape]) -> TensorInfo:
    """One validated entry; the bytes it claims must be exactly dtype x shape."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise FormatError(f"tensor {name}: expected dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"tensor {name}: unknown dtype {entry['dtype']!r}")
    if not _is_sizes(shape):
        raise FormatError(f"tensor {name}: shape {shape!r} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"tensor {name}: data_offsets {offsets!r} is not a pair of positions")
    try:
        nbytes = dtype.nbytes(_count_elements(shape))
    except FormatError as error:
        raise FormatError(f"tensor {name}: {error}") from None
    start, stop = offsets
    if stop - start != nbytes:
        raise FormatError(
            f"tensor {name}: data_offsets hold {stop - start} bytes,"
            f" {dtype.name} of shape {shape} takes {nbytes}"
        )
    shape = shapes.setdefault(tuple(shape), tuple(shape))
    return TensorInfo(name, dtype, shape, data_start + start, data_start + stop)


def _count_elements(shape: list[int]) -> int:
    """The product of a shape; FormatError where it overflows on its way, as safetensors' does.

    So [0, 2**63, 4] has no elements, and [2**63, 4, 0] is refused.
    """
    elements = 1
    for size in shape:
        elements *= size
        if elements >= _SIZE_LIMIT:
            raise FormatError(f"shape {shape} has more than 2**64 elements")
    return elements
