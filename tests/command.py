"""Running a command of ours: within the test's own process, or in one that is killed midway."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowmem_adamms.cli import main

ROOT = Path(__file__).parent.parent

NUMPY_KERNEL = """
from lowmem_adamms.kernels import select
name = "numba: compiled, parallel"  # but numpy, which has the same bits, loads sooner
select.select_kernel = lambda triples=(): (select.blend_numpy, name)
select._has_numba = lambda: False
"""
_SMALL_WINDOWS = """
from lowmem_adamms.merging import disk_sink, loop, writer
from lowmem_adamms.quantizing import quantizing_sink
disk_sink.WINDOW = loop.WINDOW = writer.REMOTE_WINDOW = quantizing_sink.WINDOW = 4096
disk_sink.DURABLE = 10_000
"""


def run(*words: object) -> int:
    """The exit code of a command, wherever it comes from."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


Done = subprocess.CompletedProcess[str]


class Forker:
    """Runs commands in processes of their own, which are forked instead of started: see forking.py.

    env: what its environment has besides this process's own.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "forking.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})},
        )

    def __enter__(self) -> Forker:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(
        self,
        words: Sequence[object],
        calls: Sequence[str] = (),
        at: int = -1,
        *,
        number: int = signal.SIGKILL,
        setup: str = "",
    ) -> Done:
        """Run a command that is sent signal `number` before call `at`, from 0, of these functions.

        If it is not killed, the last line it prints tells how many of these calls it made. setup:
        Python that runs before the command, or alone if there are no words.
        """
        spelled = [str(word) for word in words]
        job = {"words": spelled, "calls": calls, "at": at, "setup": setup}
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps({**job, "signal": int(number)}), file=self._server.stdin, flush=True)
        return Done(spelled, **json.loads(self._server.stdout.readline()))

    def run_until_killed(self, words: Sequence[object]) -> None:
        """Run a command, in small windows, until SIGKILL at its sixtieth write."""
        done = self.run(words, ["os.pwrite"], 59, setup=NUMPY_KERNEL + _SMALL_WINDOWS)
        assert done.returncode == -signal.SIGKILL, done.stderr
