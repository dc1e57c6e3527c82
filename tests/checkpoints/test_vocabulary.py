"""Vocabularies read from every form of tokenizer file, and rows joined by token."""

from __future__ import annotations

import json
import struct
import time
from array import array
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from lowmem_adamms.checkpoints.vocabulary import (
    MAX_FILE_BYTES,
    join_rows,
    read_vocabulary,
)
from lowmem_adamms.errors import FormatError

VOCAB = {"a": 0, "b": 1, "ab": 2, '"': 3, "\\": 4, "{": 5, "]": 6}
ADDED = {"<|end|>": 7, "<image>": 9}


def added_tokens(tokens: Mapping[str, int]) -> list[dict[str, Any]]:
    return [
        {"id": i, "content": token, "single_word": False, "special": True}
        for token, i in tokens.items()
    ]


def put(folder: Path, **files: object) -> Path:
    """Write `<name>.json` files into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in files.items():
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def fast(vocab: object, added: Mapping[str, int], **model: Any) -> dict[str, Any]:
    """A tokenizer.json in the key order in which the tokenizers library writes it."""
    return {
        "version": "1.0",
        "truncation": None,
        "added_tokens": added_tokens(added),
        "normalizer": {"type": "NFC"},
        "model": {"type": "BPE", "unk_token": None, "vocab": vocab, **model},
    }


def read(folder: Path) -> array[int]:
    hashes = read_vocabulary(folder)
    assert hashes is not None
    return hashes


def shared(base: Path, donor: Path) -> list[tuple[int, ...]]:
    runs = join_rows(read(base), read(donor), 1000, 1000)
    return [(run.base, run.donor, run.length) for run in runs]


def assert_same_tokens(folder: Path, tokens: Mapping[str, int], tmp_path: Path) -> None:
    """The folder's vocabulary is exactly `tokens`: joined with them written the simplest way."""
    plain = put(tmp_path / "plain", vocab=tokens)
    found, expected = read(folder), read(plain)
    size = max(tokens.values()) + 1
    assert list(found[:size]) == list(expected[:size])
    assert not any(found[size:])
    assert sum(map(bool, found)) == len(tokens)


# Forms


@pytest.mark.parametrize("order", [["added_tokens", "model"], ["model", "added_tokens"]])
@pytest.mark.parametrize("merges", [["a b", '" \\'], [["a", "b"], ['"', "\\"]]])
@pytest.mark.parametrize("merges_first", [True, False])
def test_tokenizer_json_in_any_key_order(
    tmp_path: Path, order: list[str], merges: list[Any], merges_first: bool
) -> None:
    document = fast(VOCAB, ADDED, merges=merges)
    if merges_first:
        document["model"] = {"merges": merges, **document["model"]}
    document = {"version": "1.0", **{key: document.pop(key) for key in order}, **document}
    assert_same_tokens(put(tmp_path / "t", tokenizer=document), VOCAB | ADDED, tmp_path)


@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_layout_and_escapes_do_not_matter(
    tmp_path: Path, indent: int | str | None, ascii_only: bool
) -> None:
    words = ["Ġgröße", "数", "😀", '\\"', "\n\t", "[}", "\u2028", "", "}"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = ['\\" [', "} {", "数 😀", "\\ \\"]
    document = {"junk": {"[": '"]\\', "x": [[1.5e3, "{", None, True]]}, **fast(vocab, ADDED)}
    document["model"] = {"junk": merges, "merges": merges, **document["model"]}
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text(text, encoding="utf-8")
    vocab = {token: i for token, i in vocab.items() if i != 7}
    assert_same_tokens(tmp_path / "t", vocab | {"<|end|>": 7, "<image>": 9}, tmp_path)


def test_unigram_vocabulary_is_a_list(tmp_path: Path) -> None:
    pieces = [["<unk>", 0.0], ["▁the", -3.25], ["s", -4.5], ["▁", -5]]
    document = fast(pieces, {"<image>": 4}, byte_fallback=True)
    document["model"] |= {"type": "Unigram", "unk_id": 0}
    folder = put(tmp_path / "t", tokenizer=document)
    tokens = {"<unk>": 0, "▁the": 1, "s": 2, "▁": 3, "<image>": 4}
    assert_same_tokens(folder, tokens, tmp_path)


def test_tokenizer_json_without_added_tokens(tmp_path: Path) -> None:
    document = fast(VOCAB, {})
    del document["added_tokens"]
    assert_same_tokens(put(tmp_path / "t", tokenizer=document), VOCAB, tmp_path)


@pytest.mark.parametrize("form", ["vocab", "tokenizer"])
def test_slow_files_name_more_tokens(tmp_path: Path, form: str) -> None:
    decoder = {"9": {"content": "<image>", "special": True}, "7": {"content": "<|end|>"}}
    folder = put(
        tmp_path / "t",
        **{form: VOCAB if form == "vocab" else fast(VOCAB, {})},
        added_tokens={"<video>": 8, "<|end|>": 7},
        tokenizer_config={"added_tokens_decoder": decoder, "model_max_length": 32768},
    )
    assert_same_tokens(folder, VOCAB | {"<|end|>": 7, "<video>": 8, "<image>": 9}, tmp_path)


@pytest.mark.parametrize("rival", ["vocab.json", "tokenizer.model"])
def test_tokenizer_json_wins(tmp_path: Path, rival: str) -> None:
    folder = put(tmp_path / "t", tokenizer=fast({"new": 0}, {}))
    (folder / rival).write_bytes(b'{"old": 0}' if "json" in rival else sentence_piece(["old"]))
    assert_same_tokens(folder, {"new": 0}, tmp_path)


UNFINISHED = {
    "a string of quotes": '{"model": {"merges": ["' + '\\"' * 40_000,
    "many strings": '{"model": {"merges": [' + '"' * 79_999,
    "many lists": '{"model": {"merges": ' + '["' * 40_000,
    "many objects": '{"a": {"b":' * 8_000,
}


@pytest.mark.parametrize("body", UNFINISHED.values(), ids=UNFINISHED.keys())
def test_an_unfinished_tokenizer_json_is_refused_in_linear_time(tmp_path: Path, body: str) -> None:
    """The first took 27 seconds: every quote was tried as the start of a string."""
    (tmp_path / "tokenizer.json").write_text(body)
    start = time.process_time()
    with pytest.raises(FormatError, match="not a tokenizer's file"):
        read_vocabulary(tmp_path)
    assert time.process_time() - start < 5


def test_a_file_too_large_for_a_tokenizer_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "vocab.json").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(FormatError, match=r"vocab\.json: 134217729 bytes; a tokenizer's file has"):
        read_vocabulary(tmp_path)


