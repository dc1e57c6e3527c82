"""Measures what else a user could merge with, on a linear merge, half and half.

    python bench/synthetic.py PAIR --kind qwen2 --size full
    python bench/rivals.py PAIR/base PAIR/donor OUT_DIR [--runs 3] [--only NAME ...] [--env FOLDER]

BASE and DONOR must have the same architecture, as mergekit wants it. Every row starts with its
inputs out of the page cache, its program's imports in it, and free memory settled; a copy limit
taken just before says what the machine could do at that moment; the output is synced (timed apart,
as `sync_s`) and deleted. mergekit gets an environment of its own, because it may want other
versions than we do; it is made on first use. The other rows, ours among them, run with this
interpreter and need torch and safetensors. What else there is to say of ours: see merge.py.

The rivals take turns, as often as --runs says. Prints a row a run, a table of medians and, last,
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from measure import IMPORTS, ROOT, all_files, copy_limit, drop_caches, evict, measure, settled

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
MERGEKIT = ["torch==2.13.0", "mergekit==0.1.5"]
RECIPE = """\
merge_method: linear
models:
  - model: {base}
    parameters: {{weight: 0.5}}
  - model: {donor}
    parameters: {{weight: 0.5}}
dtype: bfloat16
"""
COSTS = ("wall_s", "cpu_s", "peak_anon_bytes", "peak_rss_bytes")
TUNED = {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass(frozen=True)
class Job:
    """One merge to make: of the base, the donor and others; the output has `bytes`.

    mergekit lives in `env`.
    """

    inputs: tuple[Path, ...]
    out: Path
    bytes: int
    env: Path


@dataclass(frozen=True)
class Rival:
    """How to start one merger: `prepare` puts its imports into the page cache."""

    prepare: Callable[[Job], list[str]]
    command: Callable[[Job], list[str]]
    env: dict[str, str] = field(default_factory=dict)


def mergekit(*options: str) -> Callable[[Job], list[str]]:
    """The command of a mergekit run with these options; writes the recipe for it."""

    def command(job: Job) -> list[str]:
        recipe = job.out.with_name("linear.yaml")
        base, donor = map(quote, job.inputs)
        recipe.write_text(RECIPE.format(base=base, donor=donor))
        return [str(mergekit_program(job.env)), str(recipe), str(job.out), *options]

    return command


def quote(path: Path) -> str:
    """A path as a YAML string."""
    return json.dumps(str(path))


def mergekit_help(job: Job) -> list[str]:
    """A command that imports what mergekit imports."""
    return [str(mergekit_program(job.env)), "--help"]


def script(name: str) -> Callable[[Job], list[str]]:
    """The command of a script that stands beside this one."""
    return lambda job: [sys.executable, str(HERE / name), *map(str, (*job.inputs, job.out))]


def import_torch(_job: Job) -> list[str]:
    """A command that imports what the scripts import."""
    return [sys.executable, "-c", "import torch, safetensors.torch"]


def ours(job: Job) -> list[str]:
    """The command of our own merge."""
    out = ["-o", str(job.out), "--alpha", "0.5"]
    return [sys.executable, "-m", "lowmem_adamms", *map(str, job.inputs), *out]


def import_ours(_job: Job) -> list[str]:
    """A command that imports what our merge imports, and compiles its kernel the first time."""
    return [sys.executable, "-c", IMPORTS]


FASTER = ("--lazy-unpickle", "--async-write", "--write-threads", "2")
RIVALS = {
    "lowmem-adamms": Rival(import_ours, ours),
    "mergekit": Rival(mergekit_help, mergekit("--lazy-unpickle")),
    "mergekit-tuned": Rival(mergekit_help, mergekit(*FASTER), TUNED),
    "nine-lines": Rival(import_torch, script("nine_lines.py")),
    "whole-model": Rival(import_torch, script("whole_model.py")),
}


def mergekit_program(env: Path) -> Path:
    """mergekit-yaml in its own environment, which is made if it is missing."""
    program = env / "bin" / "mergekit-yaml"
    if not program.exists():
        print(f"installing {' '.join(MERGEKIT)} into {env}", file=sys.stderr)
        checked([sys.executable, "-m", "venv", str(env)])
        checked([str(env / "bin" / "python"), "-m", "pip", "install", "--quiet", *MERGEKIT])
    return program


def checked(argv: list[str]) -> None:
    """Runs a command that must succeed."""
    done = subprocess.run(
        argv, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    if done.returncode:
        why = last_line(done.stdout)
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {why}")


def last_line(text: str) -> str:
    """Where a traceback says what happened."""
    return (text.strip().splitlines() or ["no output"])[-1]


def run_row(name: str, rival: Rival, job: Job) -> dict[str, Any]:
    """One rival from cold inputs to synced output; a row with `failed` where it did not work."""
    try:
        prepare, command = rival.prepare(job), rival.command(job)
        drop_caches(job.inputs)
        checked(prepare)
        with settled(job.out.parent, 4 * job.bytes):
            limit = copy_limit(job.inputs[:1], job.inputs[1:], job.bytes, job.out)
            evict(job.inputs)
            run = measure(command, cwd=ROOT, env={"HF_HUB_OFFLINE": "1", **rival.env})
            if run.returncode:
                raise RuntimeError(f"ended with {run.returncode}: {last_line(run.stdout_tail)}")
            sync_s = sync(job.out)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return {"name": name, "failed": str(error)}
    finally:
        shutil.rmtree(job.out, ignore_errors=True)
    costs = {key: value for key, value in asdict(run).items() if key in COSTS}
    ratio = (run.wall_s + sync_s) / limit
    return {"name": name, **costs, "sync_s": sync_s, "copy_limit_s": limit, "ratio": ratio}


def sync(folder: Path) -> float:
    """Seconds until everything in the folder is on the disk."""
    start = time.perf_counter()
    for path in all_files([folder]):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


HEADS = ("limit s", "wall s", "sync s", "x limit", "cpu s", "anon MiB", "rss MiB")


def table_line(row: dict[str, Any]) -> str:
    """A row for people."""
    if "failed" in row:
        return f"{row['name']:<26}failed: {row['failed']}"
    times = (row["copy_limit_s"], row["wall_s"], row["sync_s"], row["ratio"], row["cpu_s"])
    memory = (row["peak_anon_bytes"] / 2**20, row["peak_rss_bytes"] / 2**20)
    return f"{row['name']:<26}" + "".join(f"{value:>10.2f}" for value in (*times, *memory))


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One rival's runs as one row: the median of each figure, of the runs that worked."""
    worked = [row for row in rows if "failed" not in row]
    if not worked:
        return rows[-1]
    figures = {key: [row[key] for row in worked] for key in worked[0] if key != "name"}
    return {"name": worked[0]["name"]} | {key: median(found) for key, found in figures.items()}


