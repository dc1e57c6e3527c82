"""Ranges of one file on the Hub, and a repository's files, whatever goes wrong on the way."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from hub_server import TOKEN, File, HubServer, make_certificate, use

from lowmem_adamms.errors import DigestError, HubError
from lowmem_adamms.hub import client
from lowmem_adamms.hub.remote_file import RemoteFile
from lowmem_adamms.hub.repository import Repository, download, fetch_files, open_repository

WEIGHTS, SMALL = "model.safetensors", "config.json"
CONTENT = {WEIGHTS: bytes(range(256)) * 400, SMALL: b'{"small": true}', "nested/a [1].txt": b"x"}
NETWORK = f"GET /network/.*{WEIGHTS}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENT.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "repository"


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        use(server, monkeypatch, tmp_path)
        server.add("org/name", folder)
        yield server


def opened(repo_id: str = "org/name", *, cache: bool = True) -> Repository:
    return open_repository(repo_id, None, cache=cache)


def weights() -> RemoteFile:
    return opened().files[WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, SMALL])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 14), (0, None)])
def test_a_range_is_the_files_bytes(
    server: HubServer, name: str, start: int, stop: int | None
) -> None:
    stop = stop or len(CONTENT[name])
    assert opened().files[name].read(start, stop) == CONTENT[name][start:stop]


def test_more_bytes_than_were_asked_for_are_left_alone(server: HubServer) -> None:
    file = weights()
    server.fail(NETWORK, "long", after=50, times=99)
    assert file.read(10, 1000) == CONTENT[WEIGHTS][10:1000]


def test_over_tls_too_if_the_certificate_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import close_session

    try:
        certificate = make_certificate(tmp_path)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    with HubServer(certificate) as server:
        use(server, monkeypatch, tmp_path)
        server.add("org/name", folder)
        close_session()  # the client reads its settings anew
        with pytest.raises(HubError, match=f"cannot reach {server.endpoint} .*SSL_CERT_FILE"):
            opened()
        assert not server.seen
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        close_session()
        server.fail(NETWORK, "drop", after=1000, times=2)
        assert weights().read(0, len(CONTENT[WEIGHTS])) == CONTENT[WEIGHTS]
        assert server.endpoint.startswith("https:") and server.network.startswith("https:")
    close_session()


# What passes


@pytest.mark.parametrize("after", [0, 1, 5000])
def test_a_broken_connection_goes_on_where_it_was(server: HubServer, after: int) -> None:
    file = weights()
    fault = server.fail(NETWORK, "drop", after=after, times=5)
    assert file.read(10, 90_000) == CONTENT[WEIGHTS][10:90_000]
    assert fault.times == 0
    stretches = server.served(f"org/name/{WEIGHTS}")
    assert [start for start, _ in stretches] == [10, *(stop for _, stop in stretches[:-1])]


@pytest.mark.parametrize("status", [503, 408, 429, None])
def test_what_fails_temporarily_is_tried_again(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    file = weights()
    how = {"kind": "status", "status": status} if status else {"kind": "silence"}
    fault = server.fail(NETWORK, times=3, **how)
    assert file.read(0, 50_000) == CONTENT[WEIGHTS][:50_000]
    assert fault.times == 0


def test_only_attempts_in_a_row_that_bring_nothing_are_counted(server: HubServer) -> None:
    file = weights()
    server.fail(NETWORK, "drop", after=100, times=3 * client.ATTEMPTS)
    assert file.read(0, 50_000) == CONTENT[WEIGHTS][:50_000]
    server.fail(NETWORK, "drop", times=client.ATTEMPTS)
    with pytest.raises(HubError, match=r"closed connection.*; run the same command again"):
        file.read(0, 50_000)
    assert not server.faults[-1].times


def test_an_error_of_this_machines_disk_is_left_as_it_is() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError) as raised:
        client.ask("org/name", Mock(side_effect=full))
    assert raised.value is full


def test_pauses_grow_to_a_limit() -> None:
    stop = Mock()
    stop.wait.return_value = False
    with pytest.raises(HubError, match=r"^org/name: x; run the same command again"):
        client.ask("org/name", Mock(side_effect=client.TemporaryError("x")), attempts=9, stop=stop)
    pauses = [call.args[0] for call in stop.wait.call_args_list]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 20, 20]


def test_an_address_that_expires_is_asked_for_anew(server: HubServer) -> None:
    file = weights()
    assert file.read(0, 10) == CONTENT[WEIGHTS][:10]
    server.signature += 1
    assert file.read(10, 20) == CONTENT[WEIGHTS][10:20]


def test_the_first_question_is_repeated(server: HubServer) -> None:
    fault = server.fail("GET /api/models/org/name", "status", status=502, times=2)
    assert opened().sha == server.repos["org/name"].sha
    assert fault.times == 0


# What does not pass


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("size", {}, "the server sends"),
        ("ignore", {}, "ignores ranges"),
        ("etag", {"skip": 1}, "changed while read"),
        ("status", {"times": 99}, "answers 503; run the same command again"),
        ("status", {"status": 418, "words": "a teapot."}, "answers 418: a teapot$"),
    ],
)
def test_what_is_not_the_file_is_an_error(
    server: HubServer, kind: str, options: dict[str, Any], message: str
) -> None:
    file = weights()
    server.fail(NETWORK, kind, **options)
    with pytest.raises(HubError, match=f"^org/name@{file.sha[:12]}: {WEIGHTS}: .*{message}"):
        for start in (1, 5000):
            file.read(start, start + 1000)


@pytest.mark.parametrize("what", ["commit", "ETag", "size"])
def test_another_commit_etag_or_size_is_an_error(server: HubServer, what: str) -> None:
    file = weights()
    repo = server.repos["org/name"]
    other = File(b"", 5, "0" * 40, "1" * 64)
    if what == "commit":
        repo.revisions[repo.sha] = "main"
        repo.commits[-1] = ("0" * 40, repo.files)
    else:
        repo.files[WEIGHTS] = other
        setattr(file, *(("size", 5) if what == "ETag" else ("etag", "1" * 64)))
    with pytest.raises(HubError, match=f"its {what} is"):
        file.read(0, 10)


def test_a_download_that_is_not_what_the_hub_says_is_removed(server: HubServer) -> None:
    repo = opened()
    path = repo.folder / WEIGHTS
    server.fail(NETWORK, "flip", times=99)
    with pytest.raises(DigestError, match=r"has the sha256 .*, the Hub says .*fetch it anew"):
        download(repo, [path])
    assert not path.exists() and not path.is_symlink()
    server.faults.clear()
    download(repo, [path])
    assert path.read_bytes() == CONTENT[WEIGHTS]
    received = server.sent()
    download(repo, [path])
    assert server.sent() == received
    repo.files[WEIGHTS].check_sha256(hashlib.sha256(CONTENT[WEIGHTS]).hexdigest())


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = opened()
    server.seen.clear()
    size = len(CONTENT[WEIGHTS])
    for free in (size - 1, size):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda path, usage=usage: usage)
        if free < size:
            with pytest.raises(HubError, match="102 kB free, org/name takes 102 kB"):
                download(repo, [repo.folder / WEIGHTS])
            assert not server.seen
    download(repo, [repo.folder / WEIGHTS])


def test_files_lie_where_the_cache_keeps_them_or_go_with_the_repository(
    server: HubServer, tmp_path: Path
) -> None:
    from huggingface_hub import snapshot_download

    kept = opened()
    fetch_files(kept, CONTENT)
    assert Path(snapshot_download("org/name", local_files_only=True)) == kept.folder
    assert {name: (kept.folder / name).read_bytes() for name in CONTENT} == CONTENT
    gone = opened(cache=False)
    folder = gone.folder
    assert (folder / SMALL).is_file() and tmp_path not in folder.parents
    del gone
    assert not folder.exists()


# Answers of a Hub that wishes ill


@pytest.mark.parametrize(
    "name", ["/abs", "a/../../x", "a\\..\\x", "nul\0", "", "a//b", "..", "line\nfeed", "\ud800"]
)
def test_a_file_name_that_leaves_its_folder_is_refused(server: HubServer, name: str) -> None:
    files = server.repos["org/name"].files
    files[name] = files[SMALL]
    with pytest.raises(HubError, match=r"^org/name: the Hub lists a file"):
        opened()


@pytest.mark.parametrize("size", [-1, "5", 1.5])
def test_a_size_that_is_none_is_refused(server: HubServer, size: Any) -> None:
    files = server.repos["org/name"].files
    files[SMALL] = replace(files[SMALL], size=size)
    with pytest.raises(HubError, match=r"^org/name: the Hub lists a file 'config.json' of"):
        opened()


@pytest.mark.parametrize("sha", ["../../x", "", "g" * 40, "0" * 39])
def test_a_commit_that_is_none_is_refused(server: HubServer, sha: str) -> None:
    repo = server.repos["org/name"]
    repo.commits[-1] = (sha, repo.files)
    with pytest.raises(HubError, match=r"^org/name: the Hub calls its commit .*expected 40 hex"):
        opened()


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/x", "ftp://x/y", "http://["])
@pytest.mark.parametrize("asked", ["GET /api/models/org/name", "HEAD /org/name/resolve"])
def test_a_redirect_elsewhere_is_one_line(server: HubServer, asked: str, place: str) -> None:
    server.fail(asked, "status", status=302, headers={"Location": place}, times=999)
    with pytest.raises(HubError, match=r"^org/name.*$"):
        opened().files[WEIGHTS].read(0, 10)


@pytest.mark.parametrize("answer", ["[]", "{}", '{"id": 3}', "null", '{"siblings": [{}]}'])
def test_an_answer_that_makes_no_sense_is_one_line(server: HubServer, answer: str) -> None:
    server.fail("GET /api/models/org/name", "status", status=200, words=answer, times=99)
    with pytest.raises(HubError, match=r"^org/name"):
        opened()


def test_the_token_stays_with_the_hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["org/name"].private = server.repos["org/name"].gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    files = opened().files
    for name in (SMALL, WEIGHTS):
        assert files[name].read(1, 10) == CONTENT[name][1:10]
    assert {seen.authorised for seen in server.seen} == {True, False}
    assert not any(seen.authorised for seen in server.seen if "/network/" in seen.line)
