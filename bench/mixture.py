"""Measures the memory of merging a mixture of experts whose experts are laid out otherwise.

    python bench/mixture.py FOLDER [--layers N] [--inner N]

FOLDER receives two checkpoints as large as Qwen3-VL-30B-A3B (experts stacked and transposed) and
Qwen3-30B-A3B (one by one): true headers with holes for data, 2 x 61 GB that take no room on the
disk. With --layers or --inner, of so many layers or with experts of so many rows, and the merge is
the command line's, onto the disk. Without, all go through plan and loop into a sink that only
counts, as the output would take 61 GB.
Memory is RssAnon above that of a process that has only done the imports. Prints a table and, last,
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import ROOT, Run, anonymous_after, measure, run_merge

sys.path.insert(0, str(ROOT / "tests"))

from families import Family, some_of, write_headers
from mixtures import QWEN3, Mixture, decoder

COUNTING = """
import sys
import numpy as np
from lowmem_adamms import make_plan
from lowmem_adamms.mapping import kinship
from lowmem_adamms.merging import loop

class Counting:
    def __init__(self):
        self.bytes = 0
        self.slots = []
    def wants(self, step):
        return True
    def copy(self, step, offset, content):
        self.bytes += len(content)
    def slot(self, step, offset, nbytes):
        self.bytes += nbytes
        self.slots.append(np.empty(nbytes, np.uint8))
        return self.slots[-1]
    def commit(self):
        self.slots.clear()

plan = make_plan(*sys.argv[1:3])
kinship.check(plan)
sink = Counting()
loop.run(plan, 0.3, sink, evict=True)
assert sink.bytes == plan.bytes_written
print(sink.bytes)
"""


def make_pair(folder: Path, dims: Mixture) -> tuple[Path, Path]:
    """Write both checkpoints, unless they are there."""
    classes = ("Qwen3VLMoeForConditionalGeneration", "Qwen3MoeForCausalLM")
    tensors = (
        decoder(dims, "transposed", "model.language_model.") | some_of("model.visual.merger.x"),
        decoder(dims, "each"),
    )
    folders = []
    for side, cls, held in zip(("base", "donor"), classes, tensors, strict=True):
        folders.append(folder / f"{dims.layers}-{dims.inner}" / side)
        if not folders[-1].exists():
            write_headers(folders[-1], Family(side, {"architectures": [cls]}, held))
    return folders[0], folders[1]


def run_counting(base: Path, donor: Path) -> Run:
    """Merge into a sink that counts."""
    run = measure([sys.executable, "-c", COUNTING, base, donor], cwd=ROOT)
    if run.returncode:
        raise SystemExit(run.stdout_tail)
    return run


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Measure the merge of a mixture of experts.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=QWEN3.layers)
    parser.add_argument("--inner", type=int, default=QWEN3.inner, help="rows of an expert")
    args = parser.parse_args()
    dims = replace(QWEN3, layers=args.layers, inner=args.inner)
    base, donor = make_pair(args.folder.resolve(), dims)
    imports = anonymous_after()
    if dims == QWEN3:
        run = run_counting(base, donor)
    else:
        run = run_merge(base, donor, "-o", base.parent / "merged")
        shutil.rmtree(base.parent / "merged")
    report: dict[str, Any] = {
        "benchmark": "mixture",
        "layers": dims.layers,
        "inner": dims.inner,
        "bytes": (base / "model.safetensors").stat().st_size,
        "wall_s": run.wall_s,
        "cpu_s": run.cpu_s,
        "anon_after_imports_bytes": imports,
        "peak_anon_bytes": run.peak_anon_bytes,
        "above_imports_bytes": run.peak_anon_bytes - imports,
    }
    for name, value in report.items():
        print(f"{name:26} {value / 2**20:,.1f} MiB" if "bytes" in name else f"{name:26} {value}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
