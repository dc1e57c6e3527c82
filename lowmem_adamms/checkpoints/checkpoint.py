"""A checkpoint: folder, file or Hub id -> shards -> spans. Headers only; bytes are read elsewhere.

Safetensors files are read by `header.py`. `pytorch_model*.bin` goes through torch's restricted
unpickler onto the meta device, which executes no code of the file's and reads no tensor, but tells
where each tensor's bytes lie; from there on a .bin is streamed like any other file.
Of a Hub id the headers are read by ranges. Leaves to others: what the names mean (`arch.py`),
reading data (`stream.py`), repositories (`hub.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, HubError
from ..hub import repository as hub
from ..hub.remote_file import RemoteFile
from . import torch_bin
from .safetensors_header import Header, read_header
from .span import Span

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".ot"),
    *(".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".tflite", ".pkl", ".pdparams", ".distcp"),
)
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.(?:safetensors|bin)$")
_ADAPTER = "a LoRA adapter: merge it into its model first (peft's merge_and_unload) and save that"
OURS = frozenset({"README.md", "adamms.json", "report.html", "answers.jsonl"})
"""Files of a checkpoint folder that describe that checkpoint only and are written anew."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Every tensor of a checkpoint as a span, in the order of its shards and of their bytes.

    repo: the repository it comes from; then shards need not lie on this disk (see `remote_files`).
    """

    path: Path
    shards: tuple[Path, ...]
    tensors: Mapping[str, Span]
    config: Mapping[str, Any]
    repo: hub.Repo | None = None

    @property
    def ref(self) -> str:
        """What opens it again: `org/name@sha`, or its absolute path."""
        return self.repo.ref if self.repo else str(self.path.resolve())

    def identity(self) -> list[Any]:
        """Plain data that tells its weights, as they are now, from any others."""
        if self.repo:
            return [self.ref, [shard.name for shard in self.shards]]
        stats = [(shard, shard.stat()) for shard in self.shards]
        return [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def remote_files(self) -> dict[Path, RemoteFile]:
        """The shards that are not on this disk now."""
        return self.repo.missing(self.shards) if self.repo else {}

    @property
    def folder(self) -> Path | None:
        """Where its sidecars lie; None for a bare file."""
        return self.path if self.path.is_dir() else None

    @property
    def name(self) -> str:
        """`org/name` where path and config tell it, else the folder's or file's name.

        The config's `_name_or_path` is what was loaded before it was saved: of a fine-tune, its
        parent. It is believed only where the folder bears the same name.
        """
        if self.repo:
            return self.repo.id
        for part in self.path.absolute().parts:
            if part.startswith("models--"):  # a repository in the Hub's cache
                return part.removeprefix("models--").replace("--", "/", 1)
        own, spoken = self.path.absolute().name, self.config.get("_name_or_path")
        if isinstance(spoken, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", spoken):
            return spoken if spoken.rpartition("/")[2] == own else own
        return own

    @property
    def tied_flags(self) -> list[bool]:
        """What its config says of tying the head to the embedding, level by level."""
        said = (level.get("tie_word_embeddings") for level in self.config_levels)
        return [tied for tied in said if isinstance(tied, bool)]

    @property
    def tied(self) -> bool | None:
        """Whether its config ties the head to the embedding at any level; None if it does not say.

        Of llava-hf/llava-onevision-qwen2-0.5b-ov-hf the outer config says no and the language
        model's yes, and transformers ties.
        """
        return any(self.tied_flags) if self.tied_flags else None

    @property
    def config_levels(self) -> list[Mapping[str, Any]]:
        """Its config, and the parts of it that are about the language model, outermost first."""
        outer = _language_configs(self.config)
        return [
            self.config,
            *outer,
            *(inner for level in outer for inner in _language_configs(level)),
        ]

    def sidecars(self) -> Iterator[Path]:
        """Relative paths of the files that belong to the model but hold no weights."""
        if self.repo and self.repo.files:
            yield from (Path(name) for name in sorted(self.repo.files) if _is_sidecar(Path(name)))
            return
        for path in sorted(self.folder.rglob("*")) if self.folder else ():
            relative = path.relative_to(self.path)
            if path.is_file() and _is_sidecar(relative):
                yield relative

    def fetch_sidecars(self) -> None:
        """Have them lie in its folder, if they do not."""
        if self.repo and self.repo.files:
            hub.fetch(self.repo, map(str, self.sidecars()))

    def download(self, *, bars: bool = False) -> None:
        """Have everything of it lie in its folder. bars: show progress."""
        if self.repo:
            self.fetch_sidecars()
            hub.download(self.repo, self.shards, bars=bars)


_LANGUAGE = ("text", "llm", "language", "thinker")
"""What the part of a config about the language model may be called; language_config is Janus's."""


