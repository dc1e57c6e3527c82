"""Merging what lies on the Hub: every way gives the local merge's bytes, whatever goes wrong."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import random_pair
from hub_server import HubServer, use

from lowmem_adamms import make_plan, merge
from lowmem_adamms.checkpoints.checkpoint import Checkpoint, open_checkpoint
from lowmem_adamms.checkpoints.dtypes import DTYPES
from lowmem_adamms.checkpoints.safetensors_header import build_header
from lowmem_adamms.checkpoints.span import Span
from lowmem_adamms.cli import main
from lowmem_adamms.comparing.comparison import compare
from lowmem_adamms.comparing.pairing import pair_checkpoints
from lowmem_adamms.errors import FormatError, HubError, RecipeError
from lowmem_adamms.hub import client
from lowmem_adamms.mapping import kinship
from lowmem_adamms.mapping.plan import Step
from lowmem_adamms.merging import range_source as ranges
from lowmem_adamms.merging import shard_source as shards
from lowmem_adamms.merging import sources as inputs
from lowmem_adamms.merging.journal import WORK
from lowmem_adamms.merging.sources import Fetch
from lowmem_adamms.merging.verify import verify

loop = importlib.import_module(
    "lowmem_adamms.merging.loop"
)  # the package's `merge` is the function
ROOT = Path(__file__).parents[2]
Pair = tuple[Path, Path]
Files = dict[str, bytes]
STREAM = Fetch(no_cache=True)
BUDGET = Fetch(disk_budget=10**9)
WAYS = {"cache": Fetch(), "no cache": STREAM, "disk budget": BUDGET}
IDS = ("org/base", "org/donor")


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
    """A Hub with the pair on it, an empty cache, and no waiting between attempts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(ranges, "GAP", 0)
    with HubServer() as server:
        use(server, monkeypatch, tmp_path)
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


def streamed(tmp_path: Path, fetch: Fetch = STREAM) -> Path:
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


@pytest.mark.parametrize("remote", ["base", "donor"])
def test_one_side_may_lie_on_this_disk(
    server: HubServer, pair: Pair, local: Files, tmp_path: Path, remote: str
) -> None:
    refs = (IDS[0], pair[1]) if remote == "base" else (pair[0], IDS[1])
    plan = make_plan(*(open_checkpoint(ref, cache=False) for ref in refs))
    assert left(merge(plan, 0.3, tmp_path / "out", fetch=STREAM)) == local


@pytest.mark.parametrize("alpha", [0, 1])
def test_at_the_ends_only_one_side_is_read(
    server: HubServer, pair: Pair, tmp_path: Path, alpha: float
) -> None:
    expected = left(merge(make_plan(*pair), alpha, tmp_path / "local"))
    out = merge(make_plan(*opened()), alpha, tmp_path / "out", fetch=STREAM)
    assert left(out) == expected


