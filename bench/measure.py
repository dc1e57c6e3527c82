"""Measures a command as the kernel sees it: wall, processor time and memory of its process tree.

`measure(argv) -> Run`, `run_merge(*words)` for ours; `anonymous_after(code)` and `watched()` for
memory alone; `evict`, `drop_caches`, `warm` and `settled` for the page cache; `copy_limit`, the
time in which this machine can read two sides and write a third; `memory_copy_bandwidth`.

Memory is sampled every 10 ms (a shorter peak can be missed) and summed over the tree (a page that
a fork still shares counts in both processes). Descendants are noticed within 100 ms. What to run,
how often and what it means is left to the callers. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

StrPath = str | os.PathLike[str]
T = TypeVar("T")

MIB = 1 << 20
CHUNK = 8 * MIB
PAGE = os.sysconf("SC_PAGE_SIZE")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the scripts find the package where it is not installed
IMPORTS = "import lowmem_adamms, rich.progress; from lowmem_adamms.kernels import cpu; cpu.warm()"
"""What a merge imports; it compiles the kernel the first time."""
SAMPLE_S = 0.01
SAMPLES_PER_SCAN = 10  # new descendants are looked for every 100 ms


@dataclass(frozen=True)
class Run:
    """What one command cost. Processor time and memory include its descendants."""

    wall_s: float
    cpu_s: float
    peak_anon_bytes: int
    peak_rss_bytes: int
    returncode: int
    stdout_tail: str


# --- a command ----------------------------------------------------------------------------------


def measure(
    argv: Sequence[StrPath], *, cwd: StrPath | None = None, env: Mapping[str, str] | None = None
) -> Run:
    """Runs a command to its end. `env` is added to this process's environment."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(
            [os.fspath(word) for word in argv],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        sampler = _Sampler(child.pid)
        try:
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            sampler.stop()
            if child.returncode is None:
                child.kill()
                child.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - 4096))
        tail = output.read().decode(errors="replace")
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall, cpu, sampler.peak_anon, sampler.peak_rss, child.returncode, tail)


class _Sampler:
    """Watches the memory of a process and its descendants from a thread of ours."""

    def __init__(self, pid: int) -> None:
        self.peak_anon = self.peak_rss = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        tree, samples = [self._pid], 0
        while not self._done.is_set():
            if samples % SAMPLES_PER_SCAN == 0:
                tree = process_tree(self._pid)
                self.peak_rss = max(self.peak_rss, *map(highest_resident, tree))
            samples += 1
            memory = [anonymous_and_resident(pid) for pid in tree]
            self.peak_anon = max(self.peak_anon, sum(anonymous for anonymous, _ in memory))
            self.peak_rss = max(self.peak_rss, sum(resident for _, resident in memory))
            self._done.wait(SAMPLE_S)


def process_tree(root: int) -> list[int]:
    """The process and its descendants, the root first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
        except OSError:
            continue  # it has just ended
        children.setdefault(parent, []).append(int(folder.name))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def anonymous_and_resident(pid: int) -> tuple[int, int]:
    """RssAnon and VmRSS in bytes, from the file that is cheapest to read; 0 once it has ended."""
    try:
        resident, shared = map(int, Path(f"/proc/{pid}/statm").read_bytes().split()[1:3])
    except OSError:
        return 0, 0
    return (resident - shared) * PAGE, resident * PAGE


def highest_resident(pid: int) -> int:
    """VmHWM in bytes: the kernel's own record of the resident peak of one process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_bytes().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(b"VmHWM")), 0)


def run_merge(*words: StrPath, env: Mapping[str, str] | None = None) -> Run:
    """Runs one of our merges, at alpha 0.3. words: models, and options such as -o."""
    argv = [sys.executable, "-m", "lowmem_adamms", "merge", *words, "--alpha", "0.3"]
    run = measure(argv, cwd=ROOT, env=env)
    if run.returncode:
        raise SystemExit(run.stdout_tail)
    return run


def anonymous_after(code: str = IMPORTS) -> int:
    """RssAnon in bytes of a process that has run this code."""
    argv = [sys.executable, "-c", f"{code}\n{_PRINT_RSS_ANON}"]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return int(done.stdout) * 1024


_PRINT_RSS_ANON = """
print(next(line.split()[1] for line in open('/proc/self/status') if 'RssAnon' in line))
"""


@contextlib.contextmanager
def sampled(read: Callable[[], int], every_s: float) -> Iterator[list[int]]:
    """What `read` returns, again and again while the block runs."""
    found, stop = [read()], threading.Event()

    def watch() -> None:
        while not stop.wait(every_s):
            found.append(read())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def watched() -> contextlib.AbstractContextManager[list[int]]:
    """RssAnon of this process in bytes, every 5 ms while the block runs."""
    return sampled(lambda: anonymous_and_resident(os.getpid())[0], 0.005)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, and what it returns."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


