"""Measures every merging method against the copy limit, with mergekit beside those that it has.

    python bench/synthetic.py MODELS --kind qwen2 --size full --ancestor
    python bench/methods.py MODELS OUT_DIR [--runs 3] [--only NAME ...] [--skip-mergekit]
    python bench/methods.py MODELS OUT_DIR --compare

MODELS has base, donor and ancestor of one architecture, as mergekit wants it. Both programs take
the same YAML, in which mergekit is to compute in float32. Rows are those of rivals.py; the copy
limit reads every input once, while slerp, ties, breadcrumbs and metagpt read them twice.

--compare measures no time, but how far the two outputs agree: of all elements that are blended, the
share that is equal, the share one step of bf16 apart, and the largest distance in steps.

Prints a table and, last, one line of JSON, which has the anonymous memory of a process that has
only done the imports, as `imports`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import anonymous_after
from rivals import (
    CACHE,
    Job,
    Rival,
    checked,
    mergekit_help,
    mergekit_program,
    quote,
    take_turns,
)

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


def write_recipe(name: str, job: Job) -> Path:
    """Mergekit's YAML for one method."""
    base, donor, ancestor = (quote(folder) for folder in job.inputs)
    models = {"base": base, "donor": donor, "ancestor": ancestor}
    path = job.out.with_name("recipe.yaml")
    if name in ("linear", "slerp"):
        path.write_text((LINEAR if name == "linear" else SLERP).format(**models))
        return path
    way = {side: f", parameters: {{{each}}}" if each else "" for side, each in WAYS[name].items()}
    parameters = "normalize: true" if name == "dare-ties" else ""
    method = name.replace("-", "_")
    path.write_text(TASKS.format(**models, **way, method=method, parameters=parameters))
    return path


def ours(name: str, job: Job) -> list[str]:
    """The command of our own merge, rounded as mergekit does."""
    argv = [sys.executable, "-m", "lowmem_adamms", "merge", "-o", str(job.out)]
    argv += ["--rounding", "nearest"]
    if name != "metagpt":
        return [*argv, "--config", str(write_recipe(name, job))]
    base, donor, ancestor = map(str, job.inputs)
    return [*argv, base, donor, "--method", name, "--ancestor", ancestor]


def theirs(name: str, job: Job) -> list[str]:
    """The command of mergekit's."""
    program = str(mergekit_program(job.env))
    return [program, str(write_recipe(name, job)), str(job.out), "--lazy-unpickle"]


def import_ours(_job: Job) -> list[str]:
    """A command that imports what our merge imports, and compiles its kernel the first time."""
    return [sys.executable, "-c", IMPORTS]


def compare(name: str, job: Job) -> dict[str, Any]:
    """How far two bf16 outputs lie apart, in the rows that we blend.

    mergekit blends the rows of embedding and head that belong to no token as well.
    """
    from lowmem_adamms import make_plan
    from lowmem_adamms.checkpoints.checkpoint import open_checkpoint
    from lowmem_adamms.checkpoints.mapped_files import MappedFiles

    outputs = []
    for who, command in (("ours", ours), ("mergekit", theirs)):
        out = job.out.with_name(f"{name} {who}")
        checked(command(name, replace(job, out=out)))
        outputs.append(open_checkpoint(out))
    first, second = outputs
    if first.tensors.keys() != second.tensors.keys():
        raise SystemExit(f"{name}: the two outputs hold different tensors")
    counts, largest = np.zeros(2, np.int64), 0
    elements = 0
    with MappedFiles() as files:
        for step, part in make_plan(*job.inputs[:2]).parts:
            if not part.donor:
                continue
            sides = (output.tensors[step.name].rows(*part.rows) for output in outputs)
            values = (_ordered(files.view(side).view(np.uint16)) for side in sides)
            steps = np.abs(np.subtract(*values))
            counts += (np.count_nonzero(steps == 0), np.count_nonzero(steps == 1))
            largest = max(largest, int(steps.max()))
            elements += steps.size
    equal, near = (float(count / elements) for count in counts)
    print(f"{name:<26}{equal:>10.4%} equal, {near:.4%} one step, {largest} steps at most")
    return {"name": name, "share_equal": equal, "share_one_step": near, "max_steps": largest}


def _ordered(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.int32]:
    """Bit patterns as integers in the order of their values."""
    wide = bits.astype(np.int32)
    return np.where(wide & 0x8000, -(wide & 0x7FFF), wide)


def make_rivals(names: list[str], *, mergekit: bool) -> dict[str, Rival]:
    """Our merge by each method, and mergekit's."""
    rivals = {}
    for name in names:
        rivals[name] = Rival(import_ours, partial(ours, name))
        if mergekit and name != "metagpt":
            rivals[f"mergekit {name}"] = Rival(mergekit_help, partial(theirs, name))
    return rivals


def main() -> None:
    """Measures the chosen methods."""
    parser = argparse.ArgumentParser(description="Measure merging methods, beside mergekit.")
    parser.add_argument("models", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=NAMES, nargs="+", default=list(NAMES))
    parser.add_argument("--env", type=Path, default=CACHE / "lowmem-adamms-bench" / "mergekit")
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    inputs = tuple(args.models.resolve() / side for side in ("base", "donor", "ancestor"))
    total = sum(path.stat().st_size for path in inputs[0].glob("*.safetensors"))
    args.out_dir.mkdir(parents=True, exist_ok=True)
    job = Job(inputs, args.out_dir.resolve() / "merged", total, args.env.absolute())
    report: dict[str, Any] = {"benchmark": "methods", "bytes": total}
    if args.compare:
        with tempfile.TemporaryDirectory(dir=args.out_dir) as folder:
            job = replace(job, out=Path(folder).resolve() / "merged")
            names = [name for name in args.only if name in COMPARED]
            report["agreement"] = [compare(name, job) for name in names]
    else:
        anonymous_after(IMPORTS)  # compiles, the first time
        report["imports"] = anonymous_after(IMPORTS)
        print(f"imports alone: {report['imports'] / 2**20:.0f} MiB")
        rivals = make_rivals(args.only, mergekit=not args.skip_mergekit)
        report["rows"] = take_turns(rivals, job, args.runs)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
