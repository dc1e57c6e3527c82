"""Which row of the donor's embedding belongs to which row of the base's: joined by token string.

Reads the first of FORMS that a folder has, then the added tokens of `added_tokens.json` and
`tokenizer_config.json`. Byte-level vocabularies (tokenizer.json, vocab.json, .tiktoken) spell a
token alike, and so do both forms of a SentencePiece one. Other forms (tekken.json, tokenizers that
are Python code) are not read. A vocabulary is kept as one hash per id, and the merges of
tokenizer.json are skipped unparsed: two 150 000-token vocabularies as Python objects would not fit
the memory a whole merge is allowed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from ..errors import FormatError, first_line
from .safetensors_header import refuse_lfs_pointer

_SPACE = re.compile(r"[\s,:]*")
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')
FORMS = ("tokenizer.json", "vocab.json", "tokenizer.model", "qwen.tiktoken")
"""Where a vocabulary may stand, in the order they are looked for."""
_PIECE = 0x0A  # protobuf: field 1, a run of bytes; ModelProto.pieces and SentencePiece.piece
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_LEVEL = dict(
    zip((i for i in range(256) if i not in _PRINTABLE), range(256, 512), strict=False)
)
"""How byte-level vocabularies write bytes that are no visible Latin-1 letter: GPT-2's table."""
_QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
)
"""Ids behind those of qwen.tiktoken: hf.co/Qwen/Qwen-7B, tokenization_qwen.py."""
_ABSENT = 0
KnownVocabularies = dict[tuple[int, bytes], "array[int]"]
"""Hashes by id of the `model.vocab` whose JSON has this length and digest."""
_MOST_IDS = 1 << 22


@dataclass(frozen=True, slots=True)
class RowRun:
    """`length` consecutive base rows from `base` take the donor's rows from `donor`."""

    base: int
    donor: int
    length: int


def read_vocabulary(
    folder: Path | None, known: KnownVocabularies | None = None
) -> array[int] | None:
    """For each token id a 64-bit hash of its string (0: no such id), or None without a tokenizer.

    Hashes are Python's own, so they compare within one process only. known: what was read before,
    and gains what is read now, as descendants of one model share most of their tokenizer.json.
    """
    if folder is None:
        return None
    hashes = array("q")
    path = next((folder / name for name in FORMS if (folder / name).is_file()), None)
    if path is None:
        return None
    with _reading(path):
        if path.name == "tokenizer.json":
            _fill_from_json(hashes, path.read_bytes().decode(), {} if known is None else known)
        elif path.name == "vocab.json":
            _fill(hashes, json.loads(path.read_bytes()))
        else:
            _fill_from_bytes(
                hashes, path.read_bytes(), _QWEN_SPECIAL if "qwen" in path.name else ()
            )
    for name, added in _ADDED.items():
        if (path := folder / name).is_file():
            with _reading(path):
                _fill(hashes, added(json.loads(path.read_bytes())))
    return hashes


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong with the content of a file becomes one FormatError that names it."""
    refuse_lfs_pointer(path)
    try:
        yield
    except UnicodeDecodeError as error:  # whose own words quote the whole file
        reason = f"byte {error.start + 1} is not UTF-8"
    except KeyError as error:
        reason = f"no {error} in it"
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = first_line(error)
    else:
        return
    raise FormatError(f"{path}: not a tokenizer's file ({reason}); download it again")


def join_rows(base: array[int], donor: array[int], base_rows: int, donor_rows: int) -> list[RowRun]:
    """Runs of base rows whose token the donor has too, in the order of the base's rows.

    Of a token that the donor has at several ids, as some added ones are, the same id is taken.
    """
    base, donor = base[:base_rows], donor[:donor_rows]
    pairs = zip(base, chain(donor, repeat(_ABSENT)), strict=False)
    elsewhere = {token for token, same in pairs if token != same} - {_ABSENT}
    where = {token: i for i, token in enumerate(donor) if token in elsewhere}
    runs: list[RowRun] = []
    first, end, shift = 0, 0, 0
    for i, (token, same) in enumerate(zip(base, chain(donor, repeat(_ABSENT)), strict=False)):
        j = i if token == same != _ABSENT else where.get(token)
        if i == end and j == i + shift:
            end += 1
        elif j is not None:
            if end > first:
                runs.append(RowRun(first, first + shift, end - first))
            first, end, shift = i, i + 1, j - i
    return [*runs, RowRun(first, first + shift, end - first)] if end > first else runs


def _fill(hashes: array[int], tokens: Mapping[str, int]) -> None:
    """Enter a map of token to id; an id beyond any real vocabulary is refused, not allocated."""
    if not isinstance(tokens, dict):
        raise ValueError("expected a map of tokens to ids")
    if not tokens:
        return
    lowest, highest = min(tokens.values()), max(tokens.values())
    if lowest < 0 or highest >= _MOST_IDS:
        raise ValueError(f"token ids {lowest} to {highest}, at most {_MOST_IDS} are believed")
    hashes.extend([_ABSENT] * (highest + 1 - len(hashes)))
    for token, i in tokens.items():
        hashes[i] = hash(token) or 1


def _fill_from_bytes(hashes: array[int], data: bytes, special: tuple[str, ...]) -> None:
    """Enter a SentencePiece model, or tiktoken's lines of base64 and rank, then what follows it."""
    if data[:1] == bytes([_PIECE]):
        hashes.extend(hash(piece) or 1 for piece in _sentence_pieces(data))
        return
    for line in data.splitlines():
        word, rank = line.split()
        token = base64.b64decode(word, validate=True).decode("latin-1").translate(_BYTE_LEVEL)
        if int(rank) != len(hashes):
            raise ValueError(f"token {len(hashes)} has rank {int(rank)}")
        hashes.append(hash(token) or 1)
    hashes.extend(hash(token) or 1 for token in special)


