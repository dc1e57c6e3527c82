"""Options together: quantizing, alphas by layer, recipes, inputs from the Hub, pushing to it.

Each pair of them gives the bytes that they give one after the other, or from local folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Forker, run
from hub_server import TOKEN, HubServer, use

from lowmem_adamms import make_plan, merge
from lowmem_adamms.merging.journal import WORK
from lowmem_adamms.quantizing.quantized_layout import Method

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

IDS = ("org/base", "org/donor")
REPO = "lab/merged"
ALPHAS = "0.1,0.5"
METHODS: tuple[Method, ...] = ("nf4", "int8")
WAYS = {"cache": (), "no cache": ("--no-cache",)}
# huggingface_hub's own use of httpx2
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
Files = dict[str, bytes]
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tiny_models: dict[str, Path]) -> Pair:
    return tiny_models["qwen2_vl"], tiny_models["llava_onevision"]


@pytest.fixture(scope="module")
def plain(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a merge at ALPHAS by layer is without --quantize. Read only."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert run(*pair, "-o", out, "--alpha-layers", ALPHAS) == 0
    return out


@pytest.fixture(scope="module")
def quantized(pair: Pair, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """That, quantized afterwards: test_quantized.py shows these to be transformers' bytes."""
    root, plan = tmp_path_factory.mktemp("quantized"), make_plan(plain, pair[1])
    return {method: merge(plan, 0, root / method, quantize=method) for method in METHODS}


@pytest.fixture
def server(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with the pair on it, and no waiting between attempts."""
    with HubServer() as server:
        use(server, monkeypatch, tmp_path)
        for repo_id, folder in zip(IDS, pair, strict=True):
            server.add(repo_id, folder, "v1")
        yield server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that takes uploads."""
    with HubServer() as server:
        use(server, monkeypatch, tmp_path, TOKEN)
        yield server


def weights(folder: Path) -> Files:
    """Shards and index of a complete merge."""
    assert not (folder / WORK).exists()
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


def assert_pushed(hub: HubServer, out: Path) -> None:
    """The repository holds the folder, from one commit."""
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2
    ours = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert repo.contents == ours


# Quantized


@pytest.mark.parametrize("method", METHODS)
def test_alphas_by_layer_are_quantized(
    method: Method, pair: Pair, plain: Path, quantized: dict[str, Path], tmp_path: Path
) -> None:
    words = (*pair, "-o", tmp_path / "out", "--alpha-layers", ALPHAS, "--quantize", method)
    assert run(*words) == 0
    assert weights(tmp_path / "out") == weights(quantized[method])
    recipes = [json.loads((out / "adamms.json").read_bytes()) for out in (tmp_path / "out", plain)]
    assert recipes[0]["alphas"] == recipes[1]["alphas"]
    assert run("verify", tmp_path / "out", "--deep") == 0


@pytest.mark.parametrize(("way", "method"), [*((way, "nf4") for way in WAYS), ("no cache", "int8")])
def test_what_comes_from_the_hub_is_quantized(
    server: HubServer, quantized: dict[str, Path], tmp_path: Path, way: str, method: Method
) -> None:
    words = (*IDS, "-o", tmp_path / "out", "--alpha-layers", ALPHAS, "--quantize", method)
    assert run(*words, *WAYS[way]) == 0
    assert weights(tmp_path / "out") == weights(quantized[method])
    stored = [path for path in tmp_path.rglob("*.safetensors") if path.parent != tmp_path / "out"]
    assert bool(stored) == (way == "cache")
    assert server.sent(".safetensors") > 0


def test_killed_while_it_quantizes_from_the_hub_it_resumes(
    server: HubServer, quantized: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [*IDS, "-o", str(out), "--alpha-layers", ALPHAS, "--quantize", "nf4", "--no-cache"]
    places = {"HF_ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
    with Forker(places | {"HF_HUB_OFFLINE": "0"}) as forker:
        forker.run_until_killed(words)
    assert any((out / WORK).iterdir())
    server.seen.clear()
    assert run(*words) == 0
    assert weights(out) == weights(quantized["nf4"])
    again = server.sent(".safetensors")
    server.seen.clear()
    assert run(*words[:2], "-o", tmp_path / "fresh", *words[4:]) == 0
    assert again < server.sent(".safetensors")


# Recipes


@pytest.mark.parametrize("way", ["cache", "no cache"])
@pytest.mark.parametrize("method", [None, "nf4"])
def test_a_recipe_may_name_what_lies_on_the_hub(
    server: HubServer, pair: Pair, tmp_path: Path, way: str, method: Method | None
) -> None:
    text = """\
merge_method: linear
models:
  - {{model: {0}, parameters: {{weight: [0.9, 0.5]}}}}
  - {{model: {1}, parameters: {{weight: [0.1, 0.5]}}}}
base_model: {0}
dtype: bfloat16
"""
    more = ("--quantize", method) if method else ()
    outs = []
    for name, refs in {"local": pair, "hub": (f"{IDS[0]}@v1", IDS[1])}.items():
        recipe = tmp_path / f"{name}.yml"
        recipe.write_text(text.format(*refs))
        ways = WAYS[way] if name == "hub" else ()
        assert run("merge", "--config", recipe, "-o", tmp_path / name, *more, *ways) == 0
        outs.append(tmp_path / name)
    assert weights(outs[1]) == weights(outs[0])
    papers = json.loads((outs[1] / "adamms.json").read_bytes())
    shas = [server.repos[repo_id].sha for repo_id in IDS]
    assert [papers["base"], papers["donor"]] == [f"{i}@{s}" for i, s in zip(IDS, shas, strict=True)]


# Pushed


@pytest.mark.parametrize("method", [None, *METHODS])
def test_what_was_blended_by_layer_and_quantized_is_pushed(
    hub: HubServer,
    pair: Pair,
    plain: Path,
    quantized: dict[str, Path],
    tmp_path: Path,
    method: Method | None,
) -> None:
    out = tmp_path / "out"
    more = ("--quantize", method) if method else ()
    words = (*pair, "-o", out, "--alpha-layers", ALPHAS, "--push-to-hub", REPO, *more)
    assert run(*words) == 0
    assert weights(out) == weights(quantized[method] if method else plain)
    assert_pushed(hub, out)


def test_a_quantized_upload_that_fails_is_finished(
    hub: HubServer,
    pair: Pair,
    quantized: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the same command; it is then known which merge waits."""
    out = tmp_path / "out"
    words = (*pair, "-o", out, "--alpha-layers", ALPHAS, "--push-to-hub", REPO)
    hub.fail(r"POST .*/commit/main", "status", status=403)
    assert run(*words, "--quantize", "int8") == 2
    assert "the output is complete" in capsys.readouterr().err
    assert run(*words) == 2
    assert "a merge of other inputs or options" in capsys.readouterr().err
    assert run(*words, "--quantize", "int8") == 0
    assert weights(out) == weights(quantized["int8"])
    assert_pushed(hub, out)
