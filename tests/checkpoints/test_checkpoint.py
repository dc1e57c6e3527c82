"""Checkpoints on disk: every form they are published in, and every way in which one is broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.numpy import save_file

from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.safetensors_header import build_header
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.errors import FormatError

Arrays = Mapping[str, npt.NDArray[Any]]
INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"


def draw(*shape: int, dtype: str = "float32", seed: int = 0) -> npt.NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


A, B, C = draw(4, 3, seed=1), draw(5, dtype="float16", seed=2), draw(2, 2, dtype="int64", seed=3)


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


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def bytes_of(span: Span) -> bytes:
    return span.path.read_bytes()[span.start : span.stop]


def contents(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (s.dtype.name, s.shape, bytes_of(s)) for n, s in checkpoint.tensors.items()}


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
    assert contents(checkpoint) == {
        "a": ("F32", (4, 3), A.tobytes()),
        "b": ("F16", (5,), B.tobytes()),
    }
    assert checkpoint.shards == (tmp_path / "m" / name,)
    assert (checkpoint.folder, checkpoint.name) == (tmp_path / "m", "m")


def test_bare_file(tmp_path: Path) -> None:
    put(tmp_path, {"weights.safetensors": {"a": A}})
    checkpoint = open_checkpoint(tmp_path / "weights.safetensors")
    assert contents(checkpoint) == {"a": ("F32", (4, 3), A.tobytes())}
    assert (checkpoint.folder, checkpoint.config, checkpoint.tied) == (None, {}, None)
    assert list(checkpoint.sidecars()) == []


def test_shards_come_in_the_order_of_their_names_and_tensors_in_that_of_their_bytes(
    tmp_path: Path,
) -> None:
    """Whatever the order of the index."""
    put(
        tmp_path,
        {
            "model-00002-of-00002.safetensors": {"c": C, "a": A},
            "model-00001-of-00002.safetensors": {"z": B},
        },
    )
    checkpoint = open_checkpoint(tmp_path)
    assert [path.name for path in checkpoint.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    spans = list(checkpoint.tensors.values())
    assert next(iter(checkpoint.tensors)) == "z"
    assert [span.start for span in spans[1:]] == sorted(span.start for span in spans[1:])
    assert contents(checkpoint) == {
        "z": ("F16", (5,), B.tobytes()),
        "a": ("F32", (4, 3), A.tobytes()),
        "c": ("I64", (2, 2), C.tobytes()),
    }


def test_mixed_dtypes_in_one_file(tmp_path: Path) -> None:
    tensors = {
        name: torch.arange(6).reshape(2, 3).to(getattr(torch, name))
        for name in ("bfloat16", "float16", "float32", "int64")
    }
    save_torch_state_dict(tensors, tmp_path, metadata={"format": "pt"})
    found = contents(open_checkpoint(tmp_path))
    assert {name: found[name][0] for name in tensors} == {
        "bfloat16": "BF16",
        "float16": "F16",
        "float32": "F32",
        "int64": "I64",
    }
    for name, tensor in tensors.items():
        assert found[name][2] == bytes(tensor.contiguous().view(torch.uint8).numpy())


def test_the_index_wins_over_other_files_in_the_folder(tmp_path: Path) -> None:
    put(tmp_path, {"one.safetensors": {"a": A}, "two.safetensors": {"b": B}})
    put(tmp_path, {"model.safetensors": {"other": C}, "lora.safetensors": {"more": C}}, {})
    write_json(tmp_path / INDEX, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": {"a": A}})
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"language_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
        ({"thinker_config": {"text_config": {"tie_word_embeddings": True}}}, True),
        ({"tie_word_embeddings": "yes"}, None),
        ({"text_config": None}, None),
        ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_tied_is_what_the_config_says(tmp_path: Path, config: object, tied: bool | None) -> None:
    put(tmp_path, {"model.safetensors": {"a": A}})
    write_json(tmp_path / "config.json", config)
    assert open_checkpoint(tmp_path).tied is tied


def test_hub_cache_with_symlinked_shards(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--Qwen--Qwen2-VL-7B"
    put(repo / "blobs", {"1111": {"a": A}, "2222": {"b": B}})
    (repo / "blobs" / INDEX).unlink()
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    write_json(
        repo / "blobs" / "3333", {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    )
    for name, blob in (("m-1.safetensors", "1111"), ("m-2.safetensors", "2222"), (INDEX, "3333")):
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    checkpoint = open_checkpoint(snapshot)
    assert contents(checkpoint) == {
        "a": ("F32", (4, 3), A.tobytes()),
        "b": ("F16", (5,), B.tobytes()),
    }
    assert checkpoint.name == "Qwen/Qwen2-VL-7B"


def test_a_dangling_link_in_the_hub_cache_is_a_missing_file(tmp_path: Path) -> None:
    put(tmp_path, {"m-1.safetensors": {"a": A}, "m-2.safetensors": {"b": B}})
    (tmp_path / "m-2.safetensors").unlink()
    (tmp_path / "m-2.safetensors").symlink_to("../blobs/gone")
    assert "m-2.safetensors is missing" in refused(tmp_path)


@pytest.mark.parametrize(
    ("loaded_from", "name"),
    [
        ("Qwen/folder", "Qwen/folder"),
        ("Qwen/Qwen2.5-7B-Instruct", "folder"),  # of a fine-tune: what it was made from
        ("/home/me/models/qwen", "folder"),
        ("./out", "folder"),
        ("../up", "folder"),
        ("qwen", "folder"),
        (7, "folder"),
        ("", "folder"),
    ],
)
def test_name_from_the_config(tmp_path: Path, loaded_from: object, name: str) -> None:
    put(tmp_path / "folder", {"model.safetensors": {"a": A}})
    write_json(tmp_path / "folder" / "config.json", {"_name_or_path": loaded_from})
    assert open_checkpoint(tmp_path / "folder").name == name


def test_a_path_of_dots_still_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "my-model", {"model.safetensors": {"a": A}})
    monkeypatch.chdir(tmp_path / "my-model")
    assert open_checkpoint(".").name == "my-model"


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


@pytest.mark.parametrize(("dtype", "start", "stop"), [("BF16", 120, 128), ("F4", 105, 107)])
def test_a_flat_slice_of_a_span(dtype: str, start: int, stop: int) -> None:
    span = Span(Path("f"), DTYPES[dtype], 100, 200, (5, 10))
    part = span.flat_slice(10, 4)
    assert (part.start, part.stop, part.shape) == (start, stop, (4,))


def test_a_scalar_is_one_row() -> None:
    span = Span(Path("f"), DTYPES["F32"], 8, 12, ())
    assert (span.row_bytes, span.rows(0, 1)) == (4, span)


# What is missing or in the wrong place


@pytest.mark.parametrize("ref", ["/no/such/folder", "./no/such", "gone", "gone.safetensors"])
def test_a_path_that_is_no_hub_id_gets_no_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=f"^{ref}: no such folder or file$"):
        open_checkpoint(ref)


def test_empty_folder(tmp_path: Path) -> None:
    assert "no model.safetensors" in refused(tmp_path)


def test_several_files_without_an_index(tmp_path: Path) -> None:
    put(tmp_path, {"a.safetensors": {"a": A}, "b.safetensors": {"b": B}})
    (tmp_path / INDEX).unlink()
    assert "found 2 other .safetensors" in refused(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "nor other weights"),
        (["qwen-Q4_K_M.gguf"], r"found qwen-Q4_K_M\.gguf: take the safetensors files"),
        (["adapter_model.safetensors"], r"adapter_model\.safetensors, a LoRA adapter: merge it"),
        (["adapter_model.bin"], r"adapter_model\.bin, a LoRA adapter: merge it"),
        (["qwen/model.safetensors.index.json"], "one folder deeper: give qwen$"),
        (["a/README.md"], "nor other weights"),
    ],
)
def test_what_lies_there_instead_of_weights_is_told(
    tmp_path: Path, files: list[str], words: str
) -> None:
    touch(tmp_path, *files)
    message = refused(tmp_path)
    assert "no model.safetensors, no model.safetensors.index.json" in message
    assert re.search(words, message)


def test_an_adapter_beside_the_one_file_of_weights_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path, {"consolidated.safetensors": {"a": A}})
    put(tmp_path, {"adapter_model.safetensors": {"b": B}})
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_a_bare_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    put(tmp_path, {"lora.safetensors": {"base_model.model.model.layers.0.q.lora_A.weight": A}})
    assert "a LoRA adapter: merge it" in refused(tmp_path / "lora.safetensors")


def test_one_shard_of_several_asks_for_the_folder(tmp_path: Path) -> None:
    put(tmp_path, {"model-00002-of-00003.safetensors": {"a": A}})
    shard = tmp_path / "model-00002-of-00003.safetensors"
    assert "one of 3 shards; give the folder" in refused(shard)
    shard.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert open_checkpoint(tmp_path / "model-00001-of-00001.safetensors").tensors


def test_an_index_given_as_a_checkpoint_asks_for_the_folder(tmp_path: Path) -> None:
    put(tmp_path, {"one.safetensors": {"a": A}, "two.safetensors": {"b": B}})
    assert "give the folder" in refused(tmp_path / INDEX)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_clone_without_git_lfs_says_how_to_get_the_weights(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16000000000\n"
    (tmp_path / name).write_text(pointer)
    assert f"{name}: a Git LFS pointer" in (message := refused(tmp_path))
    assert "git lfs pull" in message


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert "no tensors" in refused(put(tmp_path, {"model.safetensors": {}}))


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    put(tmp_path, {"one.safetensors": {"a": A}, "two.safetensors": {"b": B}})
    (tmp_path / "two.safetensors").unlink()
    message = refused(tmp_path)
    assert "two.safetensors is missing" in message
    assert "(it holds b)" in message


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"},
        {"a": "two.safetensors", "b": "one.safetensors"},
    ],
)
def test_an_index_that_names_a_tensor_where_it_is_not(
    tmp_path: Path, weight_map: dict[str, str]
) -> None:
    shards = {"one.safetensors": {"a": A}, "two.safetensors": {"b": B}}
    put(tmp_path, shards, weight_map)
    assert re.search(r"says [abc] is in (one|two)\.safetensors; it is not there", refused(tmp_path))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = {"one.safetensors": {"a": A, "w.x": B}, "two.safetensors": {"b": B, "w.x": B}}
    message = refused(put(tmp_path, shards))
    assert "tensor w.x is in one.safetensors and two.safetensors" in message


@pytest.mark.parametrize(
    "file",
    [
        "../other.safetensors",
        "/etc/passwd",
        "sub/other.safetensors",
        "..",
        ".",
        "",
        "sub\\other.safetensors",
        "other.safetensors\0",
        "./one.safetensors",
        None,
        3,
        ["one.safetensors"],
    ],
)
def test_an_index_that_names_a_path_outside_the_folder(tmp_path: Path, file: object) -> None:
    """Even where that file exists and holds the tensor."""
    put(tmp_path, {"other.safetensors": {"b": B}})
    put(tmp_path / "m" / "sub", {"other.safetensors": {"b": B}})
    put(tmp_path / "m", {"one.safetensors": {"a": A}}, {"a": "one.safetensors", "b": file})
    message = refused(tmp_path / "m")
    assert "b is said to be in" in message
    assert "outside the folder" in message


@pytest.mark.parametrize("file", ["x" * 300, "config.json", "sub"])
def test_an_index_that_names_what_cannot_be_a_shard(tmp_path: Path, file: str) -> None:
    """A name too long for the system, a file of another kind, a folder."""
    (tmp_path / "sub").mkdir()
    write_json(tmp_path / "config.json", {})
    put(tmp_path, {"one.safetensors": {"a": A}}, {"a": "one.safetensors", "b": file})
    refused(tmp_path)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}]
)
def test_an_index_without_a_weight_map(tmp_path: Path, index: object) -> None:
    put(tmp_path, {"one.safetensors": {"a": A}})
    write_json(tmp_path / INDEX, index)
    assert "no weight_map" in refused(tmp_path)


@pytest.mark.parametrize("file", [INDEX, "config.json"])
@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b"[" * 100_000])
def test_a_broken_json_file_is_named(tmp_path: Path, file: str, raw: bytes) -> None:
    put(tmp_path, {"one.safetensors": {"a": A}})
    (tmp_path / file).write_bytes(raw)
    assert str(tmp_path / file) in refused(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    put(tmp_path, {"one.safetensors": {"a": A}, "two.safetensors": {"b": B}})
    path = tmp_path / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = refused(tmp_path)
    assert str(path) in message
    assert "truncated" in message


# Pickles


@pytest.fixture(scope="module")
def hand_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mPLUG-Owl2, which exists as .bin only: several shards, F32 buffers among BF16."""
    folder = tmp_path_factory.mktemp("bin") / "safetensors"
    return tiny.make("mplug_owl2", folder, ancestor=tiny.ancestor("llama"))


