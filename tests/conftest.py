"""Fixtures that several test files share; each is made once a session."""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
from command import Forker
from families import FAMILIES, write_headers
from hypothesis import HealthCheck, settings

from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    import tiny

    from lowmem_adamms import LiveModel

V = TypeVar("V")

# Where transformers copies remote code to; read when it is imported, which nothing above does.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# On a busy machine making examples may take longer than Hypothesis finds healthy
settings.register_profile(
    "shared-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared-machine")


class MadeOnce(dict[str, V]):
    """Values that are made when they are first asked for."""

    def __init__(self, make: Callable[[str], V]) -> None:
        self._make = make

    def __missing__(self, name: str) -> V:
        self[name] = self._make(name)
        return self[name]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """PyTorch, where a test file uses it, on one thread: faster for what is this small."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def true_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Every family, opened from a folder of true-size headers without data."""
    root = tmp_path_factory.mktemp("true-size")

    def make(name: str) -> Checkpoint:
        write_headers(root / name, FAMILIES[name])
        return open_checkpoint(root / name)

    return MadeOnce(make)


@pytest.fixture(scope="session")
def ancestors() -> dict[str, tiny.Tensors]:
    """One tiny random language model for each line of descent."""
    import tiny

    return MadeOnce(tiny.ancestor)


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

    root = tmp_path_factory.mktemp("tiny")
    return MadeOnce(
        lambda family: tiny.make(family, root / family, ancestor=ancestors[tiny.line_of(family)])
    )


@pytest.fixture(scope="session")
def talking(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]
) -> dict[str, Path]:
    """The tiny models with tokenizer, processor and remote code. Read only."""
    import talk

    root = tmp_path_factory.mktemp("talking")
    return MadeOnce(lambda family: talk.complete(tiny_models[family], root / family))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three image files."""
    import talk

    return talk.draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """Runs commands that are killed."""
    with Forker() as forker:
        yield forker


Talkers = Callable[[str], "LiveModel"]


@pytest.fixture(scope="session")
def talker(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_models: dict[str, Path],
    talking: dict[str, Path],
    ancestors: dict[str, tiny.Tensors],
) -> Iterator[Talkers]:
    """Gives a family's live model in float32, loaded at the first call; shared: apply an alpha."""
    import talk
    import tiny

    loaded: list[LiveModel] = []

    @functools.cache
    def load(family: str) -> LiveModel:
        if family in talk.DONORS:
            donor = tiny_models[talk.DONORS[family]]
        else:
            folder = tmp_path_factory.mktemp("sibling")
            donor = tiny.make(family, folder, ancestor=ancestors[tiny.line_of(family)], seed=2)
        loaded.append(talk.load(talking[family], donor))
        return loaded[-1]

    yield load
    for live in loaded:
        live.close()


@pytest.fixture
def hide_package(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package look as if it were not installed.

    transformers is imported before: it looks once, at its import, for what is installed.
    """

    def hide(name: str) -> None:
        importlib.import_module("transformers")
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda asked, *rest: None if asked == name else find_spec(asked, *rest),
        )
        monkeypatch.setitem(sys.modules, name, None)

    return hide
