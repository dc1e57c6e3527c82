"""The Hub behind TLS: over the client of huggingface_hub, which decides what is trusted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import run
from hub_server import HubServer, use

from lowmem_adamms import make_plan, merge
from lowmem_adamms.hub import client

IDS = ("org/base", "org/donor")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One that this machine signed itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the program openssl to make a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    files = folder / "certificate.pem", folder / "key.pem"
    argv = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    argv += ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext"]
    argv += ["subjectAltName=IP:127.0.0.1", "-out", str(files[0]), "-keyout", str(files[1])]
    subprocess.run(argv, check=True, capture_output=True)
    return files


@pytest.fixture
def server(
    tiny_models: dict[str, Path],
    certificate: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[HubServer]:
    """A Hub over TLS that nobody trusts yet; the client reads its settings anew."""
    from huggingface_hub import close_session

    monkeypatch.setattr(client, "FIRST_PAUSE", 0.001)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    with HubServer(certificate=certificate) as server:
        use(server, monkeypatch, tmp_path)
        for repo_id, family in zip(IDS, ("qwen2_vl", "llava_onevision"), strict=True):
            server.add(repo_id, tiny_models[family])
        close_session()
        yield server
    close_session()


def test_a_certificate_that_is_trusted_gives_the_bytes_of_the_local_merge(
    server: HubServer,
    certificate: tuple[Path, Path],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    assert server.endpoint.startswith("https:") and server.network.startswith("https:")
    assert run("plan", *IDS, "--no-cache") == 0
    assert "from the Hub: " in capsys.readouterr().out
    assert server.sent("donor/config.json") > 0
    server.fail("drop", ".safetensors?", after=1000, times=2)
    assert run(*IDS, "-o", tmp_path / "out", "--alpha", "0.3", "--no-cache") == 0
    pair = tiny_models["qwen2_vl"], tiny_models["llava_onevision"]
    local = merge(make_plan(*pair), 0.3, tmp_path / "local")
    for path in local.glob("model*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_a_certificate_that_is_not_is_one_line(
    server: HubServer, tmp_path: Path, capsys: Capture, command: str
) -> None:
    more = ("-o", tmp_path / "out", "--alpha", "0.3") if command == "merge" else ()
    assert run(command, *IDS, "--no-cache", *more) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith(
        f"error: org/base (no folder or file of that name here): cannot reach {server.endpoint} "
    )
    assert "certificate" in said.err and "SSL_CERT_FILE" in said.err
    assert not server.seen
    assert not (tmp_path / "out").exists()
