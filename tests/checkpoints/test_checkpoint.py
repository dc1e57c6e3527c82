"""Checkpoints on disk: every form they are published in, and every way in which one is broken."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch
from safetensors.numpy import save_file

from lowmem_adamms.checkpoints import weight_files
from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.safetensors_header import build_header
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.errors import FormatError

Arrays = Mapping[str, npt.NDArray[Any]]
INDEX = "model.safetensors.index.json"


def draw(*shape: int, dtype: str = "float32", seed: int = 0) -> npt.NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


A, B, C = draw(4, 3, seed=1), draw(5, dtype="float16", seed=2), draw(2, 2, dtype="int64", seed=3)
TWO: dict[str, Arrays] = {"one.safetensors": {"a": A}, "two.safetensors": {"b": B}}


def put(folder: Path, shards: Mapping[str, Arrays], weight_map: object = None) -> Path:
    """Write files of tensors, and an index if there is more than one file or a map is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, arrays in shards.items():
        save_file(dict(arrays), folder / file, metadata={"format": "pt"})
    if weight_map is None and len(shards) > 1:
        weight_map = {name: file for file, arrays in shards.items() for name in arrays}
    if weight_map is not None:
        write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    return folder


def put_one(folder: Path, config: object = None) -> Path:
    """Write a checkpoint of one file, and a config.json if it is given."""
    put(folder, {"model.safetensors": {"a": A}})
    if config is not None:
        write_json(folder / "config.json", config)
    return folder


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def contents(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (span.dtype.name, span.shape, span.path.read_bytes()[span.start : span.stop])
        for name, span in checkpoint.tensors.items()
    }


A_CONTENT, B_CONTENT = ("F32", (4, 3), A.tobytes()), ("F16", (5,), B.tobytes())


def refused(path: Path) -> str:
    """The one line with which opening fails, which must name the folder."""
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# Forms


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.safetensors"])
def test_folder_with_one_file(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(put(tmp_path / "m", {name: {"a": A, "b": B}}))
    assert contents(checkpoint) == {"a": A_CONTENT, "b": B_CONTENT}
    assert checkpoint.shards == (tmp_path / "m" / name,)
    assert (checkpoint.folder, checkpoint.name) == (tmp_path / "m", "m")


def test_bare_file(tmp_path: Path) -> None:
    put(tmp_path, {"weights.safetensors": {"a": A}})
    checkpoint = open_checkpoint(tmp_path / "weights.safetensors")
    assert contents(checkpoint) == {"a": A_CONTENT}
    assert (checkpoint.folder, checkpoint.config, checkpoint.tied) == (None, {}, None)
    assert list(checkpoint.sidecars()) == []


def test_shards_come_in_the_order_of_their_names_and_tensors_in_that_of_their_bytes(
    tmp_path: Path,
) -> None:
    """Whatever the order of the index."""
    last, first = (f"model-0000{i}-of-00002.safetensors" for i in (2, 1))
    checkpoint = open_checkpoint(put(tmp_path, {last: {"c": C, "a": A}, first: {"z": B}}))
    assert [path.name for path in checkpoint.shards] == [first, last]
    assert next(iter(checkpoint.tensors)) == "z"
    _, *starts = [span.start for span in checkpoint.tensors.values()]
    assert starts == sorted(starts)
    c_content = ("I64", (2, 2), C.tobytes())
    assert contents(checkpoint) == {"z": B_CONTENT, "a": A_CONTENT, "c": c_content}


def test_the_index_wins_over_other_files_in_the_folder(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": {"other": C}, "lora.safetensors": {"more": C}})
    put(tmp_path, TWO)
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


def test_safetensors_win_over_pickles_and_adapters(tmp_path: Path) -> None:
    put(tmp_path, {"consolidated.safetensors": {"a": A}})
    put(tmp_path, {"adapter_model.safetensors": {"b": B}})
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, None),
        (TIED, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": False, "language_config": TIED}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
        ({"thinker_config": {"text_config": TIED}}, True),
        ({"tie_word_embeddings": "yes", "text_config": None}, None),
    ],
)
def test_tied_is_what_the_config_says(tmp_path: Path, config: object, tied: bool | None) -> None:
    assert open_checkpoint(put_one(tmp_path, config)).tied is tied


