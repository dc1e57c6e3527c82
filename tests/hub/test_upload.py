"""What arrives on the Hub, and what is left when it does not: against a server on this machine."""

from __future__ import annotations

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import run
from hub_server import TOKEN, Fault, HubServer, Repo, person, use
from huggingface_hub import constants

from lowmem_adamms import make_plan, merge
from lowmem_adamms.errors import PushError
from lowmem_adamms.hub import client
from lowmem_adamms.hub.upload import Upload
from lowmem_adamms.merging import model_card, writer
from lowmem_adamms.merging.journal import PENDING, is_pending
from lowmem_adamms.merging.verify import verify
from lowmem_adamms.settings import UploadSettings

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
REPO = "lab/merged"
PUT = "PUT /lfs/"
COMMIT = r"POST .*/commit/main"
FOREVER = 10**6
TO_REPO = UploadSettings(push_to_hub=REPO)
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
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that takes uploads."""
    with HubServer() as server:
        use(server, monkeypatch, tmp_path, TOKEN)
        yield server


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def words(pair: Pair, out: Path) -> tuple[object, ...]:
    """A merge that is pushed."""
    return (*pair, "-o", out, "--alpha", "0.3", "--push-to-hub", REPO)


def add_repo(hub: HubServer, files: dict[str, bytes] | None = None, **how: bool) -> Repo:
    """A repository with the Hub's first commit, and perhaps one more."""
    repo = hub.add(REPO, {".gitattributes": b"x"}, **how)
    if files:
        repo.commit({".gitattributes": b"x"} | files)
    return repo


