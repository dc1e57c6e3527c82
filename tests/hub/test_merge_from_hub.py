"""Merging what lies on the Hub: every way gives the local merge's bytes, whatever goes wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import random_pair
import stacks
import tiny
from command import run
from hub_server import TOKEN, HubServer, use

from lowmem_adamms import make_plan, merge
from lowmem_adamms.checkpoints import checkpoint
from lowmem_adamms.checkpoints import safetensors_header as header
from lowmem_adamms.checkpoints.checkpoint import open_checkpoint
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.comparing.comparison import compare
from lowmem_adamms.comparing.pairing import pair_checkpoints
from lowmem_adamms.mapping import kinship
from lowmem_adamms.merging import range_source, sources, writer
from lowmem_adamms.merging.journal import WORK

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))
from measure import measure  # noqa: E402

IDS = ("org/base", "org/donor")
WAYS = {"cache": (), "no cache": ("--no-cache",)}
SHARD = r"GET /network/.*\.safetensors"
Pair = tuple[Path, Path]
Files = dict[str, bytes]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The demo's pair: several shards, tokenizers on both sides; a card and some code."""
    base, donor = random_pair.make_pair(tmp_path_factory.mktemp("pair"))
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
    """A Hub with the pair on it, an empty cache, and a request for each span."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(range_source, "GAP", 0)
    with HubServer() as server:
        use(server, monkeypatch, tmp_path)
        for repo_id, folder in zip(IDS, pair, strict=True):
            server.add(repo_id, folder, "v1", "refs/pr/1")
        yield server


@pytest.fixture
def unsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinship takes samples of what is streamed later; not here, where bytes are counted."""
    monkeypatch.setattr(kinship, "check", lambda plan: kinship.Kinship({}))


def left(out: Path) -> Files:
    """Every file of a merged folder but its papers, which name the inputs."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("README.md", "adamms.json")
    }


def merged(*options: str, refs: tuple[str | Path, ...] = IDS, alpha: float = 0.3) -> Files:
    """What a merge into `out` leaves."""
    assert run(*refs, "-o", "out", "--alpha", alpha, *options) == 0
    return left(Path("out"))


def assert_fails(capsys: Capture, message: str, *options: str) -> None:
    """A merge that ends in one line and leaves no shard at its place."""
    assert run(*IDS, "-o", "out", "--alpha", "0.3", *options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert not list(Path("out").glob("*.safetensors"))


# The same bytes


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_bytes_of_the_local_merge(
    server: HubServer, local: Files, tmp_path: Path, way: str
) -> None:
    assert merged(*WAYS[way]) == local
    stored = {path.parent for path in tmp_path.rglob("*.safetensors")}
    assert (stored == {tmp_path / "out"}) == (way == "no cache")
    assert (tmp_path / "cache").exists() == (way == "cache")
    assert run("verify", "out", "--deep") == 0
    shard = next(Path("out").glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x12\x34")
    assert run("verify", "out", "--deep") == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_method_reads_each_model_on_the_hub_twice(
    server: HubServer, pair: Pair, tmp_path: Path, way: str
) -> None:
    """Base, donor and, as its ancestor, the donor with less of what it learned."""
    average = merge(make_plan(pair[1], pair[0]), 0.5, tmp_path / "average")
    server.add("org/ancestor", average)
    plan = make_plan(*pair, ancestor=average, method="ties", density=0.4)
    local = left(merge(plan, 0.7, tmp_path / "local"))
    words = ["--method", "ties", "--density", "0.4", "--ancestor", "org/ancestor"]
    assert merged(*words, *WAYS[way], alpha=0.7) == local
    assert run("verify", "out", "--deep") == 0


@pytest.mark.parametrize("forms", [("transposed", "each"), ("each", "transposed")])
def test_experts_are_streamed_in_any_order(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forms: tuple[str, str]
) -> None:
    """A slab is put together from one request or several, in windows smaller than it."""
    monkeypatch.setattr(writer, "REMOTE_WINDOW", 500)
    text = stacks.ancestor(bias=False)
    folders = []
    for seed, form in enumerate(forms):
        tensors = stacks.spell(stacks.descend(text, seed), form)
        folders.append(stacks.write(tmp_path / f"in{seed}", tensors, form))
        server.add(f"mix/{seed}", folders[-1])
    refs = ("mix/0", "mix/1")
    assert merged("--no-cache", refs=refs) == left(
        merge(make_plan(*folders), 0.3, tmp_path / "local")
    )
    assert run("verify", "out", "--deep") == 0


def test_a_slab_that_does_not_fit_the_memory_is_not_streamed(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setattr(sources, "MAX_AT_ONCE", 1000)
    for seed, form in enumerate(("transposed", "each")):
        tensors = stacks.spell(stacks.ancestor(bias=False), form)
        server.add(f"mix/{seed}", stacks.write(tmp_path / f"in{seed}", tensors, form))
    words = ("mix/0", "mix/1", "-o", "out", "--alpha", "0.3")
    assert run(*words, "--no-cache") == 2
    said = capsys.readouterr().err
    assert "mix/1: 1.54 kB of it are needed at once" in said and "gate_up_proj" in said
    assert "without --no-cache" in said
    assert not list(Path("out").glob("*.safetensors"))
    assert run(*words) == 0


@pytest.mark.parametrize("remote", [0, 1])
def test_one_side_may_lie_on_this_disk(
    server: HubServer, pair: Pair, local: Files, remote: int
) -> None:
    refs = (IDS[0], pair[1]) if remote == 0 else (pair[0], IDS[1])
    assert merged("--no-cache", refs=refs) == local


@pytest.mark.parametrize("alpha", [0, 1])
def test_at_the_ends_only_one_side_is_read(
    server: HubServer, pair: Pair, tmp_path: Path, alpha: int
) -> None:
    expected = left(merge(make_plan(*pair), alpha, tmp_path / "local"))
    assert merged("--no-cache", alpha=alpha) == expected


def test_small_rings_and_requests_give_the_same(
    server: HubServer, local: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one window needs more than the ring holds."""
    monkeypatch.setattr(writer, "REMOTE_WINDOW", 12_000)
    for name, size in (("BUFFER", 10_000), ("REQUEST", 3000), ("GAP", 500)):
        monkeypatch.setattr(range_source, name, size)
    monkeypatch.setattr(checkpoint, "_FIRST_READ", 16)  # of a header
    assert merged("--no-cache") == local


