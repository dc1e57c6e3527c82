"""What becomes of each multimodal class of transformers, tried with tiny random models.

    python bench/class_table.py [--llava] [--keep FOLDER] [NAME ...]

A line a class and kind of donor, then the counts. Names are model types, such as qwen3_vl_moe, or
with --llava text decoders in LLaVA. `tests/every_class/` holds the same outcomes.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "every_class")]

import torch
from classes import multimodal_classes, text_decoders
from harness import Outcome, llava_case, multimodal_case, try_case
from tiny_models import timm_stub


def main() -> None:
    """Try the classes named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--keep", type=Path, help="leave the checkpoints in this folder")
    parser.add_argument("--llava", action="store_true", help="LLaVA around other text decoders")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel("ERROR")
    counts: Counter[str] = Counter()
    root = options.keep or Path(tempfile.mkdtemp())
    with timm_stub():
        for name in options.names or (text_decoders() if options.llava else multimodal_classes()):
            start = time.process_time()
            try:
                case = llava_case(name) if options.llava else multimodal_case(name)
                outcomes = try_case(case, root / name)
            except Exception as error:  # the harness cannot make it
                outcomes = {"harness": Outcome("untried", why=f"{type(error).__name__}: {error}")}
            seconds = time.process_time() - start
            if not options.keep:
                shutil.rmtree(root / name, ignore_errors=True)
            for donor, outcome in outcomes.items():
                counts[f"{donor}: {outcome.merged}, live {outcome.searched or 'untried'}"] += 1
                print(f"{name:24} {donor:11} {outcome}  [{seconds:.2f} s]", flush=True)
    print(json.dumps(dict(sorted(counts.items())), indent=2))


if __name__ == "__main__":
    main()
