"""Tokenizer files, and which rows of two embeddings hold the same token.

Reads the first of FORMS that a folder has, then the added tokens of `added_tokens.json` and
`tokenizer_config.json`. A token is spelled alike in all forms of a vocabulary. Other forms
(tiktoken, tekken.json, tokenizers that are Python code) are not read.

A vocabulary is kept as one hash per id, and of tokenizer.json only the parts that name tokens are
parsed: two of 150 000 tokens, merges included, would as Python objects not fit the memory a whole
merge is allowed.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from ..errors import FormatError, first_line
from .safetensors_header import refuse_lfs_pointer

FORMS = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""Where a vocabulary may stand, in the order they are looked for."""
MAX_FILE_BYTES = 1 << 27
"""Of a tokenizer's file; the largest known, of 262 000 tokens, has 33 MB."""
MAX_IDS = 1 << 22
_ABSENT = 0

_PROTOBUF_PIECE = 0x0A  # field 1, a run of bytes; ModelProto.pieces and SentencePiece.piece


@dataclass(frozen=True, slots=True)
class RowRun:
    """`length` consecutive base rows from `base` take the donor's rows from `donor`."""

    base: int
    donor: int
    length: int


def read_vocabulary(folder: Path | None) -> array[int] | None:
    """For each token id a 64-bit hash of its string (0: no such id), or None without a tokenizer.

    Hashes are Python's own, so they compare within one process only.
    """
    if folder is None:
        return None
    forms = [folder / name for name in FORMS if (folder / name).is_file()]
    if not forms:
        return None
    hashes = array("q")
    # Those after the first are the slow tokenizer's, which may have tokens its vocabulary lacks
    for path in (forms[0], folder / "added_tokens.json", folder / "tokenizer_config.json"):
        if path.is_file():
            _read_file(hashes, path)
    return hashes


def join_rows(base: array[int], donor: array[int], base_rows: int, donor_rows: int) -> list[RowRun]:
    """Runs of base rows whose token the donor has too, in the order of the base's rows.

    base, donor: from `read_vocabulary`. Only rows that both matrices have are joined. Of a token
    that the donor has at several ids, as some added ones are, the base's id is taken.
    """
    runs: list[RowRun] = []
    start = shift = length = 0
    for base_row, donor_row in _shared_rows(base[:base_rows], donor[:donor_rows]):
        if length and base_row == start + length and donor_row == base_row + shift:
            length += 1
            continue
        if length:
            runs.append(RowRun(start, start + shift, length))
        start, shift, length = base_row, donor_row - base_row, 1
    if length:
        runs.append(RowRun(start, start + shift, length))
    return runs


def _shared_rows(base: array[int], donor: array[int]) -> Iterator[tuple[int, int]]:
    """Base row and donor row of every token of the base that the donor has too."""
    moved = {token for token, same_row in _side_by_side(base, donor) if token != same_row}
    moved.discard(_ABSENT)
    donor_rows = {token: row for row, token in enumerate(donor) if token in moved}
    for row, (token, same_row) in enumerate(_side_by_side(base, donor)):
        if token == same_row != _ABSENT:
            yield row, row
        elif token in donor_rows:
            yield row, donor_rows[token]


def _side_by_side(base: array[int], donor: array[int]) -> Iterator[tuple[int, int]]:
    return zip(base, chain(donor, repeat(_ABSENT)), strict=False)


def _read_file(hashes: array[int], path: Path) -> None:
    """Enter the tokens of a file; whatever is wrong in it becomes one FormatError that names it."""
    refuse_lfs_pointer(path)
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise FormatError(f"{path}: {size} bytes; a tokenizer's file has at most {MAX_FILE_BYTES}")
    try:
        data = path.read_bytes()
        match path.name:
            case "tokenizer.json":
                _add_tokenizer_json(hashes, data)
            case "vocab.json" | "added_tokens.json":
                _add_tokens(hashes, json.loads(data))
            case "tokenizer_config.json":
                decoder = json.loads(data).get("added_tokens_decoder", {})
                _add_tokens(hashes, {token["content"]: int(i) for i, token in decoder.items()})
            case _:
                hashes.extend(map(_hash, _sentence_pieces(data)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error):.200}"
        raise FormatError(f"{path}: not a tokenizer's file ({reason}); download it again") from None


