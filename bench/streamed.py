"""Measures held and streamed models: memory above the imports, bytes read from the disk, seconds.

    python bench/streamed.py PAIR [--live held streamed] [--rounds 2] [--batches 1 4 16] [--evict]

Any pair will do, also one without a tokenizer: what is asked are random tokens. Each way is loaded
in a process of its own, and they take turns, so that a ratio of the two comes from one run. For
each number of batches, one alpha is applied and all batches are answered, as `Answerer` does it:
side by side in a streamed model, one after the other in a held one. Answers must be the same.
--evict: as if the page cache had no room: weights are put out of it before each alpha, and again
once they were used. Prints a table and, last, one line of JSON. Linux only.

From `plan` to report on a pair that this machine cannot hold:

    python bench/runnable.py PAIR --size 14b --prompts 2
    python -m lowmem_adamms plan PAIR/base PAIR/donor --vram 0
    python -m lowmem_adamms search PAIR/base PAIR/donor --vram 0 --prompts PAIR/prompts.jsonl \
        --alphas 0,0.3,0.6 --no-noise --max-new-tokens 4 --report PAIR/report.html
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import MIB, anonymous_and_resident, evict, watched

from lowmem_adamms import LiveModel, make_plan
from lowmem_adamms.live.free_memory import Memory, measure_memory
from lowmem_adamms.live.placement import MAX_BATCHES_AT_ONCE
from lowmem_adamms.live.placing import place
from lowmem_adamms.live.transformers_model import quiet
from lowmem_adamms.settings import PlacementSettings


def main() -> None:
    """Measure each way in turn, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", type=Path)
    parser.add_argument("--live", choices=("held", "streamed"), nargs="+", default=["streamed"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=2)
    parser.add_argument("--ram", type=float, help="GiB for a streamed model and layers that stay")
    parser.add_argument("--evict", action="store_true")
    parser.add_argument("--here", action="store_true", help="measure one way in this process")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure_way(arguments)))
        return
    found = []
    for round_ in range(arguments.rounds):
        for way in arguments.live:
            print(f"round {round_ + 1}, {way}:", flush=True)
            found.append(measure_elsewhere(way))
            print_way(found[-1])
    print(json.dumps({"ways": found, "held_to_streamed": compare(found)}))


def measure_elsewhere(way: str) -> dict[str, Any]:
    """One way, in a process of its own, by the same words."""
    words = [sys.executable, *sys.argv, "--here", "--live", way]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure_way(arguments: Any) -> dict[str, Any]:
    """Load, then answer at an alpha for each number of batches."""
    torch.nn.Linear(8, 8)(torch.ones(1, 8))  # torch's own threads count as imports
    before = anonymous_and_resident(os.getpid())[0]
    plan = make_plan(arguments.pair / "base", arguments.pair / "donor")
    (way,) = arguments.live
    memory = measure_memory(vram=0)
    if arguments.ram and way == "streamed":
        memory = Memory(int(arguments.ram * (1 << 30)), None, None)
    settings = PlacementSettings(
        live=way,
        live_quantize="none",
        batch_size=arguments.batch_size,
        device="cpu",
        ram=memory.ram_bytes if arguments.ram else None,
    )
    placement = place(plan, memory, settings)
    if not arguments.ram:
        placement = replace(placement, batches_at_once=MAX_BATCHES_AT_ONCE)
    # What finds no room in the page cache is dropped once it was used
    page_cache_bytes = 0 if arguments.evict else measure_memory(vram=0).ram_bytes
    placement = replace(placement, page_cache_bytes=page_cache_bytes)
    rows = []
    with watched() as found:
        start = time.perf_counter()
        with LiveModel(plan, placement=placement) as live:
            load_seconds = time.perf_counter() - start
            peak_of_load = max(found) - before
            for index, count in enumerate(arguments.batches):
                if arguments.evict:
                    evict([arguments.pair / "base", arguments.pair / "donor"])
                rows.append(measure_alpha(live, 0.1 + 0.1 * index, count, arguments))
    return {
        "live": way,
        "placed": placement.lines[0],
        "kept_layers": placement.kept_layers,
        "load_s": round(load_seconds, 1),
        "load_mib": round(peak_of_load / MIB),
        "peak_mib": round((max(found) - before) / MIB),
        "rows": rows,
    }


def measure_alpha(live: Any, alpha: float, count: int, arguments: Any) -> dict[str, Any]:
    """One alpha, so many batches of random tokens, and a digest of their answers."""
    read, start = bytes_read(), time.perf_counter()
    live.apply(alpha)

    def answer(seed: int) -> tuple[int, Any]:
        generator = torch.Generator().manual_seed(seed)
        shape = (arguments.batch_size, arguments.prompt_tokens)
        ids = torch.randint(10, 1000, shape, generator=generator)
        with quiet(), torch.inference_mode():
            made = live.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=arguments.new_tokens,
                min_new_tokens=arguments.new_tokens,
            )
        return seed, made[:, arguments.prompt_tokens :].tolist()

    answers = sorted(live._weights.run_batches(answer, range(count)))
    read = bytes_read() - read
    passes = arguments.new_tokens * (1 if live.placement.live == "streamed" else count)
    return {
        "batches": count,
        "seconds": round(time.perf_counter() - start, 1),
        "read_gb": round(read / 1e9, 2),
        "read_gb_per_pass": round(read / passes / 1e9, 2),
        "answers": answers,
    }


def compare(found: list[dict[str, Any]]) -> dict[int, float] | None:
    """How many times as long a held model takes, by batches; the answers must be the same."""
    seconds: dict[tuple[int, str], list[float]] = {}
    answers: dict[int, Any] = {}
    for way in found:
        for row in way["rows"]:
            seconds.setdefault((row["batches"], way["live"]), []).append(row["seconds"])
            told = answers.setdefault(row["batches"], row["answers"])
            assert row["answers"] == told, f"answers differ: {row['answers']}, {told}"
    middle = {key: statistics.median(times) for key, times in seconds.items()}
    if {way["live"] for way in found} != {"held", "streamed"}:
        return None
    return {count: round(middle[count, "held"] / middle[count, "streamed"], 2) for count in answers}


def print_way(way: dict[str, Any]) -> None:
    """What was measured, as a table."""
    print(way["placed"])
    print(f"load and check {way['load_s']} s, {way['load_mib']} MiB; peak {way['peak_mib']} MiB")
    for row in way["rows"]:
        print(
            f"{row['batches']:3} batches: {row['seconds']:6.1f} s, {row['read_gb']:6.2f} GB read,"
            f" {row['read_gb_per_pass']:6.2f} a pass",
            flush=True,
        )


def bytes_read() -> int:
    """Bytes that this process has had read from a disk."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


if __name__ == "__main__":
    main()