def _language_configs(level: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = (level.get(f"{name}_config") for name in _LANGUAGE)
    return [config for config in inner if isinstance(config, dict)]


def _is_sidecar(relative: Path) -> bool:
    """Whether a file of a checkpoint folder is copied beside the merged weights."""
    hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
    # Of ONNX the weights may lie beside the graph, as model.onnx_data or model.onnx_data_1
    weights = relative.suffix in WEIGHT_SUFFIXES or relative.suffix.startswith(".onnx")
    weights = weights or relative.name.endswith(".index.json")
    # With this beside the weights transformers would load the model that it names instead
    adapter = relative.name == "adapter_config.json"
    return not (hidden or weights or adapter or str(relative) in OURS)


def open_checkpoint(
    ref: str | Path,
    *,
    cache: bool = True,
    download_bins: bool = False,
    allow_quantized: bool = False,
) -> Checkpoint:
    """Open a folder, a bare file or `org/name[@revision]` by its headers.

    What exists on disk is never looked for on the Hub.

    Args:
        ref: Where the checkpoint is.
        cache: Keep the small files of a Hub id in the ordinary cache.
        download_bins: Download a repository that holds only .bin files, whose tensors cannot be
            located otherwise.
        allow_quantized: Open quantized weights as well, to look at them; they cannot be blended.

    Raises:
        FormatError: A file is missing, damaged, or not of a kind that can be merged.
        HubError: The repository cannot be read.

    """
    path = Path(ref)
    repo = None
    if not path.exists():
        asked = hub.parse(str(ref))
        if asked is None:
            raise FormatError(f"{ref}: no such folder or file")
        repo = hub.find(*asked, cache=cache)
        path = repo.folder
    config = _read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if not allow_quantized:
        _refuse_quantized_config(path, config)
    names, weight_map = _hub_shards(repo, download_bins) if repo and repo.files else _shards(path)
    headers = hub.headers(repo.missing(names)) if repo else {}
    tensors: dict[str, Span] = {}
    home: dict[str, Path] = {}
    for shard in names:
        for name, span in _spans(shard, headers.get(shard)):
            if name in home:
                raise FormatError(f"{path}: tensor {name} is in {home[name].name} and {shard.name}")
            tensors[name], home[name] = span, shard
    for name, file in weight_map.items():
        if name not in home or home[name].name != file:
            raise FormatError(f"{path}: the index says {name} is in {file}; it is not there")
    if not tensors:
        raise FormatError(f"{path}: no tensors in it")
    if all(name.startswith("base_model.model.") for name in tensors):  # as peft's save_pretrained
        raise FormatError(f"{path}: holds {_ADAPTER}")
    if not allow_quantized:
        _refuse_quantized_tensors(path, tensors)
    return Checkpoint(path, tuple(names), tensors, config, repo)


def _shards(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a checkpoint in order, and the index's weight map if there is one."""
    if path.is_file():
        if (shard := _SHARD.search(path.name)) and int(shard[1]) > 1:
            raise FormatError(f"{path}: one of {int(shard[1])} shards; give the folder they are in")
        if path.name.endswith(".json"):
            raise FormatError(f"{path}: holds no weights; give the folder it is in")
        return [path], {}
    if found := _chosen(path, {file.name for file in path.glob("*") if file.is_file()}):
        return found
    names: list[str] = []
    for depth in ("*", "*/*"):
        names += sorted(file.relative_to(path).as_posix() for file in path.glob(depth))
    raise FormatError(f"{path}: {_lacks_weights(names)}")


def _chosen(folder: Path, listed: Collection[str]) -> tuple[list[Path], dict[str, str]] | None:
    """Of the files there are, those of the weights and the index's map; None if there are none."""
    for index, single in zip(INDEXES, SINGLES, strict=True):
        if index in listed:
            weight_map = _weight_map(folder / index, listed)
            return [folder / name for name in sorted(set(weight_map.values()))], weight_map
        if single in listed:
            return [folder / single], {}
    lone = [name for name in listed if _is_plain(name)]  # whatever it is called
    return ([folder / lone[0]], {}) if len(lone) == 1 else None


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and not name.startswith("adapter_")


def _lacks_weights(names: Sequence[str]) -> str:
    """What to say of a folder without weights that can be read, and of what lies there instead."""
    said = f"no {SINGLES[0]}, no {INDEXES[0]} and no {SINGLES[1]} in it"
    if several := sum(map(_is_plain, names)):
        return (
            f"{said}; found {several} other .safetensors files: get the index that tells which"
            " tensor is in which, or name the one file that holds the whole model"
        )
    for name in names:
        if name.startswith("adapter_model."):
            return f"{said}; found {name}, {_ADAPTER}"
        if name.endswith(".gguf"):
            return f"{said}; found {name}: take the safetensors files that the GGUF was made from"
    inside = {name.partition("/")[0] for name in names if name.endswith((*SINGLES, *INDEXES))}
    if folders := sorted(inside):
        more = ", …" if len(folders) > 3 else ""
        return f"{said}; found weights one folder deeper: give {', '.join(folders[:3])}{more}"
    return f"{said}, nor other weights that can be read"


def _hub_shards(repo: hub.Repo, bins: bool) -> tuple[list[Path], dict[str, str]]:
    """The same of a repository, by the names it lists."""
    found = _chosen(repo.folder, repo.files)
    if found is None:
        there = [name for name in repo.files if "/" not in name]  # a Hub id names no folder in it
        raise HubError(f"{repo.ref}: {_lacks_weights(sorted(there))}")
    paths, _ = found
    if any(path.suffix != ".safetensors" for path in paths) and repo.missing(paths):
        if not bins:
            raise HubError(
                f"{repo.ref}: holds .bin files only, which cannot be read by ranges: merge them"
                f" by way of the cache, or first: hf download {repo.id} --revision {repo.sha}"
            )
        hub.download(repo, paths)
    return found


def _weight_map(index: Path, listed: Collection[str]) -> dict[str, str]:
    """The index's map of tensor to file, every file a plain name of those that are listed."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: no weight_map in it")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise FormatError(f"{index}: {name} is said to be in {file!r}, outside the folder")
        if file not in listed:
            raise FormatError(f"{index}: {file} is missing beside it (it holds {name})")
    return weight_map


def _spans(shard: Path, known: Header | None) -> Iterator[tuple[str, Span]]:
    """Name and span of every tensor of one weight file; known: its header, if it was read."""
    if shard.suffix in (".bin", ".pt", ".pth"):
        yield from torch_bin.read_spans(shard)
        return
    for info in (known or read_header(shard)).tensors:
        yield info.name, Span(shard, info.dtype, info.start, info.stop, info.shape)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FormatError names the file."""
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return document


def _refuse_quantized_config(path: Path, config: Mapping[str, Any]) -> None:
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    quantization = config.get("quantization_config") or inner
    if quantization:
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        _refuse_quantized(path, f"config.json has a quantization_config ({method})")


_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|quant_state\.\w+|SCB|weight_scale(_inv)?)$"
)


def _refuse_quantized_tensors(path: Path, tensors: Mapping[str, Span]) -> None:
    """GPTQ, AWQ, bitsandbytes and FP8 block scales betray themselves by their tensor names."""
    for name, span in tensors.items():
        if _QUANTIZED.search(name) or span.dtype.name.startswith("F8_"):
            _refuse_quantized(path, f"tensor {name} ({span.dtype.name})")


def _refuse_quantized(path: Path, sign: str) -> None:
    raise FormatError(
        f"{path}: quantized weights cannot be blended: {sign}; expected bf16, fp16 or fp32."
        " Merge the unquantized checkpoint and quantize the result"
    )