def _add_tokens(hashes: array[int], tokens: Mapping[str, int]) -> None:
    """Enter a map of token to id; an id beyond any real vocabulary is refused, not allocated."""
    if not isinstance(tokens, dict):
        raise ValueError("expected a map of tokens to ids")
    if not tokens:
        return
    lowest, highest = min(tokens.values()), max(tokens.values())
    if lowest < 0 or highest >= MAX_IDS:
        raise ValueError(f"found token ids {lowest} to {highest}, expected 0 to {MAX_IDS - 1}")
    hashes.extend([_ABSENT] * (highest + 1 - len(hashes)))
    for token, i in tokens.items():
        hashes[i] = _hash(token)


def _hash(token: str) -> int:
    return hash(token) or 1  # 0 is _ABSENT


# tokenizer.model


def _sentence_pieces(data: bytes) -> Iterator[str]:
    """The pieces of a ModelProto: google/sentencepiece, sentencepiece_model.proto."""
    if data[:1] != bytes([_PROTOBUF_PIECE]):
        raise ValueError("no SentencePiece model; give its tokenizer.json")
    for tag, start, stop in _protobuf_fields(data, 0, len(data)):
        if tag == _PROTOBUF_PIECE:
            fields = _protobuf_fields(data, start, stop)
            texts = (data[a:b] for inner, a, b in fields if inner == _PROTOBUF_PIECE)
            yield next(texts, b"").decode("utf-8")


def _protobuf_fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Tag, start and stop of each field of the protobuf message between two positions."""
    while position < end:
        tag, position = _read_varint(data, position)
        size = {0: 0, 1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 0:
            _, position = _read_varint(data, position)
        elif tag & 7 == 2:
            size, position = _read_varint(data, position)
        if size is None or position + size > end:
            raise ValueError("unfinished protobuf")
        yield tag, position, position + size
        position += size


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A protobuf number, 7 bits a byte, and the position after it."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number of more than 64 bits")


# tokenizer.json

# Possessive (`++`, `*+`): what a text was matched as is never tried again, so that no text takes
# more than linear time
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_SEPARATORS = re.compile(rb"[\s,:]*+")
_SCALAR = re.compile(_STRING + rb'|[^"\[\]{},:\s]++', re.DOTALL)
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+", re.DOTALL)


def _add_tokenizer_json(hashes: array[int], data: bytes) -> None:
    """Enter `model.vocab` (a map, of Unigram a list) and `added_tokens` of a tokenizer.json."""
    top = _find_members(data, 0, {"added_tokens", "model"})
    vocab = _read_value(data, _find_members(data, top["model"], {"vocab"})["vocab"])
    if isinstance(vocab, list):
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    _add_tokens(hashes, vocab)
    if "added_tokens" in top:
        added = _read_value(data, top["added_tokens"])
        _add_tokens(hashes, {token["content"]: token["id"] for token in added})


def _find_members(data: bytes, position: int, wanted: set[str]) -> dict[str, int]:
    """Where the values of the wanted keys of a JSON object start.

    The last one found and what follows it are not looked at: merges often stand there, which take
    longer to skip than all else.
    """
    position = _skip_separators(data, position)
    if data[position : position + 1] != b"{":
        raise ValueError("expected a JSON object")
    position += 1
    found: dict[str, int] = {}
    while True:
        position = _skip_separators(data, position)
        if data[position : position + 1] == b"}":
            return found
        key_start, position = position, _skip_value(data, position)
        key = json.loads(data[key_start:position].decode())
        start = _skip_separators(data, position)
        if key in wanted:
            found[key] = start
        if found.keys() == wanted:
            return found
        position = _skip_value(data, start)


def _read_value(data: bytes, start: int) -> Any:
    return json.loads(data[start : _skip_value(data, start)].decode())


def _skip_separators(data: bytes, position: int) -> int:
    match = _SEPARATORS.match(data, position)
    assert match is not None  # the pattern matches nothing as well
    return match.end()


def _skip_value(data: bytes, position: int) -> int:
    """The position after the JSON value that starts at `position`."""
    if match := _SCALAR.match(data, position):
        return match.end()
    depth = 0
    while True:
        match = _TO_BRACKET.match(data, position)
        assert match is not None  # the pattern matches nothing as well
        position = match.end() + 1
        bracket = data[match.end() : position]
        if bracket not in (b"[", b"]", b"{", b"}"):  # the end, also within a string
            raise ValueError("unfinished JSON")
        depth += 1 if bracket in b"[{" else -1
        if depth <= 0:
            return position