def take_turns(rivals: Mapping[str, Rival], job: Job, runs: int) -> dict[str, Any]:
    """The rows of each rival, one a run, which are printed as they come, and their medians.

    The job's output is made in a folder of its own beside where it says.
    """
    print(" " * 26 + "".join(f"{head:>10}" for head in HEADS))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in rivals}
    for name in [*rivals] * runs:
        with tempfile.TemporaryDirectory(dir=job.out.parent) as scratch:
            here = replace(job, out=Path(scratch) / job.out.name)
            rows[name].append(run_row(name, rivals[name], here))
        print(table_line(rows[name][-1]), flush=True)
    print(f"medians of {runs} runs")
    for found in rows.values():
        print(table_line(medians(found)))
    return rows


def main() -> None:
    """Measures the chosen rivals in turn."""
    parser = argparse.ArgumentParser(description="Measure other mergers on the same merge.")
    parser.add_argument("base", type=Path)
    parser.add_argument("donor", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=RIVALS, nargs="+", default=list(RIVALS))
    parser.add_argument("--env", type=Path, default=CACHE / "lowmem-adamms-bench" / "mergekit")
    args = parser.parse_args()
    base, donor = args.base.resolve(), args.donor.resolve()
    out_bytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    args.out_dir.mkdir(parents=True, exist_ok=True)
    job = Job((base, donor), args.out_dir.resolve() / "merged", out_bytes, args.env.absolute())
    rows = take_turns({name: RIVALS[name] for name in args.only}, job, args.runs)
    print(json.dumps({"benchmark": "rivals", "bytes": out_bytes, "rows": rows}))


if __name__ == "__main__":
    main()
