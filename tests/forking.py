"""The process that `command.Forker` starts: it forks a child for each command it is told.

Importing takes seconds, so it is done once, here. Jobs and what came of them are lines of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import numba  # noqa: F401  (not our kernels, which start threads: those do not survive a fork)

import lowmem_adamms.live.live_model  # noqa: F401
from lowmem_adamms import cli


def run_here(job: dict[str, Any]) -> int:
    """Run a job in this process; a signal comes before the call of its number."""
    exec(job["setup"], {"__name__": "__main__"})
    if not job["words"]:
        return 0
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal count
            if count == job["at"]:
                os.kill(os.getpid(), job["signal"])
            count += 1
            return call(*args, **options)

        return wrapper

    for path in job["calls"]:
        home, _, name = path.rpartition(".")
        setattr(resolve_name(home), name, counted(getattr(resolve_name(home), name)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    code = cli.main(job["words"])
    sys.stdout.write(f"calls {count}\n")
    return code


def run_in_child(job: dict[str, Any]) -> dict[str, Any]:
    """Exit code, or the signal less than 0, and what was printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 1
            try:
                code = run_here(job)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        for file in (out, err):
            file.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return {"returncode": code, "stdout": out.read(), "stderr": err.read()}


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run_in_child(json.loads(line))) + "\n")
        sys.stdout.flush()