def test_hub_cache_with_symlinked_shards(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--Qwen--Qwen2-VL-7B"
    snapshot = repo / "snapshots" / ("0123abcd" * 5)
    snapshot.mkdir(parents=True)
    put(repo / "blobs", TWO)
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    checkpoint = open_checkpoint(snapshot)
    assert contents(checkpoint) == {"a": A_CONTENT, "b": B_CONTENT}
    assert checkpoint.name == "Qwen/Qwen2-VL-7B"
    assert checkpoint.public_ref == f"Qwen/Qwen2-VL-7B@{snapshot.name}"
    (repo / "blobs" / "two.safetensors").unlink()
    assert "two.safetensors is missing" in refused(snapshot)


@pytest.mark.parametrize(
    ("loaded_from", "name"),
    [
        ("Qwen/folder", "Qwen/folder"),
        ("Qwen/Qwen2.5-7B-Instruct", "folder"),  # of a fine-tune: what it was made from
        ("./folder", "folder"),
        (7, "folder"),
    ],
)
def test_name_from_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded_from: object, name: str
) -> None:
    """Also of a path that does not show it."""
    monkeypatch.chdir(put_one(tmp_path / "folder", {"_name_or_path": loaded_from}))
    assert open_checkpoint(".").name == name


# Spans


def test_rows_of_a_span() -> None:
    span = Span(Path("f"), DTYPES["BF16"], 100, 100 + 4 * 3 * 5 * 2, (4, 3, 5))
    assert span.row_bytes == 30
    part = span.rows(1, 3)
    assert (part.start, part.stop, part.shape) == (130, 190, (2, 3, 5))
    assert span.rows(0, 4) == span
    assert (span.rows(0, 1).stop, span.rows(0, 1).shape) == (130, (1, 3, 5))
    empty = span.rows(2, 2)
    assert (empty.nbytes, empty.shape) == (0, (0, 3, 5))
    scalar = Span(Path("f"), DTYPES["F32"], 8, 12, ())
    assert (scalar.row_bytes, scalar.rows(0, 1)) == (4, scalar)


@pytest.mark.parametrize(("dtype", "start", "stop"), [("BF16", 120, 128), ("F4", 105, 107)])
def test_a_flat_slice_of_a_span(dtype: str, start: int, stop: int) -> None:
    span = Span(Path("f"), DTYPES[dtype], 100, 200, (5, 10))
    part = span.flat_slice(10, 4)
    assert (part.start, part.stop, part.shape) == (start, stop, (4,))


# What is missing or in the wrong place


@pytest.mark.parametrize("ref", ["/no/such/folder", "./gone", "gone.safetensors"])
def test_a_path_that_is_no_hub_id_gets_no_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=f"^{ref}: no such folder or file$"):
        open_checkpoint(ref)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "nor other weights"),
        (["a/README.md"], "nor other weights"),
        (["a.safetensors", "b.safetensors"], "found 2 other .safetensors"),
        (["qwen-Q4_K_M.gguf"], r"found qwen-Q4_K_M\.gguf: take the safetensors files"),
        (["adapter_model.bin"], r"adapter_model\.bin, a LoRA adapter: merge it"),
        (["qwen/model.safetensors.index.json"], "one folder deeper: give qwen$"),
    ],
)
def test_what_lies_there_instead_of_weights_is_told(
    tmp_path: Path, files: list[str], words: str
) -> None:
    touch(tmp_path, *files)
    message = refused(tmp_path)
    assert "no model.safetensors, no model.safetensors.index.json" in message
    assert re.search(words, message)


