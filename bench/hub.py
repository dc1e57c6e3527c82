"""Measures merges that talk to a Hub: streamed from it against the local merge, and pushed to it.

    python bench/synthetic.py PAIR --size 1gb
    python bench/hub.py PAIR [--runs 3] [--push]

The Hub is tests/hub_server.py in a process of its own on this machine, serving PAIR over HTTPS with
a certificate made on the spot. Each run merges the folders, then with `--no-cache` what the server
has, each as a whole process with its inputs in the page cache; the bytes of the outputs are
compared. Memory: RssAnon at its peak, and of a process that has only done the imports. Disk: the
streamed merge runs with its temporary files, its cache and its output in one folder, whose size is
watched: it must never hold the inputs. Processor time: of the merges, and of the server, which runs
on the same cores. Beside them stands what fetching alone costs: a process that asks the server for
the same bytes in requests of the same size and drops them.

--push: only the memory of a merge without and with --push-to-hub. The server keeps what it is sent
in memory, which is not counted; nothing is said about the time an upload takes.

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from measure import MIB, ROOT, anonymous_after, run_merge, sampled, warm

IMPORTS = """
import lowmem_adamms, rich.progress, huggingface_hub
from huggingface_hub import HfApi, get_hf_file_metadata, get_session, hf_hub_url, snapshot_download
from lowmem_adamms.merging import range_source
from lowmem_adamms.kernels import cpu
get_session()
cpu.warm()
"""
PUSH_IMPORTS = "from huggingface_hub import CommitOperationAdd, HfApi; HfApi()"
FETCH = """
import time
from concurrent.futures import ThreadPoolExecutor
from huggingface_hub import get_session
from lowmem_adamms.checkpoints.checkpoint import open_checkpoint
from lowmem_adamms.hub.remote_file import PARALLEL_REQUESTS
from lowmem_adamms.merging.range_source import REQUEST
files = {}
for ref in ("bench/base", "bench/donor"):
    files |= open_checkpoint(ref, cache=False).remote_files()
def fetch(job):
    file, start = job
    file.read(start, min(start + REQUEST, file.size))
jobs = [(file, at) for file in files.values() for at in range(0, file.size, REQUEST)]
get_session()
before = time.perf_counter()
with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
    list(pool.map(fetch, jobs))
print(time.perf_counter() - before)
"""
COLUMNS = {
    "local_s": 1,
    "hub_s": 1,
    "ratio": 1,
    "local_cpu_s": 1,
    "hub_cpu_s": 1,
    "server_cpu_s": 1,
    "fetch_alone_s": 1,
    "local_anon_mib": MIB,
    "hub_anon_mib": MIB,
    "disk_mb": 1e6,
}
"""Figures of a run, with the unit they are shown in."""


@contextlib.contextmanager
def hub_server(*words: str) -> Iterator[tuple[dict[str, str], int]]:
    """The tests' server: the environment in which it is the Hub, and its process's id."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, str(ROOT / "tests" / "hub_server.py"), *words, "--tls", folder]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdin is not None and server.stdout is not None
            env = {"HF_ENDPOINT": server.stdout.readline().strip(), "HF_HUB_OFFLINE": "0"}
            try:
                yield env | {"SSL_CERT_FILE": str(Path(folder, "certificate.pem"))}, server.pid
            finally:
                server.stdin.close()


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bytes_on_disk(folder: Path) -> int:
    """What a folder holds, up to the first file or folder that has just gone."""
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.rglob("*"):
            total += path.stat().st_blocks * 512
    return total


