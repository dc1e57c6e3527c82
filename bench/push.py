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
import json
import sys
import tempfile
from pathlib import Path

from hub import ROOT, anon_after, hub_server
from measure import measure

IMPORTS = "from huggingface_hub import CommitOperationAdd, HfApi; HfApi()"


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
    with hub_server() as (env, _):
        options = ("--push-to-hub", "lab/merged")
        report["merge_and_push"] = merged(pair, *options, env=env | {"HF_TOKEN": "tok"})
    for name, value in report.items():
        print(f"{name:<16}{value / 2**20:>8.1f} MiB anonymous")
    print(json.dumps({"benchmark": "push", **{f"{k}_bytes": v for k, v in report.items()}}))


if __name__ == "__main__":
    main()
