"""Prompt sets: every format read as it stands, and every way in which one is broken named."""

from __future__ import annotations

import doctest
import importlib
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, ImageOps

from lowmem_adamms.errors import MergeError, PromptError, RecipeError
from lowmem_adamms.prompts import Prompt, Prompts, digest, load_prompts, open_image
from lowmem_adamms.settings import PromptSettings

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)
ORIENTATION = 0x0112


def load(source: Path | str, **settings: Any) -> Prompts:
    return load_prompts(source, PromptSettings(**settings))


def refused(source: Path | str, kind: type[MergeError] = PromptError, **settings: Any) -> str:
    """The one line with which loading fails, which must name the source."""
    with pytest.raises(kind) as caught:
        load(source, **settings)
    message = str(caught.value)
    assert message.startswith(str(source))
    assert message.isprintable()
    assert len(message) < 700
    return message


def encode(colour: object = RED, form: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """A small image's file."""
    file = io.BytesIO()
    Image.new(mode, (4, 3), colour).save(file, form, **options)  # type: ignore[arg-type]
    return file.getvalue()


def noise(form: str) -> bytes:
    """An image's file that is too large for a decoder to swallow in one gulp."""
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)).save(file, form)
    return file.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def lines(path: Path, entries: Iterable[object]) -> Path:
    """A prompt file; text stands as it is, anything else as JSON."""
    text = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    return put(path, "\n".join(text).encode())


# JSON Lines


@pytest.mark.parametrize("name", ["prompts.ndjson", "PROMPTS.JSONL"])
def test_json_lines_in_every_allowed_form(tmp_path: Path, name: str) -> None:
    red = put(tmp_path / "pics" / "red.png", encode())
    away = put(tmp_path / "blue.jpg", encode(BLUE, "JPEG"))
    path = lines(
        tmp_path / name,
        [
            {"prompt": "One?", "image": "pics/red.png", "answer": "1", "task": "t", "id": 7},
            "",
            {"prompt": " two\nlines ", "images": ["pics/red.png", str(away)]},
            "  \t",
            {"prompt": "None?", "image": None},
            {"prompt": "Ça va, 世界\u2028?"},
            {"prompt": "Both keys", "image": None, "images": ["blue.jpg"]},
            {"prompt": "Empty list", "images": [], "image": None},
        ],
    )
    assert load(str(path)).ref == str(path)
    assert load(path) == (
        Prompt("One?", (red,), f"{name}:1"),
        Prompt(" two\nlines ", (red, away), f"{name}:3"),
        Prompt("None?", (), f"{name}:5"),
        Prompt("Ça va, 世界\u2028?", (), f"{name}:6"),
        Prompt("Both keys", (away,), f"{name}:7"),
        Prompt("Empty list", (), f"{name}:8"),
    )


