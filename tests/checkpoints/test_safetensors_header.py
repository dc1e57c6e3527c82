"""Safetensors headers: agreement with the safetensors library, and every lie a header can tell."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from lowmem_adamms.checkpoints.dtypes import DTYPES, DType
from lowmem_adamms.checkpoints.safetensors_header import (
    Header,
    build_header,
    parse_header,
    read_header,
)
from lowmem_adamms.errors import FormatError

Tensor = tuple[str, DType, tuple[int, ...]]


def file_of(document: object, data: int = 0) -> bytes:
    """A file with this JSON (or these raw bytes) as its header, then `data` zero bytes."""
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ENTRY = json.dumps(entry()).encode()


def refused(tmp_path: Path, content: bytes) -> str:
    """The message `read_header` refuses a file with, which must name the file."""
    path = tmp_path / "lie.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def open_theirs(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """What safetensors reads in a file; SafetensorError if it refuses it."""
    return deserialize(content)  # type: ignore[no-any-return, no-untyped-call]


def check_valid(parsed: Header, file_size: int) -> None:
    """What a Header promises: spans in order, inside the file, without overlap or hole."""
    position = parsed.data_start
    for info in parsed.tensors:
        assert info.start == position
        assert (info.stop - info.start) * 8 == info.dtype.bits * math.prod(info.shape)
        position = info.stop
    assert position == file_size
    assert len({info.name for info in parsed.tensors}) == len(parsed.tensors)


# Round trip and agreement with the safetensors library


names = st.text(max_size=30).filter(lambda name: name != "__metadata__")
whole_bytes = st.sampled_from([dtype for dtype in DTYPES.values() if dtype.bits >= 8])
shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
tensors = st.lists(st.tuples(names, whole_bytes, shapes), max_size=6, unique_by=lambda it: it[0])
metadata = st.dictionaries(st.text(), names, max_size=3)


@given(tensors, metadata, st.sampled_from([0, 8, 512]))
def test_built_headers_are_read_by_us_and_by_safetensors(
    wanted: list[Tensor], notes: dict[str, str], min_bytes: int
) -> None:
    raw = build_header(wanted, notes, min_bytes=min_bytes)
    size = len(raw) + sum(dtype.bits // 8 * math.prod(shape) for _, dtype, shape in wanted)
    parsed = parse_header(raw[8:], size)
    assert int.from_bytes(raw[:8], "little") == len(raw) - 8
    assert len(raw) % 8 == 0
    assert min_bytes <= len(raw) < max(min_bytes + 1, len(raw.rstrip(b" ")) + 8)
    assert parsed.data_start == len(raw)
    assert parsed.metadata == notes
    check_valid(parsed, size)
    found = {info.name: (info.dtype, info.shape) for info in parsed.tensors}
    assert found == {name: (dtype, shape) for name, dtype, shape in wanted}
    filled = [name for name, _, shape in wanted if math.prod(shape)]
    assert [info.name for info in parsed.tensors if info.start < info.stop] == filled
    theirs = open_theirs(raw + bytes(size - len(raw)))
    assert {name: (info["dtype"], tuple(info["shape"])) for name, info in theirs} == {
        name: (dtype.name, shape) for name, dtype, shape in wanted
    }


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays: dict[str, npt.NDArray[Any]] = {
        "model.embed_tokens.weight": random.standard_normal((5, 4)).astype(np.float16),
        "größe.数": random.standard_normal((3, 1, 2)).astype(np.float32),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.int64),
        "mask": np.array([True, False, True]),
    }
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"format": "pt", "by": "Ω"})
    parsed = read_header(path)
    check_valid(parsed, path.stat().st_size)
    assert parsed.metadata == {"format": "pt", "by": "Ω"}
    raw = path.read_bytes()
    assert {i.name: (i.dtype.name, i.shape, raw[i.start : i.stop]) for i in parsed.tensors} == {
        name: (dtype, array.shape, array.tobytes())
        for (name, array), dtype in zip(
            arrays.items(), ["F16", "F32", "F64", "I64", "BOOL"], strict=True
        )
    }


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    document = {
        "last": entry("U8", [3], [5, 8]),
        "first": entry("U8", [4], [0, 4]),
        "none": entry("U8", [0], [4, 4]),
        "middle": entry("U8", [1], [4, 5]),
    }
    raw = json.dumps(document).encode()
    parsed = parse_header(raw, 8 + len(raw) + 8)
    assert [info.name for info in parsed.tensors] == ["first", "none", "middle", "last"]
    assert parsed.tensors[-1].start == 8 + len(raw) + 5


# Where JSON leaves a choice, that of safetensors is ours


def is_accepted(raw: bytes, data: int) -> bool:
    """Whether we take a header; safetensors must agree."""
    try:
        check_valid(parse_header(raw, 8 + len(raw) + data), 8 + len(raw) + data)
    except FormatError:
        accepted = False
    else:
        accepted = True
    try:
        open_theirs(file_of(raw, data))
    except SafetensorError as error:
        assert not accepted, error
    else:
        assert accepted
    return accepted


def with_name(name: bytes) -> bytes:
    return b'{"' + name + b'": ' + ENTRY + b"}"


def with_more(more: bytes) -> bytes:
    return b'{"a": {' + more + b", " + ENTRY[1:] + b"}"


def with_metadata(value: bytes) -> bytes:
    return b'{"__metadata__": ' + value + b', "a": ' + ENTRY + b"}"


@pytest.mark.parametrize(
    "raw",
    [
        with_name(b""),
        with_name(b"\\u0000"),
        with_name(b"\\ud83d\\ude00"),
        with_name(b"\\\\ud800"),
        with_name(b"a") + b" \n\t ",
        b"\n" + with_name(b"a"),
        with_more(b'"more": 1'),
        with_more(b'"more": {"inner": [null, -0, 1.5e3, "x"]}'),
        with_metadata(b"null"),
        with_metadata(b"{}"),
        with_metadata(b'{"format": "pt"}'),
    ],
)
def test_headers_that_safetensors_takes_are_taken(raw: bytes) -> None:
    assert is_accepted(raw, 24)


@pytest.mark.parametrize(
    "raw",
    [
        with_name(b"\\ud800"),
        with_name(b"\\udc00x"),
        with_name(b"\\ude00\\ud83d"),
        with_more(b'"more": "\\uD800"'),
        with_more(b'"more": ["\\udFFF"]'),
        with_more(b'"more": NaN'),
        with_more(b'"more": -Infinity'),
        with_more(b'"dtype": "F32"'),
        with_metadata(b'{"a": "\\ud800"}'),
        with_metadata(b'{"\\udbff": "a"}'),
        *map(with_metadata, [b"[]", b'"pt"', b'""', b"0", b"false", b'{"a": 1}', b'{"a": null}']),
    ],
)
def test_headers_that_safetensors_refuses_are_refused(raw: bytes) -> None:
    assert not is_accepted(raw, 24)


@pytest.mark.parametrize(
    ("shape", "accepted"),
    [
        ("[0, 3]", True),
        ("[-0, 3]", False),
        ("[0.0, 3]", False),
        ("[]", False),
        ("[0, 9223372036854775808, 4]", True),
        ("[9223372036854775808, 4, 0]", False),
        ("[4294967296, 4294967296, 0]", False),
        ("[18446744073709551615, 0]", True),
        ("[18446744073709551616, 0]", False),
        ("[0, 18446744073709551616]", False),
    ],
)
def test_sizes_are_counted_as_safetensors_counts_them(shape: str, accepted: bool) -> None:
    raw = f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 0]}}}}'
    assert is_accepted(raw.encode(), 0) is accepted


SMALL = (
    b'{"__metadata__":{"f":"pt"},"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"U8","shape":[0,4],"data_offsets":[8,8]},'
    b'"c":{"dtype":"F32","shape":[],"data_offsets":[8,12]}}'
)
# No quote and no comma alone, which would make names twice or lists for entries: we are stricter
SNIPPETS = rb'0 1 2 8 9 - . e { } [ ] : u \ -0 1.0 null true \ud800 "x":1, 18446744073709551616 U8'
snippets = st.sampled_from([b" ", b"\n", b"\xff", *SNIPPETS.split()])


@given(st.lists(st.tuples(st.integers(0, len(SMALL)), snippets), min_size=1, max_size=2))
def test_damaged_headers_are_taken_or_refused_as_by_safetensors(
    changes: list[tuple[int, bytes]],
) -> None:
    raw = SMALL
    for position, snippet in changes:
        raw = raw[:position] + snippet + raw[position + len(snippet) :]
    is_accepted(raw, 12)


# Lies about the file


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes is too short"),
        (bytes(7), "7 bytes is too short"),
        ((3).to_bytes(8, "little") + b"{}", "3 bytes long, the file has 10; truncated"),
        (file_of({"a": entry()}, 23), "truncated"),
        (file_of({"a": entry()}, 25), "trailing bytes"),
        (file_of({}, 4), "trailing bytes"),
    ],
)
def test_sizes_that_do_not_fit_the_file(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refused(tmp_path, content)


@pytest.mark.parametrize("length", [100_000_001, 2**64 - 1])
def test_a_header_longer_than_allowed_is_not_read(tmp_path: Path, length: int) -> None:
    """Even where the file, a sparse one, is as long."""
    path = tmp_path / "lie.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)
    with pytest.raises(FormatError, match=f"{length} bytes long, and at most 100000000"):
        read_header(path)


# Lies about the JSON


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}}",
        b'{"\xc3": {}}',
        b'{"a\xed\xa0\x80": {}}',
        b"\xef\xbb\xbf{}",
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_not_json(tmp_path: Path, raw: bytes) -> None:
    assert "not JSON" in refused(tmp_path, file_of(raw))


def test_json_but_not_an_object(tmp_path: Path) -> None:
    assert "not a JSON object" in refused(tmp_path, file_of([{"a": entry()}]))


@pytest.mark.parametrize("first", [b"x.weight", b"\\u0078.weight"])
def test_a_name_twice(tmp_path: Path, first: bytes) -> None:
    raw = b'{"%s": %s, "b": %s, "x.weight": %s}' % (first, ENTRY, ENTRY, ENTRY)
    assert "'x.weight' twice" in refused(tmp_path, file_of(raw, 24))


# Lies about a tensor: each message names it


LACKING = [{k: v for k, v in entry().items() if k != key} for key in entry()]
NO_SIZES: tuple[object, ...] = (None, 6, [2, -3], [2.0, 3], [True, 6], ["2", 3], {})
NO_DTYPES: tuple[object, ...] = ("F33", "f32", None, 4, {})
NO_POSITIONS = (None, 24, [0], [0, 24, 24], [-24, 0], [0.0, 24], [False, 24])
WRONG_SIZES = [([2, 3], [0, 20]), ([2, 3], [24, 0]), ([], [0, 0]), ([0, 5], [0, 4])]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((value, "expected dtype, shape") for value in (*LACKING, [entry()])),
        *((entry(dtype=name), f"unknown dtype {name!r}") for name in NO_DTYPES),
        *((entry(shape=shape), "shape") for shape in NO_SIZES),
        *((entry(offsets=offsets), "data_offsets") for offsets in NO_POSITIONS),
        *((entry("F32", *sizes), "data_offsets hold") for sizes in WRONG_SIZES),
        (entry("F4", [3], [0, 2]), "3 elements of F4"),
    ],
)
def test_entries_that_are_none(tmp_path: Path, value: object, words: str) -> None:
    assert f"tensor w.x: {words}" in refused(tmp_path, file_of({"w.x": value}, 24))


@pytest.mark.parametrize("dtype", ["F32", "F4"])
def test_sizes_too_large_to_print(tmp_path: Path, dtype: str) -> None:
    """Python refuses to write numbers of more than 4300 digits: a lie must not end in that."""
    odd = 10**4000 + 1
    assert "tensor w.x" in refused(tmp_path, file_of({"w.x": entry(dtype, [odd, odd])}, 24))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((0, 6), (4, 10), "tensor w.b overlaps"),
        ((0, 10), (0, 10), "overlaps"),
        ((0, 10), (3, 5), "tensor w.b overlaps"),
        ((0, 10), (3, 3), "tensor w.b overlaps"),
        ((0, 4), (6, 10), "tensor w.b follows a hole"),
        ((4, 10), (2, 4), "tensor w.b follows a hole"),
    ],
)
def test_overlaps_and_holes(
    tmp_path: Path, a: tuple[int, int], b: tuple[int, int], message: str
) -> None:
    document = {
        name: entry("U8", [stop - start], [start, stop])
        for name, (start, stop) in (("w.a", a), ("w.b", b))
    }
    assert message in refused(tmp_path, file_of(document, 10))


# Anything else


VALID = build_header(
    [
        ("model.embed_tokens.weight", DTYPES["BF16"], (4, 3)),
        ("größe", DTYPES["F32"], ()),
        ("empty", DTYPES["I64"], (0, 2)),
        ("tail", DTYPES["F4"], (2, 5)),
    ],
    {"format": "pt"},
) + bytes(24 + 4 + 0 + 5)


@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 34), st.integers(0, 255)), max_size=4),
    st.integers(-40, 8),
)
def test_damaged_files_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], longer: int
) -> None:
    content = bytearray(VALID)
    for position, value in changes:
        content[position] = value
    content = content[:longer] if longer < 0 else content + bytes(longer)
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    try:
        parsed = read_header(path)
    except FormatError as error:
        assert str(path) in str(error)
    else:
        check_valid(parsed, len(content))
