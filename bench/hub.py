"""Measures a merge streamed from a Hub over TLS against the local merge of the same pair.

    python bench/synthetic.py PAIR --size 1gb
    python bench/hub.py PAIR [--runs 3] [--cold] [--plain]

The Hub is tests/hub_server.py in a process of its own on this machine, serving PAIR over HTTPS with
a certificate made on the spot (--plain: over HTTP, which tells what TLS costs). Each run merges the
folders, then with `--no-cache` what the server has, each as a whole process, inputs in the page
cache (or, with --cold, out of it) just before; the bytes of the outputs are compared. Memory:
RssAnon at its peak, and of a process that has only done the imports. Disk: the streamed merge runs
with its temporary files, its cache and its output in one folder, whose size is watched: it must
never hold the inputs. Processor time: of the merges, and of the server, which runs on the same
cores. Beside them stands what fetching alone costs: a process that asks the server for the same
bytes in requests of the same size and drops them; and sha256 of the base, the other thing that a
merge of folders has no need of. Prints a table and, last, one line of JSON.
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
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Run, evict, measure, settled, warm

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = """
import lowmem_adamms, rich.progress, huggingface_hub
from huggingface_hub import HfApi, get_hf_file_metadata, get_session, hf_hub_url, snapshot_download
from lowmem_adamms.merging import range_source
from lowmem_adamms.kernels import cpu
get_session()
cpu.warm()
"""
RSS_ANON = (
    "\nprint(next(line.split()[1] for line in open('/proc/self/status') if 'RssAnon' in line))"
)
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
before = time.perf_counter(), time.process_time()
with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
    list(pool.map(fetch, jobs))
print(time.perf_counter() - before[0], time.process_time() - before[1])
"""
DIGEST = """
import hashlib, sys, time
from pathlib import Path
before, total = time.process_time(), hashlib.sha256()
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(1 << 20))
        while count := file.readinto(buffer):
            total.update(buffer[:count])
print(time.process_time() - before)
"""