def test_an_image_may_lie_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a shell; a folder that is called `~` is still found by its whole path."""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    home = put(tmp_path / "me" / "pics" / "red.png", encode())
    odd = put(tmp_path / "~" / "red.png", encode())
    images = ["~/pics/red.png", str(odd), str(home)]
    path = lines(tmp_path / "p.jsonl", [{"prompt": "One?", "images": images}])
    assert load(path)[0].images == (home, odd, home)


def test_byte_order_mark_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    text = '{"prompt": "ä\u2028b"}\r\n{"prompt": "c"}\r\n'
    path = put(tmp_path / "p.jsonl", text.encode("utf-8-sig"))
    assert [prompt.text for prompt in load(path)] == ["ä\u2028b", "c"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x",}', ["not JSON", "column 16"]),
        ('{"prompt": ' + "[" * 100_000, ["not JSON"]),
        ('{"prompt": ' + "9" * 5000 + "}", ["not JSON"]),
        ('[{"prompt": "x"}]', ["found [", "object"]),
        ("{}", ['no "prompt"']),
        ('{"question": "x", "answer": "y"}', ['no "prompt"', "found question, answer"]),
        ('{"prompt": " \\n"}', ['"prompt" is empty']),
        ('{"prompt": null}', ['"prompt" is None', "a text"]),
        ('{"prompt": "\\ud83d"}', ["surrogate"]),
        ('{"prompt": "x", "image": "a.png", "images": ["a.png"]}', ["both", "keep one"]),
        ('{"prompt": "x", "image": {"path": "a.png"}}', ["is {", "path"]),
        ('{"prompt": "x", "image": ""}', ["is ''", "path"]),
        ('{"prompt": "x", "images": "a.png"}', ["is 'a.png'", "list of paths"]),
        ('{"prompt": "x", "images": ["a.png", null]}', ["None", "path"]),
        ('{"prompt": "x", "image": "HTTPS://host/a.png"}', ["HTTPS://host/a.png", "download"]),
        ('{"prompt": "x", "image": "data:image/png;base64,' + "A" * 9999 + '"}', ["in base64"]),
        ('{"prompt": "x", "image": "data:image/png,AAAA"}', ["in base64"]),
    ],
)
def test_every_line_is_checked_also_outside_the_sample(
    tmp_path: Path, line: str, words: list[str]
) -> None:
    good = [json.dumps({"prompt": str(number)}) for number in range(40)]
    path = lines(tmp_path / "p.jsonl", [*good, "", line, *good])
    message = refused(path, samples=1)
    assert message.startswith(f"{path}:42: ")
    for word in words:
        assert word in message


def test_other_encodings_are_refused_with_the_line(tmp_path: Path) -> None:
    path = put(tmp_path / "p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe4"}\n')
    assert refused(path).startswith(f"{path}:2: byte 13 is not UTF-8")
    assert "not UTF-8" in refused(put(path, '{"prompt": "a"}'.encode("utf-16")))


BROKEN = {
    "missing": (None, "no such file"),
    "text": (b"GIF, honestly", "not an image"),
    "PostScript, which Pillow would hand to Ghostscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "not an image",
    ),
    **{
        f"{form} cut off": ((data := noise(form))[: len(data) * 9 // 10], "cannot be read")
        for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    },
}


@pytest.mark.parametrize(("data", "words"), BROKEN.values(), ids=BROKEN)
def test_unusable_image_is_named_with_file_and_line(
    tmp_path: Path, data: bytes | None, words: str
) -> None:
    put(tmp_path / "good.png", encode())
    if data is not None:
        put(tmp_path / "pics" / "bad.png", data)
    images = ["good.png", "pics/bad.png"]
    path = lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "images": images}])
    message = refused(path)
    assert message.startswith(f"{path}:2: image {tmp_path / 'pics' / 'bad.png'}: ")
    assert words in message


@pytest.mark.parametrize("most_pixels", [5, 11])
def test_a_decompression_bomb_is_refused_where_pillow_raises_and_where_it_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_pixels: int
) -> None:
    put(tmp_path / "a.png", encode())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most_pixels)
    message = refused(lines(tmp_path / "p.jsonl", [{"prompt": "x", "image": "a.png"}]))
    assert f"more than {most_pixels} pixels; scale it down" in message


def test_image_of_strange_name_still_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for name in ("two\nlines.png", "nul\0.png", "half \udc80.png", "x" * 5000, "folder.png"):
        path = lines(tmp_path / "p.jsonl", [{"prompt": "x", "image": name}])
        assert refused(path).startswith(f"{path}:1: image ")


# Folders


def test_folder_asks_about_each_image_by_name(tmp_path: Path) -> None:
    names = ["b.PNG", "a/z.jpg", "a/y.webp", "c.tiff", "é.gif", "a.bmp"]
    for name in names:
        put(tmp_path / name, encode())
    for name in ("notes.txt", ".hidden.png", ".thumbs/a.png", "a/._z.jpg"):
        put(tmp_path / name, b"")
    (tmp_path / "folder.png").mkdir()
    assert load(tmp_path, question="What?") == tuple(
        Prompt("What?", (tmp_path / name,), name) for name in sorted(names)
    )


def test_broken_image_in_a_folder_is_named_once(tmp_path: Path) -> None:
    bad = put(tmp_path / "sub" / "b.png", noise("PNG")[:-100])
    message = refused(tmp_path, question="What?")
    assert message.startswith(f"{bad}: cannot be read")
    assert message.count("b.png") == 1


@pytest.mark.parametrize(
    ("question", "words"), [(None, "`question`"), (" \n", "`question`"), ("What?", "no images")]
)
def test_folder_without_question_or_images_is_refused(
    tmp_path: Path, question: str | None, words: str
) -> None:
    put(tmp_path / "a.txt", encode())
    assert words in refused(tmp_path, question=question)


# Parquet

ENCODED = [encode((number, 0, 0)) for number in range(90)]


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    """A Parquet file; columns that hold structs get the type that `datasets` gives to images."""
    arrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(arrow.table(columns), path, **options)
    return path


def cell(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def test_parquet_as_the_hub_stores_it(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "set.parquet",
        {
            "answer": ["A", "B", "A"],
            "options": [["x"], [], ["y"]],
            "question": ["Red?", "<image 1> or <image 2>?", "None?"],
            "image_10": [None, cell(ENCODED[10]), None],
            "image_2": [None, cell(ENCODED[2], "x.png"), None],
            "image": [cell(ENCODED[0]), cell(ENCODED[1]), None],
        },
    )
    assert load(path) == (
        Prompt("Red?", (ENCODED[0],), "set.parquet[0]"),
        Prompt("<image 1> or <image 2>?", tuple(ENCODED[i] for i in (1, 2, 10)), "set.parquet[1]"),
        Prompt("None?", (), "set.parquet[2]"),
    )


@pytest.mark.parametrize(
    "cells",
    [
        [ENCODED[0], "a.png"],
        [[ENCODED[0]], ["a.png"]],
        [cell(ENCODED[0]), cell(None, "a.png")],
        [[cell(ENCODED[0], "no/such.png")], [cell(None, "a.png")]],
    ],
    ids=["plain", "lists", "structs", "lists of structs"],
)
def test_images_in_every_form(tmp_path: Path, cells: list[Any]) -> None:
    """Paths start at the folder of the file. Where a struct has both, its bytes count."""
    image = put(tmp_path / "a.png", encode())
    columns = [{"text": ["a"], "images": [value]} for value in cells]
    encoded = load(parquet(tmp_path / "encoded.parquet", columns[0]))
    named = load(parquet(tmp_path / "named.parquet", columns[1]))
    assert [encoded[0].images, named[0].images] == [(ENCODED[0],), (image,)]


def test_parquet_columns_can_be_named(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "set.parquet",
        {"text": ["t"], "prompt": ["p"], "image": [ENCODED[0]], "left": [ENCODED[1]]},
    )
    assert load(path) == (Prompt("p", (ENCODED[0],), "set.parquet[0]"),)
    named = load(path, text_column="text", image_column=("left", "image"))
    assert named == (Prompt("t", (ENCODED[1], ENCODED[0]), "set.parquet[0]"),)
    message = refused(path, image_column=("pic",))
    assert "no column pic; there are text, prompt" in message


@pytest.mark.parametrize("rows", [1, 7, 90])
def test_only_sampled_rows_are_checked_in_whatever_row_group_they_are(
    tmp_path: Path, rows: int
) -> None:
    picks = sorted(random.Random(5).sample(range(90), 20))
    columns = {
        "prompt": [f"{row}?" if row in picks else None for row in range(90)],
        "image": [ENCODED[row] if row in picks else b"broken" for row in range(90)],
    }
    path = parquet(tmp_path / "set.parquet", columns, row_group_size=rows)
    assert load(path, samples=20, seed=5) == tuple(
        Prompt(f"{pick}?", (ENCODED[pick],), f"set.parquet[{pick}]") for pick in picks
    )
    refused(path, samples=21, seed=5)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"caption": ["a"], "label": ["b"]}, ["prompt, question", "caption, label"]),
        ({"prompt": ["a"], "image": [b"x"], "images": [[b"x"]]}, ["both", "name the one"]),
        ({"prompt": []}, ["no prompts"]),
        ({"prompt": [7]}, ["[0]", "is 7"]),
        ({"prompt": ["a"], "image": [{"width": 3}]}, ["[0]", '"image"', "{'width': 3}"]),
        ({"prompt": ["a"], "image": ["https://host/a.png"]}, ["[0]", "download"]),
        ({"prompt": ["a"], "image": ["a.png"]}, ["[0]", "a.png", "no such file"]),
        ({"prompt": ["a", "b"], "image": [ENCODED[0], b""]}, ["[1]", "1 of 1", "not an image"]),
        (
            {"prompt": ["a"], "images": [[ENCODED[0], noise("JPEG")[:-900]]]},
            ["[0]", "2 of 2", "cannot be read"],
        ),
    ],
)
def test_broken_parquet_rows_and_columns(
    tmp_path: Path, columns: dict[str, Any], words: list[str]
) -> None:
    message = refused(parquet(tmp_path / "set.parquet", columns))
    for word in words:
        assert word in message


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "set.parquet", {"prompt": ["a" * 5000, "b"]}, compression="zstd")
    data = path.read_bytes()
    refused(put(path, data[: len(data) // 2]))
    refused(put(path, data[:4] + bytes(60) + data[64:]))


@pytest.mark.parametrize(
    ("module", "package", "source"),
    [("pyarrow.parquet", "pyarrow", "set.parquet"), ("datasets", "datasets", "acme/set")],
)
def test_missing_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "set.parquet", b"")
    monkeypatch.setitem(sys.modules, module, None)
    assert refused(source).endswith(f"pip install {package}")


# Hub datasets

HUB_SCRIPT = """
import json, sys
from pathlib import Path
import datasets
from datasets.arrow_writer import ArrowWriter
from lowmem_adamms.errors import PromptError
from lowmem_adamms.prompts import load_prompts
from lowmem_adamms.settings import PromptSettings