def test_sharded_bin_has_the_bytes_of_its_safetensors_original(
    hand_made: Path, tmp_path: Path
) -> None:
    pickled = tiny.to_bin(hand_made, tmp_path / "bin")
    checkpoint = open_checkpoint(pickled)
    assert len(checkpoint.shards) > 1
    assert all(path.suffix == ".bin" for path in checkpoint.shards)
    assert (pickled / BIN_INDEX).is_file()
    assert contents(checkpoint) == contents(open_checkpoint(hand_made))
    assert {span.dtype.name for span in checkpoint.tensors.values()} == {"BF16", "F32"}
    assert checkpoint.config["architectures"] == ["MPLUGOwl2LlamaForCausalLM"]


def test_single_bin(hand_made: Path, tmp_path: Path) -> None:
    pickled = tiny.to_bin(hand_made, tmp_path / "bin", max_shard_size="1GB")
    assert (pickled / "pytorch_model.bin").is_file()
    assert contents(open_checkpoint(pickled)) == contents(open_checkpoint(hand_made))
    bare = open_checkpoint(pickled / "pytorch_model.bin")
    assert contents(bare) == contents(open_checkpoint(hand_made))


def test_bin_tensors_come_in_the_order_of_their_bytes(hand_made: Path, tmp_path: Path) -> None:
    pickled = tiny.to_bin(hand_made, tmp_path / "bin", max_shard_size="1GB")
    starts = [span.start for span in open_checkpoint(pickled).tensors.values()]
    assert starts == sorted(starts)


