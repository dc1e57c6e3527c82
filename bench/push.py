"""Measures what pushing adds to the memory of a merge, against a server on this machine.

    python bench/synthetic.py PAIR --size 1gb
    python bench/push.py PAIR

The same merge without and with --push-to-hub, as processes of their own, and a process that only
imports huggingface_hub. The server (tests/hub_server.py) is another process, which is not
counted and keeps what it is sent in memory. Nothing is said about the time an upload takes. Prints
a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import measure

ROOT = Path(__file__).resolve().parent.parent
RSS_ANON = "print(next(line.split()[1] for line in open('/proc/self/status') if 'RssAnon' in line))"
IMPORTS = "from huggingface_hub import CommitOperationAdd, HfApi, ModelCard; HfApi()"


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The address of a server in a process of its own."""
    argv = [sys.executable, str(ROOT / "tests" / "hub_server.py")]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        yield process.stdout.readline().strip()
        process.stdin.close()


def anon_after(code: str) -> int:
    """RssAnon in bytes of a process that has run `code`."""
    argv = [sys.executable, "-c", f"{code}; {RSS_ANON}"]
    return int(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout) * 1024


def merged(pair: Path, *more: str, env: dict[str, str] | None = None) -> int:
    """Peak anonymous bytes of one merge."""
    with tempfile.TemporaryDirectory(dir=pair.parent) as folder:
        argv = [sys.executable, "-m", "lowmem_adamms", str(pair / "base"), str(pair / "donor")]
        done = measure([*argv, "-o", f"{folder}/out", "--alpha", "0.3", *more], cwd=ROOT, env=env)
        if done.returncode:
            raise SystemExit(done.stdout_tail)
        return done.peak_anon_bytes


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Measure what pushing adds to a merge's memory.")
    parser.add_argument("pair", type=Path, help="what synthetic.py made: PAIR/base and PAIR/donor")
    pair = parser.parse_args().pair.resolve()
    report = {"python": anon_after("pass"), "huggingface_hub": anon_after(IMPORTS)}
    report["merge"] = merged(pair)
    with server() as url:
        env = {**os.environ, "HF_ENDPOINT": url, "HF_TOKEN": "tok"}
        report["merge_and_push"] = merged(pair, "--push-to-hub", "lab/merged", env=env)
    for name, value in report.items():
        print(f"{name:<16}{value / 2**20:>8.1f} MiB anonymous")
    print(json.dumps({"benchmark": "push", **{f"{k}_bytes": v for k, v in report.items()}}))


if __name__ == "__main__":
    main()
