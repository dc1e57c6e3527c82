"""Put a trained pair and its questions into the package: what `demo` exports and runs.

    python bench/zoo/pack.py ZOO [--base qwen2-vl] [--donor llava-onevision]

Replaces lowmem_adamms/demo/{base,donor,questions.zip}. Questions are drawn from scenes that neither
training nor the study has seen; the search's and the exam's share no picture.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from world import Question, questions, scenes, text_question

from lowmem_adamms.demo.pair import HERE, QUESTIONS

PROMPTS, EXAM = 100, 400
MOST = 12_000_000  # bytes in the package


def main() -> None:
    """Copy the weights, draw the questions, weigh the result."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("zoo", type=Path)
    options.add_argument("--base", default="qwen2-vl")
    options.add_argument("--donor", default="llava-onevision")
    given = options.parse_args()
    for side, name in (("base", given.base), ("donor", given.donor)):
        shutil.rmtree(HERE / side, ignore_errors=True)
        shutil.copytree(given.zoo / name / "model", HERE / side)
    with zipfile.ZipFile(HERE / QUESTIONS, "w", zipfile.ZIP_STORED) as box:
        pack(box, "prompts.jsonl", draw(PROMPTS, 21), labelled=False)
        pack(box, "eval.jsonl", draw(EXAM, 22), labelled=True)
    total = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    if total > MOST:
        raise SystemExit(f"{total} bytes in {HERE}, more than {MOST}")
    print(json.dumps({"bytes": total}))


def draw(count: int, seed: int) -> list[Question]:
    """`count` questions, a sixth of them without a picture, in mixed order."""
    dice = random.Random(seed)
    alone = [text_question(dice) for _ in range(count // 6)]
    shown = [dice.choice(questions([s], seed + i)) for i, s in enumerate(
        scenes(count - len(alone), seed, held_out=True))]  # fmt: skip
    mixed = alone + shown
    dice.shuffle(mixed)
    return mixed


def pack(box: zipfile.ZipFile, name: str, asked: Sequence[Question], *, labelled: bool) -> None:
    """Write a question file and its images; the same questions give the same bytes."""
    from PIL import Image

    lines = []
    for number, question in enumerate(asked):
        line: dict[str, str | None] = {"prompt": question.text, "image": None}
        if question.scene is not None:
            path = f"images/{name.removesuffix('.jsonl')}-{number:03}.png"
            line["image"] = path
            held = io.BytesIO()
            Image.fromarray(question.scene.pixels).save(held, "PNG", optimize=True)
            put(box, path, held.getvalue())
        if labelled:
            line |= {"answer": question.answer, "task": question.task}
        lines.append(json.dumps(line) + "\n")
    put(box, name, "".join(lines).encode())


def put(box: zipfile.ZipFile, name: str, content: bytes) -> None:
    """One member, dated so that it does not tell when it was made."""
    box.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), content)


if __name__ == "__main__":
    main()
