"""A checkpoint: a folder, a file or a Hub id, opened by the headers of its weight files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, HubError
from ..hub import repository as hub
from ..hub.remote_file import PARALLEL_REQUESTS, RemoteFile
from ..values import format_size
from . import torch_bin
from .adapter import read_adapter
from .quantized import check_method, dequantize, find_settings
from .safetensors_header import MAX_HEADER_BYTES, Header, parse_header, read_header
from .span import Span
from .weight_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    WeightFiles,
    check_own_file,
    choose_weight_files,
    explain_missing_weights,
    find_weight_files,
    is_sidecar,
    read_json_object,
)

MAX_SIDECAR_BYTES = 10**9
_FIRST_READ = 1 << 17  # bytes of a remote file that hold nearly every header
_LANGUAGE_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
"""What the part of a config about the language model may be called; language_config is Janus's."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Every tensor of a checkpoint as a span, in the order of its shards and of their bytes.

    repo: the repository it comes from; then its shards may be on the Hub only (`remote_files`).
    is_adapter: it is what a LoRA adapter adds to another one.
    """

    path: Path
    shards: tuple[Path, ...]
    tensors: Mapping[str, Span]
    config: Mapping[str, Any]
    repo: hub.Repository | None = None
    is_adapter: bool = False

    @property
    def ref(self) -> str:
        """What opens it again: `org/name@sha`, or its absolute path."""
        return self.repo.ref if self.repo else str(self.path.resolve())

    @property
    def public_ref(self) -> str:
        """What tells nothing of this machine: `org/name@sha`, or the folder's or file's name."""
        if self.repo:
            return self.repo.ref
        path = self.path.absolute()
        cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$", path.as_posix())
        return f"{cached[1]}/{cached[2]}@{cached[3]}" if cached else path.name

    @property
    def folder(self) -> Path | None:
        """Where its sidecars lie; None for a bare file."""
        return self.path if self.path.is_dir() else None

    @property
    def name(self) -> str:
        """`org/name` where the path or the config tells it, else the folder's or file's name.

        The config's `_name_or_path` is what was loaded before it was saved: of a fine-tune, its
        parent. It is believed only where the folder bears the same name.
        """
        if self.repo:
            return self.repo.id
        for part in self.path.absolute().parts:
            if part.startswith("models--"):  # a repository in the Hub's cache
                return part.removeprefix("models--").replace("--", "/", 1)
        own_name, loaded_from = self.path.absolute().name, self.config.get("_name_or_path")
        if isinstance(loaded_from, str):
            repo_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/([\w.-]+)", loaded_from)
            if repo_id and repo_id[1] == own_name:
                return loaded_from
        return own_name

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How its config says that it is quantized."""
        settings = find_settings(self.config)
        return settings if isinstance(settings, dict) and settings else None

    def require_loadable(self, purpose: str) -> Path:
        """Its folder, from which a library loads it to be `purpose`; FormatError if none can."""
        if self.folder is None:
            raise FormatError(f"{self.path}: a bare file cannot be {purpose}; give its folder")
        if self.quantization:
            raise FormatError(
                f"{self.path}: a quantized base cannot be {purpose}; merge it at alpha 0, which"
                " writes it in bf16, and take that as the base"
            )
        return self.folder

    def identity(self) -> list[Any]:
        """Plain data that distinguishes its weights, as they are now, from any others."""
        if self.repo:
            return [self.ref, [shard.name for shard in self.shards]]
        stats = [(shard, shard.stat()) for shard in self.shards]
        return [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    @property
    def config_levels(self) -> list[Mapping[str, Any]]:
        """Its config, and the parts of it that are about the language model, outermost first."""
        levels = [self.config]
        outer = _language_configs(self.config)
        levels += outer
        for level in outer:
            levels += _language_configs(level)
        return levels

    @property
    def tied_flags(self) -> list[bool]:
        """What its config says of tying the head to the embedding, level by level."""
        flags = (level.get("tie_word_embeddings") for level in self.config_levels)
        return [flag for flag in flags if isinstance(flag, bool)]

    @property
    def tied(self) -> bool | None:
        """Whether its config ties the head to the embedding at any level; None if it does not say.

        The outer config of llava-hf/llava-onevision-qwen2-0.5b-ov-hf says no and the language
        model's yes, and transformers ties.
        """
        return any(self.tied_flags) if self.tied_flags else None

    def remote_files(self) -> dict[Path, RemoteFile]:
        """The shards that are not on this disk now."""
        return self.repo.missing(self.shards) if self.repo else {}

    def sidecars(self) -> dict[Path, int]:
        """Relative path and size in bytes of the files of the model that hold no weights.

        FormatError for one that is larger than MAX_SIDECAR_BYTES, a link out of the folder, or no
        regular file.
        """
        sizes: dict[Path, int] = {}
        if self.repo and self.repo.files:
            sizes = {Path(name): file.size for name, file in sorted(self.repo.files.items())}
        elif self.folder:
            for path in sorted(self.folder.rglob("*")):
                relative = path.relative_to(self.folder)
                if path.exists() and not path.is_dir() and is_sidecar(relative):
                    check_own_file(path, self.folder)
                    sizes[relative] = path.stat().st_size
        sizes = {path: size for path, size in sizes.items() if is_sidecar(path)}
        for path, size in sizes.items():
            if size > MAX_SIDECAR_BYTES:
                raise FormatError(
                    f"{self.path / path}: {format_size(size)}, expected at most"
                    f" {format_size(MAX_SIDECAR_BYTES)} of a file without weights; merge a copy of"
                    " the folder without it"
                )
        return sizes

    def fetch_sidecars(self) -> None:
        """Download those sidecars that do not lie in its folder."""
        if self.repo and self.repo.files:
            hub.fetch_files(self.repo, map(str, self.sidecars()))

    def download(self, *, bars: bool = False) -> None:
        """Download everything that does not lie in its folder. bars: show progress."""
        if self.repo:
            self.fetch_sidecars()
            hub.download(self.repo, self.shards, progress_bars=bars)


def _language_configs(level: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    configs = (level.get(name) for name in _LANGUAGE_CONFIGS)
    return [config for config in configs if isinstance(config, dict)]


def open_checkpoint(
    ref: str | Path | Checkpoint,
    *,
    cache: bool = True,
    download_bins: bool = False,
    as_stored: bool = False,
) -> Checkpoint:
    """Open a folder, a bare file or `org/name[@revision]` by its headers.

    What exists on disk is never looked for on the Hub. A checkpoint that is open is returned as it
    is. FormatError for a file that is missing, damaged, or of a kind that cannot be merged.

    cache: keep the small files of a Hub id in the ordinary cache. download_bins: download a
    repository that holds only .bin files, whose tensors cannot be located otherwise. as_stored:
    leave quantized weights, of whatever kind, as they are, to look at them.
    """
    if isinstance(ref, Checkpoint):
        return ref
    path = Path(ref)
    repo = None
    if not path.exists():
        repo_id = hub.parse_repo_id(str(ref))
        if repo_id is None:
            raise FormatError(f"{ref}: no such folder or file{_hint_at_repo(str(ref))}")
        repo = hub.open_repository(*repo_id, cache=cache)
        path = repo.folder
    config_path = path / "config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    if not as_stored:
        check_method(path, config)
    if repo and repo.files:
        shards, weight_map = _repo_weight_files(repo, download_bins)
    else:
        shards, weight_map = find_weight_files(path)
        for shard in shards if path.is_dir() else ():
            check_own_file(shard, path)
    headers = _read_remote_headers(repo.missing(shards)) if repo else {}
    tensors = _read_tensors(path, shards, headers, weight_map)
    is_adapter = shards[0].name == ADAPTER_WEIGHTS and path.is_dir()
    if is_adapter:
        config = read_json_object(path / ADAPTER_CONFIG)
        tensors = read_adapter(path, config, tensors)
    elif all(name.startswith("base_model.model.") for name in tensors):
        raise FormatError(f"{path}: holds {ADAPTER}")
    if not as_stored:
        tensors = dequantize(path, tensors)
    return Checkpoint(path, tuple(shards), tensors, config, repo, is_adapter)


def _hint_at_repo(text: str) -> str:
    """How a repository is named that was probably meant; empty if none was."""
    url = re.match(r"(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/+([^/?#]+/[^/?#]+)", text)
    if url:
        return f"; give a model of the Hub as {url[1]}"
    is_file = text.endswith((".safetensors", ".bin", ".gguf", ".json"))
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*", text) and not is_file:
        return f"; a model of the Hub is called org/name, here org/{text}"
    return ""


def _repo_weight_files(repo: hub.Repository, download_bins: bool) -> WeightFiles:
    """The weight files of a repository, by the names it lists."""
    files = choose_weight_files(repo.folder, repo.files)
    if files is None:
        names = [name for name in repo.files if "/" not in name]  # a Hub id names no folder in it
        raise HubError(f"{repo.ref}: {explain_missing_weights(sorted(names))}")
    paths, _ = files
    if any(path.suffix != ".safetensors" for path in paths) and repo.missing(paths):
        if not download_bins:
            raise HubError(
                f"{repo.ref}: holds .bin files only, which cannot be read by ranges: merge them"
                f" by way of the cache, or first: hf download {repo.id} --revision {repo.sha}"
            )
        hub.download(repo, paths)
    return files


def _read_remote_headers(files: Mapping[Path, RemoteFile]) -> dict[Path, Header]:
    """The safetensors header of each file on the Hub, by ranges, several at once."""
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return dict(zip(files, pool.map(_read_remote_header, files.values()), strict=True))


def _read_remote_header(file: RemoteFile) -> Header:
    """One header: a request for what nearly always holds it, another for what is beyond."""
    raw = file.read(0, min(file.size, _FIRST_READ))
    length = int.from_bytes(raw[:8], "little")
    name = f"{file.repo_id}: {file.name}"
    if len(raw) < 8 or 8 + length > file.size or length > MAX_HEADER_BYTES:
        raise FormatError(f"{name}: not a safetensors file, or a damaged one")
    if len(raw) < 8 + length:
        raw += file.read(len(raw), 8 + length)
    file.header = raw[: 8 + length]
    try:
        return parse_header(file.header[8:], file.size)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None


def _read_tensors(
    path: Path,
    shards: Sequence[Path],
    headers: Mapping[Path, Header],
    weight_map: Mapping[str, str],
) -> dict[str, Span]:
    """Every tensor of all shards, each where the index, if there is one, says it is."""
    tensors: dict[str, Span] = {}
    for shard in shards:
        for name, span in _read_spans(shard, headers.get(shard)):
            if name in tensors:
                first = tensors[name].path.name
                raise FormatError(f"{path}: tensor {name} is in {first} and {shard.name}")
            tensors[name] = span
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise FormatError(f"{path}: the index says {name} is in {file}; it is not there")
    if not tensors:
        raise FormatError(f"{path}: no tensors in it")
    return tensors


def _read_spans(shard: Path, header: Header | None) -> Iterator[tuple[str, Span]]:
    """Name and span of every tensor of one weight file; header: if it was read already."""
    if shard.suffix in (".bin", ".pt", ".pth"):
        yield from torch_bin.read_spans(shard)
        return
    for info in (header or read_header(shard)).tensors:
        yield info.name, Span(shard, info.dtype, info.start, info.stop, info.shape)
