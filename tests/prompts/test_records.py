"""Prompts as people have them: arrays, conversations, messages, tables, and from Python."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lowmem_adamms.errors import MergeError, PromptError, RecipeError
from lowmem_adamms.prompts import Prompt, as_prompt, digest, load_prompts, open_image
from lowmem_adamms.settings import PromptSettings


def png(colour: object = "red", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (4, 3), colour).save(file, "PNG")  # type: ignore[arg-type]
    return file.getvalue()


RED = png()
DATA_URL = "data:image/png;base64," + base64.b64encode(RED).decode()


def put(path: Path, content: object) -> Path:
    """A file; text stands as it is, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def refused(source: Any, kind: type[MergeError] = PromptError, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        load_prompts(source, PromptSettings(**settings))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


def human(value: object) -> dict[str, object]:
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "Yes"}]}


def user(content: object, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}], **more}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def image(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


A, B = Path("a.png"), Path("sub/b.png")
FORMS: dict[str, tuple[dict[str, Any], str, tuple[Path | bytes, ...]]] = {
    "ours": ({"prompt": "What?", "image": "a.png"}, "What?", (A,)),
    "LLaVA": ({**human("<image>\nWhat?"), "image": "a.png", "id": 7}, "What?", (A,)),
    "LLaVA, mark behind": ({**human("What?\n<image>"), "image": "a.png"}, "What?", (A,)),
    "LLaVA without a mark": ({**human("What?"), "image": "a.png"}, "What?", (A,)),
    "LLaVA, text only": (human(" Why? "), " Why? ", ()),
    "LLaVA, several": (
        {**human("<image>\nIs it like <image>?"), "image": ["a.png", "sub/b.png"]},
        "Is it like <image 2>?",
        (A, B),
    ),
    "LLaVA's system": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Why?"},
            ]
        },
        "Be brief.\n\nWhy?",
        (),
    ),
    "OpenAI": (user("What?"), "What?", ()),
    "OpenAI's parts": (user([image("a.png"), text("What?")]), "What?", (A,)),
    "OpenAI's data: URL": (user([text("What?"), image(DATA_URL)]), "What?", (RED,)),
    "OpenAI's responses": (
        user([{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "Q"}]),
        "Q",
        (A,),
    ),
    "parts in turns": (
        user([text("First:"), image("a.png"), text("then:"), image("sub/b.png"), text("So?")]),
        "First:\n<image 1>\nthen:\n<image 2>\nSo?",
        (A, B),
    ),
    "transformers' parts": (user([{"type": "image", "path": "a.png"}, text("Q")]), "Q", (A,)),
    "images beside messages": (
        user([{"type": "image"}, text("Q")], images=["sub/b.png"]),
        "Q",
        (B,),
    ),
    "marks in messages": (user("<image>Q", images=["a.png"]), "Q", (A,)),
    "the first of several questions": (
        {
            "messages": [
                {"role": "developer", "content": "Rules"},
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "Two?"},
            ]
        },
        "Rules\n\nOne?",
        (),
    ),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_in_both_kinds_of_file(tmp_path: Path, form: str, suffix: str) -> None:
    record, words, images = FORMS[form]
    for path in (A, B):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(RED)
    path = put(tmp_path / f"set{suffix}", [record] if suffix == ".json" else record)
    id = f"set{suffix}[0]" if suffix == ".json" else "set.jsonl:1"
    expected = tuple(tmp_path / each if isinstance(each, Path) else each for each in images)
    assert load_prompts(path) == (Prompt(words, expected, id),)


BAD: list[tuple[object, str]] = [
    ({"conversations": []}, "no question"),
    ({"conversations": "What?"}, "found 'What?'"),
    ({"conversations": [{"from": "gpt", "value": "Yes"}]}, "begins with a question"),
    ({"conversations": [{"role": "user", "content": "OpenAI's"}]}, "from is one of human, user"),
    (human(7), '"value" is 7'),
    (human("<image>"), "1 marks <image>, 0 images"),
    ({**human("<image>"), "image": "a.png"}, '"conversations" is empty'),
    ({**human("<image> <image>"), "image": "a.png"}, "2 marks <image>, 1 images"),
    ({**human("<image>"), "image": ["a.png"] * 2}, "1 marks <image>, 2 images"),
    ({"messages": [{"role": "system", "content": "Be brief."}]}, "no question"),
    (user(None), '"content" is None'),
    (user([]), '"messages" is empty'),
    (user([{"type": "video_url"}]), "expected one of the types text, image_url"),
    (user([{"type": ["text"]}]), "expected one of the types"),
    (user(["What?"]), "a part is 'What?'"),
    (user([{"type": "text"}]), '"text" is None'),
    (user([image("https://host/a.png"), text("Q")]), "https://host/a.png is a URL; download it"),
    (user([image("file:///etc/passwd"), text("Q")]), "is a URL"),
    (user([image("data:image/png;base64,%%%"), text("Q")]), "no data: URL in base64"),
    (user([image(""), text("Q")]), "an image is ''"),
    (user([{"type": "image", "image": {"bytes": "x"}}, text("Q")]), "an image is {'bytes': 'x'}"),
    (
        user([image("a.png"), text("Q")], image="a.png"),
        "1 images beside a message that has its own",
    ),
    ({**human("Q"), "messages": []}, "found conversations and messages; keep one"),
    (["What?"], "expected an object"),
    ({"question": "Q"}, 'no "prompt" in it, found question'),
]


