"""A file on the web comes back whole, or with the reason why not, whatever the server does; and politely."""

from __future__ import annotations

import gzip
import importlib
import threading
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from reading import fetch

from pipeline.errors import NoImagesError, ReadError
from pipeline.fetch import Fetcher
from pipeline.listing import Inputs
from pipeline.sources import ListingOptions, open_source
from pipeline.storage.web import MAX_CONNECTIONS_PER_HOST, MAX_REDIRECTS, open_web

web_module = importlib.import_module("pipeline.storage.web")

pytestmark = pytest.mark.usefixtures("waits")


class Server:
    """Calls the function that `pages` holds for a path; the others are its path as text."""

    def __init__(self) -> None:
        self.pages: dict = {}
        self.requests: list[BaseHTTPRequestHandler] = []
        self.closing = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.requests.append(self)
                try:
                    owner.pages.get(self.path, lambda handler: reply(handler, self.path.encode()))(self)
                except OSError:  # the client has gone
                    self.close_connection = True

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.block_on_close = False
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that go in the middle are meant to
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


def reply(handler, body: bytes = b"", *, status: int = 200, size: int | None = None, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body) if size is None else size))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(web_module, "STALL_TIMEOUT_S", 0.3)
    open_web.cache_clear()
    server = Server()
    yield server
    server.close()
    open_web.cache_clear()


def test_file_is_read(server):
    assert fetch(f"{server.url}/a.jpg") == (b"/a.jpg", 1)


def test_large_file_is_read_whole(server):
    content = bytes(range(256)) * 20_000
    server.pages["/a.jpg"] = lambda handler: reply(handler, content)
    assert fetch(f"{server.url}/a.jpg") == (content, 1)


def test_empty_file_is_empty(server):
    server.pages["/a.jpg"] = reply
    assert fetch(f"{server.url}/a.jpg") == (b"", 1)


@pytest.mark.parametrize("status", [204, 304, 400, 401, 403, 404, 410])
def test_refusal_is_a_failed_image_at_once(server, status):
    server.pages["/a.jpg"] = lambda handler: reply(handler, status=status)
    with pytest.raises(ReadError, match=f"^HTTP{status}: ") as raised:
        fetch(f"{server.url}/a.jpg")
    assert raised.value.attempts == 1 and len(server.requests) == 1


def test_refusals_do_not_use_up_the_connections(server):
    server.pages["/a.jpg"] = lambda handler: reply(handler, b"no such page", status=404)

    def ask_often() -> None:
        for _ in range(2 * MAX_CONNECTIONS_PER_HOST):
            with pytest.raises(ReadError):
                fetch(f"{server.url}/a.jpg")

    asking = threading.Thread(target=ask_often, daemon=True)
    asking.start()
    asking.join(10)
    assert not asking.is_alive()
    assert fetch(f"{server.url}/b.jpg") == (b"/b.jpg", 1)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_answer_that_may_change_is_asked_for_again(server, status):
    server.pages["/a.jpg"] = lambda handler: reply(handler, b"?", status=status if len(server.requests) < 3 else 200)
    assert fetch(f"{server.url}/a.jpg") == (b"?", 3)


def test_no_more_attempts_than_asked_for(server):
    server.pages["/a.jpg"] = lambda handler: reply(handler, status=503)
    with pytest.raises(ReadError, match=r"^HTTP503: Service Unavailable") as raised:
        fetch(f"{server.url}/a.jpg", retries=2)
    assert raised.value.attempts == len(server.requests) == 3


def test_refusal_after_failures_counts_them(server):
    server.pages["/a.jpg"] = lambda handler: reply(handler, status=503 if len(server.requests) < 3 else 404)
    with pytest.raises(ReadError, match="HTTP404") as raised:
        fetch(f"{server.url}/a.jpg")
    assert raised.value.attempts == 3


@pytest.mark.parametrize(("asked", "waited"), [("3", 3), ("0", 0), ("999999999", 20)])
def test_server_says_how_long_to_wait(server, waits, asked, waited):
    server.pages["/a.jpg"] = lambda handler: reply(
        handler, status=429 if len(server.requests) < 2 else 200, Retry_After=asked
    )
    fetch(f"{server.url}/a.jpg")
    assert waits == [waited]


@pytest.mark.parametrize("asked", ["Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-1", "1e9", "²", ""])
def test_wait_that_is_no_number_of_seconds_is_our_own(server, waits, asked):
    answers = iter([429, 200])
    server.pages["/a.jpg"] = lambda handler: (
        handler.send_response(next(answers)),
        handler.wfile.write(b"".join(handler._headers_buffer) + f"Retry-After: {asked}\r\n".encode()),
        handler.wfile.write(b"Content-Length: 0\r\n\r\n"),
        handler._headers_buffer.clear(),
    )
    fetch(f"{server.url}/a.jpg")
    assert len(waits) == 1 and waits[0] < 1