def test_an_added_token_takes_its_id_from_the_vocabulary(tmp_path: Path) -> None:
    """An id named twice belongs to the token added last."""
    folder = put(tmp_path / "t", tokenizer=fast({"a": 0, "<extra_0>": 1}, {"<image>": 1}))
    assert_same_tokens(folder, {"a": 0, "<image>": 1}, tmp_path)


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def sentence_piece(pieces: list[str]) -> bytes:
    """A ModelProto as SentencePiece writes it: pieces with score and type, then other fields."""

    def field(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    out = b""
    for i, piece in enumerate(pieces):
        score, kind = b"\x15" + struct.pack("<f", -float(i)), b"\x18" + varint(6 if i % 2 else 1)
        out += field(1, field(1, piece.encode()) + score + kind)
    return out + field(2, b"\x18\x01" + field(7, b"text.txt")) + field(3, field(1, b"nmt_nfkc"))


PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "▁the", "größe", "数" * 100, "▁"]


def test_sentence_piece_models_name_the_same_tokens_as_their_tokenizer_json(
    tmp_path: Path,
) -> None:
    """LLaVA-1.5, Vicuna and InternVL2-8B come without tokenizer.json."""
    folder = put(tmp_path / "t", added_tokens={"<image>": 9})
    (folder / "tokenizer.model").write_bytes(sentence_piece(PIECES))
    tokens = {piece: i for i, piece in enumerate(PIECES)}
    assert_same_tokens(folder, tokens | {"<image>": 9}, tmp_path)
    other = put(tmp_path / "o", tokenizer=fast(tokens, {"<pad>": 8}, byte_fallback=True))
    assert shared(folder, other) == [(0, 0, 8)]