@pytest.mark.parametrize(("record", "words"), BAD)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, record: object, words: str) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    path = put(tmp_path / "set.json", [{"prompt": "good"}, record])
    message = refused(path, samples=1)  # also outside the sample
    assert message.startswith(f"{path}[1]: ")
    assert words in message


def test_a_damaged_data_url_is_named_with_its_place(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(RED[:45]).decode()
    path = put(tmp_path / "set.json", [user([image(url), text("Q")])])
    assert refused(path).startswith(f"{path}[0]: image 1 of 1: cannot be read")


def test_lines_are_read_again_where_they_stand(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{i} ä" * (i + 1)}) for i in range(50)]
    path = put(tmp_path / "set.jsonl", " \r\n  \n".join(lines))
    whole = load_prompts(path)
    assert [prompt.id for prompt in whole] == [f"set.jsonl:{2 * i + 1}" for i in range(50)]
    sample = load_prompts(path, PromptSettings(samples=5))
    assert [prompt for prompt in whole if prompt in sample] == list(sample)


# Tables


@pytest.mark.parametrize(("suffix", "comma"), [(".csv", ","), (".TSV", "\t")])
def test_tables(tmp_path: Path, suffix: str, comma: str) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    rows = [
        ["id", "question", "image", "image_2"],
        ["1", '"Is it, a ""cat"",\nor not?"', "a.png", ""],
        ["2", "Ünd?", "", ""],
        [],
        ["3", "Both?", DATA_URL if comma == "\t" else f'"{DATA_URL}"', "a.png"],
    ]
    path = put(tmp_path / f"set{suffix}", "\ufeff" + "\r\n".join(map(comma.join, rows)) + "\r\n")
    assert load_prompts(path) == (
        Prompt('Is it, a "cat",\nor not?', (tmp_path / "a.png",), f"set{suffix} row 2"),
        Prompt("Ünd?", (), f"set{suffix} row 3"),
        Prompt("Both?", (RED, tmp_path / "a.png"), f"set{suffix} row 5"),
    )
    named = load_prompts(path, PromptSettings(text_column="id", image_column=("image_2",)))
    assert [(prompt.text, len(prompt.images)) for prompt in named] == [("1", 0), ("2", 0), ("3", 1)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("caption\na\n", "no column called prompt, question"),
        ("prompt,prompt\na,b\n", "two columns are called prompt"),
        ("prompt,image\na\n", "row 2: found 1 cells, expected 2"),
        ("prompt,image\n,a.png\n", 'row 2: "prompt" is empty'),
        ("prompt,image\na,b.png\n", "row 2: image"),
        ("prompt,image\na,http://host/b.png\n", "is a URL; download it"),
        ('prompt\n"a\n', "not a row of a table"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, content: str, words: str) -> None:
    path = put(tmp_path / "set.csv", content)
    message = refused(path)
    assert message.startswith(str(path))
    assert words in message


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_bytes("prompt\nä\n".encode("latin-1"))
    assert "line 2: not UTF-8" in refused(path)


# Python


def test_prompts_from_python(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(RED)
    prompts = load_prompts(
        [
            "Why?",
            {"prompt": "What?", "image": Image.new("RGB", (4, 3), "red")},
            {"prompt": "Both?", "images": [RED, path]},
            user([text("Q"), {"type": "image", "image": Image.new("L", (4, 3), 7)}]),
            Prompt("Own", id="mine"),
        ]
    )
    assert [prompt.text for prompt in prompts] == ["Why?", "What?", "Both?", "Q", "Own"]
    assert [prompt.id for prompt in prompts][3:] == ["prompt 4", "mine"]
    assert prompts[2].images == (RED, path)
    for prompt, colour in ((prompts[1], (255, 0, 0)), (prompts[3], (7, 7, 7))):
        assert open_image(prompt.images[0]).getpixel((0, 0)) == colour
    assert prompts.ref == "prompts given in Python"
    assert digest(prompts) == digest(load_prompts(prompts))


def test_a_pillow_image_counts_as_the_file_it_came_from(tmp_path: Path) -> None:
    """Upright, and white where it is transparent: what the model sees is the same."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    path = tmp_path / "a.png"
    Image.new("RGBA", (4, 3), (0, 0, 0, 0)).save(path, exif=exif)
    with Image.open(path) as opened:
        given = as_prompt({"prompt": "Q", "image": opened}).images[0]
    assert open_image(given).tobytes() == open_image(path).tobytes()
    assert open_image(given).size == (3, 4)


def test_python_prompts_that_are_wrong() -> None:
    assert refused([]).endswith("no prompts in it")
    assert refused(["a", 7]).startswith("prompt 2: found 7")
    assert refused([{"prompt": "a", "image": b"x"}]).startswith("prompt 1: image 1 of 1: not an")
    assert "question does not go with" in refused(["a"], RecipeError, question="Q")


@pytest.mark.parametrize("given", [None, 5, {"prompt": "Q"}, b"prompts.jsonl"])
def test_what_cannot_be_a_set_is_a_mistake_of_the_caller(given: Any) -> None:
    with pytest.raises(TypeError, match="expected a path or a list of prompts"):
        load_prompts(given)


def test_long_blanks_around_marks_are_read_in_one_pass() -> None:
    """Searching for the end at each of these blanks would take hours."""
    blanks = " " * 300_000
    record = {
        **human(f"<image>{blanks}a{blanks}<image>{blanks}b{blanks}<image>"),
        "image": [RED] * 3,
    }
    assert as_prompt(record).text == f"a{blanks}<image 2>{blanks}b"