# --- the page cache -----------------------------------------------------------------------------


def all_files(paths: Iterable[StrPath]) -> Iterator[Path]:
    """The given files, and every file below the given folders."""
    for path in map(Path, paths):
        yield from sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def evict(paths: Iterable[StrPath]) -> None:
    """Puts files and folders out of the page cache; needs no rights."""
    for path in all_files(paths):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drop_caches(paths: Iterable[StrPath]) -> None:
    """Evicts files and folders; as root also everything else, imported libraries included."""
    evict(paths)
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a container may lack the right
            Path("/proc/sys/vm/drop_caches").write_text("3")


def warm(paths: Iterable[StrPath]) -> None:
    """Reads files and folders into the page cache."""
    _read_all(all_files(paths), release=False)


@contextlib.contextmanager
def settled(folder: StrPath, most_bytes: int) -> Iterator[None]:
    """Free memory full of clean cache pages (of a file of holes), as after days of other work.

    A virtual machine may hand free memory back to its host, and touching it again then costs
    seconds a gigabyte: without this, that is charged to whoever happens to use it first. Works
    only if the free memory is full, so `most_bytes` is what the measured command might touch.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * PAGE - 512 * MIB
    with tempfile.NamedTemporaryFile(dir=folder) as holes:
        holes.truncate(max(0, min(free, most_bytes)))
        warm([holes.name])
        yield


# --- the limits of the machine ------------------------------------------------------------------


def copy_limit(
    inputs_a: Sequence[StrPath], inputs_b: Sequence[StrPath], out_bytes: int, out_path: StrPath
) -> float:
    """Seconds to read both sides and write `out_bytes` at once, fsync included, no arithmetic.

    Runs in a process of its own and removes `out_path` afterwards.
    """
    argv = [sys.executable, __file__, out_path, str(out_bytes)]
    argv += ["--base", *inputs_a, "--donor", *inputs_b]
    return float(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _copy(sides: Sequence[Iterable[StrPath]], out: Path, out_bytes: int) -> float:
    lists = [list(all_files(side)) for side in sides]
    start = time.perf_counter()
    with ThreadPoolExecutor(len(lists) + 1) as pool:
        writer = pool.submit(_write, out, out_bytes)
        readers = [pool.submit(_read_all, files, release=True) for files in lists]
        for future in (writer, *readers):
            future.result()
    return time.perf_counter() - start


def _read_all(files: Iterable[Path], *, release: bool) -> None:
    buffer = mmap.mmap(-1, CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            at = 0
            while count := os.preadv(file.fileno(), [buffer], at):
                if release:
                    os.posix_fadvise(file.fileno(), at, count, os.POSIX_FADV_DONTNEED)
                at += count


def _write(path: Path, length: int) -> None:
    chunk = memoryview(os.urandom(CHUNK))
    behind = 8 * CHUNK
    with path.open("wb", buffering=0) as file:
        fd = file.fileno()
        os.posix_fallocate(fd, 0, length)
        for at in range(0, length, CHUNK):
            os.pwrite(fd, chunk[: length - at], at)
            _sync_range(fd, at, CHUNK, START_WRITE)
            if at >= behind:
                _sync_range(fd, at - behind, CHUNK, WAIT_WRITTEN)
                os.posix_fadvise(fd, at - behind, CHUNK, os.POSIX_FADV_DONTNEED)
        os.fsync(fd)


START_WRITE, WAIT_WRITTEN = 2, 7  # flags of sync_file_range(2)
_LIBC = ctypes.CDLL(None)


def _sync_range(fd: int, at: int, length: int, flags: int) -> None:
    _LIBC.sync_file_range(fd, ctypes.c_int64(at), ctypes.c_int64(length), ctypes.c_uint(flags))


def memory_copy_bandwidth(threads: int) -> float:
    """Bytes read plus bytes written a second, copying arrays far larger than any cache."""
    pairs = [(np.ones(256 * MIB, np.uint8), np.ones(256 * MIB, np.uint8)) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(7):
            start = time.perf_counter()
            for _done in pool.map(lambda pair: np.copyto(*pair), pairs):
                pass
            best = min(best, time.perf_counter() - start)
    return 2 * 256 * MIB * threads / best


def main() -> None:
    """Print the seconds of a copy, in a process of its own."""
    parser = argparse.ArgumentParser(
        description="Read two sides and write a file: how many seconds?"
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("bytes", type=int)
    parser.add_argument("--base", type=Path, nargs="+", required=True)
    parser.add_argument("--donor", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    try:
        print(_copy([args.base, args.donor], args.out, args.bytes))
    finally:
        args.out.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
