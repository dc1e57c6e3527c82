"""One safetensors header: parse, validate, emit. Knows bytes and names, not folders or models.

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
MAX_SIZE = 1 << 64
_POINTER = b"version https://git-lfs.github.com/spec/"  # git-lfs/git-lfs, docs/spec.md


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

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return self.tensors[-1].stop if self.tensors else self.data_start


def refuse_lfs_pointer(path: Path) -> None:
    """FormatError if a clone without Git LFS left a few lines of text where `path` should be."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise FormatError(
                f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
                " or download it"
            )


def read_header(path: Path) -> Header:
    """The header of `path`, read without touching its data. FormatError names what is wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8:
            raise FormatError(f"{path}: {size} bytes is too short for a safetensors file")
        if length > MAX_HEADER_BYTES:
            refuse_lfs_pointer(path)  # its first letters make a number as large
            raise FormatError(
                f"{path}: header says it is {length} bytes long, at most {MAX_HEADER_BYTES} is"
                " allowed; not a safetensors file?"
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
    """Validate the JSON of a header that stands in a file of `file_size` bytes."""
    document = _json_object(raw)
    metadata = document.pop("__metadata__", {})
    if not _is_string_map(metadata):
        raise FormatError("header __metadata__ is not a map of strings to strings")
    data_start = 8 + len(raw)
    infos = [_entry(name, entry, data_start) for name, entry in document.items()]
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
    room: int = 0,
) -> bytes:
    """Length, JSON and padding for tensors laid out one after the other in the order given.

    room: bytes, a multiple of 8, that it is padded to where it takes fewer.
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
    raw += b" " * max(-len(raw) % 8, room - 8 - len(raw))
    return len(raw).to_bytes(8, "little") + raw


def _json_object(raw: bytes) -> dict[str, Any]:
    """The header as a dict; duplicate names, bad UTF-8 and non-objects are FormatErrors."""

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twin, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise FormatError(f"header names {twin!r} twice")
        return found

    try:
        document = json.loads(raw.decode(), object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"header is not JSON ({error})") from None
    if not isinstance(document, dict):
        raise FormatError("header is not a JSON object")
    try:
        "".join(document).encode()
    except UnicodeEncodeError:
        raise FormatError("header has a tensor name that is not Unicode text") from None
    return document


def _is_string_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _entry(name: str, entry: Any, data_start: int) -> TensorInfo:
    """One validated entry; the bytes it claims must be exactly dtype x shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"tensor {name}: expected dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"tensor {name}: unknown dtype {entry['dtype']!r}")
    if not _is_naturals(shape):
        raise FormatError(f"tensor {name}: shape {shape!r} is not a list of sizes")
    if not _is_naturals(offsets) or len(offsets) != 2:
        raise FormatError(f"tensor {name}: data_offsets {offsets!r} is not a pair of positions")
    if any(size > MAX_SIZE for size in (*shape, *offsets)):
        raise FormatError(f"tensor {name}: sizes beyond 2**64 in shape or data_offsets")
    try:
        expected = dtype.nbytes(math.prod(shape))
    except FormatError as error:
        raise FormatError(f"tensor {name}: {error}") from None
    if offsets[1] - offsets[0] != expected:
        raise FormatError(
            f"tensor {name}: data_offsets hold {offsets[1] - offsets[0]} bytes,"
            f" {dtype.name} of shape {shape} takes {expected}"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