# ---------------------------------------------------------------------------------------------------------------
# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_followed(server, status):
    server.pages["/a.jpg"] = lambda handler: reply(handler, status=status, Location="/b.jpg")
    assert fetch(f"{server.url}/a.jpg") == (b"/b.jpg", 1)


def test_redirects_in_a_circle_are_a_failed_image_at_once(server):
    server.pages["/a.jpg"] = lambda handler: reply(handler, status=302, Location="/a.jpg")
    with pytest.raises(ReadError, match="TooManyRedirects") as raised:
        fetch(f"{server.url}/a.jpg")
    assert raised.value.attempts == 1 and len(server.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize("where", ["file:///etc/passwd", "s3://bucket/key", "http://["])
def test_redirect_leads_to_the_web_only(server, where):
    server.pages["/a.jpg"] = lambda handler: reply(handler, status=302, Location=where)
    with pytest.raises(ReadError, match="InvalidURL"):
        fetch(f"{server.url}/a.jpg", retries=0)


def test_redirect_to_nowhere_is_a_failed_image(server):
    server.pages["/a.jpg"] = lambda handler: reply(handler, status=302)
    with pytest.raises(ReadError, match="HTTP302"):
        fetch(f"{server.url}/a.jpg")


# ---------------------------------------------------------------------------------------------------------------
# Bodies


def test_body_that_was_cut_is_read_again(server):
    def cut_once(handler) -> None:
        reply(handler, b"content", size=7 if len(server.requests) > 1 else 100)
        handler.close_connection = True

    server.pages["/a.jpg"] = cut_once
    assert fetch(f"{server.url}/a.jpg") == (b"content", 2)


def send_chunk(handler, content: bytes) -> None:
    handler.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
    handler.wfile.flush()


def begin_chunks(handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()


def test_chunks_are_put_together(server):
    def answer(handler) -> None:
        begin_chunks(handler)
        for content in (b"one ", b"two ", b"three", b""):
            send_chunk(handler, content)

    server.pages["/a.jpg"] = answer
    assert fetch(f"{server.url}/a.jpg") == (b"one two three", 1)


def test_chunks_that_were_cut_are_no_file(server):
    def answer(handler) -> None:
        begin_chunks(handler)
        send_chunk(handler, b"one")
        handler.close_connection = True

    server.pages["/a.jpg"] = answer
    with pytest.raises(ReadError) as raised:
        fetch(f"{server.url}/a.jpg", retries=1)
    assert raised.value.attempts == 2


def test_server_that_stalls_is_given_up_and_asked_again(server):
    def answer(handler) -> None:
        if len(server.requests) == 1:
            server.closing.wait()
        reply(handler, b"content")

    server.pages["/a.jpg"] = answer
    assert fetch(f"{server.url}/a.jpg") == (b"content", 2)


def test_server_that_stalls_within_a_body_is_given_up(server):
    def answer(handler) -> None:
        reply(handler, b"half", size=8)
        server.closing.wait()

    server.pages["/a.jpg"] = answer
    with pytest.raises(ReadError, match="Timeout"):
        fetch(f"{server.url}/a.jpg", retries=0)


def test_server_that_drips_is_given_up_after_all(server, monkeypatch):
    monkeypatch.setattr(web_module, "TOTAL_TIMEOUT_S", 0.3)

    def answer(handler) -> None:
        reply(handler, size=1_000_000)
        for _ in range(100):
            server.closing.wait(0.02)
            handler.wfile.write(b".")

    server.pages["/a.jpg"] = answer
    with pytest.raises(ReadError, match="Timeout: it took longer"):
        fetch(f"{server.url}/a.jpg", retries=0)


def test_file_that_says_it_is_too_large_is_not_read(server, monkeypatch):
    monkeypatch.setattr(web_module, "MAX_IMAGE_BYTES", 1000)
    server.pages["/a.jpg"] = lambda handler: reply(handler, size=1001)  # and never a byte
    with pytest.raises(ReadError, match="FileTooLarge"):
        fetch(f"{server.url}/a.jpg")
    assert len(server.requests) == 1


def test_file_that_turns_out_too_large_is_given_up(server, monkeypatch):
    monkeypatch.setattr(web_module, "MAX_IMAGE_BYTES", 1000)

    def answer(handler) -> None:
        begin_chunks(handler)
        while not server.closing.is_set():
            send_chunk(handler, bytes(500))

    server.pages["/a.jpg"] = answer
    with pytest.raises(ReadError, match="FileTooLarge"):
        fetch(f"{server.url}/a.jpg")


def test_compressed_answer_is_decompressed(server):
    body = gzip.compress(b"content" * 1000)
    server.pages["/a.jpg"] = lambda handler: reply(handler, body, Content_Encoding="gzip")
    assert fetch(f"{server.url}/a.jpg") == (b"content" * 1000, 1)


def test_compressed_answer_that_swells_is_given_up(server, monkeypatch):
    monkeypatch.setattr(web_module, "MAX_IMAGE_BYTES", 100_000)
    body = gzip.compress(bytes(10_000_000))
    server.pages["/a.jpg"] = lambda handler: reply(handler, body, Content_Encoding="gzip")
    with pytest.raises(ReadError, match="FileTooLarge"):
        fetch(f"{server.url}/a.jpg")


def test_answer_that_is_not_compressed_as_it_says_is_a_failed_image(server):
    server.pages["/a.jpg"] = lambda handler: reply(handler, b"no gzip", Content_Encoding="gzip")
    with pytest.raises(ReadError, match="DecodeError"):
        fetch(f"{server.url}/a.jpg", retries=0)


# ---------------------------------------------------------------------------------------------------------------
# Addresses


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/a b.jpg", "/a%20b.jpg"),
        ("/é🦊.jpg", "/%C3%A9%F0%9F%A6%8A.jpg"),
        ("/%C3%A9.jpg", "/%C3%A9.jpg"),
        ("/a%2Fb.jpg", "/a%2Fb.jpg"),
        ("/a.jpg?size=1&b=%20c", "/a.jpg?size=1&b=%20c"),
        ("/a.jpg#part", "/a.jpg"),
        ("/a::b+c.jpg", "/a::b+c.jpg"),
        ("?q", "/?q"),
        ("", "/"),
    ],
)
def test_address_is_asked_for_as_it_is(server, path, asked):
    assert fetch(f"{server.url}{path}") == (asked.encode(), 1)