def test_two_models_on_the_hub_are_compared_without_being_stored(
    server: HubServer, pair: Pair, tmp_path: Path
) -> None:
    there = pair_checkpoints(*(open_checkpoint(ref, cache=False) for ref in IDS))
    assert there.remote and there.a.path.startswith("org/base@")
    sample = kinship.RUN_ELEMENTS
    remote, local = (compare(p, sample=sample) for p in (there, pair_checkpoints(*pair)))
    assert (remote.similarities, remote.ancestry) == (local.similarities, local.ancestry)
    server.seen.clear()
    compare(there, sample=4 * sample)  # one request for each stretch, not four
    assert 0 < len(server.seen) <= 2 * sum(len(pair.pieces) for pair in there.pairs)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_bins_go_by_way_of_the_cache(server: HubServer, pair: Pair, tmp_path: Path) -> None:
    bins = tiny.to_bin(pair[0], tmp_path / "bins")
    server.add("org/bins", bins)
    expected = left(merge(make_plan(bins, pair[1]), 0.3, tmp_path / "local"))
    assert merged(refs=("org/bins", IDS[1])) == expected


# What is fetched


@pytest.mark.usefixtures("unsampled")
def test_nothing_is_streamed_twice_and_nothing_that_is_not_used(
    server: HubServer, pair: Pair, local: Files
) -> None:
    plan = make_plan(*pair)
    server.fail(SHARD, "drop", skip=10, after=5000, times=10)
    assert merged("--no-cache") == local
    for side, repo_id in zip(pair, IDS, strict=True):
        for shard in side.glob("*.safetensors"):
            used = {(span.start, span.stop) for span in plan.spans if span.path == shard}
            # Only headers are read from the start on
            sent = [at for at in server.served(f"{repo_id}/{shard.name}") if at[0]]
            assert sum(stop - start for start, stop in sent) == sum(b - a for a, b in used)
            assert len(set(sent)) == len(sent)


