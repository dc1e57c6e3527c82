"""Safetensors headers: agreement with the safetensors library, and every lie a header can tell."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from lowmem_adamms.checkpoints.dtypes import DTYPES, DType
from lowmem_adamms.checkpoints.safetensors_header import (
    Header,
    build_header,
    parse_header,
    read_header,
)
from lowmem_adamms.errors import FormatError

Tensor = tuple[str, DType, tuple[int, ...]]

NUMPY = {
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def file_of(document: object, data: int = 0) -> bytes:
    """A file with this JSON (or these raw bytes) as its header and `data` zero bytes behind it."""
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(tmp_path: Path, content: bytes) -> str:
    """The message `read` refuses a file with, which must name the file."""
    path = tmp_path / "lie.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def check_valid(parsed: Header, file_size: int) -> None:
    """What a Header promises: spans in order, inside the file, without overlap or hole."""
    position = parsed.data_start
    for info in parsed.tensors:
        assert info.start == position
        assert (info.stop - info.start) * 8 == info.dtype.bits * math.prod(info.shape)
        position = info.stop
    assert position == parsed.file_size == file_size
    assert len({info.name for info in parsed.tensors}) == len(parsed.tensors)


# Round trip and agreement with the safetensors library


names = st.text(max_size=30).filter(lambda name: name != "__metadata__")
whole_bytes = st.sampled_from([dtype for dtype in DTYPES.values() if dtype.bits >= 8])
shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
tensors = st.lists(st.tuples(names, whole_bytes, shapes), max_size=6, unique_by=lambda it: it[0])
metadata = st.dictionaries(st.text(), names, max_size=3)


@given(tensors, metadata)
def test_emitted_headers_parse_to_what_was_put_in(
    wanted: list[Tensor], notes: dict[str, str]
) -> None:
    raw = build_header(wanted, notes)
    size = len(raw) + sum(dtype.bits // 8 * math.prod(shape) for _, dtype, shape in wanted)
    parsed = parse_header(raw[8:], size)
    assert int.from_bytes(raw[:8], "little") == len(raw) - 8
    assert len(raw) % 8 == 0
    assert parsed.data_start == len(raw)
    assert parsed.metadata == notes
    check_valid(parsed, size)
    found = {info.name: (info.dtype, info.shape) for info in parsed.tensors}
    assert found == {name: (dtype, shape) for name, dtype, shape in wanted}
    filled = [name for name, _, shape in wanted if math.prod(shape)]
    assert [info.name for info in parsed.tensors if info.start < info.stop] == filled


@given(st.lists(st.tuples(names, shapes), max_size=5, unique_by=lambda it: it[0]), st.data())
def test_safetensors_opens_what_we_emit(
    tmp_path_factory: pytest.TempPathFactory,
    wanted: list[tuple[str, tuple[int, ...]]],
    data: st.DataObject,
) -> None:
    kinds = [data.draw(st.sampled_from(sorted(NUMPY))) for _ in wanted]
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.arange(math.prod(shape)).reshape(shape).astype(NUMPY[kind])
        for (name, shape), kind in zip(wanted, kinds, strict=True)
    }
    described = [(n, DTYPES[k], s) for (n, s), k in zip(wanted, kinds, strict=True)]
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    body = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(build_header(described, {"format": "pt"}) + body)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(arrays)
        for name, array in arrays.items():
            loaded = file.get_tensor(name)
            assert loaded.dtype == array.dtype
            assert np.array_equal(loaded, array)
            assert loaded.shape == array.shape


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
    found = {info.name: raw[info.start : info.stop] for info in parsed.tensors}
    assert found == {name: array.tobytes() for name, array in arrays.items()}
    assert {info.name: info.shape for info in parsed.tensors} == {
        name: array.shape for name, array in arrays.items()
    }
    assert {info.name: info.dtype.name for info in parsed.tensors} == {
        "model.embed_tokens.weight": "F16",
        "größe.数": "F32",
        "scalar": "F64",
        "empty": "I64",
        "mask": "BOOL",
    }


def test_bfloat16_from_torch_is_read(tmp_path: Path) -> None:
    tensor = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    save_torch_file({"a": tensor}, tmp_path / "a.safetensors")
    (info,) = read_header(tmp_path / "a.safetensors").tensors
    assert (info.dtype.name, info.shape) == ("BF16", (1, 2))
    assert (tmp_path / "a.safetensors").read_bytes()[info.start : info.stop] == b"\x80\x3f\x00\xc0"


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


def test_no_tensors_at_all_is_a_valid_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(file_of({"__metadata__": {"format": "pt"}}))
    parsed = read_header(tmp_path / "a.safetensors")
    assert (parsed.tensors, parsed.metadata) == ((), {"format": "pt"})


def test_spaces_behind_the_json_are_padding() -> None:
    raw = json.dumps({"a": entry()}).encode() + b"  \n "
    assert parse_header(raw, 8 + len(raw) + 24).tensors[0].start == 8 + len(raw)


# Lies about the file


@pytest.mark.parametrize("size", [0, 1, 7])
def test_shorter_than_its_length_field(tmp_path: Path, size: int) -> None:
    assert re.search(f"{size} bytes is too short", refused(tmp_path, bytes(size)))


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    message = refused(tmp_path, (1000).to_bytes(8, "little") + b"{}")
    assert "1000 bytes long, the file has 10" in message


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_header_longer_than_allowed_is_not_read(tmp_path: Path, length: int) -> None:
    assert str(length) in refused(tmp_path, length.to_bytes(8, "little") + b"{}")


def test_absurd_length_that_the_file_has(tmp_path: Path) -> None:
    """A sparse file of 200 MB whose header would fill it: refused for its length alone."""
    path = tmp_path / "wide.safetensors"
    with path.open("wb") as file:
        file.write((150_000_000).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)
    with pytest.raises(FormatError, match="150000000"):
        read_header(path)


@pytest.mark.parametrize("missing", [1, 23, 24])
def test_truncated_data(tmp_path: Path, missing: int) -> None:
    message = refused(tmp_path, file_of({"a": entry()}, 24)[:-missing])
    assert "truncated" in message


def test_trailing_bytes(tmp_path: Path) -> None:
    assert "trailing bytes" in refused(tmp_path, file_of({"a": entry()}, 25))


def test_trailing_bytes_without_tensors(tmp_path: Path) -> None:
    assert "trailing bytes" in refused(tmp_path, file_of({}, 1))


# Lies about the JSON


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"{}}",
        b"not json",
        b'{"a": }',
        b"\xff\xfe{}",
        b'{"\xc3": {}}',
        b'{"a\xed\xa0\x80": {}}',
        b"\xef\xbb\xbf{}",
        b"\x00" * 16,
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_not_json(tmp_path: Path, raw: bytes) -> None:
    assert "not JSON" in refused(tmp_path, file_of(raw))


@pytest.mark.parametrize("document", [[], None, 3, "a", [{"a": entry()}]])
def test_json_but_not_an_object(tmp_path: Path, document: object) -> None:
    assert "not a JSON object" in refused(tmp_path, file_of(document))


def test_a_name_twice(tmp_path: Path) -> None:
    one = json.dumps(entry())
    raw = f'{{"x.weight": {one}, "b": {one}, "x.weight": {one}}}'.encode()
    assert "'x.weight' twice" in refused(tmp_path, file_of(raw, 24))


def test_a_name_twice_under_different_escapes(tmp_path: Path) -> None:
    one = json.dumps(entry())
    raw = f'{{"ab": {one}, "\\u0061b": {one}}}'.encode()
    assert "'ab' twice" in refused(tmp_path, file_of(raw, 24))


def test_a_field_twice(tmp_path: Path) -> None:
    raw = b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}'
    assert "'dtype' twice" in refused(tmp_path, file_of(raw, 4))


@pytest.mark.parametrize("value", [[], "pt", 3, {"format": 1}, {"a": None}, {"a": {"b": "c"}}])
def test_metadata_that_is_not_strings(tmp_path: Path, value: object) -> None:
    assert "__metadata__" in refused(tmp_path, file_of({"__metadata__": value, "a": entry()}, 24))


def test_a_lone_surrogate_is_no_name(tmp_path: Path) -> None:
    """No UTF-8 file could hold it again; safetensors refuses it as well."""
    content = file_of(b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}", 24)
    refused(tmp_path, content)
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "lie.safetensors", framework="np")


# Lies about a tensor: each message names it


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "F32",
        {},
        {"dtype": "F32", "shape": [2, 3]},
        {"dtype": "F32", "data_offsets": [0, 24]},
        {"shape": [2, 3], "data_offsets": [0, 24]},
        {**entry(), "more": 1},
    ],
)
def test_entries_without_their_three_fields(tmp_path: Path, value: object) -> None:
    assert re.search("tensor w.x: .*dtype, shape", refused(tmp_path, file_of({"w.x": value}, 24)))


@pytest.mark.parametrize("dtype", ["F33", "", "f32", "float32", None, 4, [], {}, True])
def test_unknown_dtypes(tmp_path: Path, dtype: object) -> None:
    message = refused(tmp_path, file_of({"w.x": entry(dtype=dtype)}, 24))
    assert f"tensor w.x: unknown dtype {dtype!r}" in message


@pytest.mark.parametrize(
    "shape", [None, 6, "6", [2, -3], [-2, -3], [2.0, 3], [True, 6], ["2", 3], [[6]], [None], {}]
)
def test_shapes_that_are_no_sizes(tmp_path: Path, shape: object) -> None:
    message = refused(tmp_path, file_of({"w.x": entry(shape=shape)}, 24))
    assert "tensor w.x: shape" in message


@pytest.mark.parametrize(
    "offsets",
    [None, 24, [], [0], [0, 24, 24], [-24, 0], [0.0, 24], [False, 24], ["0", "24"], [None, 24]],
)
def test_offsets_that_are_no_positions(tmp_path: Path, offsets: object) -> None:
    message = refused(tmp_path, file_of({"w.x": entry(offsets=offsets)}, 24))
    assert "tensor w.x: data_offsets" in message


@pytest.mark.parametrize(
    ("shape", "offsets", "size"),
    [
        ([2, 3], [0, 20], 20),
        ([2, 3], [0, 28], 28),
        ([2, 3], [24, 0], 24),
        ([], [0, 0], 0),
        ([0, 5], [0, 4], 4),
        ([2**62, 4], [0, 0], 0),
        ([2**63, 2**63], [0, 24], 24),
    ],
)
def test_shapes_that_do_not_fit_the_offsets(
    tmp_path: Path, shape: list[int], offsets: list[int], size: int
) -> None:
    message = refused(tmp_path, file_of({"w.x": entry("F32", shape, offsets)}, size))
    assert "tensor w.x: data_offsets hold" in message


def test_sizes_too_large_to_print(tmp_path: Path) -> None:
    """Python refuses to write numbers of more than 4300 digits: a lie must not end in that."""
    huge = 10**4000
    message = refused(tmp_path, file_of({"w.x": entry("F32", [huge, huge], [0, 24])}, 24))
    assert "tensor w.x" in message


def test_sub_byte_elements_that_do_not_fill_a_byte(tmp_path: Path) -> None:
    message = refused(tmp_path, file_of({"w.x": entry("F4", [3], [0, 2])}, 2))
    assert "tensor w.x: 3 elements of F4" in message


def test_sub_byte_sizes_too_large_to_print(tmp_path: Path) -> None:
    odd = 10**4000 + 1
    assert "tensor w.x" in refused(tmp_path, file_of({"w.x": entry("F4", [odd, odd], [0, 2])}, 2))


def test_overlap(tmp_path: Path) -> None:
    document = {"w.a": entry("U8", [6], [0, 6]), "w.b": entry("U8", [6], [4, 10])}
    assert "tensor w.b overlaps" in refused(tmp_path, file_of(document, 10))


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    document = {"w.a": entry("U8", [6], [0, 6]), "w.b": entry("U8", [6], [0, 6])}
    assert re.search(r"tensor w\.[ab] overlaps", refused(tmp_path, file_of(document, 6)))


def test_a_tensor_inside_another(tmp_path: Path) -> None:
    document = {"w.a": entry("U8", [9], [0, 9]), "w.b": entry("U8", [2], [3, 5])}
    assert "tensor w.b overlaps" in refused(tmp_path, file_of(document, 9))


def test_a_hole_between(tmp_path: Path) -> None:
    document = {"w.a": entry("U8", [4], [0, 4]), "w.b": entry("U8", [4], [6, 10])}
    assert "tensor w.b follows a hole" in refused(tmp_path, file_of(document, 10))


def test_a_hole_before_the_first(tmp_path: Path) -> None:
    assert "tensor w.b follows a hole" in refused(
        tmp_path, file_of({"w.b": entry("U8", [4], [2, 6])}, 6)
    )


def test_an_empty_tensor_inside_another(tmp_path: Path) -> None:
    document = {"w.a": entry("U8", [9], [0, 9]), "w.b": entry("U8", [0], [3, 3])}
    assert "tensor w.b" in refused(tmp_path, file_of(document, 9))


# Anything else: random damage


VALID = build_header(
    [
        ("model.embed_tokens.weight", DTYPES["BF16"], (4, 3)),
        ("größe", DTYPES["F32"], ()),
        ("empty", DTYPES["I64"], (0, 2)),
        ("tail", DTYPES["F4"], (2, 5)),
    ],
    {"format": "pt"},
) + bytes(24 + 4 + 0 + 5)
HEAD = VALID[: -24 - 4 - 5]


@given(
    st.lists(st.tuples(st.integers(0, len(HEAD) - 1), st.integers(0, 255)), max_size=4),
    st.integers(-40, 8),
)
def test_damaged_bytes_never_raise_anything_else(
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


digits = st.sampled_from(
    sorted({i for i, byte in enumerate(HEAD) if i > 8 and chr(byte) in "0123456789"})
)


@given(st.lists(st.tuples(digits, st.sampled_from(b"0123456789-.e")), min_size=1, max_size=3))
def test_changed_digits_never_make_a_false_span(changes: list[tuple[int, int]]) -> None:
    raw = bytearray(HEAD[8:])
    for position, value in changes:
        raw[position - 8] = value
    try:
        parsed = parse_header(bytes(raw), len(VALID))
    except FormatError:
        return
    check_valid(parsed, len(VALID))


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(sorted(DTYPES)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPES)) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 30), max_size=3) | json_values,
    }
)


@given(
    st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), near_entries | json_values),
    st.integers(0, 60),
)
def test_any_json_is_either_refused_or_consistent(document: dict[str, Any], data: int) -> None:
    raw = json.dumps(document).encode()
    try:
        parsed = parse_header(raw, 8 + len(raw) + data)
    except FormatError:
        return
    check_valid(parsed, 8 + len(raw) + data)