def save_bin(folder: Path, state: object, **options: Any) -> Path:
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


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
        found = contents(open_checkpoint(save_bin(tmp_path, state)))
        assert found == {
            "parameter": ("F32", (4, 3), tensor_bytes(whole)),
            "tail": ("F32", (2, 3), tensor_bytes(whole[2:])),
            "head": ("F32", (2, 3), tensor_bytes(whole[:2])),
            "tied": ("F32", (4, 3), tensor_bytes(whole)),
            "empty": ("F32", (0, 3), b""),
            "scalar": ("F32", (), tensor_bytes(torch.tensor(2.5))),
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
    folder = tmp_path / "m"
    folder.mkdir()
    save_bin(folder, state, _use_new_zipfile_serialization=zipped)
    message = refused(folder)
    assert "pytorch_model.bin" in message
    assert not trace.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trace.exists(), "the pickle of this test does nothing, so it shows nothing"


def test_a_bin_older_than_torch_1_6(tmp_path: Path) -> None:
    save_bin(tmp_path, {"a": torch.zeros(3)}, _use_new_zipfile_serialization=False)
    message = refused(tmp_path)
    assert "not a zip" in message
    assert "1.6" in message


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
    ("value", "sign"),
    [
        (torch.zeros(4, 3).t(), "contiguous"),
        (torch.zeros(1, 3).expand(4, 3), "contiguous"),
        (7, "not a plain"),
        ("text", "not a plain"),
        (torch.zeros(4, 3).to_sparse(), "w.x"),
    ],
    ids=["transposed", "expanded", "int", "str", "sparse"],
)
def test_a_bin_with_what_is_no_plain_tensor(tmp_path: Path, value: object, sign: str) -> None:
    message = refused(save_bin(tmp_path, {"a": torch.ones(2), "w.x": value}))
    assert "w.x" in message
    assert sign in message