def compare(pair: Path, hub: dict[str, str], pid: int, scratch: Path) -> dict[str, Any]:
    """The local merge, the streamed one, and whether they wrote the same shards."""
    inputs = [pair / "base", pair / "donor"]
    warm(inputs)
    local = run_merge(*inputs, "-o", scratch / "local")
    home = scratch / "streamed"
    home.mkdir()
    places = {"HF_HOME": home / "hf", "HF_HUB_CACHE": home / "hf" / "hub", "TMPDIR": home}
    env = hub | {key: str(path) for key, path in places.items()}
    warm(inputs)
    before = cpu_of(pid)
    with sampled(partial(bytes_on_disk, home), 0.05) as disk:
        remote = run_merge("bench/base", "bench/donor", "-o", home / "out", "--no-cache", env=env)
    server_cpu_s = cpu_of(pid) - before
    fetch = subprocess.run(
        [sys.executable, "-c", FETCH],
        check=True,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | env,
    )
    names = [path.name for path in (scratch / "local").glob("*.safetensors")]
    _, odd, lost = filecmp.cmpfiles(scratch / "local", home / "out", names, shallow=False)
    return {
        "local_s": local.wall_s,
        "hub_s": remote.wall_s,
        "ratio": remote.wall_s / local.wall_s,
        "local_cpu_s": local.cpu_s,
        "hub_cpu_s": remote.cpu_s,
        "server_cpu_s": server_cpu_s,
        "fetch_alone_s": float(fetch.stdout),
        "local_anon_mib": local.peak_anon_bytes,
        "hub_anon_mib": remote.peak_anon_bytes,
        "disk_mb": max(disk),
        "same_bytes": bool(names) and not odd and not lost,
    }


def measure_streaming(pair: Path, runs: int) -> dict[str, Any]:
    """Compare as often, and show each run."""
    report: dict[str, Any] = {"imports_anon_mib": anonymous_after(IMPORTS) / MIB, "runs": []}
    print(f"anonymous after imports: {report['imports_anon_mib']:.1f} MiB")
    print("".join(f"{name:>15}" for name in COLUMNS), flush=True)
    repos = [f"bench/{side}={pair / side}" for side in ("base", "donor")]
    with hub_server(*repos) as (hub, pid):
        for _ in range(runs):
            with tempfile.TemporaryDirectory(dir=pair) as folder:
                row = compare(pair, hub, pid, Path(folder))
            row |= {name: row[name] / unit for name, unit in COLUMNS.items()}
            report["runs"].append(row)
            print("".join(f"{row[name]:>15.2f}" for name in COLUMNS), flush=True)
            os.sync()
    report["same_bytes"] = all(row["same_bytes"] for row in report["runs"])
    report["median_ratio"] = statistics.median(row["ratio"] for row in report["runs"])
    print(f"median ratio {report['median_ratio']:.2f}, same bytes: {report['same_bytes']}")
    return report


def measure_push(pair: Path) -> dict[str, Any]:
    """Anonymous memory of a merge without and with an upload, and of the imports alone."""

    def merge_anon(*options: str, env: dict[str, str] | None = None) -> int:
        with tempfile.TemporaryDirectory(dir=pair.parent) as folder:
            out = ("-o", Path(folder) / "out")
            run = run_merge(pair / "base", pair / "donor", *out, *options, env=env)
            return run.peak_anon_bytes

    report = {"python": anonymous_after("pass"), "huggingface_hub": anonymous_after(PUSH_IMPORTS)}
    report["merge"] = merge_anon()
    with hub_server() as (env, _):
        options = ("--push-to-hub", "lab/merged")
        report["merge_and_push"] = merge_anon(*options, env=env | {"HF_TOKEN": "tok"})
    for name, value in report.items():
        print(f"{name:<16}{value / MIB:>8.1f} MiB anonymous")
    return {f"{name}_bytes": value for name, value in report.items()}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", type=Path, help="what synthetic.py made: PAIR/base and PAIR/donor")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--push", action="store_true", help="measure an upload's memory instead")
    args = parser.parse_args()
    pair = args.pair.resolve()
    report = measure_push(pair) if args.push else measure_streaming(pair, args.runs)
    print(json.dumps({"benchmark": "hub"} | report))


if __name__ == "__main__":
    main()
