"""Bodies received over bare connections, from a server that answers as each test dictates."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from lowmem_adamms.hub import plain_http as plain

HEAD = b"HTTP/1.1 200 OK\r\n"
Say = Callable[[socket.socket], None]


@contextmanager
def answering(*answers: Say, same: bool = False) -> Iterator[str]:
    """The address of a server that gives these answers, each on a connection of its own.

    same: all of them on one.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                connection = server.accept()[0] if same else None
                for answer in answers:
                    at = connection or server.accept()[0]
                    asked = b""
                    while not asked.endswith(b"\r\n\r\n"):
                        asked += at.recv(1)
                    answer(at)
                    if connection is None:
                        at.close()
                if connection:
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/file"


def received(url: str, size: int, timeout: float = 5.0) -> bytes:
    """What comes, in buffers of `size` bytes."""
    body, buffer = b"", bytearray(size)
    with plain.get(url, {}, timeout) as answer:
        while count := answer.receive(memoryview(buffer)):
            body += buffer[:count]
    return body


def sized(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_a_body_that_comes_in_drops_is_whole(size: int) -> None:
    body = bytes(range(256)) * 8

    def drip(at: socket.socket) -> None:
        raw = sized(body)
        for start in range(0, len(raw), 150):
            at.sendall(raw[start : start + 150])
            time.sleep(0.001)

    with answering(drip) as url:
        assert received(url, size) == body


def test_what_is_not_asked_for_yet_stays_for_the_next_answer() -> None:
    """Both answers may come in one packet, and in the buffer of the first one's head."""
    first, second = b"a" * 20_000, b"b" * 20_000
    with answering(
        lambda at: at.sendall(sized(first)), lambda at: at.sendall(sized(second)), same=True
    ) as url:
        assert received(url, 1 << 16) == first
        assert received(url, 1 << 16) == second


def test_a_chunked_body_is_its_content() -> None:
    chunks = [b"x" * 5000, b"y" * 3, b"z" * 70_000]
    raw = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    with answering(lambda at: at.sendall(head + raw)) as url:
        assert received(url, 10_000) == b"".join(chunks)


def test_a_body_of_unknown_length_ends_with_its_connection() -> None:
    body = b"q" * 30_000
    with answering(lambda at: at.sendall(HEAD + b"Connection: close\r\n\r\n" + body)) as url:
        assert received(url, 4096) == body


@pytest.mark.parametrize("before", [0, 100, 50_000])
def test_a_stall_is_said_after_the_time_that_was_given(before: int) -> None:
    done = threading.Event()

    def stall(at: socket.socket) -> None:
        at.sendall(HEAD + b"Content-Length: 60000\r\n\r\n" + b"s" * before)
        done.wait(10)

    with answering(stall) as url:
        body, buffer = 0, memoryview(bytearray(1 << 20))
        start = time.monotonic()
        with (
            pytest.raises(plain.TransportError, match=r"127\.0\.0\.1:\d+: "),
            plain.get(url, {}, 0.2) as answer,
        ):
            while count := answer.receive(buffer):
                body += count
        done.set()
    assert body == before
    assert time.monotonic() - start < 5


def test_a_connection_that_breaks_gives_what_came_before() -> None:
    def broken(at: socket.socket) -> None:
        at.sendall(HEAD + b"Content-Length: 60000\r\n\r\n" + b"s" * 40_000)

    with answering(broken) as url:
        assert received(url, 1 << 20) == b"s" * 40_000


def test_a_connection_that_was_closed_meanwhile_is_replaced() -> None:
    with answering(*[lambda at: at.sendall(sized(b"once"))] * 2) as url:
        assert received(url, 100) == b"once"
        assert received(url, 100) == b"once"
