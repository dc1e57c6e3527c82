"""Running a command of ours: within the test's own process, or in one that is killed midway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowmem_adamms.cli import main

ROOT = Path(__file__).parent.parent

_KILLED = """
import os, signal, sys
from lowmem_adamms import cli
from lowmem_adamms.merging import disk_sink, loop, writer
words = sys.argv[1:]
disk_sink.WINDOW = loop.WINDOW = writer.REMOTE_WINDOW = 4096
disk_sink.DURABLE = 10_000
if "--quantize" in words:
    from lowmem_adamms.quantizing import quantizing_sink
    quantizing_sink.WINDOW = 4096
pwrite, count = os.pwrite, 0
def killing(*args):
    global count
    count += 1
    if count == 60:
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(*args)
os.pwrite = killing
cli.main(words)
"""


def run(*words: object) -> int:
    """The exit code of a command, wherever it comes from."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def run_until_killed(words: Sequence[object], *, env: Mapping[str, str] | None = None) -> None:
    """Run a command, in small windows, until SIGKILL at its sixtieth write."""
    argv = [sys.executable, "-c", _KILLED, *map(str, words)]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, **(env or {})}, check=False)
    assert done.returncode == -signal.SIGKILL
