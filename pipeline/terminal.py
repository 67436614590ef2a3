"""What a person sees while a job runs: one line, the few notices worth interrupting it for, and no noise.

On a terminal the line is rewritten in place; elsewhere (a log file, a CI job) a plain line comes every 30 seconds.
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import shlex
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TextIO, TypeVar

from pipeline.secrets import mask

Item = TypeVar("Item")

REDRAW_S: Final = 0.2
PLAIN_LINE_S: Final = 30.0
_ERASE: Final = "\r\x1b[K"
_USUAL_COLUMNS: Final = 80
_SHOWN_COUNTS: Final = 12
# The rate over about this long is shown: steady, and still true after the batch size or the cluster has changed.
_RATE_WINDOW_S: Final = 60.0


class Progress:
    """A progress line on `stream`, drawn by a thread of its own while the block lasts."""

    def __init__(self, stream: TextIO, *, is_quiet: bool = False) -> None:
        self._stream = stream
        self._is_quiet = is_quiet
        self._is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._describe: Callable[[], str] = lambda: ""
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if not self._is_quiet:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._erase()

    def show(self, describe: str | Callable[[], str]) -> None:
        """What the line says from now on: a text, or a function that gives the text of the moment."""
        self._describe = describe if callable(describe) else lambda: describe

    def count(self, items: Iterable[Item], text: str) -> Iterator[Item]:
        """Pass `items` on, while the line shows how many there were, in place of the `{}` in `text`."""
        number = 0
        self.show(lambda: text.format(number))
        for item in items:
            number += 1
            yield item

    def notice(self, text: str) -> None:
        """A line that stays."""
        if not self._is_quiet:
            self._write(f"{_ERASE if self._is_terminal else ''}{escape_controls(mask(text.expandtabs()))}\n")

    def _run(self) -> None:
        last = ""
        while not self._ended.wait(REDRAW_S if self._is_terminal else PLAIN_LINE_S):
            text = self._describe()
            if self._is_terminal:
                self._write(f"{_ERASE}{text[: self._find_width() - 1]}")
            elif text != last:
                self._write(f"{text}\n")
                last = text

    def _erase(self) -> None:
        if self._is_terminal and not self._is_quiet:
            self._write(_ERASE)

    def _write(self, text: str) -> None:
        # A run outlives its terminal: when the connection drops, nobody is left to read this.
        with self._guard, contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()

    def _find_width(self) -> int:
        """Columns of this stream's terminal, which need not be that of stdout."""
        try:
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(self._stream.fileno()).columns)
        except (OSError, ValueError):
            columns = 0
        return columns or _USUAL_COLUMNS


@contextlib.contextmanager
def open_terminal(log: Path, *, is_quiet: bool) -> Iterator[Progress]:
    """The progress line of a job, whose other output, Ray's and tracebacks among it, goes to `log`."""
    with redirect_output(log) as stream, Progress(stream, is_quiet=is_quiet) as progress:
        try:
            yield progress
        except BaseException:
            # On a full disk there is no room for it, and the reason itself matters more.
            with contextlib.suppress(OSError), open(log, "a", encoding="utf-8") as file:
                file.write(mask(traceback.format_exc()))
            raise


@contextlib.contextmanager
def redirect_output(log: Path) -> Iterator[TextIO]:
    """Send file descriptors 1 and 2 to `log` for the length of a block, and yield a stream to the terminal.

    Ray's processes inherit them and write crash reports there that no option turns off; C libraries do the same.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    is_own = _is_descriptor(sys.stderr, 2)
    terminal = os.fdopen(os.dup(2), "w", errors="backslashreplace") if is_own else sys.stderr
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield terminal
    finally:
        # What was printed meanwhile is still in Python's buffers, and belongs into the log as well.
        for stream in (sys.stdout, sys.stderr, *([terminal] if is_own else [])):
            with contextlib.suppress(OSError):  # a full disk, a terminal that is gone: the message to come matters more
                stream.flush()
        if is_own:
            with contextlib.suppress(OSError):
                terminal.close()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)


def _is_descriptor(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):  # replaced by a test or a notebook
        return False


class Rate:
    """Images per second over the last minute or so."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []

    def add(self, num_images: int, *, at: float, since: float) -> None:
        """Count images that were finished `at` a time, by work that had begun at `since` if these are the first."""
        if not self._marks:
            self._marks.append((since, 0))
        self._marks.append((at, self._marks[-1][1] + num_images))
        while len(self._marks) > 2 and self._marks[1][0] < at - _RATE_WINDOW_S:
            del self._marks[0]

    @property
    def images_per_s(self) -> float:
        """0.0 until something is finished."""
        if not self._marks:
            return 0.0
        (since, before), (until, after) = self._marks[0], self._marks[-1]
        return (after - before) / (until - since) if until > since else 0.0


def format_seconds(seconds: float) -> str:
    """`45 s`, `12 min 05 s` or `3 h 07 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{minutes} min {rest:02d} s" if hours == 0 else f"{hours:,} h {minutes:02d} min"


def describe_counts(counts: Counter[str]) -> str:
    """`12 .heic, 3 .txt`, the most frequent first; `none` where there are none."""
    shown = [f"{count:,} {name}" for name, count in counts.most_common(_SHOWN_COUNTS)]
    if more := len(counts) - len(shown):
        shown.append(f"and of {more:,} more kinds")
    return ", ".join(shown) or "none"


def format_bytes(count: int) -> str:
    """`740 bytes`, `6.3 MB` or `1.2 TB`."""
    exponent = min(int(math.log(max(count, 1), 1_000)), 4)
    return (
        f"{count / 1_000**exponent:,.1f} {('bytes', 'kB', 'MB', 'GB', 'TB')[exponent]}"
        if exponent
        else f"{count} bytes"
    )


def escape_controls(text: str) -> str:
    """`text` without what would move the cursor, colour the terminal or break the line: names may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quote_for_shell(text: str) -> str:
    """`text` as one word: in double quotes, which read better here, if the shell would expand nothing in them."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def quote_for_sql(folder: str) -> str:
    """All Parquet files of `folder` as DuckDB names them."""
    return "'" + os.path.join(glob.escape(folder), "*.parquet").replace("'", "''") + "'"
