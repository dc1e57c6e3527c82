"""What arrives on the Hub, and what is left when it does not: against a server on this machine."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import run
from hub_push_server import Fault, HubServer, person, serving, use
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http

from lowmem_adamms import make_plan, merge
from lowmem_adamms.errors import OutputError, PushError
from lowmem_adamms.hub import client, upload
from lowmem_adamms.merging import model_card as card
from lowmem_adamms.merging import writer
from lowmem_adamms.merging.journal import PENDING
from lowmem_adamms.merging.verify import verify

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
REPO = "lab/merged"
PUT = r"PUT /lfs/[0-9a-f]{64}(/1)?$"  # the first or only request for a file
COMMIT = r"POST .*/commit/main"
# huggingface_hub's own use of httpx2
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
Pair = tuple[Path, Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def merged(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge that was never pushed. Read only."""
    return merge(make_plan(*pair), 0.3, tmp_path_factory.mktemp("merged") / "out")


@pytest.fixture
def copy(merged: Path, tmp_path: Path) -> Path:
    return shutil.copytree(merged, tmp_path / "copy")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that takes uploads."""
    with serving() as server:
        use(server, monkeypatch)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    """The visible files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def on_main(hub: HubServer) -> dict[str, bytes]:
    """What the repository's main branch holds, but for what the Hub put there itself."""
    files = hub.repos[REPO].files
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def assert_one_error(capsys: Capture, words: str) -> str:
    said = capsys.readouterr()
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("error: ")
    assert re.search(words, said.err), said.err
    return said.err


# What arrives


def test_a_merge_arrives_whole_and_in_one_commit(
    hub: HubServer, pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert run(*pair, "-o", out, "--alpha", "0.3", "--push-to-hub", REPO) == 0
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2
    assert on_main(hub) == contents(out)
    assert {name for name in repo.files if name.endswith(".safetensors")} == repo.large
    assert not repo.private
    assert len(hub.asked(PUT)) == len(set(hub.asked(PUT))) == len(repo.large) > 1
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[1] == f"{hub.url}/{REPO}: {len(contents(out))} files"


def test_what_is_pushed_is_what_is_merged_without_a_push(
    hub: HubServer, pair: Pair, merged: Path, tmp_path: Path
) -> None:
    assert run(*pair, "-o", tmp_path / "o", "--alpha", "0.3", "--push-to-hub", REPO) == 0
    assert on_main(hub) == contents(merged)


def test_the_merge_goes_on_while_a_shard_is_sent_and_main_stays_empty(
    hub: HubServer, pair: Pair, tmp_path: Path
) -> None:
    hub.hold()
    words = (*pair, "-o", tmp_path / "out", "--alpha", "0.3", "--push-to-hub", REPO)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(*words)))
    thread.start()
    try:
        assert hub.reached.wait(60)
        wait_for_complete(tmp_path / "out")
        assert verify(tmp_path / "out").shards > 1
        assert not hub.asked(COMMIT)
        assert on_main(hub) == {}
    finally:
        hub.release()
        thread.join()
    assert codes == [0]
    assert on_main(hub) == contents(tmp_path / "out")