def test_a_bare_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    put(tmp_path, {"lora.safetensors": {"base_model.model.model.layers.0.q.lora_A.weight": A}})
    assert "a LoRA adapter: merge it" in refused(tmp_path / "lora.safetensors")


def test_one_shard_or_an_index_asks_for_the_folder(tmp_path: Path) -> None:
    put(tmp_path, TWO)
    shard = (tmp_path / "one.safetensors").rename(tmp_path / "model-00002-of-00003.safetensors")
    assert "one of 3 shards; give the folder" in refused(shard)
    assert "give the folder" in refused(tmp_path / INDEX)
    shard = shard.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert open_checkpoint(shard).tensors


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_clone_without_git_lfs_says_how_to_get_the_weights(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16000000000\n"
    (tmp_path / name).write_text(pointer)
    assert f"{name}: a Git LFS pointer" in (message := refused(tmp_path))
    assert "git lfs pull" in message


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert "no tensors" in refused(put(tmp_path, {"model.safetensors": {}}))


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    put(tmp_path, TWO)
    (tmp_path / "two.safetensors").unlink()
    assert "two.safetensors is missing beside it (it holds b)" in refused(tmp_path)


@pytest.mark.parametrize("lie", [{"c": "one.safetensors"}, {"a": "two.safetensors"}])
def test_an_index_that_names_a_tensor_where_it_is_not(tmp_path: Path, lie: dict[str, str]) -> None:
    put(tmp_path, TWO, {"a": "one.safetensors", "b": "two.safetensors"} | lie)
    assert re.search(r"says [ac] is in (one|two)\.safetensors; it is not there", refused(tmp_path))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = {"one.safetensors": {"a": A, "w.x": B}, "two.safetensors": {"b": B, "w.x": B}}
    message = refused(put(tmp_path, shards))
    assert "tensor w.x is in one.safetensors and two.safetensors" in message


OUTSIDE = ("../other.safetensors", "/etc/passwd", "sub/other.safetensors", "..", "", "a\\b", "a\0")


@pytest.mark.parametrize("file", [*OUTSIDE, ".", None, ["one.safetensors"]])
def test_an_index_that_names_a_path_outside_the_folder(tmp_path: Path, file: object) -> None:
    """Even where that file exists and holds the tensor."""
    put(tmp_path, {"other.safetensors": {"b": B}})
    put(tmp_path / "m" / "sub", {"other.safetensors": {"b": B}})
    put(tmp_path / "m", {"one.safetensors": {"a": A}}, {"a": "one.safetensors", "b": file})
    assert re.search("b is said to be in .*, outside the folder", refused(tmp_path / "m"))


@pytest.mark.parametrize("file", ["x" * 300, "config.json", "sub"])
def test_an_index_that_names_what_cannot_be_a_shard(tmp_path: Path, file: str) -> None:
    """A name too long for the system, a file of another kind, a folder."""
    (tmp_path / "sub").mkdir()
    put_one(tmp_path, {})
    write_json(tmp_path / INDEX, {"weight_map": {"a": "model.safetensors", "b": file}})
    refused(tmp_path)


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_an_endless_json_file_is_not_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten million entries took 25 s and 2.5 GB; here the limit is moved instead."""
    put(tmp_path, {"model.safetensors": {"a": np.zeros(1, np.float32)}})
    write_json(tmp_path / name, {"weight_map": {"a": "model.safetensors"}, "x": "y" * 100})
    assert open_checkpoint(tmp_path).tensors
    monkeypatch.setattr(weight_files, "MAX_JSON_BYTES", 100)
    assert re.search(rf"{name}: \d+ B, expected at most 100 B of JSON", refused(tmp_path))


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_weight_map(tmp_path: Path, index: object) -> None:
    write_json(put_one(tmp_path) / INDEX, index)
    assert "no weight_map" in refused(tmp_path)


@pytest.mark.parametrize("file", [INDEX, "config.json"])
@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_a_broken_json_file_is_named(tmp_path: Path, file: str, raw: bytes) -> None:
    (put_one(tmp_path) / file).write_bytes(raw)
    assert str(tmp_path / file) in refused(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    path = put(tmp_path, TWO) / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert re.search("two.safetensors: .*truncated", refused(tmp_path))


# Pickles


@pytest.fixture(scope="module")
def hand_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mPLUG-Owl2, which exists as .bin only: several shards, F32 buffers among BF16."""
    folder = tmp_path_factory.mktemp("bin") / "safetensors"
    return tiny.make("mplug_owl2", folder, ancestor=tiny.ancestor("llama"))


def test_sharded_bin_has_the_bytes_of_its_safetensors_original(
    hand_made: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny.to_bin(hand_made, tmp_path / "bin"))
    assert len(checkpoint.shards) > 1
    assert all(path.suffix == ".bin" for path in checkpoint.shards)
    assert contents(checkpoint) == contents(open_checkpoint(hand_made))
    assert {span.dtype.name for span in checkpoint.tensors.values()} == {"BF16", "F32"}


def test_single_bin(hand_made: Path, tmp_path: Path) -> None:
    pickled = tiny.to_bin(hand_made, tmp_path / "bin", max_shard_size="1GB")
    expected = contents(open_checkpoint(hand_made))
    for path in (pickled, pickled / "pytorch_model.bin"):
        checkpoint = open_checkpoint(path)
        assert contents(checkpoint) == expected
        starts = [span.start for span in checkpoint.tensors.values()]
        assert starts == sorted(starts)


def save_bin(folder: Path, state: object, **options: Any) -> Path:
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder


def test_what_may_stand_in_a_bin(tmp_path: Path) -> None:
    """Parameters, views into one storage, tied and empty tensors, under `state_dict` or not."""
    whole = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    tensors = {
        "parameter": torch.nn.Parameter(whole.clone()),
        "tail": whole[2:],
        "head": whole[:2],
        "tied": whole,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    for state in (tensors, {"state_dict": tensors}):
        assert contents(open_checkpoint(save_bin(tmp_path, state))) == {
            name: ("F32", tuple(tensor.shape), tiny.raw(tensor)) for name, tensor in tensors.items()
        }


class Malicious:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "trace"
    state = {"a": torch.zeros(3), "b": Malicious(f"touch {trace}")}
    save_bin(tmp_path, state, _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path)
    assert zipped or "not a zip; truncated, or a torch file older than 1.6" in message
    assert not trace.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert trace.exists(), "the pickle of this test does nothing, so it shows nothing"


def rezip(path: Path, change: Callable[[str, bytes], bytes], compression: int) -> None:
    """Write a .bin anew with changed records."""
    with zipfile.ZipFile(path) as old:
        records = {item.filename: old.read(item) for item in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records.items():
            new.writestr(name, change(name, data))


def test_a_compressed_bin(tmp_path: Path) -> None:
    save_bin(tmp_path, {"a": torch.zeros(300)})
    rezip(tmp_path / "pytorch_model.bin", lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(tmp_path)


def test_a_bin_whose_data_end_too_early(tmp_path: Path) -> None:
    """Torch itself does not look as long as no data are read."""
    save_bin(tmp_path, {"a": torch.zeros(3000)})
    rezip(
        tmp_path / "pytorch_model.bin",
        lambda name, data: data[:8] if "/data/" in name else data,
        zipfile.ZIP_STORED,
    )
    assert "a lies outside the file; truncated?" in refused(tmp_path)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(4, 3).t(), torch.zeros(1, 3).expand(4, 3), 7, torch.zeros(4, 3).to_sparse()],
    ids=["transposed", "expanded", "int", "sparse"],
)
def test_a_bin_with_what_is_no_plain_tensor(tmp_path: Path, value: object) -> None:
    message = refused(save_bin(tmp_path, {"a": torch.ones(2), "w.x": value}))
    assert "w.x is not a plain contiguous tensor" in message


@pytest.mark.parametrize("state", [[torch.ones(2)], {"state_dict": torch.ones(2)}, {}])
def test_a_bin_that_holds_no_dict_of_tensors(tmp_path: Path, state: object) -> None:
    refused(save_bin(tmp_path, state))


@pytest.mark.parametrize("left", [0, 3, 100, 0.3, 0.6, 0.95, -1])
def test_a_truncated_bin(tmp_path: Path, left: float) -> None:
    save_bin(tmp_path, {"a": torch.randn(500), "b": torch.randn(500)})
    path = tmp_path / "pytorch_model.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(left * len(raw)) if isinstance(left, float) else left])
    assert str(path) in refused(tmp_path)


def test_a_bin_whose_directory_is_damaged(tmp_path: Path) -> None:
    """Every third byte of the zip's directory, so any error of zipfile's may come up."""
    save_bin(tmp_path, {"a": torch.randn(5)})
    path = tmp_path / "pytorch_model.bin"
    raw = path.read_bytes()
    for position in range(raw.index(b"PK\x01\x02"), len(raw), 3):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 0xFF]) + raw[position + 1 :])
        try:
            tensors = open_checkpoint(tmp_path).tensors
        except FormatError as error:
            assert str(path) in str(error)
        else:
            assert 0 <= tensors["a"].start < tensors["a"].stop <= len(raw)