def test_small_rings_and_requests_give_the_same(
    server: HubServer, local: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one window needs more than the ring holds."""
    for name, size in (("BUDGET", 10_000), ("REQUEST", 3000), ("WINDOW", 12_000), ("GAP", 500)):
        monkeypatch.setattr(ranges, name, size)
    assert left(streamed(tmp_path)) == local


# What is fetched


@pytest.fixture
def unsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinship takes samples of what is streamed later; not here, where bytes are counted."""
    monkeypatch.setattr(kinship, "check", lambda plan: kinship.Kinship({}))


@pytest.mark.usefixtures("unsampled")
def test_nothing_is_streamed_twice_and_nothing_that_is_not_used(
    server: HubServer, pair: Pair, tmp_path: Path
) -> None:
    plan = make_plan(*opened())
    server.seen.clear()
    merge(plan, 0.3, tmp_path / "out", fetch=STREAM)
    for side, folder, repo_id in zip((plan.base, plan.donor), pair, IDS, strict=True):
        for name, stretches in data(server, folder, repo_id).items():
            used = {(span.start, span.stop) for span in plan.spans if span.path.name == name}
            used &= {(s.start, s.stop) for s in plan.spans if s.path.parent == side.path}
            assert overlap(stretches) == 0
            assert sum(stop - start for start, stop in stretches) == sum(b - a for a, b in used)


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("after", [0, 1, 5000])
def test_a_broken_connection_goes_on_where_it_was(
    server: HubServer, pair: Pair, local: Files, tmp_path: Path, after: int
) -> None:
    plan = make_plan(*opened())
    server.seen.clear()
    fault = server.fail("drop", ".safetensors?", after=after, times=10)
    assert left(merge(plan, 0.3, tmp_path / "out", fetch=STREAM)) == local
    assert fault.times == 0
    for folder, repo_id in zip(pair, IDS, strict=True):
        assert all(not overlap(found) for found in data(server, folder, repo_id).values())


def test_neighbours_share_a_request(server: HubServer, pair: Pair, tmp_path: Path) -> None:
    plan = make_plan(*opened())
    copied = [step for step in plan.steps if step.action == "copy"]
    server.seen.clear()
    merge(plan, 0, tmp_path / "out", fetch=STREAM)
    asked = [seen for seen in server.seen if seen.start and seen.file.startswith("org/base")]
    streams = [seen for seen in asked if seen.sent > 2048]  # kinship's samples are smaller
    assert len(copied) > 2 * len(streams)


def test_a_plan_reads_headers_and_small_files(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *IDS, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    sha = server.repos["org/base"].sha
    assert document["base"] == f"org/base@{sha}"
    assert document["forecast"]["to_fetch"] == sum(
        file.size
        for repo in server.repos.values()
        for name, file in repo.files.items()
        if name.endswith(".safetensors")
    )
    assert not list(tmp_path.rglob("*.safetensors"))
    headers = [seen for seen in server.seen if seen.file.endswith(".safetensors") and seen.sent]
    assert all(seen.start == 0 for seen in headers)
    assert len(headers) == sum(
        name.endswith(".safetensors") for repo in server.repos.values() for name in repo.files
    )


@pytest.mark.parametrize("way", ["no cache", "disk budget"])
def test_the_inputs_are_stored_nowhere(server: HubServer, tmp_path: Path, way: str) -> None:
    out = streamed(tmp_path, WAYS[way])
    stored = {path.parent for path in tmp_path.rglob("*") if path.suffix == ".safetensors"}
    assert stored == {out}
    if way == "no cache":
        assert not (tmp_path / "cache").exists()


def test_what_the_cache_has_is_not_fetched_again(
    server: HubServer, local: Files, tmp_path: Path
) -> None:
    streamed(tmp_path, WAYS["cache"])
    shutil.rmtree(tmp_path / "out")
    server.seen.clear()
    assert left(streamed(tmp_path, WAYS["cache"])) == local
    assert server.sent() == 0


def test_the_cache_alone_serves_offline(
    server: HubServer, local: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed(tmp_path, WAYS["cache"])
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    server.seen.clear()
    assert left(streamed(tmp_path, WAYS["cache"])) == local
    assert not server.seen


# A revision is a commit


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1"])
def test_the_recipe_names_the_commit(server: HubServer, tmp_path: Path, revision: str) -> None:
    ids = (f"org/base@{revision}", "org/donor")
    out = merge(make_plan(*opened(ids=ids)), 0.3, tmp_path / "out", fetch=STREAM)
    recipe = json.loads((out / "adamms.json").read_bytes())
    base, donor = (server.repos[repo_id] for repo_id in IDS)
    assert (recipe["base"], recipe["donor"]) == (f"org/base@{base.sha}", f"org/donor@{donor.sha}")
    for side, repo in (("base", base), ("donor", donor)):
        noted = {item["file"]: item["sha256"] for item in recipe["inputs"][side]}
        assert noted == {name: repo.files[name].sha256 for name in noted}
    card = (out / "README.md").read_text()
    assert '- "org/base"\n- "org/donor"\n' in card
    assert "license: mit" in card


def test_a_branch_that_moves_changes_nothing(
    server: HubServer, pair: Pair, local: Files, tmp_path: Path
) -> None:
    plan = make_plan(*opened())
    repo = server.repos["org/base"]
    repo.revisions = {repo.sha: repo.sha}
    assert left(merge(plan, 0.3, tmp_path / "out", fetch=STREAM)) == local


@pytest.mark.parametrize("way", WAYS)
def test_the_output_verifies_against_the_hub(server: HubServer, tmp_path: Path, way: str) -> None:
    out = streamed(tmp_path, WAYS[way])
    assert (verify(out, deep=True).rows or 0) > 0
    shard = next(out.glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x12\x34")
    with pytest.raises(FormatError):
        verify(out, deep=True)


def test_whole_files_are_held_against_the_hubs_digests(server: HubServer, tmp_path: Path) -> None:
    """The base's bytes come in the order of its files, the donor's do not."""
    recipe = json.loads((streamed(tmp_path) / "adamms.json").read_bytes())
    unchecked = recipe["not_checked"]
    assert all(name.startswith("org/donor: ") for name in unchecked)


# What passes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("status", {"status": 503}),
        ("status", {"status": 500}),
        ("status", {"status": 429, "headers": {"Retry-After": "0"}}),
        ("drop", {"after": 3000}),
    ],
)
def test_what_fails_in_passing_is_tried_again(
    server: HubServer,
    local: Files,
    tmp_path: Path,
    way: str,
    kind: str,
    options: dict[str, Any],
) -> None:
    plan = make_plan(*opened(WAYS[way]))
    fault = server.fail(kind, ".safetensors?", times=3, **options)
    assert left(merge(plan, 0.3, tmp_path / "out", fetch=WAYS[way])) == local
    assert fault.times == 0


def test_retry_after_is_waited_for() -> None:
    pauses = [client._pause(1, client.Failure("429", True, after)) for after in (7.0, 10.0**6)]
    assert pauses == [7.0, client.LONGEST_RETRY_AFTER]


def test_a_silent_server_is_asked_again(
    server: HubServer, local: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    fault = server.fail("stall", ".safetensors?", after=100, seconds=1, times=2)
    assert left(streamed(tmp_path)) == local
    assert fault.times == 0


def test_addresses_that_expire_are_asked_for_anew(
    server: HubServer, local: Files, tmp_path: Path
) -> None:
    plan = make_plan(*opened())
    server.expire()
    assert left(merge(plan, 0.3, tmp_path / "out", fetch=STREAM)) == local


def test_the_api_is_asked_again_too(server: HubServer) -> None:
    server.fail("status", "/api/models/org/base", status=502)
    assert opened()[0].tensors


# What does not pass


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("short", {"after": 1}, "the server sends|are sent"),
        ("size", {}, "the server sends"),
        ("shift", {}, "the server sends"),
        ("ignore", {}, "ignores ranges"),
        ("etag", {"skip": 1}, "changed while it was read"),
        ("status", {"status": 503, "times": 10**6}, "answers 503; run the same command again"),
        ("status", {"status": 418}, "answers 418"),
        ("flip", {"match": "signature", "times": 10**6}, "the Hub says"),
    ],
)
@pytest.mark.usefixtures("unsampled")
def test_what_is_not_the_file_is_an_error_and_the_merge_resumes(
    server: HubServer,
    local: Files,
    tmp_path: Path,
    kind: str,
    options: dict[str, Any],
    message: str,
) -> None:
    plan = make_plan(*opened())
    server.fail(kind, **{"match": ".safetensors?"} | options)
    with pytest.raises(HubError, match=message):
        merge(plan, 0.3, tmp_path / "out", fetch=STREAM)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    server.faults.clear()
    assert left(streamed(tmp_path)) == local


def test_two_models_on_the_hub_are_compared_without_being_stored(
    server: HubServer, pair: Pair, tmp_path: Path
) -> None:
    here, there = pair_checkpoints(*pair), pair_checkpoints(*opened())
    assert there.remote and there.a.path.startswith("org/base@")
    local, remote = (compare(pairing, sample=kinship.RUN_ELEMENTS) for pairing in (here, there))
    assert remote.similarities == local.similarities
    assert remote.ancestry == local.ancestry
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("way", ["cache", "disk budget"])
def test_a_damaged_download_is_thrown_away(
    server: HubServer, local: Files, tmp_path: Path, way: str
) -> None:
    plan = make_plan(*opened(WAYS[way]))
    kinship.check(plan)
    big = max(server.repos["org/base"].files.items(), key=lambda item: item[1].size)[0]
    server.fail("flip", f"base/{server.repos['org/base'].sha}/{big}", times=10**6)
    with pytest.raises(HubError, match=f"{big} has the sha256"):
        merge(plan, 0.3, tmp_path / "out", force=True, fetch=WAYS[way])
    assert not list((tmp_path / "out").glob("*.safetensors"))
    server.faults.clear()
    assert left(merge(plan, 0.3, tmp_path / "out", fetch=WAYS[way])) == local


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("way", ["no cache", "disk budget"])
def test_what_is_finished_is_not_fetched_again(
    server: HubServer,
    pair: Pair,
    local: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """A merge that fails at the base's last shard, then goes on."""
    names = sorted(path.name for path in pair[0].glob("*.safetensors"))
    monkeypatch.setattr(ranges, "WINDOW", 8192)
    monkeypatch.setattr(inputs, "WINDOW", 8192)
    plan = make_plan(*opened(WAYS[way]))
    match = f"base/{server.repos['org/base'].sha}/{names[-1]}"
    server.fail("status", match, status=503, times=10**6)
    with pytest.raises(HubError, match="503"):
        merge(plan, 0.3, tmp_path / "out", fetch=WAYS[way])
    journal = (tmp_path / "out" / WORK / ".journal.jsonl").read_text()
    done = {line["file"] for line in map(json.loads, journal.splitlines()) if "blake3" in line}
    assert done
    server.faults.clear()
    server.seen.clear()
    assert left(merge(plan, 0.3, tmp_path / "out", fetch=WAYS[way])) == local
    again = data(server, pair[0], "org/base")
    assert {name for name, stretches in again.items() if stretches} <= set(names) - done


# Shard by shard


class Everything:
    """A sink that wants every step, to be asked nothing else."""

    def wants(self, step: Step) -> bool:
        return True

    def copy(self, step: Step, offset: int, span: Span) -> None:
        raise NotImplementedError

    def slot(self, step: Step, offset: int, nbytes: int) -> Any:
        raise NotImplementedError

    def commit(self) -> None:
        raise NotImplementedError


def test_shards_never_take_more_than_the_budget(
    server: HubServer, local: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "WINDOW", 8192)
    plan = make_plan(*opened(BUDGET))
    with pytest.raises(RecipeError, match="needed at one time take") as refused:
        merge(plan, 0.3, tmp_path / "small", fetch=Fetch(disk_budget=10))
    assert "--no-cache" in str(refused.value)
    windows = loop.spans_in_order(plan, 0.3, Everything(), 8192)
    stays = shards.visits(inputs.remote(plan), windows)
    need = max(
        sum(other.file.size for other in stays if other.first <= stay.first <= other.last)
        for stay in stays
    )
    total = sum(stay.file.size for stay in stays)
    assert need < total
    work, peak = tmp_path / "out" / WORK / shards.FOLDER, [0]
    fetch = shards._fetch

    def fetched(*arguments: Any) -> None:
        fetch(*arguments)
        peak.append(sum(path.stat().st_size for path in work.iterdir()))

    monkeypatch.setattr(shards, "_fetch", fetched)
    out = merge(plan, 0.3, tmp_path / "out", fetch=Fetch(disk_budget=need))
    assert left(out) == local
    assert 0 < max(peak) <= need
    assert not (out / WORK).exists()


@pytest.mark.usefixtures("unsampled")
def test_a_merge_may_go_on_another_way(server: HubServer, local: Files, tmp_path: Path) -> None:
    plan = make_plan(*opened(BUDGET))
    server.fail("status", "00002-of-00003.safetensors?", status=503, times=10**6)
    with pytest.raises(HubError):
        merge(plan, 0.3, tmp_path / "out", fetch=BUDGET)
    assert (tmp_path / "out" / WORK / shards.FOLDER).exists()
    server.faults.clear()
    assert left(streamed(tmp_path, STREAM)) == local


# What is refused, in one line


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("org/none", "(no folder or file of that name here): no such repository at"),
        ("org/base@v9", "this revision is not"),
        ("org/private", "no such repository at"),
        ("org/gated", "gated; accept its conditions"),
        ("org/empty", "no model.safetensors, no model.safetensors.index.json"),
        ("org/bins", "holds .bin files only"),
        ("org/base..x", "not the name of a repository"),
        ("org/broken", "not a safetensors file"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    server: HubServer,
    tmp_path: Path,
    pair: Pair,
    capsys: pytest.CaptureFixture[str],
    ref: str,
    message: str,
) -> None:
    odd = {"empty": "config.json", "bins": "pytorch_model.bin", "broken": "model.safetensors"}
    for name, file in odd.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}" if name == "empty" else "{}" * 10)
        server.add(f"org/{name}", tmp_path / name)
    server.add("org/private", pair[0], private=True)
    server.add("org/gated", pair[0], gated=True)
    assert main(["merge", ref, "org/donor", "-o", "out", "--alpha", "0.3", "--no-cache"]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not Path("out").exists()


def test_the_token_opens_what_is_gated_and_stays_with_the_hub(
    server: HubServer,
    pair: Pair,
    local: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.add("org/gated", pair[0], gated=True)
    server.add("org/private", pair[1], private=True)
    monkeypatch.setenv("HF_TOKEN", server.token)
    plan = make_plan(*opened(ids=("org/gated", "org/private")))
    assert left(merge(plan, 0.3, tmp_path / "out", fetch=STREAM)) == local
    shown = [seen for seen in server.seen if seen.authorised]
    assert shown
    assert all("signature=" not in seen.path for seen in shown)


def test_offline_needs_the_cache(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"org/base: not, or not whole, in the cache"):
        opened(Fetch())
    assert not server.seen


def test_no_network_is_one_error(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        HubError, match=r"no folder or file of that name here\): cannot reach http://127\.0\.0\.1:9"
    ):
        opened()


def test_bins_go_by_way_of_the_cache(
    server: HubServer, pair: Pair, tmp_path: Path, local: Files
) -> None:
    import tiny

    bins = tiny.to_bin(pair[0], tmp_path / "bins")
    server.add("org/bins", bins)
    assert main(["merge", "org/bins", "org/donor", "-o", "out", "--alpha", "0.3"]) == 0
    expected = merge(make_plan(bins, pair[1]), 0.3, tmp_path / "local")
    assert left(Path("out")) == left(expected)


@pytest.mark.parametrize(
    "words",
    [("--no-cache", "--prompts", "p.jsonl")],
)
def test_ways_that_exclude_each_other_are_refused_at_once(
    server: HubServer, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    alpha = () if "--prompts" in words else ("--alpha", "0.3")
    assert main(["merge", *IDS, "-o", "out", *alpha, *words]) == 2
    assert "--no-cache" in capsys.readouterr().err
    assert not server.seen


# Memory

MEASURED = """
import sys, threading, time
from pathlib import Path
import rich.progress, huggingface_hub
from huggingface_hub import HfApi, get_hf_file_metadata, snapshot_download
from lowmem_adamms.merging import range_source
from lowmem_adamms.cli import main
from lowmem_adamms.kernels import cpu
huggingface_hub.utils.get_session()
cpu.warm()

def anon():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

before, peak, done = anon(), [0], threading.Event()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anon())
thread = threading.Thread(target=watch)
thread.start()
code = main(sys.argv[1:])
done.set()
thread.join()
print(code, peak[0] - before)
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
    head = build_header(
        [(name, DTYPES["BF16"], shape) for name, shape in shapes.items()], {"format": "pt"}
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 2 * sum(math.prod(shape) for shape in shapes.values()))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("way", [["--no-cache"]])
def test_anonymous_memory_stays_within_the_bound(
    server: HubServer, tmp_path: Path, way: list[str]
) -> None:
    """64 MiB above the imports, for 0.8 GB of inputs."""
    for side in ("base", "donor"):
        server.add(f"big/{side}", sparse_llama(tmp_path / side))
    words = ["merge", "big/base", "big/donor", "-o", str(tmp_path / "out"), "--alpha", "0.5", *way]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words],
        env={**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(tmp_path / "c")},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    code, grown = map(int, done.stdout.splitlines()[-1].split())
    assert code == 0
    assert grown <= 64 << 10, f"{grown} KiB"
