"""Fetching of images: one deadline, linear time, only the hosts that may be asked, nothing private in errors."""

import asyncio
import contextlib
import gzip
import ipaddress
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import CHECKPOINT, picture
from transformers import AutoProcessor

from minimind_v import downloading_minimind_v as downloading
from minimind_v.downloading_minimind_v import download
from minimind_v.image_loading_minimind_v import load_image

LOOPBACK = ["127.0.0.1"]
HEAD = b"HTTP/1.1 200 OK\r\n"


@contextlib.contextmanager
def server(*pieces, pause=0.0, repeat=b""):
    """A real server that sends the pieces, then `repeat` for ever; yields its URL and the requests it has read."""
    requests, stopped = [], threading.Event()

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            requests.append(connection.recv(65536))
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            while repeat and not stopped.is_set():
                connection.sendall(repeat)
                time.sleep(pause)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/image.png", requests
        finally:
            stopped.set()


def ok(content, *headers):
    lines = [f"Content-Length: {len(content)}".encode(), *headers]
    return HEAD + b"\r\n".join(lines) + b"\r\n\r\n" + content


def redirect(location):
    return b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location.encode() + b"\r\n\r\n"


@pytest.mark.parametrize(
    "pieces, repeat",
    [
        ([HEAD], b"X-Drip: 1\r\n"),
        ([], b"HTTP/1.1 100 Continue\r\n\r\n"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n"], b"1\r\nx\r\n"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n"], b"0"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"], b"X-Trailer: 1\r\n"),
        ([HEAD + b"Content-Length: 1000000\r\n\r\n"], b"x"),
        ([], b""),
    ],
    ids=["headers", "continue", "chunks", "chunk size", "trailers", "content", "nothing"],
)
def test_one_deadline_for_the_whole_download(pieces, repeat, monkeypatch):
    monkeypatch.setattr(downloading, "TIMEOUT", 1)
    with server(*pieces, pause=0.05, repeat=repeat) as (url, _):
        start = time.monotonic()
        with pytest.raises(ValueError, match="image cannot be downloaded: "):
            download(url, allowed_hosts=LOOPBACK)
        assert time.monotonic() - start < 10


def test_large_and_too_large(monkeypatch):
    content = bytes(range(256)) * 2**18  # 64 MiB
    with server(ok(content)) as (url, _):
        assert download(url, allowed_hosts=LOOPBACK) == content
    with server(ok(content + b"x")) as (url, _), pytest.raises(ValueError, match="more than 67108864 bytes"):
        download(url, allowed_hosts=LOOPBACK)
    bomb = gzip.compress(bytes(2**28))
    with (
        server(ok(bomb, b"Content-Encoding: gzip")) as (url, _),
        pytest.raises(ValueError, match="more than 67108864"),
    ):
        download(url, allowed_hosts=LOOPBACK)


def test_redirects():
    with server(ok(b"content")) as (target, _):
        with server(redirect(target)) as (url, _):
            assert download(url, allowed_hosts=LOOPBACK) == b"content"
        elsewhere = target.replace("127.0.0.1", "localhost")
        with (
            server(redirect(elsewhere)) as (url, _),
            pytest.raises(ValueError, match="its host is not an allowed one"),
        ):
            download(url, allowed_hosts=LOOPBACK)
    for location in ("ftp://127.0.0.1/image.png", "file:///etc/passwd", "data:image/png;base64,AAAA"):
        with server(redirect(location)) as (url, _), pytest.raises(ValueError, match="something else than http"):
            download(url, allowed_hosts=LOOPBACK)
    with server(redirect("/image.png")) as (url, requests):
        with pytest.raises(ValueError, match="redirected more than 5 times"):
            download(url, allowed_hosts=LOOPBACK)
        assert len(requests) == 6


@pytest.mark.parametrize("allowed, message", [(None, "private address"), ((), "switched off"), (["a.org"], "allowed")])
def test_hosts_that_are_not_asked(allowed, message):
    with server(ok(b"content")) as (url, requests):
        with pytest.raises(ValueError, match=message):
            download(url, allowed_hosts=allowed)
        assert not requests


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "0.0.0.0",
        "10.0.0.1",
        "169.254.169.254",
        "192.168.1.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "2130706433",
    ],
)
def test_private_addresses_in_every_form(host):
    with pytest.raises(ValueError, match="private address"):
        download(f"http://{host}:9/image.png")


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::101:101", "2002:101:101::"])
def test_public_addresses(address):
    assert downloading.is_public(ipaddress.ip_address(address))


def test_names_of_hosts():
    with server(ok(b"content")) as (url, _):
        local = url.replace("127.0.0.1", "localhost")
        for name in ("LOCALHOST", "localhost."):
            assert download(local, allowed_hosts=[name]) == b"content"
            assert download(local.replace("localhost", name), allowed_hosts=["localhost"]) == b"content"
        with pytest.raises(ValueError, match="not an allowed one"):
            download(local, allowed_hosts="www.localhost.org")  # one name, not a part of it


def test_a_name_that_is_looked_up_for_ever(monkeypatch):
    monkeypatch.setattr(downloading, "TIMEOUT", 1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(15))
    start = time.monotonic()
    with pytest.raises(ValueError, match="more than 1 seconds"):
        download("http://slow.example/a.png")
    assert time.monotonic() - start < 10


def test_a_hanging_server_does_not_stop_other_threads(monkeypatch):
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    processor.allowed_hosts = LOOPBACK
    monkeypatch.setattr(downloading, "TIMEOUT", 8)

    def fetch(url):
        with pytest.raises(ValueError, match="cannot be downloaded"):
            processor(text="<|image_pad|>", images=url)

    for_ever = b"HTTP/1.1 100 Continue\r\n\r\n"
    with server(pause=0.1, repeat=for_ever) as (url, requests), ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(fetch, url)
        while not requests:
            time.sleep(0.01)
        assert processor(text="<|image_pad|>", images=picture())["pixel_values"] is not None
        assert not hanging.done()
    hanging.result()


def test_errors_hold_no_secrets():
    broken_png = b"\x89PNG\r\n\x1a\n\0\0\0\x01SECRET" * 9
    for answer in (
        ok(broken_png),
        b"SECRET nonsense\r\n\r\n",
        b"HTTP/1.1 404 SECRET\r\nX: SECRET\r\n\r\nSECRET",
        redirect("http://[SECRET"),
    ):
        with server(answer) as (url, _):
            address = url.replace("http://", "http://user:PASSWORD@") + "?token=TOKEN#FRAGMENT"
            with pytest.raises(ValueError) as caught:
                load_image(address, allowed_hosts=LOOPBACK)
            error = caught.value
            text = f"{error}{error.__context__}{error.__cause__}"
            assert "cannot be " in text and url in text
            assert not any(word in text for word in ("SECRET", "PASSWORD", "TOKEN", "FRAGMENT"))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a",
        "http://no-such-host.invalid/a",
        "http://[::1/a",
        f"http://{'a' * 70}/",
        "http://127.0.0.1:99999/a",
    ],
)
def test_addresses_that_lead_nowhere(url):
    with pytest.raises(ValueError, match="image cannot be downloaded"):
        download(url, allowed_hosts=None if "invalid" in url else ["127.0.0.1", "a" * 70])


def test_inside_a_running_event_loop():
    async def ask(url):
        return download(url, allowed_hosts=LOOPBACK)

    with server(ok(b"content")) as (url, _):
        assert asyncio.run(ask(url)) == b"content"
