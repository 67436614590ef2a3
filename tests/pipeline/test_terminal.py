"""A person sees one line and the notices, a log sees plain lines, and stdout sees nothing that is not the result."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
from collections import Counter
from pathlib import Path

import pytest

from pipeline import terminal
from pipeline.terminal import Progress, Rate, describe_counts, format_seconds, open_terminal, redirect_output

REPOSITORY = Path(__file__).parents[2]
ERASE = "\r\x1b[K"


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def fast_clock(monkeypatch):
    """Lines come every few milliseconds, on a terminal of a usual kind."""
    monkeypatch.setattr(terminal, "REDRAW_S", 0.002)
    monkeypatch.setattr(terminal, "PLAIN_LINE_S", 0.002)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def show_until_drawn(progress: Progress, text: str, *, times: int = 3) -> None:
    """Show `text` until it was asked for this often, so that it was written at least once less."""
    asked, left = threading.Event(), [times]

    def describe() -> str:
        left[0] -= 1
        if left[0] <= 0:
            asked.set()
        return text

    progress.show(describe)
    assert asked.wait(10)


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """What a process of its own writes to its stdout and stderr, both of them pipes."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONUNBUFFERED": ""},  # as a user has it
        capture_output=True,
        timeout=60,
        check=False,
    )


# ---------------------------------------------------------------------------------------------------------------
# Time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (45, "45 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (60, "1 min 00 s"),
        (725, "12 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (11_220, "3 h 07 min"),
        (11_279, "3 h 07 min"),
        (3_600_000, "1,000 h 00 min"),
    ],
)
def test_seconds_are_written_in_two_units(seconds, text):
    assert format_seconds(seconds) == text


def test_rate_is_none_until_something_is_finished():
    rate = Rate()
    assert rate.images_per_s == 0
    rate.add(50, at=100, since=100)  # no time to divide by
    assert rate.images_per_s == 0


def test_rate_is_images_per_second_from_when_the_first_work_began():
    rate = Rate()
    rate.add(30, at=102, since=100)
    assert rate.images_per_s == 15
    rate.add(30, at=104, since=103)
    assert rate.images_per_s == 15
    rate.add(90, at=106, since=90)
    assert rate.images_per_s == 25


def test_rate_forgets_what_is_more_than_a_minute_ago():
    rate = Rate()
    for second in range(1, 101):
        rate.add(10, at=second, since=0)
    for second in range(101, 201):
        rate.add(100, at=second, since=0)
    assert rate.images_per_s == 100


def test_rate_of_rare_parts_is_over_the_last_two():
    rate = Rate()
    for part in range(1, 6):
        rate.add(6000 * part, at=600 * part, since=0)
    assert rate.images_per_s == 50


# ---------------------------------------------------------------------------------------------------------------
# The progress line


def test_log_gets_plain_lines():
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.notice("one input is inside another")
        show_until_drawn(progress, "5 of 9 images")
        show_until_drawn(progress, "9 of 9 images")
    assert stream.getvalue() == "one input is inside another\n5 of 9 images\n9 of 9 images\n"


def test_log_says_nothing_twice():
    stream = io.StringIO()
    with Progress(stream) as progress:
        show_until_drawn(progress, "starting Ray", times=9)
    assert stream.getvalue() == "starting Ray\n"


def test_log_gets_a_line_once_in_a_while(monkeypatch):
    monkeypatch.setattr(terminal, "REDRAW_S", 3600)
    stream = io.StringIO()
    with Progress(stream) as progress:
        show_until_drawn(progress, "5 of 9 images")
    assert "5 of 9 images\n" in stream.getvalue()


def test_block_ends_without_waiting_for_the_next_line(monkeypatch):
    monkeypatch.setattr(terminal, "PLAIN_LINE_S", 3600)
    with Progress(io.StringIO()) as progress:
        pass
    assert not progress._thread.is_alive()


def test_terminal_has_one_line_that_is_rewritten_and_gone_at_the_end():
    stream = FakeTerminal()
    with Progress(stream) as progress:
        show_until_drawn(progress, "5 of 9 images")
        show_until_drawn(progress, "9 of 9 images")
    written = stream.getvalue()
    assert f"{ERASE}5 of 9 images" in written and f"{ERASE}9 of 9 images" in written
    assert "\n" not in written
    assert written.endswith(ERASE)


