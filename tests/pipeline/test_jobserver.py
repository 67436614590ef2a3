"""The client of the Jobs API, as far as it does not need one; the rest is tests/jobs/test_submit.py."""

import pytest

from pipeline.errors import ConfigError
from pipeline.jobserver import ADDRESS_VARIABLES, DEFAULT_ADDRESS, Job, _find_reason, _Lines, find_address

LOG = "first\nsecond, with HF_TOKEN=abc in it\n\nüñ\nlast without an end"
LINES = ["first", "second, with HF_TOKEN=*** in it", "", "üñ", "last without an end"]


@pytest.mark.parametrize("size", [1, 3, 7, 1_000])
def test_log_that_breaks_off_anywhere_is_passed_on_line_by_line_each_once(size):
    for end in range(len(LOG) + 1):
        received: list[str] = []
        lines = _Lines(received.append)
        for text in (LOG[:end], LOG):  # each connection begins at the beginning
            for position in range(0, len(text), size):
                lines.take(text[position : position + size], position)
        lines.take_all(LOG)
        lines.end()
        assert received == LINES


@pytest.mark.parametrize(
    ("given", "environment", "address"),
    [
        ("http://10.0.0.1:8265/", {}, "http://10.0.0.1:8265"),
        ("https://ray.example.org", {}, "https://ray.example.org"),
        ("10.0.0.1:8265", {}, "http://10.0.0.1:8265"),
        (None, {}, DEFAULT_ADDRESS),
        ("auto", {}, DEFAULT_ADDRESS),
        (None, {"RAY_ADDRESS": "http://b:1", "RAY_API_SERVER_ADDRESS": "http://a:1"}, "http://a:1"),
        (None, {"RAY_ADDRESS": "http://b:1"}, "http://b:1"),
        ("http://c:1", {"RAY_API_SERVER_ADDRESS": "http://a:1"}, "http://c:1"),
    ],
)
def test_address_is_the_flag_then_the_environment_then_this_machine(given, environment, address, monkeypatch):
    for name in ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_address(given) == address


@pytest.mark.parametrize(
    ("given", "what"), [("10.0.0.1:6379", "is the cluster's GCS"), ("ray://10.0.0.1:10001", "is Ray Client")]
)
def test_address_of_something_else_is_refused_with_the_one_that_is_meant(given, what):
    with pytest.raises(ConfigError) as refused:
        find_address(given)
    assert what in str(refused.value)
    assert "http://10.0.0.1:8265" in str(refused.value)


@pytest.mark.parametrize(
    ("state", "code", "exit_code"),
    [
        ("succeeded", 0, 0),
        ("failed", 3, 3),
        ("failed", 130, 130),
        ("failed", -9, 137),
        ("failed", None, 1),
        ("stopped", None, 143),
    ],
)
def test_exit_code_is_that_of_the_command(state, code, exit_code):
    job = Job(id="x", state=state, entrypoint="", message="", submitted=None, ended=None, driver_exit_code=code)
    assert job.exit_code == exit_code


def test_reason_in_a_traceback_is_its_last_line():
    trace = "Traceback (most recent call last):\n  File x\n    y()\n      ^^^\nValueError: no such thing\n"
    assert _find_reason(trace) == "no such thing"
    assert _find_reason("plain") == "plain"