def test_name_and_password_of_an_address_are_sent(server):
    fetch(f"http://user:p%40ss@{server.host}/a.jpg")
    assert server.requests[0].headers["Authorization"] == f"Basic {b64encode(b'user:p@ss').decode()}"
    assert server.requests[0].path == "/a.jpg"


def test_program_says_who_it_is(server):
    fetch(f"{server.url}/a.jpg")
    assert "nightshift" in server.requests[0].headers["User-Agent"]


@pytest.mark.parametrize(
    "uri",
    ["http://", "http:///a.jpg", "http://[::1/a.jpg", "http://a:99999/", "http://a:b/", "http://a..b/", "http://%/"],
)
def test_address_that_is_none_is_a_failed_image_at_once(uri):
    with pytest.raises(ReadError) as raised:
        fetch(uri, retries=0)
    assert raised.value.kind in ("InvalidURL", "NoStore", "NameResolutionError")


def test_host_that_refuses_is_a_failed_image_that_says_so():
    with pytest.raises(ReadError, match=r"^NewConnectionError: .*refused") as raised:
        fetch("http://127.0.0.1:1/a.jpg", retries=2)
    assert raised.value.attempts == 3


def test_no_more_connections_to_a_host_than_agreed(server, monkeypatch):
    monkeypatch.setattr(web_module, "STALL_TIMEOUT_S", 10)  # read when the client is made
    lock, one_more, go_on = threading.Lock(), threading.Event(), threading.Event()
    num_asked = 0

    def answer(handler) -> None:
        nonlocal num_asked
        with lock:
            num_asked += 1
            mine = num_asked
        if mine == MAX_CONNECTIONS_PER_HOST:
            one_more.wait(0.3)
            go_on.set()
        elif mine > MAX_CONNECTIONS_PER_HOST and not go_on.is_set():
            one_more.set()
        go_on.wait(5)
        reply(handler)

    paths = [f"/{number}.jpg" for number in range(4 * MAX_CONNECTIONS_PER_HOST)]
    server.pages = dict.fromkeys(paths, answer)
    with ThreadPoolExecutor(len(paths)) as threads:
        list(threads.map(lambda path: fetch(f"{server.url}{path}", retries=0), paths))
    assert go_on.is_set() and not one_more.is_set()


# ---------------------------------------------------------------------------------------------------------------
# As an input


def test_address_as_an_input_is_refused_with_what_works():
    with pytest.raises(NoImagesError, match="manifest"):
        open_source("https://host/a.jpg", options=ListingOptions())


def test_address_in_a_manifest_is_fetched(server, tmp_path):
    (tmp_path / "a.csv").write_text(f"url,label\n{server.url}/a%20b.jpg,cat\n{server.url}/a.jpg?x#y,dog\n")
    images = list(Inputs((str(tmp_path / "a.csv"),), options=ListingOptions()).list_images())
    assert [image.target for image in images] == ["cat", "dog"]
    assert [get()[0] for _, get in Fetcher(retries=0).fetch(images)] == [b"/a%20b.jpg", b"/a.jpg?x"]
