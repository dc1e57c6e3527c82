"""Tensors of a torch `.bin` file as spans, located without running code of the file's."""

from __future__ import annotations

import math
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


def read_spans(shard: Path) -> Iterator[tuple[str, Span]]:
    """The tensors of a torch file, located through `torch.load(weights_only=True, mmap=True)`.

    On the meta device torch notes each storage's offset in the zip file (`_checkpoint_offset`),
    so nothing but the pickle of names is read. Needs the zip format of torch 1.6 and later.
    """
    refuse_lfs_pointer(shard)
    import torch

    try:
        if not zipfile.is_zipfile(shard):
            raise FormatError(
                f"{shard}: not a zip; truncated, or a torch file older than 1.6, which cannot be"
                " mapped: load and save it once with a current torch"
            )
        with zipfile.ZipFile(shard) as archive:
            _check_zip(shard, archive)
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        ValueError,
        OSError,
        RuntimeError,
    ) as error:
        raise FormatError(f"{shard}: damaged zip ({error}); download it again") from None
    try:
        state = torch.load(shard, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:
        reason = first_line(error)
        raise FormatError(f"{shard}: torch refuses it under weights_only=True: {reason}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise FormatError(f"{shard}: holds a {type(state).__name__}, expected a dict of tensors")
    size = shard.stat().st_size
    for name, tensor in sorted(state.items(), key=_storage_offset):
        yield str(name), _bin_span(shard, size, str(name), tensor)


def _check_zip(shard: Path, archive: zipfile.ZipFile) -> None:
    """What torch does not check before it maps: plain records, in our byte order."""
    for item in archive.infolist():
        if item.compress_type != zipfile.ZIP_STORED:
            raise FormatError(f"{shard}: {item.filename} is compressed; expected stored records")
        if item.filename.endswith("/byteorder") and archive.open(item).read(16) != b"little":
            raise FormatError(f"{shard}: its numbers are not little-endian")


def _is_strided(tensor: Any) -> bool:
    return str(getattr(tensor, "layout", "")) == "torch.strided"


def _storage_offset(item: tuple[str, Any]) -> tuple[int, str]:
    name, tensor = item
    storage = tensor.untyped_storage() if _is_strided(tensor) else None
    return getattr(storage, "_checkpoint_offset", 0), str(name)


def _bin_span(shard: Path, size: int, name: str, tensor: Any) -> Span:
    """Where one torch tensor's bytes lie in the file; FormatError unless they are one plain run."""
    dtype = FROM_TORCH.get(str(getattr(tensor, "dtype", "")).removeprefix("torch."))
    if dtype is None or not _is_strided(tensor) or not tensor.is_contiguous():
        raise FormatError(f"{shard}: {name} is not a plain contiguous tensor")
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None or sys.byteorder != "little":
        raise FormatError(f"{shard}: this torch cannot locate tensors in a .bin; use torch 2.13")
    start = offset + tensor.storage_offset() * dtype.itemsize
    shape = tuple(tensor.shape)
    stop = start + dtype.nbytes(math.prod(shape))
    if not 0 <= start <= stop <= size:
        raise FormatError(f"{shard}: {name} lies outside the file; truncated? Download it again")
    return Span(shard, dtype, start, stop, shape)
