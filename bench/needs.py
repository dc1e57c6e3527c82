"""Tabulates what a search and a merge need, for models of four sizes, as `plan` works it out.

    python bench/needs.py

The checkpoints are true names and shapes around holes: a plan reads headers only, so nothing is
downloaded and almost nothing written. Search: the model, its key-value cache and the working
memory that `plan` assumes. Merge: bytes read from the two inputs and written. Prints a table and,
last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from families import (
    QWEN2_7B,
    QWEN2_15B,
    DecoderDims,
    Family,
    flat_config,
    llama_decoder,
    llava_hf,
    qwen2vl,
    qwen25vl,
    write_headers,
)

VICUNA_13B = DecoderDims(5120, 13824, 40, 40, 40, 32000)
QWEN2_32B = DecoderDims(5120, 27648, 64, 40, 8, 152064, bias=True)
PRECISIONS = ("none", "int8", "nf4")
BATCHES = (8, 1)  # questions answered at a time


def text_model(name: str, kind: str, dims: DecoderDims) -> Family:
    """A language model alone."""
    config = flat_config(kind.lower(), f"{kind}ForCausalLM", dims, "BF16")
    return Family(name, config, llama_decoder(dims))


PAIRS = {
    "2B": (
        qwen2vl("Qwen2-VL-2B-Instruct", QWEN2_15B),
        text_model("Qwen2-1.5B-Instruct", "Qwen2", QWEN2_15B),
    ),
    "7B": (
        qwen2vl("Qwen2-VL-7B-Instruct", QWEN2_7B),
        llava_hf("llava-onevision-qwen2-7b-ov-hf", "onevision", "qwen2", QWEN2_7B),
    ),
    "13B": (
        llava_hf("llava-1.5-13b-hf", "1.5", "llama", VICUNA_13B),
        text_model("vicuna-13b-v1.5", "Llama", VICUNA_13B),
    ),
    "32B": (
        qwen25vl("Qwen2.5-VL-32B-Instruct", QWEN2_32B),
        text_model("Qwen2.5-32B-Instruct", "Qwen2", QWEN2_32B),
    ),
}


def plan(folder: Path, *options: str) -> Any:
    """The JSON document of `plan`."""
    argv = [sys.executable, "-m", "lowmem_adamms", "plan", str(folder / "base")]
    argv += [str(folder / "donor"), "--json", *options]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout)


def needs_of(base: Family, donor: Family) -> list[dict[str, Any]]:
    """One row a precision, planned for a card that nothing is too large for."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_headers(folder / "base", base)
        write_headers(folder / "donor", donor)
        for precision in PRECISIONS:
            row: dict[str, Any] = {"precision": precision.replace("none", "bf16")}
            for batch in BATCHES:
                options = ("--vram", "1TB", "--batch-size", str(batch), "--quantize", precision)
                document = plan(folder, *options)
                (chosen,) = (line for line in document["search"] if line.endswith("chosen"))
                row[f"search_{batch}"] = chosen.rpartition(" = ")[2].partition(" of ")[0]
            forecast = document["forecast"]
            row["merge_memory_bytes"] = forecast["anonymous_memory"]
            row["bytes_read"] = document["bytes_read"]
            row["bytes_written"] = forecast["disk_needed"]
            row["merge_s_at_1_gb_per_s"] = forecast["seconds_at_1_GB_per_s"]
            rows.append(row)
    return rows


def main() -> None:
    """Plan all pairs and show what they need."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    heads = ("search by 8", "search by 1", "merge MiB", "read GB", "write GB", "s at 1 GB/s")
    print(f"{'':<12}" + "".join(f"{head:>13}" for head in heads))
    table = {}
    for size, (base, donor) in PAIRS.items():
        print(f"{base.name} <- {donor.name}")
        table[size] = needs_of(base, donor)
        for row in table[size]:
            cells = (
                *(row[f"search_{batch}"] for batch in BATCHES),
                row["merge_memory_bytes"] >> 20,
                f"{row['bytes_read'] / 1e9:.1f}",
                f"{row['bytes_written'] / 1e9:.1f}",
                row["merge_s_at_1_gb_per_s"],
            )
            print(f"{size:<5}{row['precision']:<7}" + "".join(f"{cell:>13}" for cell in cells))
    print(json.dumps({"benchmark": "needs", "pairs": table}))


if __name__ == "__main__":
    main()