def test_notice_stays_on_the_terminal_above_the_line():
    stream = FakeTerminal()
    with Progress(stream) as progress:
        show_until_drawn(progress, "5 of 9 images")
        progress.notice("a worker was replaced")
        show_until_drawn(progress, "9 of 9 images")
    first, last = stream.getvalue().split("\n")
    assert first.endswith("a worker was replaced")
    assert set(last.split(ERASE)) <= {"", "5 of 9 images", "9 of 9 images"}


# In two steps, the line could be drawn between them, and the notice would stand behind it.
def test_notice_takes_the_place_of_the_line_in_one_step():
    written = []
    stream = FakeTerminal()
    stream.write = written.append
    Progress(stream).notice("a worker was replaced")
    assert written == [f"{ERASE}a worker was replaced\n"]


def test_line_is_cut_to_the_width_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = FakeTerminal()
    with Progress(stream) as progress:
        show_until_drawn(progress, "0123456789" * 5)
    assert set(stream.getvalue().split(ERASE)) == {"", "0123456789012345678"}


# Stdout is the driver's log by then. Some terminals (`docker run -t` in a script) say that they have 0 columns.
@pytest.mark.parametrize(("columns", "width"), [(40, 39), (120, 119), (0, 79)])
def test_line_is_cut_to_the_width_of_its_own_terminal(monkeypatch, columns, width):
    monkeypatch.delenv("COLUMNS")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(follower, "w") as stream, Progress(stream) as progress:
        show_until_drawn(progress, "0123456789" * 20)
    written = b""
    while select.select([leader], [], [], 0)[0]:
        try:
            written += os.read(leader, 65536)
        except OSError as error:  # everything was read, and nobody can write any more
            assert error.errno == errno.EIO
            break
    os.close(leader)
    lines = set(re.split("\r\x1b\\[K", written.decode()))
    assert max(map(len, lines)) == width


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = FakeTerminal()
    with Progress(stream) as progress:
        show_until_drawn(progress, "5 of 9 images")
    assert "\x1b" not in stream.getvalue() and "5 of 9 images\n" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), FakeTerminal()])
def test_quiet_is_quiet(stream):
    with Progress(stream, is_quiet=True) as progress:
        progress.show("listing")
        progress.show(lambda: "5 of 9 images")
        progress.notice("a worker was replaced")
    assert stream.getvalue() == ""


def test_nothing_is_drawn_while_there_is_nothing_to_say():
    stream = FakeTerminal()
    with Progress(stream) as progress:
        show_until_drawn(progress, "")
    assert stream.getvalue().replace(ERASE, "") == ""


def test_line_is_erased_when_the_run_fails():
    stream = FakeTerminal()
    with pytest.raises(ValueError, match="broken"), Progress(stream) as progress:
        show_until_drawn(progress, "5 of 9 images")
        raise ValueError("broken")
    assert stream.getvalue().endswith(ERASE)


# A run outlives its terminal: a dropped connection, `disown`.
def test_terminal_that_is_gone_does_not_end_the_run():
    class GoneTerminal(FakeTerminal):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Progress(GoneTerminal()) as progress:
        progress.show("listing")
        progress.notice("a worker was replaced")


# ---------------------------------------------------------------------------------------------------------------
# File descriptors 1 and 2

NOISY = """
import os, subprocess, sys
from collections import Counter
from pathlib import Path
from pipeline.terminal import redirect_output

def make_noise(when):
    os.write(1, f"{when}: descriptor 1\\n".encode())
    os.write(2, f"{when}: descriptor 2\\n".encode())
    subprocess.run(["sh", "-c", f"echo {when}: child 1; echo {when}: child 2 >&2"])

make_noise("before")
try:
    with redirect_output(Path(sys.argv[1])) as stream:
        make_noise("inside")
        stream.write("to a person\\n")
        if len(sys.argv) > 2:
            raise ValueError("broken")
except ValueError:
    pass
make_noise("after")
"""


@pytest.mark.parametrize("arguments", [[], ["fail"]])
def test_noise_of_a_job_goes_to_its_log_and_only_there(tmp_path, arguments):
    log = tmp_path / "logs" / "driver.log"
    run = run_script(NOISY, str(log), *arguments)
    noise = {
        when: {f"{when}: {who}".encode() for who in ("descriptor", "child")} for when in ("before", "inside", "after")
    }
    expected = sorted(noise["before"] | noise["after"])
    assert sorted(run.stdout.splitlines()) == [line + b" 1" for line in expected]
    assert sorted(run.stderr.splitlines()) == sorted([line + b" 2" for line in expected] + [b"to a person"])
    assert sorted(log.read_bytes().splitlines()) == sorted(
        line + number for line in noise["inside"] for number in (b" 1", b" 2")
    )