def test_a_big_endian_bin(tmp_path: Path) -> None:
    """Refused before torch sees it, which may crash in swapping bytes that are not there."""
    save_bin(tmp_path, {"a": torch.zeros(30)})
    swap = {"archive/byteorder": b"big", "pytorch_model/byteorder": b"big"}
    path = tmp_path / "pytorch_model.bin"
    rezip(path, lambda name, data: swap.get(name, data), zipfile.ZIP_STORED)
    assert f"{path}: its numbers are not little-endian" in refused(tmp_path)


# Quantized weights


@pytest.mark.parametrize("nested", [False, True])
def test_quantized_by_its_config(tmp_path: Path, nested: bool) -> None:
    quantization = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    put_one(tmp_path, {"text_config": quantization} if nested else quantization)
    assert "weights quantized in this way cannot be blended: config.json" in (
        message := refused(tmp_path)
    )
    assert "(gptq)" in message


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantization_config_is_none(tmp_path: Path, value: object) -> None:
    put_one(tmp_path, {"quantization_config": value})
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


GPTQ = ("qweight", "qzeros", "g_idx")
BITSANDBYTES = ("SCB", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")


@pytest.mark.parametrize("suffix", [*GPTQ, *BITSANDBYTES, "weight_scale", "weight_scale_inv"])
def test_quantized_by_its_tensor_names(tmp_path: Path, suffix: str) -> None:
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    put(tmp_path, {"model.safetensors": {"model.norm.weight": A, name: B}})
    assert f"weights quantized in this way cannot be blended: tensor {name}" in refused(tmp_path)


def test_quantized_by_its_dtype(tmp_path: Path) -> None:
    head = build_header([("w.x", DTYPES["F8_E4M3"], (4,))], {})
    (tmp_path / "model.safetensors").write_bytes(head + bytes(4))
    assert "w.x (F8_E4M3)" in refused(tmp_path)


def test_names_that_only_look_quantized_are_fine(tmp_path: Path) -> None:
    """SCB inside a word, absmax as a module's name: no quantizer writes such."""
    fine = {"model.SCBnorm.weight": A, "model.absmax.weight": A, "model.logit_scale": B}
    assert set(open_checkpoint(put(tmp_path, {"model.safetensors": fine})).tensors) == set(fine)


# Sidecars


CARRIED = [
    "LICENSE",
    "additional_chat_templates/rag.jinja",
    "config.json",
    "modeling/visual.py",
    "spk_dict.pt",
    "tokenizer.model",
]
LEFT = [
    ".cache/huggingface/download/config.json.metadata",
    ".gitattributes",
    "README.md",
    "__pycache__/modeling.cpython-311.pyc",
    "adamms.json",
    "adapter_config.json",
    "ggml-model.gguf",
    "modeling/__pycache__/visual.cpython-311.pyc",
    "model.fp32.safetensors",
    "model.safetensors.index.json",
    "onnx/model.onnx_data_1",
    "original/consolidated.00.pth",
    "report.html",
    "tf_model.h5",
]


def test_sidecars_are_everything_but_weights_and_what_is_written_anew(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(put_one(tmp_path))
    touch(tmp_path, *CARRIED, *LEFT)
    (tmp_path / "empty").mkdir()
    assert [str(path) for path in checkpoint.sidecars()] == CARRIED


def test_sidecars_under_a_hidden_folder_are_still_the_models(tmp_path: Path) -> None:
    """Only what is hidden inside the folder counts: ~/.cache/huggingface holds every model."""
    folder = put_one(tmp_path / ".cache" / "m")
    touch(folder, "tokenizer.json")
    assert [str(path) for path in open_checkpoint(folder).sidecars()] == ["tokenizer.json"]


def test_links_within_the_folder_and_into_the_hubs_cache_are_carried(tmp_path: Path) -> None:
    folder = put_one(tmp_path / "m")
    touch(tmp_path / "models--org--m" / "blobs", "0123")
    (folder / "vocab.json").symlink_to("../models--org--m/blobs/0123")
    (folder / "tokenizer.json").symlink_to("vocab.json")
    (folder / "gone.json").symlink_to("../gone")
    assert [str(name) for name in open_checkpoint(folder).sidecars()] == [
        "tokenizer.json",
        "vocab.json",
    ]


@pytest.mark.parametrize(
    "target",
    [
        *("../token", "/proc/self/environ", ".git/config", "../by/token"),
        *("../blobs/token", "../models--org--m/token"),
    ],
)
def test_links_out_of_the_folder_are_refused(tmp_path: Path, target: str) -> None:
    """A cloned repository may bring any link, and its target would be copied and published."""
    folder = put_one(tmp_path / "m")
    touch(tmp_path, "token", "m/.git/config", "blobs/token", "models--org--m/token")
    (tmp_path / "by").symlink_to(tmp_path)
    checkpoint = open_checkpoint(folder)
    (folder / "NOTICE").symlink_to(target)
    with pytest.raises(FormatError, match=r"m/NOTICE: links to .*, expected a file in .*; replace"):
        checkpoint.sidecars()


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "other", {"model.safetensors": {"a": A}})
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").symlink_to("../other/model.safetensors")
    assert "model.safetensors: links to" in refused(tmp_path / "m")


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_what_is_no_regular_file_is_refused_unopened(tmp_path: Path, kind: str) -> None:
    checkpoint = open_checkpoint(put_one(tmp_path))
    if kind == "FIFO":
        os.mkfifo(tmp_path / "NOTICE")
    else:
        (tmp_path / "NOTICE").symlink_to("/dev/zero")
    with pytest.raises(FormatError, match="NOTICE: not a regular file"):
        checkpoint.sidecars()


def test_a_sidecar_beyond_all_measure_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(put_one(tmp_path))
    touch(tmp_path, "big.tar")
    os.truncate(tmp_path / "big.tar", 10**9)
    assert checkpoint.sidecars() == {Path("big.tar"): 10**9}
    os.truncate(tmp_path / "big.tar", 10**9 + 1)
    with pytest.raises(FormatError, match=r"big.tar: 1.00 GB, expected at most 1.00 GB"):
        checkpoint.sidecars()
