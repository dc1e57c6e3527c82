"""Families that a user declares in TOML: what they say, every mistake named, and what they do."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny
import torch
from command import run
from hypothesis import given
from hypothesis import strategies as st

from lowmem_adamms import make_plan, merge
from lowmem_adamms.architectures import declare
from lowmem_adamms.architectures.arch import Arch
from lowmem_adamms.architectures.declaration import Declaration
from lowmem_adamms.architectures.families import ARCHS
from lowmem_adamms.errors import DeclarationError, RecipeError
from lowmem_adamms.merging.verify import verify

LLAMA = declare.find_arch("Llama", ARCHS)
PLAIN = replace(LLAMA, name="Mine").to_json()
Pair = tuple[Path, Path]
Capture = pytest.CaptureFixture[str]


def put(folder: Path, text: str | bytes, name: str = "my.toml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Written and read back


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_every_known_declaration_comes_back_from_what_is_printed(
    tmp_path: Path, arch: Arch, capsys: Capture
) -> None:
    assert run("archs", arch.name) == 0
    path = put(tmp_path, capsys.readouterr().out)
    again = declare.read_declaration(path)
    assert again == arch
    assert list(again.decoder.items()) == list(arch.decoder.items())
    assert run("archs", arch.name, "--json") == 0
    assert declare.parse_declaration(json.loads(capsys.readouterr().out), "x") == arch


def from_toml(text: str) -> Arch:
    return declare.parse_declaration(tomllib.loads(text), "x")


@given(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1))
def test_any_text_comes_back_from_toml_and_json(text: str) -> None:
    arch = replace(
        LLAMA,
        name=text,
        source=f" {text} \\",
        classes=(text,),
        spellings=((f"{text}.", text), ("", "")),
        decoder={**LLAMA.decoder, text.replace("#", "") or "x": ""},
        others={text: f'"{text}"'},
        shared_ids=len(text),
    )
    assert from_toml(declare.to_toml(arch)) == arch
    assert declare.parse_declaration(json.loads(json.dumps(arch.to_json())), "x") == arch


# like


def test_a_short_file_is_a_known_decoder_under_other_names(tmp_path: Path) -> None:
    text = """
    name = "Mine"
    like = "qwen2-vl"
    classes = ["MineForConditionalGeneration"]
    spellings = [["lm.", "lm.out.weight"]]
    rename = { "self_attn." = "attention.", "attention.q_proj" = "attention.wq" }
    others = { "eye." = "vision tower", "visual." = "old tower" }
    """
    arch = declare.read_declaration(put(tmp_path, text))
    qwen = declare.find_arch("Qwen2-VL", ARCHS)
    assert (arch.name, arch.classes) == ("Mine", ("MineForConditionalGeneration",))
    assert (arch.spellings, arch.shared_ids) == ((("lm.", "lm.out.weight"),), qwen.shared_ids)
    assert arch.others == {**qwen.others, "eye.": "vision tower", "visual.": "old tower"}
    assert arch.decoder["layers.#.attention.wq.weight"] == "layers.#.attn.q.weight"
    assert arch.decoder["layers.#.attention.k_proj.weight"] == "layers.#.attn.k.weight"
    assert list(arch.decoder.values()) == list(qwen.decoder.values())
    assert not any("self_attn" in name for name in arch.decoder)


def test_names_are_renamed_wherever_a_declaration_has_them(tmp_path: Path) -> None:
    text = 'name = "Mine"\nlike = "InternLM2"\nrename = { "layers." = "blocks." }\n'
    arch = declare.read_declaration(put(tmp_path, text))
    known = declare.find_arch("InternLM2", ARCHS)
    for names, before in (
        (arch.decoder, known.decoder),
        (arch.interleaved, known.interleaved),
    ):
        assert [*names] == [name.replace("layers.", "blocks.") for name in before]
    assert (arch.source, arch.classes) == ("declared by the user", ())
    assert (arch.spellings, arch.others) == (known.spellings, known.others)


def test_a_name_displaces_the_inherited_ones_of_its_roles(tmp_path: Path) -> None:
    fused = " ".join(f"layers.#.attn.{part}.weight" for part in "qkv")
    text = f"""
    name = "Mine"
    like = "Llama"
    [decoder]
    "layers.#.self_attn.qkv.weight" = "{fused}"
    "layers.#.extra.weight" = ""
    "norm.weight" = "norm"
    """
    arch = declare.read_declaration(put(tmp_path, text))
    expected = {name: held for name, held in LLAMA.decoder.items() if held not in fused.split()}
    assert {**arch.decoder} == {
        **expected,
        "layers.#.self_attn.qkv.weight": fused,
        "layers.#.extra.weight": "",
    }


# Mistakes: one line that says where, what was found, and what was expected

SHORT = 'name = "Mine"\nlike = "Llama"\n'
MISTAKES = [
    ("clases = []\nname = 'x'", "'clases': Extra inputs"),
    ('name = "x"', "'spellings': Field required"),
    ("name = 3", "'name': Input should be a valid string"),
    ('name = ""\nlike = "Llama"', "'name': String should have at least 1"),
    (r'name = "a\u0007"', "'name': expected printable text"),
    ("like = 5", "'like': Input should be a valid string"),
    ('name = "x"\nlike = "Lama"', r"like: no declaration 'Lama'; did you mean 'Llama'\?"),
    ('name = "x"\nrename = { "a" = "b" }', "'like': Field required"),
    (SHORT + "rename = 1", "'rename': Input should be a valid dict"),
    (
        SHORT + 'rename = { "q_proj" = "k_proj" }',
        "rename: two names of Llama become 'layers.#.self_attn.k_proj.weight'",
    ),
    (SHORT + 'classes = "A"', "'classes': Input should be a valid tuple"),
    (SHORT + 'classes = ["A", 2]', "'classes.1': Input should be"),
    (SHORT + 'spellings = [["model."]]', "'spellings.0.1': Field required"),
    (SHORT + 'spellings = [["model", "h"]]', "'spellings.0.0': expected a prefix that ends"),
    (SHORT + "shared_ids = 0", "'shared_ids': Input should be greater"),
    (SHORT + f"shared_ids = 0x{'f' * 9999}", "'shared_ids': Input should be less"),
    (SHORT + "shared_ids = 1979-05-27", "'shared_ids': Input should be a valid integer"),
    (SHORT + 'interleaved = ["a"]', "interleaved: 'a' is no name of the decoder"),
    (SHORT + 'others = { "eye." = 1 }', r"'others.eye.': Input should be a valid string"),
    (SHORT + 'others = { "" = "tower" }', "'others.': String should have"),
    (SHORT + '[decoder]\nx = "layers.#.attn.q.weight"', "decoder: 'x': # in the name or"),
    (SHORT + '[decoder]\n"a.#.b" = "norm"', "decoder: 'a.#.b': # in the name or"),
    (SHORT + '[decoder]\n"a.0.b.#.c" = ""', "decoder: 'a.0.b.#.c': expected its first number"),
    (SHORT + '[decoder]\nx = "head"', "decoder: 'x': 'head' cannot be a role"),
    (SHORT + '[decoder]\nx = "embed@image"', "'embed@image' cannot be a role"),
    (SHORT + '[decoder]\na = "embed norm"', "decoder: no name holds embed, alone"),
    ("name = 'x'\nname = 'y'", "not TOML: "),
    ("a = " + "[" * 5000, "not TOML: "),
    ("a = " + "9" * 5000, "not TOML: "),
    (b"name = 'x'\n\xff", "not TOML: .*utf-8"),
    (b" " * (declare.MAX_FILE_BYTES + 1), "more than 262144 bytes"),
]


@pytest.mark.parametrize(("text", "words"), MISTAKES)
def test_a_mistake_is_one_line_that_names_it(
    tmp_path: Path, text: str | bytes, words: str, capsys: Capture
) -> None:
    path = put(tmp_path, text)
    assert run("archs", "--arch", path) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"error: {re.escape(str(path))}: .*{words}.*\n", captured.err)
    assert len(captured.err) < 1500


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "none.toml", "No such file"),
        (tmp_path, "directory"),
        (Path("a\0b"), "null"),
    ):
        with pytest.raises(DeclarationError, match=words):
            declare.read_declaration(path)


def test_two_files_may_not_give_one_name(tmp_path: Path) -> None:
    first, second = put(tmp_path, SHORT, "a.toml"), put(tmp_path, SHORT, "b.toml")
    with pytest.raises(DeclarationError, match="2 declarations are named 'Mine'"):
        declare.read_declarations([first, second])
    assert declare.read_declarations([first])[0].name == "Mine"


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    assert declare.read_declaration(put(tmp_path, b"\xef\xbb\xbf" + SHORT.encode())).name == "Mine"


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.data())
def test_any_value_anywhere_is_a_declaration_or_refused(data: st.DataObject) -> None:
    """As adamms.json, too, may hold."""
    table = json.loads(json.dumps(PLAIN))
    if data.draw(st.booleans()):
        table["like"] = data.draw(st.sampled_from([arch.name for arch in ARCHS]) | values)
        table["rename"] = data.draw(
            values | st.dictionaries(st.sampled_from(["q_proj", "layers.#.", "#", "."]), st.text())
        )
    for _ in range(data.draw(st.integers(0, 2))):
        place = table
        key = data.draw(st.sampled_from(sorted(place)) | st.text(max_size=5))
        if isinstance(place.get(key), dict) and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from([*place, ""]) | st.text(max_size=5))
        place[key] = data.draw(values)
    try:
        arch = declare.parse_declaration(table, "here")
    except DeclarationError as error:
        assert str(error).startswith("here: ")
        assert "\n" not in str(error)
        assert len(str(error)) < 4000
    else:
        assert from_toml(declare.to_toml(arch)) == arch


def test_a_declaration_may_hold_whatever_an_arch_has() -> None:
    keys = {*Declaration.model_fields}
    assert keys == {field.name for field in fields(Arch)}
    assert all(field.description for field in Declaration.model_fields.values())
    assert declare.parse_declaration(PLAIN, "x").to_json() == PLAIN


# archs


def test_archs_lists_every_declaration_with_the_users_first(
    tmp_path: Path, capsys: Capture
) -> None:
    path = put(tmp_path, SHORT + 'classes = ["MineForCausalLM"]\nsource = "a page"')
    assert run("archs", "--arch", path) == 0
    out = capsys.readouterr().out
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    heads = [row[1].strip() for row in rows if row[1].strip()]
    assert heads == ["Mine", *(arch.name for arch in ARCHS)]
    assert "MineForCausalLM" in out and "Qwen2VLForConditionalGeneration" in out
    assert "python -m lowmem_adamms archs NAME" in out
    assert run("archs", "--json", "--arch", path) == 0
    documents = json.loads(capsys.readouterr().out)
    assert documents[1:] == [arch.to_json() for arch in ARCHS]
    assert run("archs", "mine", "--arch", path) == 0
    assert from_toml(capsys.readouterr().out) == declare.parse_declaration(documents[0], "x")


def test_archs_suggests_a_name(capsys: Capture) -> None:
    assert run("archs", "Qwen2VL") == 2
    assert re.fullmatch(
        "error: no declaration 'Qwen2VL'; did you mean 'Qwen2-VL'\\?\n", capsys.readouterr().err
    )
    with pytest.raises(RecipeError, match=r"expected one of Llama, .*Qwen2"):
        declare.find_arch("zzzzzz", ARCHS)


# What a declaration does: a donor of an unheard-of spelling merges as the one it was made from

ODD = """
name = "Odd"
like = "LLaVA-OneVision"
classes = ["OddForConditionalGeneration"]
spellings = [["brain.", "mouth.weight"]]
rename = { "self_attn." = "focus.", "mlp." = "think." }
others = { "rest." = "vision tower" }
[decoder]
"layers.#.focus.kv_proj.weight" = "layers.#.attn.k.weight layers.#.attn.v.weight"
"""


def oddly(name: str) -> str:
    name = tiny.modern(name)
    if name == "lm_head.weight":
        return "mouth.weight"
    if not name.startswith("model.language_model."):
        return f"rest.{name}"
    name = name.replace("model.language_model.", "brain.")
    return name.replace("self_attn.", "focus.").replace("mlp.", "think.")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Path:
    """The donor with names no declaration knows, and k and v in one tensor."""
    folder = tmp_path_factory.mktemp("odd")
    tensors = {oddly(name): tensor for name, tensor in tiny.load(pair[1]).items()}
    for name in [name for name in tensors if name.endswith("k_proj.weight")]:
        both = [tensors.pop(name), tensors.pop(name.replace("k_proj", "v_proj"))]
        tensors[name.replace("k_proj", "kv_proj")] = torch.cat(both)
    shutil.copytree(pair[1], folder / "odd", ignore=shutil.ignore_patterns("*.safetensors*"))
    tiny.respell(folder / "odd", lambda name: None, folder / "out", extra=tensors)
    return tiny.flat_config(folder / "out", architectures=["OddForConditionalGeneration"])


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_a_declared_donor_merges_as_the_known_one_it_was_made_from(
    pair: Pair, odd: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = put(tmp_path, ODD)
    words = ("--arch", path, "--alpha", "0.3", "-o")
    assert run(pair[0], odd, *words, tmp_path / "out") == 0
    assert "note: donor: Odd, as --arch declares it\n" in capsys.readouterr().err
    merge(make_plan(*pair), 0.3, tmp_path / "known")
    assert shards(tmp_path / "out") == shards(tmp_path / "known")
    assert run(pair[0], odd, "--alpha", "0.3", "-o", tmp_path / "undeclared") == 2
    lacking = capsys.readouterr().err
    assert "brain.layers.0.focus." in lacking
    assert "--unmatched keep" in lacking
    assert not (tmp_path / "undeclared").exists()


def test_verify_needs_no_file_for_what_was_declared(
    pair: Pair, odd: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = put(tmp_path, ODD)
    assert run(pair[0], odd, "--arch", path, "--alpha", "0.3", "-o", tmp_path / "out") == 0
    arch = declare.read_declaration(path)
    path.unlink()
    recipe = json.loads((tmp_path / "out" / "adamms.json").read_bytes())
    assert [declare.parse_declaration(table, "x") for table in recipe["declared"]] == [arch]
    assert verify(tmp_path / "out", deep=True, base=pair[0], donor=odd).rows
    recipe["declared"][0]["decoder"]["norm.weight"] = "norm@"
    (tmp_path / "out" / "adamms.json").write_text(json.dumps(recipe))
    assert run("verify", tmp_path / "out", "--deep", "--base", pair[0], "--donor", odd) == 2
    assert "adamms.json: declared[0]: decoder: " in capsys.readouterr().err
    for value in (7, "x"):
        (tmp_path / "out" / "adamms.json").write_text(json.dumps(recipe | {"declared": value}))
        assert run("verify", tmp_path / "out") == 2
        assert "not a recipe of lowmem-adamms" in capsys.readouterr().err


def test_a_killed_merge_resumes_only_with_the_same_declaration(
    pair: Pair, odd: Path, tmp_path: Path
) -> None:
    arch = declare.read_declaration(put(tmp_path, ODD))
    other = replace(arch, others={**arch.others, "more.": "connector"})
    first, second, again = (
        make_plan(pair[0], odd, declared=[each]).identity() for each in (arch, other, arch)
    )
    assert first == again != second


def test_plan_says_what_was_declared_and_what_was_of_no_use(
    pair: Pair, odd: Path, tmp_path: Path, capsys: Capture
) -> None:
    used, unused = put(tmp_path, ODD), put(tmp_path, SHORT, "unused.toml")
    assert run("plan", pair[0], odd, "--arch", used, "--arch", unused, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["donor_arch"] == "Odd"
    assert "donor: Odd, as --arch declares it" in document["notes"]
    assert any(note.startswith("--arch Mine: neither checkpoint") for note in document["notes"])
    assert not any(note.startswith("--arch Odd") for note in document["notes"])


def test_a_search_takes_declarations_but_recorded_answers_have_no_use_for_them(
    tmp_path: Path, pair: Pair, odd: Path, capsys: Capture
) -> None:
    broken = put(tmp_path, "name = 1")
    prompts = put(tmp_path, '{"prompt": "a"}\n', "prompts.jsonl")
    assert run("search", pair[0], odd, "--prompts", prompts, "--arch", broken) == 2
    assert f"error: {broken}: 'name': Input" in capsys.readouterr().err
    assert run("search", "--answers", "a.jsonl", "--arch", broken) == 2
    assert "leave out --arch" in capsys.readouterr().err
