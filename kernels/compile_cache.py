"""Compiled code is kept on disk where that is possible, and never the reason for a failed merge.

numba alone raises where no folder is writable, as in containers, and at each start once a file of
its cache is damaged. What it keeps is machine code: files are checked by a digest before they run.
"""

# What numba compiles it also types.
# mypy: disable-error-code="attr-defined, no-untyped-call, misc"

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import config
from numba.core.caching import FunctionCache, IndexDataCacheFile

_DIGEST_BYTES = 32


def keep_compiled(dispatcher: Any) -> Any:
    """Keep what an njit function compiles: where numba does, else in a temporary folder of ours.

    Returns the function. Where neither can be written, it is compiled anew in each process.
    """
    usual_folder = config.CACHE_DIR
    for folder in (lambda: usual_folder, _private_folder):
        try:
            config.CACHE_DIR = folder()
            dispatcher._cache = _SafeCache(dispatcher.py_func)
            break
        except (OSError, RuntimeError):  # numba's own for a function without a place
            continue
        finally:
            config.CACHE_DIR = usual_folder
    return dispatcher


def _private_folder() -> str:
    """A folder that nobody else can write to, as it holds code that is run; OSError if none can."""
    folder = Path(tempfile.gettempdir()) / f"lowmem-adamms-{os.geteuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not private")
    return str(folder)


class _SafeCache(FunctionCache):
    """numba's cache of one function, without errors: at worst the function is compiled again."""

    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _CheckedFiles(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
            if found is None or found.signature.args == sig:
                return found
        except Exception:  # damaged bytes end in anything at all
            pass
        with suppress(OSError):
            self.flush()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):  # such as a full disk
            super().save_overload(sig, data)


class _CheckedFiles(IndexDataCacheFile):
    """The files of a cache, each with a digest at its end, which pickle does not read."""

    def _dump(self, obj: Any) -> bytes:
        content: bytes = super()._dump(obj)
        return content + hashlib.sha256(content).digest()

    def _load_data(self, name: str) -> Any:
        raw = Path(self._data_path(name)).read_bytes()
        content, digest = raw[:-_DIGEST_BYTES], raw[-_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError(f"{name} is damaged")
        return pickle.loads(content)
