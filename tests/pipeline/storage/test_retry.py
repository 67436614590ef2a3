"""What may pass is tried again, with longer and longer waits; what lasts is told at once."""

from __future__ import annotations

import errno
import os

import pytest

from pipeline.errors import ReadError
from pipeline.storage.retry import MAX_BACKOFF_S, TransientError, as_os_errors, describe, is_transient, retry


def fail_with(*errors: Exception):
    """An action that raises these one after the other, and then gives its number."""
    left = list(errors)

    def act() -> str:
        if left:
            raise left.pop(0)
        return "value"

    return act


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


# ---------------------------------------------------------------------------------------------------------------
# Trying again


def test_value_comes_with_the_number_of_attempts(waits):
    assert retry(fail_with(), retries=0) == ("value", 1)
    assert retry(fail_with(os_error(errno.EIO), os_error(errno.ESTALE)), retries=2) == ("value", 3)


def test_last_error_is_raised_with_its_attempts(waits):
    with pytest.raises(OSError, match="Stale") as caught:
        retry(fail_with(os_error(errno.EIO), os_error(errno.EIO), os_error(errno.ESTALE)), retries=2)
    assert caught.value.attempts == 3
    assert len(waits) == 2


def test_without_retries_the_first_error_is_raised_at_once(waits):
    with pytest.raises(OSError) as caught:
        retry(fail_with(os_error(errno.EIO)), retries=0)
    assert caught.value.attempts == 1
    assert waits == []


def test_lasting_error_is_not_tried_again(waits):
    with pytest.raises(PermissionError) as caught:
        retry(fail_with(os_error(errno.EACCES)), retries=3)
    assert caught.value.attempts == 1
    assert waits == []


def test_lasting_error_after_a_passing_one_counts_both_attempts(waits):
    for last in (os_error(errno.ENOENT), ReadError("HTTP404", "Not Found")):
        with pytest.raises(type(last)) as caught:
            retry(fail_with(os_error(errno.EIO), last), retries=3)
        assert caught.value.attempts == 2


def test_error_that_is_no_store_s_is_not_caught(waits):
    with pytest.raises(KeyError):
        retry(fail_with(KeyError("a bug")), retries=3)
    assert waits == []


def test_waits_grow_and_end_at_a_limit(waits):
    retry(fail_with(*[os_error(errno.EIO)] * 20), retries=20)
    assert 0 < waits[0] <= 0.1
    assert all(later > sooner for sooner, later in zip(waits[:7:2], waits[2:7:2], strict=False))
    assert max(waits) <= MAX_BACKOFF_S < 2 * min(waits[10:])


def test_waits_differ_by_chance(waits):
    for _ in range(20):
        retry(fail_with(os_error(errno.EIO)), retries=1)
    assert len(set(waits)) > 10


@pytest.mark.parametrize(("asked_s", "waited_s"), [(3.0, 3.0), (0.0, 0.0), (86_400.0, MAX_BACKOFF_S)])
def test_store_that_says_how_long_is_believed_within_reason(waits, asked_s, waited_s):
    retry(fail_with(TransientError("busy", retry_after_s=asked_s)), retries=1)
    assert waits == [waited_s]


# ---------------------------------------------------------------------------------------------------------------
# What may pass


@pytest.mark.parametrize(
    "error",
    [
        *map(os_error, (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE, errno.EAGAIN)),
        TimeoutError("timed out"),
        TransientError("HTTP 503"),
        OSError("When reading: AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate."),
        OSError("AWS Error UNKNOWN (HTTP status 500) during HeadObject operation: No response body."),
        OSError("AWS Error UNKNOWN (HTTP status 429) during ListObjectsV2 operation"),
        OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56, Failure when receiving"),
        OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)"),
    ],
)
def test_error_may_pass(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        *map(os_error, (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR)),
        OSError("AWS Error ACCESS_DENIED during GetObject operation: Access Denied"),
        OSError("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation"),
        OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."),
        OSError("google::cloud::Status(PERMISSION_DENIED: no)"),
        OSError(errno.ENOENT, "No such file", "AWS Error SLOW_DOWN.jpg"),  # the name of a file says nothing
    ],
)
def test_error_lasts(error):
    assert not is_transient(error)


@pytest.mark.parametrize(
    ("error", "kind", "may_pass"),
    [
        (ImportError("no module named adlfs"), "MissingLibrary", False),
        (ValueError("no such URI"), "UnsupportedURI", False),
        (KeyError("x"), "UnsupportedURI", False),
        (EOFError("the connection ended"), "EOFError", True),
        (PermissionError(errno.EACCES, "Permission denied"), "PermissionError", False),
    ],
)
def test_error_of_a_library_becomes_one_of_the_system(error, kind, may_pass):
    with pytest.raises(OSError) as caught, as_os_errors():
        raise error
    assert describe(caught.value)[0] == kind
    assert is_transient(caught.value) is may_pass


def test_verdict_on_an_image_is_left_as_it_is():
    with pytest.raises(ReadError, match="FileTooLarge"), as_os_errors():
        raise ReadError("FileTooLarge", "")


# ---------------------------------------------------------------------------------------------------------------
# In words


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "/a"), "FileNotFoundError", "No such file"),
        (PermissionError(errno.EACCES, "Permission denied"), "PermissionError", "Permission denied"),
        (OSError("AWS Error ACCESS_DENIED during X: no"), "AccessDenied", "AWS Error ACCESS_DENIED during X: no"),
        (
            OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject"),
            "HTTP503",
            "AWS Error UNKNOWN (HTTP status 503) during HeadObject",
        ),
        (OSError("Status(UNAVAILABLE: no)"), "Unavailable", "Status(UNAVAILABLE: no)"),
        (TransientError("HTTP 500"), "TransientError", "HTTP 500"),
    ],
)
def test_error_is_described_by_a_type_in_one_word_and_a_message(error, kind, message):
    assert describe(error) == (kind, message)
