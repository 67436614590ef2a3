"""Doing again what failed for a passing reason: a store that is busy, a connection that dropped, a dying disk."""

from __future__ import annotations

import contextlib
import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeGuard, TypeVar

from pipeline.errors import PipelineError, ReadError
from pipeline.secrets import mask

Value = TypeVar("Value")

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 20.0

# Network file systems and dying disks answer so.
_TRANSIENT: Final = {
    errno.EIO,
    errno.EAGAIN,
    errno.EINTR,
    errno.ETIMEDOUT,
    errno.ESTALE,
    errno.ENETUNREACH,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EPIPE,
}
# How pyarrow words what a store answered; a HEAD request has no body, so only its status tells.
_TRANSIENT_ANSWER: Final = re.compile(
    r"AWS Error (SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|NETWORK_CONNECTION|REQUEST_TIMEOUT|THROTTLING)"
    r"|HTTP status (5\d\d|429|408)"
    r"|Status\((UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|ABORTED)"
)
_ANSWER: Final = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))?|Status\((\w+)")


class StoreError(OSError):
    """What a store answered, where its library has exceptions of its own."""

    def __init__(self, message: str, *, kind: str | None = None) -> None:
        """`kind` is what went wrong in one word."""
        super().__init__(message)
        self.kind = kind or type(self).__name__


class TransientError(StoreError):
    """A store says that it would do better a little later, perhaps with how many seconds later."""

    def __init__(self, message: str, *, kind: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, kind=kind)
        self.retry_after_s = retry_after_s


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
    """Turn what the libraries behind pyarrow and fsspec raise of their own into OSErrors."""
    try:
        yield
    except (OSError, PipelineError):
        raise
    except ImportError as error:
        raise StoreError(str(error), kind="MissingLibrary") from error
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        raise StoreError(str(error), kind="UnsupportedURI") from error
    except Exception as error:  # of a connection, mostly
        raise TransientError(str(error), kind=type(error).__name__) from error


def retry(action: Callable[[], Value], *, retries: int) -> tuple[Value, int]:
    """The value of `action`, and how many attempts it took.

    An error that may pass is waited for, longer each time; the last one is raised, with `attempts` set on it, as on
    the ReadError of an image that is not to be had.
    """
    attempt = 1
    while True:
        try:
            return action(), attempt
        except ReadError as error:
            error.attempts = attempt
            raise
        except OSError as error:
            error.attempts = attempt  # type: ignore[attr-defined]
            if attempt > retries or not is_transient(error):
                raise
            asked_s = getattr(error, "retry_after_s", None)
            # Half of it by chance, so that a thousand workers do not come back at the same moment.
            backoff_s = min(FIRST_BACKOFF_S * 2 ** (attempt - 1), MAX_BACKOFF_S) * random.uniform(0.5, 1.0)
            time.sleep(backoff_s if asked_s is None else min(asked_s, MAX_BACKOFF_S))
        attempt += 1


def is_transient(error: OSError) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, TransientError | TimeoutError) or error.errno in _TRANSIENT:
        return True
    return error.errno is None and _TRANSIENT_ANSWER.search(str(error)) is not None


def is_from_store(error: Exception) -> TypeGuard[OSError]:
    """Whether an error is about reading a file, and not about what stands in it.

    Those have a number, or attempts that `retry` counted; what a library finds wrong with the content has neither.
    """
    return isinstance(error, OSError) and (error.errno is not None or hasattr(error, "attempts"))


def describe(error: OSError) -> tuple[str, str]:
    """What went wrong, as a type in one word and a message: `AccessDenied` where a store gave that answer."""
    message = mask(" ".join((error.strerror or str(error)).split()))  # some answers have several lines, or addresses
    if isinstance(error, StoreError):
        return error.kind, message
    if answer := _ANSWER.search(message):
        code, status, google = answer.groups()
        if status is not None:
            return f"HTTP{status}", message
        return "".join(word.capitalize() for word in (code or google).split("_")), message
    return type(error).__name__, message


def to_read_error(error: OSError) -> ReadError:
    """The same as the reason why an image cannot be had, with the attempts that it took to find out."""
    return ReadError(*describe(error), attempts=getattr(error, "attempts", 1))