def test_shards_are_handed_over_before_the_output_is_complete(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes: dict[str, int] = {}

    class Watch(upload.Upload):
        def __init__(self) -> None:
            self.repo = REPO

        def begin(self) -> None:
            assert not out.exists()

        def add_shard(self, path: Path) -> None:
            assert path.parent == out / ".partial"
            sizes[path.name] = path.stat().st_size

    merge(make_plan(*pair), 0.3, out, push=Watch())
    assert sizes == {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert (out / PENDING).is_file()


def test_large_files_go_in_parts_where_the_hub_asks_for_it(hub: HubServer, copy: Path) -> None:
    hub.part_size = 50_000
    hub.faults = [Fault(r"PUT /lfs/\w+/2", "503"), Fault(r"PUT /lfs/\w+/3", "drop")]
    assert run("push", copy, REPO) == 0
    assert on_main(hub) == contents(copy)
    assert len(hub.asked(r"/complete$")) == len(hub.repos[REPO].large)
    size = sum(path.stat().st_size for path in copy.glob("*.safetensors"))
    assert size <= hub.received < size + 2 * hub.part_size


def test_prompts_and_answers_of_a_search_stay_here(hub: HubServer, copy: Path) -> None:
    (copy / "report.html").write_text("images")
    (copy / "answers.jsonl").write_text("{}")
    (copy / "nested").mkdir()
    (copy / "nested" / "thing.json").write_text("{}")
    (copy / "empty.txt").write_text("")
    (copy / ".notes").write_text("mine")
    assert run("push", copy, REPO) == 0
    assert set(contents(copy)) - set(on_main(hub)) == {"report.html", "answers.jsonl"}
    assert set(on_main(hub)) <= set(contents(copy))


def test_private_makes_the_repository_private(hub: HubServer, copy: Path) -> None:
    assert run("push", copy, REPO, "--private") == 0
    assert hub.repos[REPO].private
    assert run("push", copy, REPO, "--private") == 0


def test_a_second_push_sends_nothing(hub: HubServer, copy: Path, capsys: Capture) -> None:
    assert run("push", copy, REPO) == 0
    received, puts = hub.received, len(hub.asked("PUT"))
    assert run("push", copy, REPO) == 0
    assert (hub.received, len(hub.asked("PUT"))) == (received, puts)
    assert len(hub.repos[REPO].commits) == 2
    assert capsys.readouterr().out.splitlines()[1] == f"{hub.url}/{REPO}: {len(on_main(hub))} files"


def test_only_what_the_hub_lacks_is_sent(hub: HubServer, copy: Path) -> None:
    files = contents(copy)
    small = {name: files[name] for name in ("config.json", "tokenizer.json")}
    hub.add_repo(REPO, small)
    shard = sorted(name for name in files if name.endswith(".safetensors"))[0]
    hub.objects[hashlib.sha256(files[shard]).hexdigest()] = files[shard]
    assert run("push", copy, REPO) == 0
    assert on_main(hub) == files
    rest = [name for name in files if name.endswith(".safetensors") and name != shard]
    assert hub.received == sum(len(files[name]) for name in rest)


def test_replacing_deletes_what_was_there_in_the_same_commit(
    hub: HubServer, copy: Path, capsys: Capture
) -> None:
    old = {"model-00001-of-00009.safetensors": b"old", "config.json": b"{}", "x/y.txt": b"y"}
    hub.add_repo(REPO, old)
    assert run("push", copy, REPO) == 2
    assert_one_error(capsys, "holds other files .*--replace-repo")
    assert run("push", copy, REPO, "--replace-repo") == 0
    assert on_main(hub) == contents(copy)
    assert len(hub.repos[REPO].commits) == 3


def test_a_merge_replaces_what_was_there_too(hub: HubServer, pair: Pair, tmp_path: Path) -> None:
    base = (pair[0] / "config.json").read_bytes()
    hub.add_repo(REPO, {"config.json": base, "README.md": b"old", "old.bin": b"old"})
    words = (*pair, "-o", tmp_path / "out", "--alpha", "0.3", "--push-to-hub", REPO)
    assert run(*words, "--replace-repo") == 0
    assert on_main(hub) == contents(tmp_path / "out")
    assert len(hub.repos[REPO].commits) == 3


# What is refused before anything is written


def refusals() -> dict[str, tuple[dict[str, object], str]]:
    """By name: what to make of the server and the command, and the words of the error."""
    scope = {"entity": {"type": "user", "name": "ada"}, "permissions": ["repo.write"]}
    fine = {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    return {
        "bad name": ({"repo": "lab/a..b"}, "not the name of a repository"),
        "no owner": ({"repo": "merged"}, "expected a repository as org/name"),
        "offline": ({"offline": True}, "HF_HUB_OFFLINE is set"),
        "no token": ({"token": None}, "no token .*HF_TOKEN.*hf auth login"),
        "unknown token": ({"token": "stale"}, "the token: .* answers 401.*hf auth login"),
        "other org": ({"repo": "else/m"}, "ada's and can write to ada, lab, not else"),
        "reader": ({"me": person("ada", orgs={"lab": "read"})}, "may only read in lab"),
        "read token": ({"me": person("ada", orgs={"lab": "write"}, role="read")}, "may not write"),
        "narrow": ({"me": person("ada", orgs={"lab": "write"}, **fine)}, "may not write there"),
        "refused": (
            {"me": person("ada", orgs={"lab": "write"}, denied=True)},
            "answers 403: You don't have the rights",
        ),
        "closed": (
            {"me": person("ada", orgs={"lab": "write"}, denied=True), "there": {}},
            "this token may not write there: .*rights",
        ),
        "not empty": ({"there": {"config.json": b"{}"}}, "holds other files .config.json"),
        "public": ({"there": {}, "more": ["--private"]}, "is public"),
        "down": ({"faults": [Fault("whoami", "500", 99)]}, "the token: .* answers 500"),
        "drops": ({"faults": [Fault("whoami", "drop", 99)]}, "cannot reach .*disconnect"),
        "nonsense": ({"faults": [Fault("whoami", "garbage", 99)]}, "makes no sense .JSONDecode"),
        "card": (
            {"faults": [Fault("validate", "400", words='{"errors": [{"message": "bad tag"}]}')]},
            "the model card: .* answers 400: bad tag; rename",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_be_pushed_is_refused_before_anything_is_written(
    name: str,
    hub: HubServer,
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    how, words = refusals()[name]
    hub.faults = how.get("faults", [])  # type: ignore[assignment]
    hub.tokens["tok"] = how.get("me", hub.tokens["tok"])  # type: ignore[assignment]
    if "there" in how:
        hub.add_repo(REPO, how["there"])  # type: ignore[arg-type]
    if "token" in how:
        monkeypatch.setattr("huggingface_hub.get_token", lambda: how["token"])
        monkeypatch.setenv("HF_TOKEN", str(how["token"]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", "offline" in how)
    before = {name: list(repo.commits) for name, repo in hub.repos.items()}
    out = tmp_path / "out"
    target = how.get("repo", REPO)
    more = how.get("more", [])
    assert isinstance(more, list)
    assert run(*pair, "-o", out, "--alpha", "0.3", "--push-to-hub", target, *more) == 2
    assert_one_error(capsys, words)
    assert not out.exists()
    assert {name: repo.commits for name, repo in hub.repos.items()} == before
    assert not hub.asked("PUT|commit")


def test_a_token_for_this_namespace_alone_will_do(hub: HubServer, copy: Path) -> None:
    scope = {"entity": {"type": "org", "name": "lab"}, "permissions": ["repo.write"]}
    fine = {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    hub.tokens["tok"] = person("ada", orgs={"lab": "contributor"}, **fine)
    assert run("push", copy, REPO) == 0


@pytest.mark.parametrize("option", ["--private", "--replace-repo"])
def test_options_of_a_push_need_one(
    option: str, pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    assert run(*pair, "-o", tmp_path / "out", "--alpha", "0.3", option) == 2
    assert_one_error(capsys, "go with --push-to-hub")


def test_only_a_complete_merge_is_pushed(hub: HubServer, copy: Path, capsys: Capture) -> None:
    sorted(copy.glob("*.safetensors"))[0].unlink()
    assert run("push", copy, REPO) == 2
    assert_one_error(capsys, "model-00001")
    assert run("push", copy / "nowhere", REPO) == 2
    assert_one_error(capsys, "no such folder")
    assert hub.seen == []


# What goes wrong on the way


FAULTS = [
    Fault("whoami", "503"),
    Fault("POST /api/repos/create", "500"),
    Fault("POST /api/repos/create", "lost"),
    Fault("GET /api/models/lab/merged$", "502"),
    Fault("preupload", "503", 3),
    Fault("preupload", "garbage"),
    Fault("preupload", "drop"),
    Fault("objects/batch", "429"),
    Fault("objects/batch", "garbage"),
    Fault(PUT, "500", 3),
    Fault(PUT, "cut", 2, after=70_000),
    Fault(PUT, "lost"),
    Fault("/verify$", "500"),
    Fault("/verify$", "drop"),
    Fault(COMMIT, "503"),
    Fault(COMMIT, "drop"),
    Fault(COMMIT, "lost"),
    Fault(COMMIT, "garbage"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.pattern} {fault.kind}")
def test_what_passes_is_tried_again(fault: Fault, hub: HubServer, copy: Path) -> None:
    hub.faults = [Fault(fault.pattern, fault.kind, fault.times, fault.after)]
    assert run("push", copy, REPO) == 0
    assert hub.faults[0].times == 0
    assert on_main(hub) == contents(copy)
    assert len(hub.repos[REPO].commits) == 2


def test_an_upload_that_fails_leaves_the_output_and_says_how_to_finish(
    hub: HubServer, pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    second = Fault("PUT", "500", 10**6)
    hub.faults = [second]
    words = (*pair, "-o", out, "--alpha", "0.3", "--push-to-hub", REPO)
    assert run(*words) == 2
    line = assert_one_error(capsys, f"the output is complete at {re.escape(str(out))}")
    assert verify(out).shards > 1
    assert on_main(hub) == {}
    again = re.search(r"python -m lowmem_adamms (push .*)", line)
    assert again
    second.times = 0
    assert run(*again[1].split()) == 0
    assert on_main(hub) == contents(out)
    assert not (out / PENDING).exists()


@pytest.mark.parametrize("pattern", [PUT, "info/lfs/objects/batch", COMMIT])
def test_an_upload_that_stalls_ends(
    hub: HubServer, copy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """huggingface_hub alone waits for ever."""
    monkeypatch.setattr(client, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.faults = [Fault(pattern, "stall", 10**6, after=100)]
    assert run("push", copy, REPO) == 2
    line = assert_one_error(capsys, "sent or took nothing for too long")
    assert f"the output is complete at {copy}" in line
    assert on_main(hub) == {}
    hub.faults = []
    assert run("push", copy, REPO) == 0
    assert on_main(hub) == contents(copy)


def test_a_stall_that_passes_is_tried_again(
    hub: HubServer, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.faults = [Fault(PUT, "stall")]
    assert run("push", copy, REPO) == 0
    assert on_main(hub) == contents(copy)


def test_a_client_of_the_users_own_keeps_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import get_session, set_client_factory

    before = _http._GLOBAL_CLIENT_FACTORY
    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    try:
        with client.uploading_client():
            assert get_session().timeout.write == max(
                client.STALL_SECONDS, constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
        assert get_session().timeout.write is None
        set_client_factory(lambda: library.Client(timeout=7))
        with client.uploading_client():
            assert get_session().timeout.write == 7
    finally:
        set_client_factory(before)


def test_the_same_command_finishes_an_upload_too(
    hub: HubServer, pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    hub.faults = [Fault(COMMIT, "403", words="quota exceeded")]
    words = (*pair, "-o", out, "--alpha", "0.3", "--push-to-hub", REPO)
    assert run(*words) == 2
    assert_one_error(capsys, "answers 403: quota exceeded;")
    puts, stamps = hub.asked(PUT), {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(*words) == 0
    assert on_main(hub) == contents(out)
    assert hub.asked(PUT) == puts
    assert all(path.stat().st_mtime_ns == stamps[path] for path in out.iterdir())


def test_a_no_of_the_hub_is_not_asked_for_twice(hub: HubServer, copy: Path) -> None:
    hub.faults = [Fault("preupload", "403", 99, words="no")]
    assert run("push", copy, REPO) == 2
    assert len(hub.asked("preupload")) == 1


def test_an_output_that_waits_for_its_upload_is_not_merged_over(
    hub: HubServer, pair: Pair, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    hub.faults = [Fault(COMMIT, "403")]
    assert run(*pair, "-o", out, "--alpha", "0.3", "--push-to-hub", REPO) == 2
    capsys.readouterr()
    before = contents(out)
    assert run(*pair, "-o", out, "--alpha", "0.3") == 2
    assert_one_error(capsys, "complete and waits for its upload")
    assert run(*pair, "-o", out, "--alpha", "0.4", "--push-to-hub", REPO) == 2
    assert_one_error(capsys, "a merge of other inputs or options that waits for its upload")
    assert contents(out) == before


def test_somebody_elses_commit_is_not_overwritten(hub: HubServer, copy: Path) -> None:
    repo = hub.add_repo(REPO)
    target = upload.check_target(REPO)
    theirs = {"config.json": b"theirs"}
    repo.commit(theirs)
    with (
        upload.Upload(target, copy) as pushing,
        pytest.raises(PushError, match="has happened since"),
    ):
        pushing.finish()
    assert repo.files == theirs


def test_a_merge_cut_short_resumes_and_sends_no_shard_twice(
    hub: HubServer, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = (*pair, "-o", out, "--alpha", "0.3", "--push-to-hub", REPO)

    def cut(*_: object) -> None:
        deadline = time.monotonic() + 60
        while not hub.asked("/verify$") and time.monotonic() < deadline:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_papers", cut)
        assert run(*words) == 130
    assert hub.objects
    assert on_main(hub) == {}
    assert not (out / INDEX).exists()
    sent = set(hub.asked("/verify$"))
    assert run(*words) == 0
    assert on_main(hub) == contents(out)
    assert all(hub.asked("/verify$").count(line) == 1 for line in sent)


def test_without_a_push_a_resumed_merge_waits_for_none(
    hub: HubServer, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = (*pair, "-o", out, "--alpha", "0.3")

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_papers", cut)
        assert run(*words, "--push-to-hub", REPO) == 130
    assert run(*words) == 0
    assert not (out / PENDING).exists()
    with pytest.raises(OutputError, match="is not empty"):
        writer.prepare(make_plan(*pair), out).check(push=True)


def wait_for_complete(out: Path) -> None:
    """Until everything is at its place, which the work folder's end says."""
    deadline = time.monotonic() + 60
    while not (out / INDEX).exists() or (out / ".partial").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_upload_resumes_where_it_was(
    kill: signal.Signals, hub: HubServer, pair: Pair, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [*map(str, pair), "-o", str(out), "--alpha", "0.3", "--push-to-hub", REPO]
    hub.hold(passing=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "lowmem_adamms", *words],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "tok", "HF_HUB_DISABLE_XET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert hub.reached.wait(60)
    wait_for_complete(out)
    process.send_signal(kill)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) in [
        (-signal.SIGKILL, ""),
        (130, "interrupted: run the same command again to resume\n"),
    ]
    hub.release()
    assert on_main(hub) == {}
    (arrived,) = hub.objects
    assert run(*words) == 0
    assert on_main(hub) == contents(out)
    assert len(hub.asked(f"PUT /lfs/{arrived}")) == 1


def test_offline_is_heard_in_a_real_process(hub: HubServer, merged: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lowmem_adamms", "push", str(merged), REPO],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: HF_HUB_OFFLINE is set")
    assert hub.seen == []


# The card


def test_the_card_is_one_that_the_hub_takes(hub: HubServer, merged: Path) -> None:
    data = vars(ModelCard.load(merged / "README.md").data)
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["base_model_relation"] == "merge"
    assert set(data["base_model"]) == {"base", "donor"}
    upload.check_card((merged / "README.md").read_text())


@pytest.mark.parametrize("name", ["my model (1)", "a--b", "x.git", "-dash", "a..b"])
def test_a_folder_that_no_model_could_be_named_after_is_no_base_model(
    name: str, hub: HubServer, pair: Pair, tmp_path: Path
) -> None:
    base = shutil.copytree(pair[0], tmp_path / name)
    text = card.model_card(make_plan(base, pair[1]), 0.3, {})
    assert vars(ModelCard(text).data)["base_model"] == ["donor"]
    upload.check_card(text)


def test_a_card_that_is_no_yaml_is_refused(hub: HubServer) -> None:
    with pytest.raises(PushError, match="metadata are not valid"):
        upload.check_card("---\nlicense: [\n---\n# x\n")


def test_the_note_beside_a_pending_output_names_its_repository(
    hub: HubServer, pair: Pair, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    hub.faults = [Fault(COMMIT, "403")]
    assert run(*pair, "-o", out, "--alpha", "0.3", "--push-to-hub", REPO) == 2
    assert json.loads((out / PENDING).read_bytes())["repo"] == REPO
