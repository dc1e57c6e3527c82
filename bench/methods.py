"""Measures every merging method, and holds those that mergekit has against mergekit's output.

    python bench/synthetic.py MODELS --kind qwen2 --size 1gb --ancestor
    python bench/methods.py MODELS OUT_DIR [--only NAME ...] [--env FOLDER] [--skip-mergekit]

MODELS has base, donor and ancestor of one architecture, as mergekit wants it. Both programs take
the same YAML, in which mergekit is to compute in float32. Costs: wall and processor time, and peak
anonymous memory; ours also beyond that of a process that has only done the imports. Inputs are out
of the page cache before each run. Agreement: of all elements that are blended, the share
that is equal, the share one step of bf16 apart, and the largest distance in steps.

Prints a row a method and, last, one line of JSON. mergekit 0.1.5 lives in an environment of its
own, as in rivals.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import ROOT, Run, anonymous_after, drop_caches, evict, measure
from rivals import CACHE, COSTS, last_line, mergekit_program, quote

IMPORTS = """
import lowmem_adamms.cli.merge, rich.progress
from lowmem_adamms.kernels import cpu, reference
import numpy as np
part = [np.zeros(2, np.uint8)] * 3
cpu.mix([part], ("BF16",) * 3, reference.Mixing((reference.Term(),) * 2), [0])
"""
TASKS = """\
merge_method: {method}
base_model: {ancestor}
models:
  - {{model: {base}{own}}}
  - {{model: {donor}{others}}}
parameters: {{{parameters}}}
dtype: float32
out_dtype: bfloat16
"""
LINEAR = """\
merge_method: linear
models:
  - {{model: {base}, parameters: {{weight: 0.5}}}}
  - {{model: {donor}, parameters: {{weight: 0.3}}}}
  - {{model: {ancestor}, parameters: {{weight: 0.2}}}}
dtype: float32
out_dtype: bfloat16
"""
SLERP = """\
merge_method: slerp
base_model: {base}
models: [{{model: {base}}}, {{model: {donor}}}]
parameters: {{t: 0.3}}
dtype: float32
out_dtype: bfloat16
"""
WAYS: dict[str, dict[str, str]] = {
    "task-arithmetic": {"own": "weight: 1", "others": "weight: 0.4"},
    "ties": {"own": "weight: 1, density: 0.2", "others": "weight: 1, density: 0.2"},
    "dare-linear": {"own": "weight: 1, density: 0.8", "others": "weight: 0.4, density: 0.8"},
    "dare-ties": {"own": "weight: 1, density: 0.8", "others": "weight: 1, density: 0.8"},
    "breadcrumbs": {"own": "weight: 1, density: 0.9", "others": "weight: 0.4, density: 0.9"},
    "ram": {"own": "", "others": ""},
}
"""Parameters of the base and of the donor."""
COMPARED = ("linear", "slerp", "task-arithmetic", "ties")
"""What is the same in mergekit: chance differs, and its breadcrumbs ranks equal values by place."""
NAMES = ("linear", "slerp", *WAYS, "metagpt")


def recipe(name: str, models: dict[str, str]) -> str:
    """Mergekit's YAML for one method."""
    if name in ("linear", "slerp"):
        return (LINEAR if name == "linear" else SLERP).format(**models)
    way = {side: f", parameters: {{{each}}}" if each else "" for side, each in WAYS[name].items()}
    parameters = "normalize: true" if name == "dare-ties" else ""
    return TASKS.format(**models, **way, method=name.replace("-", "_"), parameters=parameters)


def run(argv: list[str], inputs: list[Path], **env: str) -> Run:
    """One program, its inputs out of the page cache."""
    evict(inputs)
    done = measure(argv, cwd=ROOT, env={"HF_HUB_OFFLINE": "1", **env})
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} ended with {last_line(done.stdout_tail)}")
    return done


def costs(done: Run) -> dict[str, float]:
    """What a run cost."""
    return {key: value for key, value in asdict(done).items() if key in COSTS}


