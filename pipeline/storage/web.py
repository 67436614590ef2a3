"""Web servers: whole files, read politely."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Final
from urllib.parse import unquote

import pyarrow as pa
import urllib3

from pipeline.errors import ReadError
from pipeline.storage.base import MAX_IMAGE_BYTES, Kind
from pipeline.storage.retry import TransientError

# At once from one process; a server that labels itself with a limit gets no more of our patience than it gives us.
MAX_CONNECTIONS_PER_HOST: Final = 8
CONNECT_TIMEOUT_S: Final = 10
# Without a byte for so long, a server is taken for dead; and one that drips bytes may take this long for all of them.
STALL_TIMEOUT_S: Final = 20
TOTAL_TIMEOUT_S: Final = 120
MAX_REDIRECTS: Final = 5
_CHUNK_BYTES: Final = 1 << 20


class WebStore:
    """Everything that `http://` and `https://` name. Nothing can be listed, and files are read whole."""

    def __init__(self) -> None:
        self._pool = urllib3.PoolManager(
            num_pools=64,
            maxsize=MAX_CONNECTIONS_PER_HOST,
            block=True,
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=STALL_TIMEOUT_S),
            # Our caller retries and counts; only redirects are followed here.
            retries=urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=MAX_REDIRECTS, total=None),
            headers={"User-Agent": "nightshift (image labelling; one file a request)", "Accept": "image/*, */*;q=0.5"},
        )

    def read(self, uri: str) -> bytes:
        deadline = time.monotonic() + TOTAL_TIMEOUT_S
        try:
            auth = urllib3.util.parse_url(uri).auth
            credentials = urllib3.make_headers(basic_auth=unquote(auth)) if auth else {}
            response = self._pool.request(
                "GET", uri, headers={**self._pool.headers, **credentials}, preload_content=False
            )
            try:
                content = _read_body(response, deadline)
            except BaseException:
                response.close()  # with bytes left to come, the connection is of no further use
                raise
            finally:
                response.release_conn()
            return content
        except urllib3.exceptions.MaxRetryError as error:
            if isinstance(error.reason, urllib3.exceptions.ResponseError):
                raise ReadError("TooManyRedirects", f"more than {MAX_REDIRECTS}") from error
            raise TransientError(str(error.reason), kind=type(error.reason).__name__) from error
        except ValueError as error:  # as urllib3's errors about addresses are
            raise ReadError("InvalidURL", str(error)) from error
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(str(error), kind=type(error).__name__) from error

    def open_file(self, uri: str) -> pa.NativeFile:
        return pa.BufferReader(self.read(uri))

    def find_kind(self, uri: str) -> Kind | None:
        return "file"


@lru_cache(maxsize=1)
def open_web() -> WebStore:
    """The one web client of this process, so that the limit for a host holds for all its threads."""
    return WebStore()


def _read_body(response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
    _check_status(response)
    if (size := response.headers.get("Content-Length", "")).isdecimal():
        _check_size(int(size))
    content = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):  # as much as is there already: it may come in drops
        content += chunk
        _check_size(len(content))
        if time.monotonic() > deadline:
            raise TransientError(f"it took longer than {TOTAL_TIMEOUT_S} s", kind="Timeout")
    return bytes(content)


def _check_size(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise ReadError("FileTooLarge", f"more bytes than the limit of {MAX_IMAGE_BYTES:,}")


def _check_status(response: urllib3.BaseHTTPResponse) -> None:
    if response.status == 200:
        return
    kind = f"HTTP{response.status}"
    if response.status in (408, 429) or response.status >= 500:
        asked = response.headers.get("Retry-After", "")
        wait_s = float(asked) if asked.isdecimal() else None
        raise TransientError(response.reason or "", kind=kind, retry_after_s=wait_s)
    raise ReadError(kind, response.reason or "")
