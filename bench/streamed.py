"""Measures a streamed search: memory above the imports, bytes read from the disk, seconds.

    python bench/streamed.py PAIR [--live streamed] [--batches 1 4 16] [--evict] [--new-tokens 4]

Any pair will do, also one without a tokenizer: what is asked are random tokens. For each number of
batches, one alpha is applied and all batches are answered, as `Answerer` does it: side by side in
a streamed model, one after the other in a held one. --evict: the weights are put out of the page
cache before each. Prints a table and, last, one line of JSON. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import anonymous_and_resident, evict
from search import watched

from lowmem_adamms import LiveModel, make_plan
from lowmem_adamms.live.free_memory import Memory, measure_memory
from lowmem_adamms.live.placement import place
from lowmem_adamms.live.transformers_model import quiet
from lowmem_adamms.settings import PlacementSettings

MIB = 1 << 20


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", type=Path)
    parser.add_argument("--live", choices=("held", "streamed"), default="streamed")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=2)
    parser.add_argument("--ram", type=float, help="plan for so many GiB")
    parser.add_argument("--evict", action="store_true")
    arguments = parser.parse_args()
    torch.nn.Linear(8, 8)(torch.ones(1, 8))  # torch's own threads count as imports
    before = anonymous_and_resident(os.getpid())[0]
    plan = make_plan(arguments.pair / "base", arguments.pair / "donor")
    memory = measure_memory(vram=0)
    if arguments.ram:
        memory = Memory(int(arguments.ram * (1 << 30)), None, None)
    settings = PlacementSettings(live=arguments.live, batch_size=arguments.batch_size)
    placement = place(plan, memory, settings)
    print(*placement.lines, sep="\n")
    rows = []
    with watched() as found:
        start = time.perf_counter()
        with LiveModel(plan, placement=replace(placement, batches_at_once=16)) as live:
            load_seconds = time.perf_counter() - start
            peak_of_load = (max(found) - before) / MIB
            print(f"load and check: {load_seconds:.1f} s, {peak_of_load:.0f} MiB")
            for place_of_alpha, count in enumerate(arguments.batches):
                if arguments.evict:
                    evict([arguments.pair / "base", arguments.pair / "donor"])
                rows.append(measure(live, 0.1 + 0.1 * place_of_alpha, count, arguments))
                print(rows[-1])
    row = {"live": arguments.live, "load_s": load_seconds, "load_mib": peak_of_load}
    row |= {"peak_mib": (max(found) - before) / MIB, "rows": rows}
    print(json.dumps(row))


def measure(live: Any, alpha: float, count: int, arguments: Any) -> dict[str, float]:
    """One alpha, so many batches of random tokens."""
    read, start = bytes_read(), time.perf_counter()
    live.apply(alpha)

    def answer(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        shape = (arguments.batch_size, arguments.prompt_tokens)
        ids = torch.randint(10, 1000, shape, generator=generator)
        with quiet(), torch.inference_mode():
            return live.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=arguments.new_tokens,
                min_new_tokens=arguments.new_tokens,
            )

    answers = list(live._weights.run_batches(answer, range(count)))
    assert len(answers) == count
    seconds = time.perf_counter() - start
    return {
        "batches": count,
        "seconds": round(seconds, 1),
        "read_gb": round((bytes_read() - read) / 1e9, 2),
    }


def bytes_read() -> int:
    """Bytes that this process has had read from a disk."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


if __name__ == "__main__":
    main()