def _sentence_pieces(data: bytes) -> Iterator[str]:
    """The pieces of a ModelProto: google/sentencepiece, sentencepiece_model.proto."""
    for tag, start, stop in _fields(data, 0, len(data)):
        if tag == _PIECE:
            texts = (data[a:b] for name, a, b in _fields(data, start, stop) if name == _PIECE)
            yield next(texts, b"").decode("utf-8")


def _fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Tag, start and stop of each field of the protobuf message between two positions."""
    while position < end:
        tag, position = _varint(data, position)
        size = {0: 0, 1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 0:
            _, position = _varint(data, position)
        elif tag & 7 == 2:
            size, position = _varint(data, position)
        if size is None or position + size > end:
            raise ValueError("unfinished protobuf")
        yield tag, position, position + size
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[position]
        value |= (byte & 127) << shift
        position += 1
        if byte < 128:
            return value, position
        shift += 7
    raise ValueError("a number of more than 64 bits")


def _fill_from_json(hashes: array[int], text: str, known: KnownVocabularies) -> None:
    """Enter `model.vocab` (a map, of Unigram a list) and `added_tokens` of a tokenizer.json."""
    read = json.JSONDecoder().raw_decode
    top = _find(text, _after_space(text, 0), "added_tokens", "model")
    start = _find(text, top["model"], "vocab")["vocab"]
    for (length, digest), same in known.items():
        if _digest(text[start : start + length]) == digest:
            hashes.extend(same)
            break
    else:
        vocab, stop = read(text, start)
        if isinstance(vocab, list):
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        _fill(hashes, vocab)
        known[stop - start, _digest(text[start:stop])] = hashes[:]
    if "added_tokens" in top:
        added, _ = read(text, top["added_tokens"])
        _fill(hashes, {token["content"]: token["id"] for token in added})


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode()).digest()


def _from_tokenizer_config(document: dict[str, Any]) -> dict[str, int]:
    added = document.get("added_tokens_decoder", {})
    return {token["content"]: int(i) for i, token in added.items()}


_ADDED: dict[str, Callable[[Any], dict[str, int]]] = {
    "added_tokens.json": lambda document: document,
    "tokenizer_config.json": _from_tokenizer_config,
}
"""Files of the slow tokenizer that may mention tokens which its vocabulary lacks."""


def _find(text: str, start: int, *wanted: str) -> dict[str, int]:
    """Where the values of the wanted keys stand; what comes behind the last is not looked at."""
    found: dict[str, int] = {}
    for key, position in _members(text, start):
        if key in wanted:
            found[key] = position
        if len(found) == len(wanted):
            break
    return found


def _members(text: str, start: int) -> Iterator[tuple[str, int]]:
    """Each key of the JSON object at `start`, with the position of its value; values unparsed."""
    if text[start] != "{":
        raise ValueError("expected a JSON object")
    position = start + 1
    while text[position := _after_space(text, position)] != "}":
        key, position = json.JSONDecoder().raw_decode(text, position)
        position = _after_space(text, position)
        yield key, position
        position = _skip(text, position)


def _after_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


def _skip(text: str, position: int) -> int:
    """The position behind the JSON value at `position`."""
    if text[position] not in "[{":
        return json.JSONDecoder().raw_decode(text, position)[1]
    depth = 0
    for match in _STRUCTURE.finditer(text, position):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    raise ValueError("unfinished JSON")
