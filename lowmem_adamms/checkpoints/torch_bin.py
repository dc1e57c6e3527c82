"""Tensors of a torch `.bin` file as spans, located without running code of the file's.

torch's restricted unpickler, on the meta device, executes nothing and reads no tensor, but notes
each storage's offset in the zip file (`_checkpoint_offset`). Needs the zip format of torch 1.6 and
later.
"""

from __future__ import annotations

import math
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import FormatError, first_line
from .dtypes import FROM_TORCH
from .safetensors_header import refuse_lfs_pointer
from .span import Span

_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    OSError,
    RuntimeError,
)
"""What Python's zipfile raises on damaged files."""


def read_spans(path: Path) -> Iterator[tuple[str, Span]]:
    """Name and span of every tensor of a torch file, in the order of their bytes."""
    refuse_lfs_pointer(path)
    import torch

    try:
        if not zipfile.is_zipfile(path):
            raise FormatError(
                f"{path}: not a zip; truncated, or a torch file older than 1.6, which cannot be"
                " mapped: load and save it once with a current torch"
            )
        with zipfile.ZipFile(path) as archive:
            _check_zip(path, archive)
    except _ZIP_ERRORS as error:
        raise FormatError(f"{path}: damaged zip ({error}); download it again") from None
    try:
        state = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:
        raise FormatError(f"{path}: {_explain_refusal(error)}") from None
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise FormatError(f"{path}: holds a {type(state).__name__}, expected a dict of tensors")
    file_size = path.stat().st_size
    for name, tensor in sorted(state.items(), key=_offset_and_name):
        yield str(name), _span(path, file_size, str(name), tensor)


def _explain_refusal(error: Exception) -> str:
    """Why torch does not load a file, without its advice to load it unsafely."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return (
            f"holds not only tensors but {code[1]}, which may run code as it is loaded; get the"
            " model as safetensors, or save its state_dict alone"
        )
    return f"torch cannot read it: {first_line(error).partition('. ')[0]}"


def _check_zip(path: Path, archive: zipfile.ZipFile) -> None:
    """What torch does not check before it maps: plain records, in our byte order."""
    for item in archive.infolist():
        if item.compress_type != zipfile.ZIP_STORED:
            raise FormatError(f"{path}: {item.filename} is compressed; expected stored records")
        if item.filename.endswith("/byteorder") and archive.open(item).read(16) != b"little":
            raise FormatError(f"{path}: its numbers are not little-endian")


def _is_strided(tensor: Any) -> bool:
    return str(getattr(tensor, "layout", "")) == "torch.strided"


def _offset_and_name(item: tuple[Any, Any]) -> tuple[int, str]:
    name, tensor = item
    storage = tensor.untyped_storage() if _is_strided(tensor) else None
    return getattr(storage, "_checkpoint_offset", 0), str(name)


def _span(path: Path, file_size: int, name: str, tensor: Any) -> Span:
    """Where one tensor's bytes lie in the file; FormatError unless they are one plain run."""
    dtype = FROM_TORCH.get(str(getattr(tensor, "dtype", "")).removeprefix("torch."))
    if dtype is None or not _is_strided(tensor) or not tensor.is_contiguous():
        raise FormatError(f"{path}: {name} is not a plain contiguous tensor")
    storage_offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if storage_offset is None or sys.byteorder != "little":
        raise FormatError(f"{path}: this torch cannot locate tensors in a .bin; use torch 2.13")
    start = storage_offset + tensor.storage_offset() * dtype.itemsize
    shape = tuple(tensor.shape)
    stop = start + dtype.nbytes(math.prod(shape))
    if not 0 <= start <= stop <= file_size:
        raise FormatError(f"{path}: {name} lies outside the file; truncated? Download it again")
    return Span(path, dtype, start, stop, shape)
