"""Which files of a folder or repository hold the weights, and which others belong to the model."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..values import format_size

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
MAX_JSON_BYTES = 32 << 20
"""The index of a model of 10**12 parameters takes half of that; parsing takes 20 times its size."""
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".ot"),
    *(".h5", ".msgpack", ".gguf", ".npz", ".tflite", ".pkl", ".pdparams", ".distcp"),
)
_NO_WEIGHTS = frozenset({"spk_dict.pt"})
"""Files that look like weights and are not: Qwen2.5-Omni does not load without its speakers."""
_OTHERS_OWN = frozenset({"README.md", "adamms.json", "report.html", "answers.jsonl"})
"""Files of a checkpoint folder that describe that checkpoint only and are written anew."""
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.(?:safetensors|bin)$")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = "a LoRA adapter: merge it into its model first (peft's merge_and_unload) and save that"

WeightFiles = tuple[list[Path], dict[str, str]]
"""The files in order, and the index's map of tensor to file name, empty without an index."""


def find_weight_files(path: Path) -> WeightFiles:
    """The weight files of a folder, or of a bare file. FormatError if there are none."""
    if path.is_file():
        if (shard := _SHARD.search(path.name)) and int(shard[1]) > 1:
            raise FormatError(f"{path}: one of {int(shard[1])} shards; give the folder they are in")
        if path.suffix == ".gguf":
            raise FormatError(
                f"{path}: a GGUF file; take the safetensors files that it was made from"
            )
        if path.name.endswith(".json"):
            raise FormatError(f"{path}: holds no weights; give the folder it is in")
        return [path], {}
    files = choose_weight_files(path, {file.name for file in path.glob("*") if file.is_file()})
    if files is None:
        names: list[str] = []
        for depth in ("*", "*/*"):
            names += sorted(file.relative_to(path).as_posix() for file in path.glob(depth))
        raise FormatError(f"{path}: {explain_missing_weights(names)}")
    return files


def choose_weight_files(folder: Path, names: Collection[str]) -> WeightFiles | None:
    """The weight files among the names of a folder's files; None if there are none."""
    for index, single in zip(INDEXES, SINGLES, strict=True):
        if index in names:
            weight_map = _read_weight_map(folder / index, names)
            return [folder / name for name in sorted(set(weight_map.values()))], weight_map
        if single in names:
            return [folder / single], {}
    if ADAPTER_WEIGHTS in names and ADAPTER_CONFIG in names:
        return [folder / ADAPTER_WEIGHTS], {}
    lone = [name for name in names if _is_whole_model(name)]
    return ([folder / lone[0]], {}) if len(lone) == 1 else None


def _is_whole_model(name: str) -> bool:
    """Whether a file may hold a whole model, under whatever name."""
    return name.endswith(".safetensors") and "/" not in name and not name.startswith("adapter_")


def explain_missing_weights(names: Sequence[str]) -> str:
    """What to tell the user about a folder without weights that can be read.

    names: relative paths of what lies there instead.
    """
    missing = f"no {SINGLES[0]}, no {INDEXES[0]} and no {SINGLES[1]} in it"
    if several := sum(map(_is_whole_model, names)):
        return (
            f"{missing}; found {several} other .safetensors files: get the index that tells which"
            " tensor is in which, or name the one file that holds the whole model"
        )
    for name in names:
        if name.startswith("adapter_model."):
            return f"{missing}; found {name}, {ADAPTER}"
        if name.endswith(".gguf"):
            return (
                f"{missing}; found {name}: take the safetensors files that the GGUF was made from"
            )
    if cached := [name for name in names if name.startswith("snapshots/")]:
        return (
            f"{missing}; this is a repository in the Hub's cache: give its org/name, or the folder"
            f" {'/'.join(cached[-1].split('/')[:2])} in it"
        )
    deeper = {name.partition("/")[0] for name in names if name.endswith((*SINGLES, *INDEXES))}
    if folders := sorted(deeper):
        more = ", …" if len(folders) > 3 else ""
        return f"{missing}; found weights one folder deeper: give {', '.join(folders[:3])}{more}"
    return f"{missing}, nor other weights that can be read"


def _read_weight_map(index: Path, names: Collection[str]) -> dict[str, str]:
    """The index's map of tensor to file, every file one of `names`."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: no weight_map in it")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise FormatError(f"{index}: {tensor} is said to be in {file!r}, outside the folder")
        if file not in names:
            raise FormatError(f"{index}: {file} is missing beside it (it holds {tensor})")
    return weight_map


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of MAX_JSON_BYTES at most; FormatError names the file."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise FormatError(
            f"{path}: {format_size(size)}, expected at most {format_size(MAX_JSON_BYTES)} of JSON"
        )
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return document


def check_own_file(path: Path, folder: Path) -> None:
    """Raise FormatError for a device, FIFO or socket, or a link that leads out of the folder.

    A cloned repository keeps its links, and what they lead to would be copied into the output. Out
    of the folder may lead only those that the Hub's cache consists of.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise FormatError(f"{path}: not a regular file; remove it")
    if not path.is_symlink():
        return
    target, home = path.resolve(), folder.resolve()
    is_blob = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    is_inside = target.is_relative_to(home) and is_visible(target.relative_to(home))
    if not (is_blob or is_inside):
        raise FormatError(
            f"{path}: links to {target}, expected a file in {folder} or in the Hub's cache; replace"
            " the link by the file if it belongs to the model, else remove it"
        )


def is_visible(relative: Path) -> bool:
    """Whether a file of a folder lies under no hidden name, such as .git."""
    return not any(part.startswith((".", "__pycache__")) for part in relative.parts)


def is_sidecar(relative: Path) -> bool:
    """Whether a file of a checkpoint's folder is copied along with the merged weights."""
    if not is_visible(relative):
        return False
    # ONNX weights may also lie in model.onnx_data_1 and so on
    is_weights = relative.suffix in _WEIGHT_SUFFIXES or relative.suffix.startswith(".onnx")
    if is_weights and str(relative) not in _NO_WEIGHTS:
        return False
    if relative.name.endswith(".index.json"):
        return False
    # transformers would load the model that an adapter's config names instead
    return relative.name != ADAPTER_CONFIG and str(relative) not in _OTHERS_OWN
