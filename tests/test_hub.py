"""Merging what lies on the Hub: every way gives the local merge's bytes, whatever goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from hub_server import HubServer

from lowmem_adamms import demo, hub, inputs, make_plan, merge, ranges, shards, wire
from lowmem_adamms.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.cli import main
from lowmem_adamms.errors import HubError, RecipeError
from lowmem_adamms.inputs import Fetch
from lowmem_adamms.journal import WORK

ROOT = Path(__file__).parent.parent
Pair = tuple[Path, Path]
Files = dict[str, bytes]
STREAM = Fetch(no_cache=True)
BUDGET = Fetch(disk_budget=10**9)
WAYS = {"cache": Fetch(), "no cache": STREAM, "disk budget": BUDGET}
IDS = ("org/base", "org/donor")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The demo's pair: several shards, tokenizers on both sides; a card and some code."""
    base, donor = demo.make_pair(tmp_path_factory.mktemp("pair"))
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    (base / "nested").mkdir()
    (base / "nested" / "thing [1].json").write_text("{}\n")
    return base, donor


@pytest.fixture(scope="module")
def local(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What the merge of the two folders leaves."""
    return left(merge(make_plan(*pair), 0.3, tmp_path_factory.mktemp("local") / "out"))


@pytest.fixture
def server(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with the pair on it, an empty cache, and no waiting between attempts."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(wire, "PAUSE", 0.001)
    monkeypatch.setattr(ranges, "GAP", 0)
    with HubServer() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for repo_id, folder in zip(IDS, pair, strict=True):
            server.add(repo_id, folder, revisions=("main", "v1", "refs/pr/1"))
        yield server


def left(out: Path) -> Files:
    """Every file of a merged folder but its papers, which name the inputs."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("README.md", "adamms.json")
    }


def opened(fetch: Fetch = STREAM, ids: tuple[str, str] = IDS) -> tuple[Checkpoint, Checkpoint]:
    base, donor = (open_checkpoint(ref, cache=not fetch.no_cache) for ref in ids)
    return base, donor


def streamed(tmp_path: Path, fetch: Fetch = STREAM, **options: object) -> Path:
    """A merge of the pair on the server."""
    return merge(make_plan(*opened(fetch)), 0.3, tmp_path / "out", fetch=fetch)


def overlap(stretches: list[tuple[int, int]]) -> int:
    """Bytes that are in more than one of these stretches, counted once for each further one."""
    position = twice = 0
    for start, stop in sorted(stretches):
        twice += max(0, min(stop, position) - start)
        position = max(position, stop)
    return twice


def data(server: HubServer, folder: Path, repo_id: str) -> dict[str, list[tuple[int, int]]]:
    """Of each shard, the stretches of tensor bytes that were sent since `seen` was cleared."""
    return {
        shard.name: server.served(f"{repo_id}/{shard.name}")
        for shard in sorted(folder.glob("*.safetensors"))
    }


# The same bytes


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_bytes_of_the_local_merge(
    server: HubServer, local: Files, tmp_path: Path, way: str
) -> None:
    assert left(streamed(tmp_path, WAYS[way])) == local