@pytest.mark.parametrize(
    "state", [[torch.ones(2)], torch.ones(2), {"state_dict": torch.ones(2)}, {"state_dict": []}, {}]
)
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
    """Every single byte of the zip's directory, so any error of zipfile's may come up."""
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
    """In a process of its own: torch may crash in swapping bytes that are not there."""
    save_bin(tmp_path, {"a": torch.zeros(30)})
    plain = tmp_path / "pytorch_model.bin"
    swap = {"archive/byteorder": b"big", "pytorch_model/byteorder": b"big"}
    rezip(plain, lambda name, data: swap.get(name, data), zipfile.ZIP_STORED)
    code = (
        "import sys\n"
        "from lowmem_adamms.checkpoints.checkpoint import open_checkpoint\n"
        "from lowmem_adamms.errors import FormatError\n"
        "try:\n"
        "    open_checkpoint(sys.argv[1])\n"
        "except FormatError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(plain) in done.stdout


# Quantized weights


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
@pytest.mark.parametrize("nested", [False, True])
def test_quantized_by_its_config(tmp_path: Path, method: str, nested: bool) -> None:
    put(tmp_path, {"model.safetensors": {"a": A}})
    quantization = {"quantization_config": {"quant_method": method, "bits": 4}}
    write_json(tmp_path / "config.json", {"text_config": quantization} if nested else quantization)
    message = refused(tmp_path)
    assert "quantized" in message
    assert f"({method})" in message


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantization_config_is_none(tmp_path: Path, value: object) -> None:
    put(tmp_path, {"model.safetensors": {"a": A}})
    write_json(tmp_path / "config.json", {"quantization_config": value})
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


@pytest.mark.parametrize(
    "suffix",
    [
        "qweight",
        "qzeros",
        "g_idx",
        "weight_scale",
        "weight_scale_inv",
        "weight.absmax",
        "weight.quant_map",
        "weight.quant_state.bitsandbytes__nf4",
        "SCB",
    ],
)
def test_quantized_by_its_tensor_names(tmp_path: Path, suffix: str) -> None:
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    put(tmp_path, {"model.safetensors": {"model.norm.weight": A, name: B}})
    message = refused(tmp_path)
    assert "quantized" in message
    assert name in message


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_quantized_by_its_dtype(tmp_path: Path, dtype: str) -> None:
    head = build_header([("w.x", DTYPES[dtype], (4,))], {})
    (tmp_path / "model.safetensors").write_bytes(head + bytes(4))
    assert f"w.x ({dtype})" in refused(tmp_path)


def test_names_that_only_look_quantized_are_fine(tmp_path: Path) -> None:
    """SCB inside a word, absmax as a module's name: no quantizer writes such."""
    fine = {"model.SCBnorm.weight": A, "model.absmax.weight": A, "model.logit_scale": B}
    assert set(open_checkpoint(put(tmp_path, {"model.safetensors": fine})).tensors) == set(fine)


# Sidecars


CARRIED = [
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "configuration_cogvlm.py",
    "generation_config.json",
    "merges.txt",
    "modeling/visual.py",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
]
LEFT = [
    "adapter_config.json",
    ".cache/huggingface/download/config.json.metadata",
    ".git/HEAD",
    ".gitattributes",
    "README.md",
    "__pycache__/modeling.cpython-311.pyc",
    "adamms.json",
    "flax_model.msgpack",
    "ggml-model.gguf",
    "modeling/__pycache__/visual.cpython-311.pyc",
    "model.fp32.safetensors",
    "model.safetensors.index.json",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/model.onnx_data_1",
    "original/consolidated.00.pth",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "report.html",
    "rng_state.pt",
    "tf_model.h5",
]


def test_sidecars_are_everything_but_weights_and_what_is_written_anew(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": {"a": A}})
    checkpoint = open_checkpoint(tmp_path)
    touch(tmp_path, *CARRIED, *LEFT)
    (tmp_path / "empty").mkdir()
    assert [str(path) for path in checkpoint.sidecars()] == CARRIED


def test_sidecars_under_a_hidden_folder_are_still_the_models(tmp_path: Path) -> None:
    """Only what is hidden inside the folder counts: ~/.cache/huggingface holds every model."""
    folder = put(tmp_path / ".cache" / "m", {"model.safetensors": {"a": A}})
    touch(folder, "tokenizer.json")
    assert [str(path) for path in open_checkpoint(folder).sidecars()] == ["tokenizer.json"]


def test_links_within_the_folder_and_into_the_hubs_cache_are_carried(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", {"model.safetensors": {"a": A}})
    touch(tmp_path / "models--org--m" / "blobs", "0123")
    (folder / "vocab.json").symlink_to("../models--org--m/blobs/0123")
    (folder / "tokenizer.json").symlink_to("vocab.json")
    (folder / "gone.json").symlink_to("../gone")
    assert [str(name) for name in open_checkpoint(folder).sidecars()] == [
        "tokenizer.json",
        "vocab.json",
    ]


@pytest.mark.parametrize("target", ["../token", "/proc/self/environ", ".git/config", "../by/token"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, target: str) -> None:
    """A cloned repository may bring any link, and its target would be copied and published."""
    folder = put(tmp_path / "m", {"model.safetensors": {"a": A}})
    touch(tmp_path, "token", "m/.git/config")
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
    checkpoint = open_checkpoint(put(tmp_path, {"model.safetensors": {"a": A}}))
    if kind == "FIFO":
        os.mkfifo(tmp_path / "NOTICE")
    else:
        (tmp_path / "NOTICE").symlink_to("/dev/zero")
    with pytest.raises(FormatError, match="NOTICE: not a regular file"):
        checkpoint.sidecars()


def test_a_sidecar_beyond_all_measure_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(put(tmp_path, {"model.safetensors": {"a": A}}))
    touch(tmp_path, "big.tar")
    os.truncate(tmp_path / "big.tar", 10**9)
    assert checkpoint.sidecars() == {Path("big.tar"): 10**9}
    os.truncate(tmp_path / "big.tar", 10**9 + 1)
    with pytest.raises(FormatError, match=r"big.tar: 1.00 GB, expected at most 1.00 GB"):
        checkpoint.sidecars()
