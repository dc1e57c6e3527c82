"""Fixtures that several test files share; each is made once a session."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from families import FAMILIES, write_headers
from hypothesis import settings

from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    import tiny

    from lowmem_adamms import LiveModel

# Where transformers copies remote code to; read when it is imported, which nothing above does.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

TINY_LINES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "cogvlm": "llama",
    "mplug_owl2": "llama",
}


@pytest.fixture(scope="session")
def true_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Every family of families.py, opened from a folder of true-size headers without data."""
    root = tmp_path_factory.mktemp("true-size")
    for name, family in FAMILIES.items():
        write_headers(root / name, family)
    return {name: open_checkpoint(root / name) for name in FAMILIES}


@pytest.fixture(scope="session")
def ancestors() -> dict[str, tiny.Tensors]:
    """One tiny random language model for each line of descent."""
    import tiny

    return {kind: tiny.ancestor(kind) for kind in tiny.KINDS}


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random Qwen2-VL and a random LLaVA-OneVision, in several shards. Read only."""
    import random_pair

    return random_pair.make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def tiny_models(
    tmp_path_factory: pytest.TempPathFactory, ancestors: dict[str, tiny.Tensors]
) -> dict[str, Path]:
    """A tiny real checkpoint of every family, all of a line from one ancestor. Read only."""
    import tiny

    return tiny.make_all(tmp_path_factory.mktemp("tiny"), TINY_LINES, ancestors)


class Talkers(Protocol):
    """Gives a family's live model, loaded at the first call."""

    def __call__(self, family: str) -> LiveModel: ...


@pytest.fixture(scope="session")
def talking(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> dict[str, Path]:
    """The tiny models with tokenizer, processor and remote code. Read only."""
    import talk

    root = tmp_path_factory.mktemp("talking")
    return {
        family: talk.complete(tiny_models[family], root / family)
        for family in (*talk.DONORS, "mistral")
    }


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three image files."""
    import talk

    return talk.draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def talker(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_models: dict[str, Path],
    talking: dict[str, Path],
    ancestors: dict[str, tiny.Tensors],
) -> Iterator[Talkers]:
    """A pair's live model in float32 for every family that talks; shared, so apply an alpha."""
    import talk
    import tiny

    loaded: dict[str, LiveModel] = {}

    def load(family: str) -> LiveModel:
        if family not in loaded:
            if family in talk.DONORS:
                donor = tiny_models[talk.DONORS[family]]
            else:
                folder = tmp_path_factory.mktemp("sibling")
                donor = tiny.make_mistral(folder, ancestor=ancestors[family], seed=2)
            loaded[family] = talk.load(talking[family], donor)
        return loaded[family]

    yield load
    for live in loaded.values():
        live.close()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: faster for what is this small, beside other tests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
