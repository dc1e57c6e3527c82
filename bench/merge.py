"""Measures our merge against what the machine can do, its memory, its kernel and its accuracy.

    python bench/synthetic.py PAIR --size full
    python bench/merge.py PAIR [--runs 3] [--skip-cold] [--skip-warm]

Time: the whole process against the copy limit (two readers, one writer, same bytes, fsync), taken
just before it in the same run; cold means inputs evicted, warm means read beforehand (which needs
twice the pair's size in memory). Memory: RssAnon of the process, and of one that has only done the
imports and loaded the kernel. Kernel: bytes read plus written a second, against numpy's copy.
Accuracy: of the kernel, and of `(w * t).sum()` with bf16 products (with torch), against
exact rounding. Prints a table and, last, one line of JSON. Other mergers: see rivals.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import (
    IMPORTS,
    ROOT,
    anonymous_after,
    copy_limit,
    drop_caches,
    evict,
    memory_copy_bandwidth,
    run_merge,
    settled,
    warm,
)

ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Pair:
    """The folders to merge and the bytes that come out."""

    base: Path
    donor: Path
    bytes: int


def timed_merge(pair: Pair, scratch: Path, prepare: Callable[[list[Path]], None]) -> dict[str, Any]:
    """One copy limit and one merge, each with the inputs prepared the same way just before."""
    inputs = [pair.base, pair.donor]
    prepare(inputs)
    limit = copy_limit([pair.base], [pair.donor], pair.bytes, scratch / "copy")
    prepare(inputs)
    run = run_merge(*inputs, "-o", scratch / "merged")
    return {
        "copy_limit_s": limit,
        "wall_s": run.wall_s,
        "ratio": run.wall_s / limit,
        "cpu_s": run.cpu_s,
        "peak_anon_bytes": run.peak_anon_bytes,
        "peak_rss_bytes": run.peak_rss_bytes,
    }


def merges(pair: Pair, runs: int, *, cold: bool) -> list[dict[str, Any]]:
    """Several interleaved pairs of copy limit and merge, in settled memory."""
    rows = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir=pair.base.parent) as folder:
            drop_caches([pair.base, pair.donor])
            subprocess.run([sys.executable, "-c", IMPORTS], check=True, cwd=ROOT)
            with settled(folder, 4 * pair.bytes if cold else 0):
                rows.append(timed_merge(pair, Path(folder), evict if cold else warm))
    return rows


def kernel_speed() -> dict[str, float]:
    """Bytes read plus written a second: our blend of bf16 in memory, and numpy's copy."""
    from lowmem_adamms.kernels import cpu

    pool = np.random.default_rng(0).standard_normal(1 << 20, np.float32).view(np.uint32) >> 16
    base = np.tile(pool.astype(np.uint16), ELEMENTS >> 20)
    donor, out = np.roll(base, 4321), np.zeros_like(base)
    part = (base.view(np.uint8), donor.view(np.uint8), out.view(np.uint8))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        cpu.blend([part], ("BF16", "BF16", "BF16"), 0.3)
        best = min(best, time.perf_counter() - start)
    speed, copy = 3 * base.nbytes / best, memory_copy_bandwidth(os.cpu_count() or 1)
    return {"kernel_bytes_per_s": speed, "copy_bytes_per_s": copy, "ratio": speed / copy}


def accuracy(alpha: float = 0.3) -> dict[str, float]:
    """Share of bf16 results that are not the correctly rounded ones, and the largest error in ulp.

    Real scale: base ~ N(0, 0.02), donor = base + N(0, 0.002). Exact: the float64 value, which for
    bf16 inputs is exact to 2**-52, rounded once by comparing it with the midpoint (reference.py).
    """
    from lowmem_adamms.kernels import cpu, reference

    rng = np.random.default_rng(1)
    values = rng.normal(0, 0.02, 1 << 24)
    base = reference.narrow(values, "BF16")
    donor = reference.narrow(values + rng.normal(0, 0.002, values.size), "BF16")
    out = np.zeros_like(base)
    triple = ("BF16", "BF16", "BF16")
    cpu.blend([(base.view(np.uint8), donor.view(np.uint8), out.view(np.uint8))], triple, alpha)
    exact = (1 - alpha) * reference.widen(base, "BF16") + alpha * reference.widen(donor, "BF16")
    result = {f"kernel_{key}": value for key, value in _errors(out, exact).items()}
    naive = _naive(base, donor, alpha)
    if naive is not None:
        result["naive_share_misrounded"] = _errors(naive, exact)["share_misrounded"]
    return result


def _errors(out: Any, exact: Any) -> dict[str, float]:
    from lowmem_adamms.kernels import reference

    best = reference.narrow(exact, "BF16")
    with np.errstate(divide="ignore"):
        ulp = 2.0 ** (np.maximum(np.floor(np.log2(np.abs(exact))), -126) - 7)
    off = np.abs(reference.widen(out, "BF16") - exact) / ulp
    return {"share_misrounded": float(np.mean(out != best)), "max_ulp": float(off.max())}


def _naive(base: Any, donor: Any, alpha: float) -> Any:
    """The bits of `(weights * tensors).sum(0)`, whose products are rounded to bf16."""
    try:
        import torch
    except ImportError:
        return None
    sides = [torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16) for bits in (base, donor)]
    weights = torch.tensor([1 - alpha, alpha], dtype=torch.bfloat16).unsqueeze(1)
    return (weights * torch.stack(sides)).sum(0).view(torch.int16).numpy().view(np.uint16)


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """A line a run, and the median ratio."""
    for row in rows:
        memory = (row["peak_anon_bytes"] / 2**20, row["peak_rss_bytes"] / 2**20)
        times = (row["copy_limit_s"], row["wall_s"], row["ratio"], row["cpu_s"])
        print(f"{name:<8}" + "".join(f"{value:>12.2f}" for value in (*times, *memory)))
    if rows:
        print(f"{name:<8}median ratio {statistics.median(row['ratio'] for row in rows):.2f}")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Measure our merge.")
    parser.add_argument("pair", type=Path, help="what synthetic.py made: PAIR/base and PAIR/donor")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--skip-cold", action="store_true")
    parser.add_argument("--skip-warm", action="store_true", help="where the pair exceeds memory")
    args = parser.parse_args()
    base, donor = (args.pair.resolve() / side for side in ("base", "donor"))
    pair = Pair(base, donor, sum(file.stat().st_size for file in base.glob("*.safetensors")))
    report: dict[str, Any] = {"benchmark": "merge", "bytes": pair.bytes}
    report["anon_after_imports_bytes"] = anonymous_after()
    print(f"anonymous after imports: {report['anon_after_imports_bytes'] / 2**20:.1f} MiB")
    heads = ("limit s", "wall s", "ratio", "cpu s", "anon MiB", "rss MiB")
    print(" " * 8 + "".join(f"{head:>12}" for head in heads), flush=True)
    for name, skip in (("cold", args.skip_cold), ("warm", args.skip_warm)):
        report[name] = [] if skip else merges(pair, args.runs, cold=name == "cold")
        show(name, report[name])
    report["kernel"] = kernel_speed()
    print("kernel:", {key: f"{value:.4g}" for key, value in report["kernel"].items()})
    report["accuracy"] = accuracy()
    print("accuracy:", {key: f"{value:.3g}" for key, value in report["accuracy"].items()})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