def test_neighbours_share_a_request(server: HubServer, pair: Pair) -> None:
    copied = [step for step in make_plan(*pair).steps if step.action == "copy"]
    merged("--no-cache", alpha=0)
    asked = [seen for seen in server.seen if seen.start and seen.file.startswith("org/base")]
    streams = [seen for seen in asked if seen.sent > 2048]  # kinship's samples are smaller
    assert len(copied) > 2 * len(streams) > 0


def test_a_plan_reads_headers_and_small_files(
    server: HubServer, tmp_path: Path, capsys: Capture
) -> None:
    assert run("plan", *IDS, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["base"] == f"org/base@{server.repos['org/base'].sha}"
    shards = {
        f"{repo.id}/{name}": file.size
        for repo in server.repos.values()
        for name, file in repo.files.items()
        if name.endswith(".safetensors")
    }
    assert document["forecast"]["to_fetch"] == sum(shards.values())
    assert not list(tmp_path.rglob("*.safetensors"))
    headers = [seen for seen in server.seen if seen.file.endswith(".safetensors") and seen.sent]
    assert sorted(seen.file for seen in headers) == sorted(shards)
    assert all(seen.start == 0 for seen in headers)


def test_what_the_cache_has_is_not_fetched_again_and_serves_offline(
    server: HubServer, local: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert merged() == local
    for offline in (False, True):
        shutil.rmtree("out")
        server.seen.clear()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert merged() == local
        assert server.sent() == 0
    assert not server.seen


@pytest.mark.usefixtures("unsampled")
def test_what_is_finished_is_not_fetched_again(
    server: HubServer, pair: Pair, local: Files, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A merge that fails at the base's last shard, then goes on."""
    monkeypatch.setattr(writer, "REMOTE_WINDOW", 8192)
    names = sorted(path.name for path in pair[0].glob("*.safetensors"))
    server.fail(f"GET /network/org/base/{names[-1]}", "status", skip=1, times=10**6)
    assert_fails(capsys, "answers 503", "--no-cache")
    journal = Path("out", WORK, ".journal.jsonl").read_text()
    done = {line["file"] for line in map(json.loads, journal.splitlines()) if "blake3" in line}
    assert done
    server.faults.clear()
    server.seen.clear()
    assert merged("--no-cache") == local
    again = {name for name in names for start, _ in server.served(f"org/base/{name}") if start}
    assert again <= set(names) - done


# A revision is a commit, and its bytes are held against the Hub's digests


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1"])
def test_the_recipe_names_the_commit_and_what_was_checked(server: HubServer, revision: str) -> None:
    merged("--no-cache", refs=(f"org/base@{revision}", "org/donor"))
    recipe = json.loads(Path("out/adamms.json").read_bytes())
    for side in ("base", "donor"):
        repo = server.repos[f"org/{side}"]
        assert recipe[side] == f"{repo.id}@{repo.sha}"
        noted = {item["file"]: item["sha256"] for item in recipe["inputs"][side]}
        assert noted == {name: repo.files[name].sha256 for name in noted}
    # The base's bytes come in the order of its files, the donor's do not
    assert recipe["not_checked"]
    assert all(name.startswith("org/donor: ") for name in recipe["not_checked"])
    card = Path("out/README.md").read_text()
    assert '- "org/base"\n- "org/donor"\n' in card
    assert "license: mit" in card


def test_a_branch_that_moves_changes_nothing(
    server: HubServer, local: Files, tmp_path: Path
) -> None:
    plan = make_plan(*(open_checkpoint(ref, cache=False) for ref in IDS))
    repo = server.repos["org/base"]
    repo.revisions = {repo.sha: repo.sha}
    out = merge(plan, 0.3, tmp_path / "out", no_cache=True)
    assert left(out) == local


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("way", WAYS)
def test_bad_bytes_are_found_and_the_merge_starts_over(
    server: HubServer, local: Files, capsys: Capture, way: str
) -> None:
    assert run("plan", *IDS, *WAYS[way]) == 0
    capsys.readouterr()
    headers = len(server.asked(SHARD))
    server.fail(SHARD, "flip", skip=headers, times=10**6)
    assert_fails(capsys, "the Hub says", *WAYS[way])
    server.faults.clear()
    assert merged(*WAYS[way]) == local


# What is refused, in one line


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("org/none", "(no folder or file of that name here): no such repository at"),
        ("org/base@v9", "answers 404: Invalid rev id: v9"),
        ("org/private", "no such repository at"),
        ("org/gated", "gated; accept its conditions"),
        ("org/empty", "no model.safetensors, no model.safetensors.index.json"),
        ("org/bins", "holds .bin files only"),
        ("org/base..x", "not the name of a repository"),
        ("org/broken", "not a safetensors file"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    server: HubServer, pair: Pair, capsys: Capture, ref: str, message: str
) -> None:
    server.add("org/empty", {"config.json": b"{}"})
    for name, file in (("bins", "pytorch_model.bin"), ("broken", "model.safetensors")):
        Path(name).mkdir()
        Path(name, file).write_text("{}" * 10)
        server.add(f"org/{name}", Path(name))
    server.add("org/private", pair[0], private=True)
    server.add("org/gated", pair[0], gated=True)
    assert run("merge", ref, "org/donor", "-o", "out", "--alpha", "0.3", "--no-cache") == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.count("\n") == 1 and message in printed.err
    assert not Path("out").exists()


def test_a_token_opens_what_is_gated(
    server: HubServer, pair: Pair, local: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("org/gated", pair[0], gated=True)
    server.add("org/private", pair[1], private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert merged("--no-cache", refs=("org/gated", "org/private")) == local


def test_without_network_or_cache_it_is_one_line(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        assert_fails(capsys, "of that name here): cannot reach http://127.0.0.1:9 ")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_fails(capsys, "org/base: not, or not whole, in the cache")
    assert not server.seen


def test_a_search_does_not_go_with_no_cache(server: HubServer, capsys: Capture) -> None:
    assert run("merge", *IDS, "-o", "out", "--no-cache", "--prompts", "p.jsonl") == 2
    assert "--no-cache" in capsys.readouterr().err
    assert not server.seen


# Memory

IMPORTS = """
import rich.progress
from huggingface_hub import HfApi, get_hf_file_metadata, get_session, snapshot_download
from lowmem_adamms import cli
from lowmem_adamms.kernels import cpu
from lowmem_adamms.merging import range_source
get_session()
cpu.warm()
"""


def sparse_llama(folder: Path) -> Path:
    """One layer of zeros, 0.4 GB that take no room on the disk."""
    wide, inner, rows = 2048, 16384, 32000
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (rows, wide),
        layer + "input_layernorm.weight": (wide,),
        layer + "mlp.down_proj.weight": (wide, inner),
        layer + "mlp.gate_proj.weight": (inner, wide),
        layer + "mlp.up_proj.weight": (inner, wide),
        layer + "post_attention_layernorm.weight": (wide,),
        **{layer + f"self_attn.{name}_proj.weight": (wide, wide) for name in "kqvo"},
        "model.norm.weight": (wide,),
        "lm_head.weight": (rows, wide),
    }
    folder.mkdir()
    head = header.build_header(
        [(name, DTYPES["BF16"], shape) for name, shape in shapes.items()], {"format": "pt"}
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 2 * sum(math.prod(shape) for shape in shapes.values()))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_anonymous_memory_stays_within_the_bound(server: HubServer, tmp_path: Path) -> None:
    """64 MiB above the imports, for 0.8 GB of inputs."""
    for side in ("base", "donor"):
        server.add(f"big/{side}", sparse_llama(tmp_path / side))
    env = {"HF_ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(tmp_path / "c")}
    words = ["merge", "big/base", "big/donor", "-o", str(tmp_path / "out"), "--alpha", "0.5"]
    imported = measure([sys.executable, "-c", IMPORTS], cwd=ROOT)
    merged = measure(
        [sys.executable, "-m", "lowmem_adamms", *words, "--no-cache"], cwd=ROOT, env=env
    )
    assert (imported.returncode, merged.returncode) == (0, 0)
    grown = merged.peak_anon_bytes - imported.peak_anon_bytes
    assert grown <= 64 << 20
