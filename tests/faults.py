"""An HTTP proxy in front of a real server that misbehaves on demand, and tells what it was asked."""

from __future__ import annotations

import http.client
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

SLOW_DOWN: Final = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce</Message></Error>"
DENIED: Final = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
# Headers that belong to one connection and not to the request.
_HOP: Final = ("connection", "expect", "keep-alive", "transfer-encoding")


@dataclass
class Request:
    """What a client asked for."""

    method: str
    path: str
    """With its query."""
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class _Rule:
    method: str | None
    path: re.Pattern[str]
    times: int
    skip: int
    act: Callable[[_Handler, Request], bool]
    """Returns whether it has taken care of the request."""


@dataclass
class FaultyProxy:
    """Passes requests on to `upstream`, except where a rule says otherwise; the first one that applies counts."""

    upstream: tuple[str, int]
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0
    _rules: list[_Rule] = field(default_factory=list)
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that go in the middle are meant to
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def heal(self) -> None:
        """Forget all rules."""
        self._rules.clear()

    def paths(self, method: str | None = None) -> list[str]:
        """What was asked for, in order."""
        return [request.path for request in self.requests if method in (None, request.method)]

    # -----------------------------------------------------------------------------------------------------------
    # Rules: for requests whose path and query match a regular expression, after `skip` others, so many `times`

    def answer(self, status: int, body: bytes = b"", *, headers: dict[str, str] | None = None, **rule: object) -> None:
        """Answer with an error of the server's."""

        def act(handler: _Handler, request: Request) -> bool:
            handler.respond(status, {"Content-Type": "application/xml", **(headers or {})}, body)
            return True

        self._add(act, **rule)

    def slow_down(self, **rule: object) -> None:
        """Throttle, as S3 does."""
        self.answer(503, SLOW_DOWN, **rule)

    def cut(self, **rule: object) -> None:
        """Close the connection instead of an answer."""

        def act(handler: _Handler, request: Request) -> bool:
            handler.hang_up()
            return True

        self._add(act, **rule)

    def cut_body(self, **rule: object) -> None:
        """Close the connection in the middle of the answer's body."""

        def act(handler: _Handler, request: Request) -> bool:
            status, headers, body = self._forward(request)
            handler.respond(status, headers, body, sent=len(body) // 2)
            handler.hang_up()
            return True

        self._add(act, **rule)

    def stall(self, **rule: object) -> None:
        """Never answer."""

        def act(handler: _Handler, request: Request) -> bool:
            self._closing.wait()
            handler.hang_up()
            return True

        self._add(act, **rule)

    def gather(self, parties: int, *, timeout_s: float = 10, **rule: object) -> threading.Barrier:
        """Hold requests back until so many are there; the barrier is `broken` where they never were."""
        barrier = threading.Barrier(parties)

        def act(handler: _Handler, request: Request) -> bool:
            try:
                barrier.wait(timeout_s)
            except threading.BrokenBarrierError:
                handler.respond(500, {}, b"")
                return True
            return False

        self._add(act, **{"times": parties, **rule})
        return barrier

    def _add(
        self,
        act: Callable[[_Handler, Request], bool],
        *,
        method: str | None = None,
        path: str = "",
        times: int = 1_000_000,
        skip: int = 0,
    ) -> None:
        self._rules.append(_Rule(method, re.compile(path), times, skip, act))

    def handle(self, handler: _Handler, request: Request) -> None:
        with self._lock:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            rule = self._find_rule(request)
        try:
            if rule is None or not rule.act(handler, request):
                handler.respond(*self._forward(request))
        finally:
            with self._lock:
                self._at_once -= 1

    def _find_rule(self, request: Request) -> _Rule | None:
        for rule in self._rules:
            if rule.method in (None, request.method) and rule.path.search(request.path) and rule.times > 0:
                if rule.skip > 0:
                    rule.skip -= 1
                    continue
                rule.times -= 1
                return rule
        return None

    def _forward(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.upstream)
        try:
            headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
            connection.request(request.method, request.path, request.body, headers | {"Connection": "close"})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def _handle(self) -> None:
        try:
            request = Request(self.command, self.path, dict(self.headers.items()), self._read_body())
            self.proxy.handle(self, request)
        except OSError:  # the client has gone
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def respond(self, status: int, headers: dict[str, str], body: bytes, *, sent: int | None = None) -> None:
        """Answer with the first `sent` bytes of `body`, of which all are promised."""
        headers = {name: value for name, value in headers.items() if name.lower() not in _HOP}
        if self.command != "HEAD":
            headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
            headers["Content-Length"] = str(len(body))
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
            self.wfile.flush()

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