cache, red = Path("cache"), Path("red.png").read_bytes()
image = {"bytes": red, "path": None}
features = datasets.Features({
    "question": datasets.Value("string"),
    "image": datasets.Image(),
    "extra": datasets.List(datasets.Image()),
})

def write(name, config, **splits):
    '''What the library leaves behind of a dataset that it once fetched.'''
    folder = cache / f"acme___{name}" / config / "0.0.0" / "0123"
    folder.mkdir(parents=True)
    found = datasets.SplitDict()
    for split, count in splits.items():
        writer = ArrowWriter(path=str(folder / f"{name}-{split}.arrow"), features=features)
        for row in range(count):
            question = f"{config} {split} {row}"
            writer.write({"question": question, "image": image, "extra": [image, image]})
        rows, size = writer.finalize()
        found[split] = datasets.SplitInfo(split, size, rows, dataset_name=name)
    datasets.DatasetInfo(features=features, splits=found, dataset_name=name, config_name=config,
        builder_name="parquet", version="0.0.0").write_to_directory(str(folder))

def load(ref, settings):
    try:
        found = load_prompts(ref, PromptSettings(**settings))
    except PromptError as error:
        return str(error)
    return [found.ref, *([p.text, p.id, [image == red for image in p.images]] for p in found)]

write("pics", "art", train=3, validation=2, dev=1)
write("pics", "bio", dev=30)
write("odd", "default", dev=1, devtest=1)
print(json.dumps([load(ref, settings) for ref, settings in json.load(sys.stdin)]))
"""


def hub_rows(config: str, split: str, rows: Iterable[int], images: int = 1) -> list[Any]:
    """The reference with its commit, then text, id and images of each row."""
    ref = f"acme/pics:{config}"
    found = ([f"{config} {split} {i}", f"{ref} {split}[{i}]", [True] * images] for i in rows)
    return [f"{ref}@0123 {split}", *found]


HUB_CASES: list[tuple[str, dict[str, Any], list[Any] | str]] = [
    # What is asked for; what comes, or words of the error
    ("acme/pics:art", {}, hub_rows("art", "validation", range(2))),
    (
        "acme/pics:art",
        {"split": "train", "image_column": ["image", "extra"]},
        hub_rows("art", "train", range(3), 3),
    ),
    ("acme/pics:bio", {"samples": 3, "seed": 2}, hub_rows("bio", "dev", (1, 2, 27))),
    ("acme/odd", {}, "one of its splits: dev, devtest"),
    ("acme/pics", {}, "art"),
    ("acme/pics:geo", {}, "'art', 'bio'"),
    ("acme/pics:art", {"split": "test"}, "validation"),
    ("acme/none", {}, "HF_HUB_OFFLINE"),
]


def test_hub_datasets_as_the_library_finds_them_in_its_cache(tmp_path: Path) -> None:
    """By the real library, offline, in a process of its own: it reads its environment at import."""
    pytest.importorskip("datasets")
    put(tmp_path / "red.png", encode())
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT],
        input=json.dumps([case[:2] for case in HUB_CASES]),
        env={
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (ref, _, expected), found in zip(HUB_CASES, json.loads(done.stdout), strict=True):
        if isinstance(expected, list):
            assert found == expected
        else:
            assert found.startswith(f"{ref}: ") and expected in found and found.isprintable()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("acme/set", ["acme/set", None, None]),
        ("acme/set:art", ["acme/set", "art", None]),
        ("acme/set@0a1b2c", ["acme/set", None, "0a1b2c"]),
        ("acme/set:art@refs/pr/1", ["acme/set", "art", "refs/pr/1"]),
    ],
)
def test_hub_dataset_is_asked_for_by_name_config_and_revision(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str | None]
) -> None:
    asked: list[object] = []

    def load_dataset_builder(*words: object, revision: object) -> None:
        asked.extend([*words, revision])
        raise ValueError("enough")

    library = SimpleNamespace(load_dataset_builder=load_dataset_builder)
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert "enough" in refused(name)
    assert asked == expected


# Settings


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a/missing.parquet", None, "no such file"),
        ("missing", None, "no such file"),
        ("p.json", b'{"prompt": "x"}', "call it .jsonl"),
        ("p.json", b"[]", "no prompts"),
        ("p.csv", b"", "no column called prompt"),
        ("p.csv", b"prompt\n", "no prompts"),
        ("p.txt", b"What is this?", "expected .jsonl"),
        ("p.jsonl", b"\n \n\n", "no prompts"),
    ],
)
def test_what_is_no_prompt_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        put(tmp_path / name, content)
    assert words in refused(name)


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        ("p.jsonl", {"question": "What?"}),
        ("p.jsonl", {"text_column": "text"}),
        ("p.csv", {"split": "test"}),
        ("set.parquet", {"split": "test"}),
        ("pics", {"image_column": ("image",)}),
        ("acme/set", {"question": "What?"}),
    ],
)
def test_settings_must_fit_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, settings: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "p.jsonl", [{"prompt": "x"}])
    put(tmp_path / "set.parquet", b"")
    put(tmp_path / "p.csv", b"prompt\nx\n")
    put(tmp_path / "pics" / "a.png", encode())
    assert next(iter(settings)) in refused(source, RecipeError, **settings)


def test_a_sample_of_no_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        load(lines(tmp_path / "p.jsonl", [{"prompt": "x"}]), samples=0)


def test_sample_of_a_seed_is_the_same_on_every_machine(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", [{"prompt": str(number)} for number in range(1000)])
    random.seed(7)
    picks = [int(prompt.text) for prompt in load(path, samples=8, seed=1)]
    assert picks == [64, 120, 137, 261, 582, 782, 821, 867]
    assert len(load_prompts(path)) == 100
    assert load_prompts(path) == load(path, seed=0) != load(path, seed=1)
    assert load(path, samples=1000) == load(path, samples=2000)
    assert [prompt.text for prompt in load(path, samples=1000)] == [str(i) for i in range(1000)]


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("lowmem_adamms.prompts.load")
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=4)


# Images


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
def test_image_comes_as_rgb_from_path_or_bytes(tmp_path: Path, form: str) -> None:
    data = encode(BLUE, form)
    for source in (data, put(tmp_path / "image", data)):
        image = open_image(source)
        assert (image.mode, image.size) == ("RGB", (4, 3))
        assert image.getpixel((1, 1)) == pytest.approx(BLUE, abs=3)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 100 * 257, (100, 100, 100)),
        ("I;16", 65535, (255, 255, 255)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 128, 0, 255), GREEN),
        ("LA", (0, 0), (255, 255, 255)),
    ],
)
def test_colour_modes(mode: str, colour: object, expected: tuple[int, ...]) -> None:
    assert open_image(encode(colour, mode=mode)).getpixel((0, 0)) == expected


def test_transparent_palette_turns_white_without_a_warning() -> None:
    data = encode(0, mode="P", transparency=bytes([0]))
    assert open_image(data).getpixel((0, 0)) == (255, 255, 255)


def test_orientation_is_applied() -> None:
    image = Image.new("RGB", (4, 3), BLUE)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned clockwise by a quarter
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    turned = open_image(file.getvalue())
    assert (turned.size, turned.getpixel((2, 0))) == ((3, 4), RED)


def test_broken_orientation_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> None:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    assert open_image(encode()).size == (4, 3)


def test_opening_a_broken_image_names_it(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="an image of 3 bytes: not an image"):
        open_image(b"abc")
    with pytest.raises(PromptError, match=f"image {tmp_path / 'no.png'}: no such file"):
        open_image(tmp_path / "no.png")


# Digest


def test_digest_tells_contents_and_not_places(tmp_path: Path) -> None:
    first = put(tmp_path / "a.png", ENCODED[0])
    same = put(tmp_path / "b" / "c.png", ENCODED[0])
    prompts = [Prompt("x", (first,), "p:1"), Prompt("y", (ENCODED[1],), "p:2")]
    mark = digest(prompts)
    assert re.fullmatch("[0-9a-f]{64}", mark)
    assert digest([replace(prompts[0], id="q:9"), prompts[1]]) == mark
    assert digest([replace(prompts[0], images=(same,)), prompts[1]]) == mark
    assert digest([replace(prompts[0], images=(ENCODED[0],)), prompts[1]]) == mark
    put(first, ENCODED[2])
    assert digest(prompts) != mark


def test_digest_sees_every_difference() -> None:
    sets = [
        [],
        [Prompt("ab")],
        [Prompt("a"), Prompt("b")],
        [Prompt("b"), Prompt("a")],
        [Prompt("a", (b"1",)), Prompt("b")],
        [Prompt("a"), Prompt("b", (b"1",))],
        [Prompt("a", (b"1", b"2"))],
        [Prompt("a", (b"2", b"1"))],
        [Prompt("a", (b"12",))],
        [Prompt("1 0\na")],
    ]
    assert len({digest(prompts) for prompts in sets}) == len(sets)


def test_digest_of_a_missing_image_names_it(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"gone\.png"):
        digest([Prompt("x", (tmp_path / "gone.png",))])