def contents(folder: Path) -> dict[str, bytes]:
    """The visible files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def on_main(hub: HubServer) -> dict[str, bytes]:
    return hub.repos[REPO].contents


def shard_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def assert_one_error(capsys: Capture, words: str) -> str:
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert error == lines[-1]
    assert re.search(words, error), error
    return error


# What arrives


def test_a_merge_arrives_whole_and_in_one_commit(
    hub: HubServer, words: tuple[object, ...], merged: Path, out: Path, capsys: Capture
) -> None:
    assert run(*words) == 0
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2 and not repo.private
    assert on_main(hub) == contents(out) == contents(merged)
    large = {name for name, file in repo.files.items() if file.sha256}
    assert {name for name in repo.files if name.endswith(".safetensors")} == large
    assert len(hub.asked(PUT)) == len(set(hub.asked(PUT))) == len(large) > 1
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    said = capsys.readouterr()
    assert "error" not in said.err
    assert said.out.splitlines()[1] == f"{hub.endpoint}/{REPO}: {len(contents(out))} files"


def test_the_merge_goes_on_while_a_shard_is_sent_and_main_stays_empty(
    hub: HubServer, words: tuple[object, ...], out: Path
) -> None:
    hub.fail(PUT, "silence", times=FOREVER)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(*words)))
    thread.start()
    try:
        assert hub.reached.wait(60)
        wait_for_complete(out)
        assert verify(out).shards > 1
        assert not hub.asked(COMMIT) and on_main(hub) == {}
    finally:
        hub.faults.clear()
        hub.released.set()
        thread.join()
    assert codes == [0]
    assert on_main(hub) == contents(out)


def test_every_file_is_sent_and_counted_once(hub: HubServer, copy: Path) -> None:
    """Also the one that is under way in the background at the end; its first try is dropped."""
    hub.fail(PUT, "silence")
    shards = sorted(copy.glob("*.safetensors"))
    told: list[int] = []
    with Upload(copy, TO_REPO) as upload:
        upload.begin()
        upload.add_shard(shards[0])
        assert hub.reached.wait(60)
        threading.Timer(0.2, hub.released.set).start()
        assert upload.finish(told.append) == len(contents(copy))
    assert sum(told) == sum(map(len, contents(copy).values()))
    assert len(hub.asked(PUT)) == 1 + sum(bool(f.sha256) for f in hub.repos[REPO].files.values())
    assert len(hub.asked("preupload")) == len(contents(copy))


def test_prompts_and_answers_of_a_search_stay_here(hub: HubServer, copy: Path) -> None:
    for name in ("report.html", "answers.jsonl", "nested/thing.json", "empty.txt", ".notes"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("" if name == "empty.txt" else name)
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
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{hub.endpoint}/{REPO}: {len(on_main(hub))} files"


@pytest.mark.parametrize("kind", ["push", "merge"])
def test_replacing_deletes_what_was_there_in_the_same_commit(
    kind: str, hub: HubServer, words: tuple[object, ...], copy: Path, out: Path, capsys: Capture
) -> None:
    config = (copy / "config.json").read_bytes()
    add_repo(hub, {"model-00001-of-00009.safetensors": b"old", "config.json": config, "x/y": b"y"})
    command = ("push", copy, REPO) if kind == "push" else words
    assert run(*command) == 2
    assert_one_error(capsys, "holds other files .*--replace-repo")
    assert run(*command, "--replace-repo") == 0
    assert on_main(hub) == contents(copy if kind == "push" else out)
    assert len(hub.repos[REPO].commits) == 3


# What is refused before anything is written

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "bad name": ({"repo": "lab/a..b"}, "not the name of a repository"),
    "no owner": ({"repo": "merged"}, "ada's and can write to ada, lab, not merged"),
    "offline": ({"offline": True}, "HF_HUB_OFFLINE is set"),
    "no token": ({"token": None}, "no token .*HF_TOKEN.*hf auth login"),
    "unknown token": ({"token": "stale"}, "the token: .* answers 401.*hf auth login"),
    "reader": ({"me": person("ada", {"lab": "read"})}, "may only read in lab"),
    "read token": ({"me": person("ada", {"lab": "write"}, role="read")}, "may only read in lab"),
    "refused": ({"me": person("ada", {"lab": "write"}, denied=True)}, "answers 403: You don't"),
    "closed": (
        {"me": person("ada", {"lab": "write"}, denied=True), "there": {}},
        "answers 403: You don't",
    ),
    "not empty": ({"there": {"config.json": b"{}"}}, "holds other files .config.json"),
    "public": ({"there": {}, "more": ["--private"]}, "is public"),
    "drops": ({"fault": Fault("whoami", "hang up")}, "the token: cannot reach .*disconnect"),
    "nonsense": (
        {"fault": Fault("whoami", "status", status=200, words="{nonsense")},
        "makes no sense .JSONDecode",
    ),
    "a list": ({"me": ["ada"]}, "the token: .* makes no sense"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_pushed_is_refused_before_anything_is_written(
    name: str,
    hub: HubServer,
    pair: Pair,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    how, message = REFUSALS[name]
    hub.faults = [replace(how["fault"], times=FOREVER)] if "fault" in how else []
    hub.tokens[TOKEN] = how.get("me", hub.tokens[TOKEN])
    if "there" in how:
        add_repo(hub, how["there"])
    if "token" in how:
        monkeypatch.setattr("huggingface_hub.get_token", lambda: how["token"])
        monkeypatch.setenv("HF_TOKEN", str(how["token"]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", "offline" in how)
    before = {name: list(repo.commits) for name, repo in hub.repos.items()}
    target, more = how.get("repo", REPO), how.get("more", [])
    assert run(*pair, "-o", out, "--alpha", "0.3", "--push-to-hub", target, *more) == 2
    assert_one_error(capsys, message)
    assert not out.exists()
    assert {name: repo.commits for name, repo in hub.repos.items()} == before
    assert not hub.asked("PUT|commit")


@pytest.mark.parametrize("option", ["--private", "--replace-repo"])
def test_options_of_a_push_need_one(option: str, pair: Pair, out: Path, capsys: Capture) -> None:
    assert run(*pair, "-o", out, "--alpha", "0.3", option) == 2
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
    Fault("whoami", "status"),
    Fault("POST /api/repos/create", "lost"),
    Fault("preupload", "status", status=200, words="{nonsense"),
    Fault("objects/batch", "status", status=429),
    Fault(PUT, "status", 6, status=500),  # one whole attempt of huggingface_hub
    Fault(PUT, "hang up", 2, after=70_000),
    Fault(COMMIT, "status"),
    Fault(COMMIT, "lost"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.pattern} {fault.kind}")
def test_what_fails_temporarily_is_tried_again(fault: Fault, hub: HubServer, copy: Path) -> None:
    hub.faults = [replace(fault)]
    assert run("push", copy, REPO) == 0
    assert hub.faults[0].times == 0
    assert on_main(hub) == contents(copy)
    assert len(hub.repos[REPO].commits) == 2


def test_an_upload_that_fails_leaves_the_output_and_says_how_to_finish(
    hub: HubServer, words: tuple[object, ...], out: Path, capsys: Capture
) -> None:
    hub.fail("PUT", "status", times=FOREVER)
    assert run(*words) == 2
    line = assert_one_error(capsys, f"the output is complete at {re.escape(str(out))}")
    assert verify(out).shards > 1
    assert on_main(hub) == {}
    assert json.loads((out / PENDING).read_bytes())["repo"] == REPO
    again = re.search(r"python -m lowmem_adamms (push .*)", line)
    assert again
    hub.faults.clear()
    assert run(*again[1].split()) == 0
    assert on_main(hub) == contents(out)
    assert not (out / PENDING).exists()


def test_what_could_not_be_sent_in_the_background_is_sent_at_the_end(
    hub: HubServer, copy: Path
) -> None:
    fault = hub.fail(PUT, "status", status=500, times=6 * client.FEW_ATTEMPTS)
    with Upload(copy, TO_REPO) as upload:
        upload.begin()
        upload.add_shard(sorted(copy.glob("*.safetensors"))[0])
        while fault.times:
            time.sleep(0.01)
        upload.finish()
    assert on_main(hub) == contents(copy)


def test_a_no_of_the_hub_is_not_asked_for_twice(
    hub: HubServer, copy: Path, capsys: Capture
) -> None:
    hub.fail(COMMIT, "status", status=403, times=FOREVER)
    assert run("push", copy, REPO, "--private", "--replace-repo") == 2
    assert_one_error(capsys, "push .*/copy lab/merged --private --replace-repo$")
    assert len(hub.asked(COMMIT)) == 1


@pytest.mark.parametrize("pattern", [PUT, COMMIT])
def test_an_upload_that_stalls_ends(
    hub: HubServer, copy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """huggingface_hub alone waits for ever."""
    monkeypatch.setattr(client, "STALL_SECONDS", 0.1)
    hub.fail(pattern, "silence", times=FOREVER, after=100)
    assert run("push", copy, REPO) == 2
    line = assert_one_error(capsys, "sent or took nothing for too long")
    assert f"the output is complete at {copy}" in line
    assert on_main(hub) == {}
    hub.faults = [Fault(pattern, "silence")]
    assert run("push", copy, REPO) == 0
    assert on_main(hub) == contents(copy)


def test_the_same_command_finishes_an_upload_and_no_other_does(
    hub: HubServer, pair: Pair, words: tuple[object, ...], out: Path, capsys: Capture
) -> None:
    hub.fail(COMMIT, "status", status=403, words="quota exceeded")
    assert run(*words) == 2
    assert_one_error(capsys, "answers 403: quota exceeded;")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    puts = hub.asked(PUT)
    assert run(*pair, "-o", out, "--alpha", "0.3") == 2
    assert_one_error(capsys, "complete and waits for its upload")
    assert run(*pair, "-o", out, "--alpha", "0.4", "--push-to-hub", REPO) == 2
    assert_one_error(capsys, "a merge of other inputs or options that waits for its upload")
    assert run(*words) == 0
    assert on_main(hub) == contents(out)
    assert hub.asked(PUT) == puts
    assert all(path.stat().st_mtime_ns == before[path] for path in out.iterdir())


def test_somebody_elses_commit_is_not_overwritten(hub: HubServer, copy: Path) -> None:
    repo = add_repo(hub)
    with Upload(copy, TO_REPO) as upload:
        upload.check()
        repo.commit({"config.json": b"theirs"})
        with pytest.raises(PushError, match="has happened since"):
            upload.finish()
    assert repo.contents == {"config.json": b"theirs"}


def cut_short(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_merge_cut_short_resumes_and_sends_no_shard_twice(
    hub: HubServer, words: tuple[object, ...], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_when_a_shard_arrived(*_: object) -> None:
        deadline = time.monotonic() + 60
        while not hub.objects and time.monotonic() < deadline:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_papers", cut_when_a_shard_arrived)
        assert run(*words) == 130
    sent = set(hub.objects)
    assert sent and on_main(hub) == {}
    assert not (out / INDEX).exists()
    assert run(*words) == 0
    assert on_main(hub) == contents(out)
    assert all(len(hub.asked(f"PUT /lfs/{sha256}")) == 1 for sha256 in sent)


def test_without_a_push_a_resumed_merge_waits_for_none(
    hub: HubServer,
    pair: Pair,
    words: tuple[object, ...],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_papers", cut_short)
        assert run(*words) == 130
    assert run(*words[:-2]) == 0
    assert not (out / PENDING).exists()
    assert not is_pending(out)


def wait_for_complete(out: Path) -> None:
    """Until everything is at its place, which the work folder's end says."""
    deadline = time.monotonic() + 60
    while not (out / INDEX).exists() or (out / ".partial").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_upload_resumes_where_it_was(
    kill: signal.Signals, hub: HubServer, words: tuple[object, ...], out: Path
) -> None:
    hub.fail(PUT, "silence", times=FOREVER, skip=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "lowmem_adamms", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert hub.reached.wait(60)
    wait_for_complete(out)
    process.send_signal(kill)
    _, err = process.communicate(timeout=60)
    if kill == signal.SIGINT:
        assert process.returncode == 130
        assert err.endswith("interrupted: run the same command again to resume\n")
    hub.faults.clear()
    assert on_main(hub) == {}
    (arrived,) = hub.objects
    assert run(*words) == 0
    assert on_main(hub) == contents(out)
    assert len(hub.asked(f"PUT /lfs/{arrived}")) == 1


# The card


def test_a_card_that_the_hub_refuses_is_one_line(
    hub: HubServer, copy: Path, capsys: Capture
) -> None:
    answer = '{"errors": [{"message": "base_model: no id"}], "warnings": []}'
    hub.fail("validate-yaml", "status", status=400, words=answer)
    assert run("push", copy, REPO) == 2
    assert_one_error(capsys, "Invalid metadata in README.md. - base_model: no id; the output is")
    assert len(hub.asked("validate-yaml")) == 1


@pytest.mark.parametrize("name", ["my model (1)", "a--b", "x.git", "-dash", "a..b"])
def test_a_folder_that_no_model_could_be_named_after_is_no_base_model(
    name: str, pair: Pair, tmp_path: Path
) -> None:
    (tmp_path / name).symlink_to(pair[0])
    card = model_card.make_card(make_plan(tmp_path / name, pair[1]), 0.3, {})
    assert 'base_model:\n- "donor"\nbase_model_relation' in card