def test_log_of_an_earlier_invocation_is_kept(tmp_path):
    (tmp_path / "log").write_text("earlier\n")
    run_script(NOISY, str(tmp_path / "log"))
    assert (tmp_path / "log").read_text().startswith("earlier\n")
    assert "inside" in (tmp_path / "log").read_text()


# What Python has buffered when the block ends would come out on stdout afterwards, before the JSON document.
def test_printed_text_goes_to_the_log_as_well(tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pipeline.terminal import redirect_output\n"
        "print('before')\n"
        "with redirect_output(Path(sys.argv[1])):\n"
        "    print('inside')\n"
        "    print('inside, too', file=sys.stderr)\n"
        "print('after')\n"
    )
    run = run_script(script, str(tmp_path / "log"))
    assert run.stdout == b"before\nafter\n"
    assert run.stderr == b""
    assert set((tmp_path / "log").read_text().splitlines()) == {"inside", "inside, too"}


def test_redirecting_keeps_no_descriptor_open(tmp_path):
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from pipeline.terminal import redirect_output\n"
        "before = len(os.listdir('/dev/fd'))\n"
        "streams = []\n"
        "for _ in range(3):\n"
        "    with redirect_output(Path(sys.argv[1])) as stream:\n"
        "        streams.append(stream)\n"
        "print(len(os.listdir('/dev/fd')) - before)\n"
    )
    assert run_script(script, str(tmp_path / "log")).stdout == b"0\n"


# As on sys.stderr, with a backslash.
def test_undecodable_name_can_be_shown(tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pipeline.terminal import redirect_output\n"
        "with redirect_output(Path(sys.argv[1])) as stream:\n"
        "    stream.write('caf\\udce9.jpg\\n')\n"
        "    stream.flush()\n"
    )
    run = run_script(script, str(tmp_path / "log"))
    assert run.returncode == 0, run.stderr
    assert run.stderr.startswith(b"caf")


# Else the error message would go where nobody looks.
def test_descriptors_are_restored_although_the_disk_of_the_log_is_full():
    script = (
        "import contextlib, os\n"
        "from pathlib import Path\n"
        "from pipeline.terminal import redirect_output\n"
        "with contextlib.suppress(OSError), redirect_output(Path('/dev/full')):\n"
        "    print('inside')\n"
        "os.write(1, b'result')\n"
        "os.write(2, b'message')\n"
    )
    run = run_script(script)
    assert run.stdout.startswith(b"result")
    assert run.stderr.startswith(b"message")


def test_stream_that_took_the_place_of_stderr_is_used_as_it_is(tmp_path, monkeypatch):
    notebook = io.StringIO()
    monkeypatch.setattr(sys, "stderr", notebook)
    with redirect_output(tmp_path / "log") as stream:
        stream.write("to a person\n")
    assert notebook.getvalue() == "to a person\n"
    assert sys.stderr is notebook and not notebook.closed


def test_traceback_of_a_job_is_in_its_log(tmp_path):
    log = tmp_path / "logs" / "driver.log"
    with pytest.raises(ValueError, match="broken"), open_terminal(log, is_quiet=True):
        raise ValueError("broken")
    assert "Traceback" in log.read_text() and "ValueError: broken" in log.read_text()


def test_progress_of_a_job_is_on_stderr(tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pipeline.terminal import open_terminal\n"
        "with open_terminal(Path(sys.argv[1]), is_quiet=len(sys.argv) > 2) as progress:\n"
        "    progress.notice('to a person')\n"
    )
    run = run_script(script, str(tmp_path / "log"))
    assert (run.stdout, run.stderr) == (b"", b"to a person\n")
    run = run_script(script, str(tmp_path / "log"), "quiet")
    assert (run.stdout, run.stderr) == (b"", b"")
    assert (tmp_path / "log").read_bytes() == b""


def test_counts_are_told_most_frequent_first_and_not_without_end():
    assert describe_counts(Counter({".txt": 3, ".heic": 1200})) == "1,200 .heic, 3 .txt"
    assert describe_counts(Counter()) == "none"
    many = describe_counts(Counter({f".{number}": 1 for number in range(100)}))
    assert many.endswith(", and of 88 more kinds")


def test_notice_cannot_command_the_terminal():
    stream = io.StringIO()
    Progress(stream).notice("passed over: 1 .\x1b[2J")
    assert stream.getvalue() == "passed over: 1 .\\x1b[2J\n"
