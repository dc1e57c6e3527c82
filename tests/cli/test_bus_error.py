"""An input that is cut short while it is read: one line, whatever thread meets it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command import Forker

from lowmem_adamms.cli import _CUT_SHORT

PROGRAM = """
import os, threading
import numpy as np
from pathlib import Path
from lowmem_adamms import cli
from lowmem_adamms.checkpoints.mapped_files import MappedFile
from lowmem_adamms.kernels import cpu

def lose_an_input():
    path = Path({path!r})
    mapped = MappedFile(path)
    view = mapped.view(0, path.stat().st_size)
    os.truncate(path, 0)
    {read}

cli.main = lose_an_input
cli.process()
"""
READS = {
    "python": "bytes(view)",
    "kernel": "out = np.zeros(view.size, np.uint8); cpu.blend([(view, view, out)] * 3,"
    " ('BF16',) * 3, 0.3)",
    "another thread": "thread = threading.Thread(target=lambda: view.sum()); thread.start();"
    " thread.join()",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
@pytest.mark.parametrize("read", READS)
def test_an_input_that_is_cut_short_is_one_line(read: str, tmp_path: Path, forker: Forker) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(16 << 20))
    done = forker.run((), setup=PROGRAM.format(read=READS[read], path=str(path)))
    assert (done.returncode, done.stderr) == (2, f"error: {_CUT_SHORT.decode()}\n")