@contextlib.contextmanager
def hub_server(*words: str, tls: bool = False) -> Iterator[tuple[dict[str, str], int]]:
    """The tests' server: the environment in which it is the Hub, and its process's id."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, str(ROOT / "tests" / "hub_server.py"), *words]
        argv += ["--tls", folder] if tls else []
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdin is not None and server.stdout is not None
            env = {"HF_ENDPOINT": server.stdout.readline().strip(), "HF_HUB_OFFLINE": "0"}
            if tls:
                env["SSL_CERT_FILE"] = str(Path(folder, "certificate.pem"))
            try:
                yield env, server.pid
            finally:
                server.stdin.close()


def anon_after(code: str) -> int:
    """RssAnon in bytes of a process that has run `code`."""
    return int(numbers(code + RSS_ANON)[0]) * 1024


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def numbers(code: str, *words: str, env: dict[str, str] | None = None) -> list[float]:
    """What a script prints last, run in a process of its own."""
    argv = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        argv, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | (env or {})
    )
    return [float(word) for word in done.stdout.split()]


class Watch:
    """The most that a folder holds while the block runs, in bytes on the disk."""

    def __init__(self, folder: Path) -> None:
        self.peak, self._folder, self._done = 0, folder, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            with contextlib.suppress(OSError):  # a folder that has just gone
                self.peak = max(self.peak, sum(map(_blocks, self._folder.rglob("*"))))


def _blocks(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512 if path.is_file() else 0
    except OSError:
        return 0  # it has just gone


def merged(refs: list[str], out: Path, *options: str, env: dict[str, str] | None = None) -> Run:
    """One merge as a whole process."""
    argv = [sys.executable, "-m", "lowmem_adamms", *refs, "-o", str(out), "--alpha", "0.3"]
    run = measure([*argv, *options], cwd=ROOT, env=env)
    if run.returncode:
        raise SystemExit(run.stdout_tail)
    return run


def compare(
    pair: Path, hub: dict[str, str], pid: int, scratch: Path, *, cold: bool
) -> dict[str, Any]:
    """The local merge, the streamed one, and whether they wrote the same shards."""
    prepare = evict if cold else warm
    inputs = [pair / "base", pair / "donor"]
    prepare(inputs)
    local = merged([str(side) for side in inputs], scratch / "local")
    home = scratch / "streamed"
    home.mkdir()
    places = {"HF_HOME": home / "hf", "HF_HUB_CACHE": home / "hf" / "hub", "TMPDIR": home}
    env = hub | {key: str(path) for key, path in places.items()}
    prepare(inputs)
    before = cpu_of(pid)
    with Watch(home) as watch:
        remote = merged(["bench/base", "bench/donor"], home / "out", "--no-cache", env=env)
    after = cpu_of(pid)
    fetch_s, fetch_cpu_s = numbers(FETCH, env=env)
    names = [path.name for path in (scratch / "local").glob("*.safetensors")]
    _, odd, lost = filecmp.cmpfiles(scratch / "local", home / "out", names, shallow=False)
    return {
        "local_s": local.wall_s,
        "hub_s": remote.wall_s,
        "ratio": remote.wall_s / local.wall_s,
        "local_cpu_s": local.cpu_s,
        "hub_cpu_s": remote.cpu_s,
        "server_cpu_s": after - before,
        "fetch_alone_s": fetch_s,
        "fetch_alone_cpu_s": fetch_cpu_s,
        "local_peak_anon_bytes": local.peak_anon_bytes,
        "hub_peak_anon_bytes": remote.peak_anon_bytes,
        "peak_disk_bytes": watch.peak,
        "same_bytes": bool(names) and not odd and not lost,
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Measure a merge streamed from a Hub.")
    parser.add_argument("pair", type=Path, help="what synthetic.py made: PAIR/base and PAIR/donor")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="evict the inputs before each merge")
    parser.add_argument("--plain", action="store_true", help="serve over HTTP, without TLS")
    args = parser.parse_args()
    pair = args.pair.resolve()
    sizes = {
        side: sum(file.stat().st_size for file in (pair / side).glob("*.safetensors"))
        for side in ("base", "donor")
    }
    report: dict[str, Any] = {"benchmark": "hub", "bytes": sizes, "cold": args.cold}
    report["tls"] = not args.plain
    report["anon_after_imports_bytes"] = anon_after(IMPORTS)
    print(f"anonymous after imports: {report['anon_after_imports_bytes'] / 2**20:.1f} MiB")
    (report["sha256_of_base_cpu_s"],) = numbers(DIGEST, str(pair / "base"))
    print(f"sha256 of the base: {report['sha256_of_base_cpu_s']:.2f} s of processor time")
    heads = (
        *("local s", "hub s", "ratio", "cpu s", "hub cpu s", "server cpu", "fetch s"),
        *("fetch cpu", "anon MiB", "hub anon", "disk MB"),
    )
    print("".join(f"{head:>11}" for head in heads), flush=True)
    report["runs"] = []
    repos = [f"bench/{side}={pair / side}" for side in ("base", "donor")]
    with hub_server(*repos, tls=not args.plain) as (hub, pid):
        for _ in range(args.runs):
            with tempfile.TemporaryDirectory(dir=pair) as folder:
                with settled(folder, 4 * sum(sizes.values()) if args.cold else 0):
                    row = compare(pair, hub, pid, Path(folder), cold=args.cold)
                report["runs"].append(row)
                memory = [row[f"{side}_peak_anon_bytes"] / 2**20 for side in ("local", "hub")]
                times = [row[key] for key in ("local_s", "hub_s", "ratio")]
                cpu = [row[f"{who}_cpu_s"] for who in ("local", "hub", "server")]
                cpu += [row["fetch_alone_s"], row["fetch_alone_cpu_s"]]
                values = (*times, *cpu, *memory, row["peak_disk_bytes"] / 1e6)
                print("".join(f"{value:>11.2f}" for value in values), flush=True)
                os.sync()
    report["same_bytes"] = all(row["same_bytes"] for row in report["runs"])
    report["median_ratio"] = statistics.median(row["ratio"] for row in report["runs"])
    most = max(row["hub_peak_anon_bytes"] for row in report["runs"])
    report["anon_above_imports_bytes"] = most - report["anon_after_imports_bytes"]
    print(f"median ratio {report['median_ratio']:.2f}, same bytes: {report['same_bytes']}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