BROKEN = {
    "tokenizer.model": [
        b"{}",
        b"\x0a",
        b"\x0a\xff",
        b"\x0a\x7f\x0a\x01a",
        b"\x0a" + b"\xff" * 11,
        b"\x0a\x03\x0a\x01\xff",
        b"\x0a\x02\x0b\x00",
        b"YQ== 1",
        b"YQ== 0 0",
        b"Y!== 0",
        b"YQ== x",
    ],
    "tokenizer.json": [
        b"",
        b"null",
        b"{}",
        b'{"model"',
        b'{"model" {}}',
        b'{1: {"vocab": {}}}',
        b'{"model": null}',
        b'{"model": {}}',
        b'{"model": {"vocab": 3}}',
        b'{"model": {"vocab": {"a": 0}',
        b'{"model": {"vocab": {"M\xfcller": 0}}}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 3}]}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": 3}',
        b'{"model": {"vocab": ["a", "b"]}}',
        b'{"model": {"merges": ["a b", "vocab": {"a": 0}}',
        b'{"model": {"merges": "unfinished, "vocab": {"a": 0}}}',
        b'{"model": {"vocab": ' + b'{"a":' * 100_000,
    ],
    "vocab.json": [b"", b"[]", b"[" * 100_000],
    "added_tokens.json": [b"\xff\xfe", b"[]"],
    "tokenizer_config.json": [b"[]", b'{"added_tokens_decoder": {"3": {}}}'],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, all_ in BROKEN.items() for content in all_]
)
def test_which_file_of_a_tokenizer_is_broken_is_one_short_line(
    tmp_path: Path, name: str, content: bytes
) -> None:
    if name != "tokenizer.model":
        put(tmp_path, vocab={"a": 0})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_vocabulary(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: not a tokenizer's file (")
    assert "\n" not in message
    assert len(message) < len(str(tmp_path)) + 300


def test_a_tokenizer_that_git_lfs_left_out_is_told(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(FormatError, match="Git LFS pointer"):
        read_vocabulary(tmp_path)


def read_or_refuse(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    try:
        hashes = read(folder)
    except FormatError as error:
        assert str(folder) in str(error)
    else:
        assert len(hashes) <= 1 << 22


@given(st.binary(max_size=60))
def test_random_bytes_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "random-tokenizer"
    read_or_refuse(folder, "tokenizer.model", b"\x0a" + data)


@given(st.data())
def test_random_damage_to_a_tokenizer_json_raises_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    text = json.dumps(fast(VOCAB, ADDED, merges=["a b"]))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + data.draw(st.sampled_from('"\\{}[],:0-e x')) + text[at + 1 :]
    folder = tmp_path_factory.getbasetemp() / "damaged-tokenizer"
    read_or_refuse(folder, "tokenizer.json", text.encode())


def test_no_vocabulary_in_the_folder(tmp_path: Path) -> None:
    put(tmp_path, tekken={}, tokenizer_config={})
    assert read_vocabulary(tmp_path) is None
    assert read_vocabulary(None) is None


@pytest.mark.parametrize("pretty", [True, False])
def test_agrees_with_the_tokenizers_library(tmp_path: Path, pretty: bool) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    text = ["größe und grüße, 数字与数据", 'a "quoted\\" [list] {of: things}', "the cat on the mat"]
    tokenizer.train_from_iterator(text * 20, trainer)
    tokenizer.add_special_tokens([AddedToken('<"odd\\>', special=True), AddedToken("<图像>")])
    (tmp_path / "t").mkdir()
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"), pretty=pretty)
    tokens = tokenizer.get_vocab(with_added_tokens=True)
    assert len(tokens) > 300
    assert_same_tokens(tmp_path / "t", tokens, tmp_path)


# Broken files


@pytest.mark.parametrize("i", [-1, 1 << 22, 10**30, 1.5, None, [1]])
@pytest.mark.parametrize("form", ["vocab", "tokenizer", "added", "decoder"])
def test_absurd_ids_are_refused_not_allocated(tmp_path: Path, form: str, i: Any) -> None:
    decoder = {"added_tokens_decoder": {str(i): {"content": "x"}}}
    content: dict[str, dict[str, object]] = {
        "vocab": {"vocab": VOCAB | {"x": i}},
        "tokenizer": {"tokenizer": fast(VOCAB | {"x": i}, {})},
        "added": {"tokenizer": fast(VOCAB, {"x": i})},
        "decoder": {"vocab": VOCAB, "tokenizer_config": decoder},
    }
    with pytest.raises(FormatError, match=str(tmp_path)):
        read_vocabulary(put(tmp_path, **content[form]))


# The join


def test_the_empty_token_is_a_token(tmp_path: Path) -> None:
    """Whose hash is 0 in Python, which stands for no token here."""
    folder = put(tmp_path / "t", vocab={"": 0, "a": 1})
    assert shared(folder, folder) == [(0, 0, 2)]


def test_of_a_token_at_two_ids_each_row_stays_where_it_is(tmp_path: Path) -> None:
    """An added token may repeat a word of the vocabulary, at an id of its own."""
    twice = put(tmp_path / "t", tokenizer=fast({"a": 0, "b": 1}, {"a": 2, "<image>": 3}))
    assert shared(twice, twice) == [(0, 0, 4)]


vocabularies = st.dictionaries(
    st.integers(0, 25), st.sampled_from([*"abcdefghijklmnop", "größe", "<image>"]), max_size=20
).filter(lambda ids: len(set(ids.values())) == len(ids))


@given(vocabularies, vocabularies, st.integers(0, 30), st.integers(0, 30))
def test_joined_rows_are_those_of_a_plain_dictionary(
    base: dict[int, str], donor: dict[int, str], rows: int, other: int
) -> None:
    def hashes(ids: dict[int, str]) -> array[int]:
        return array(
            "q", [hash(ids[i]) if i in ids else 0 for i in range(max(ids, default=-1) + 1)]
        )

    runs = join_rows(hashes(base), hashes(donor), rows, other)
    found = [(run.base + k, run.donor + k) for run in runs for k in range(run.length)]
    where = {token: i for i, token in donor.items() if i < other}
    assert found == [
        (i, where[token]) for i, token in sorted(base.items()) if i < rows and token in where
    ]
    for before, after in pairwise(runs):
        touching = (before.base + before.length, before.donor + before.length)
        assert touching != (after.base, after.donor), "two runs that are one"
    assert all(run.length > 0 for run in runs)