def compare(models: dict[str, Path], ours: Path, theirs: Path) -> dict[str, float]:
    """How far two bf16 outputs lie apart, in the rows that we blend.

    mergekit blends the rows of embedding and head that belong to no token as well.
    """
    from lowmem_adamms import make_plan
    from lowmem_adamms.checkpoints.checkpoint import open_checkpoint
    from lowmem_adamms.checkpoints.mapped_files import MappedFiles

    first, second = open_checkpoint(ours), open_checkpoint(theirs)
    if first.tensors.keys() != second.tensors.keys():
        raise SystemExit(f"{ours} and {theirs} hold different tensors")
    counts, largest = np.zeros(2, np.int64), 0
    elements = 0
    with MappedFiles() as files:
        for step, part in make_plan(models["base"], models["donor"]).parts:
            if not part.donor:
                continue
            sides = (
                checkpoint.tensors[step.name].rows(*part.rows) for checkpoint in (first, second)
            )
            values = (_ordered(files.view(side).view(np.uint16)) for side in sides)
            steps = np.abs(np.subtract(*values))
            counts += (np.count_nonzero(steps == 0), np.count_nonzero(steps == 1))
            largest = max(largest, int(steps.max()))
            elements += steps.size
    equal, near = (float(count / elements) for count in counts)
    return {"share_equal": equal, "share_one_step": near, "max_steps": largest}


def _ordered(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.int32]:
    """Bit patterns as integers in the order of their values."""
    wide = bits.astype(np.int32)
    return np.where(wide & 0x8000, -(wide & 0x7FFF), wide)


def measure_method(
    name: str, models: dict[str, Path], scratch: Path, env: Path | None
) -> dict[str, Any]:
    """One row: our run, mergekit's where it has the method, and how far they agree."""
    inputs, out, theirs = list(models.values()), scratch / "ours", scratch / "mergekit"
    argv = [sys.executable, "-m", "lowmem_adamms", "merge", "-o", str(out)]
    path = scratch / "recipe.yaml"
    if name == "metagpt":
        argv += [str(models["base"]), str(models["donor"]), "--method", name]
        argv += ["--ancestor", str(models["ancestor"])]
    else:
        path.write_text(recipe(name, {side: quote(folder) for side, folder in models.items()}))
        argv += ["--config", str(path)]
    row: dict[str, Any] = {"name": name, "ours": costs(run(argv, inputs))}
    if env is not None and name != "metagpt":
        program = [str(mergekit_program(env)), str(path), str(theirs), "--lazy-unpickle"]
        row["mergekit"] = costs(run(program, inputs))
        if name in COMPARED:
            row["agreement"] = compare(models, out, theirs)
    shutil.rmtree(out)
    shutil.rmtree(theirs, ignore_errors=True)
    return row


def table_line(row: dict[str, Any], imports: int) -> str:
    """A row for people."""
    ours, theirs, agreement = row["ours"], row.get("mergekit"), row.get("agreement")
    words = [
        f"{row['name']:<16}{ours['wall_s']:>8.1f} s",
        f"{ours['peak_anon_bytes'] / 2**20:>8.0f} MiB",
        f"{(ours['peak_anon_bytes'] - imports) / 2**20:>6.0f} MiB",
    ]
    if theirs:
        words.append(f"{theirs['wall_s']:>8.1f} s{theirs['peak_anon_bytes'] / 2**20:>8.0f} MiB")
    if agreement:
        words.append(
            f"{agreement['share_equal']:>10.4%} equal, {agreement['share_one_step']:.4%} one step,"
            f" {agreement['max_steps']} steps at most"
        )
    return "".join(words)


def main() -> None:
    """Measures the chosen methods."""
    parser = argparse.ArgumentParser(description="Measure merging methods, beside mergekit.")
    parser.add_argument("models", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--only", choices=NAMES, nargs="+", default=list(NAMES))
    parser.add_argument("--env", type=Path, default=CACHE / "lowmem-adamms-bench" / "mergekit")
    parser.add_argument("--skip-mergekit", action="store_true")
    args = parser.parse_args()
    models = {side: args.models.resolve() / side for side in ("base", "donor", "ancestor")}
    args.out_dir.mkdir(parents=True, exist_ok=True)
    drop_caches(list(models.values()))
    anonymous_after(IMPORTS)  # compiles, the first time
    imports = anonymous_after(IMPORTS)
    print(f"imports alone: {imports / 2**20:.0f} MiB")
    print(f"{'':<16}{'ours':>10}{'anonymous':>12}{'beyond':>10}{'mergekit':>12}{'anonymous':>12}")
    rows = []
    for name in args.only:
        with tempfile.TemporaryDirectory(dir=args.out_dir) as scratch:
            env = None if args.skip_mergekit else args.env.absolute()
            rows.append(measure_method(name, models, Path(scratch), env))
        print(table_line(rows[-1], imports), flush=True)
    total = sum(path.stat().st_size for path in models["base"].glob("*.safetensors"))
    print(json.dumps({"benchmark": "methods", "bytes": total, "imports": imports, "rows": rows}))


if __name__ == "__main__":
    main()
