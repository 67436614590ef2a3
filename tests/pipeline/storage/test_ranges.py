"""Parts of a file come as they lie there, to several readers at once, and again where a read failed."""

from __future__ import annotations

import errno
import io
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage import local, path_to_uri
from pipeline.storage.ranges import RangeFile, RangeReader

CONTENT = Random(1).randbytes(1 << 16)


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("ranges") / "50% #1.tar"
    path.write_bytes(CONTENT)
    return path_to_uri(str(path))


@pytest.fixture
def flaky_reads(monkeypatch):
    """A function that lets the next reads of a file fail with these error numbers."""

    def fail(*numbers: int) -> None:
        left = list(numbers)

        class FlakyFile:
            def __init__(self, file: pa.NativeFile) -> None:
                self.size = file.size
                self.file = file

            def read_at(self, length: int, offset: int) -> bytes:
                if left:
                    number = left.pop(0)
                    raise OSError(number, os.strerror(number))
                return self.file.read_at(length, offset)

        open_file = local.LocalStore.open_file
        monkeypatch.setattr(local.LocalStore, "open_file", lambda self, uri: FlakyFile(open_file(self, uri)))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)

    return fail


@given(offset=st.integers(0, 2 * len(CONTENT)), length=st.integers(-1, 2 * len(CONTENT)))
def test_range_is_what_lies_there(uri, offset, length):
    reader = RangeReader(uri, retries=0)
    assert reader.read_at(offset, length) == CONTENT[offset : offset + max(length, 0)]


def test_reader_knows_the_size_and_that_one_attempt_was_enough(uri):
    reader = RangeReader(uri, retries=0)
    assert reader.size == len(CONTENT)
    assert reader.read_counted(5, 3) == (CONTENT[5:8], 1)


def test_many_threads_read_one_reader_at_once(uri):
    reader = RangeReader(uri, retries=0)
    random = Random(2)
    ranges = [(random.randrange(len(CONTENT)), random.randrange(5_000)) for _ in range(500)]
    with ThreadPoolExecutor(8) as threads:
        contents = list(threads.map(lambda range_: reader.read_at(*range_), ranges))
    assert contents == [CONTENT[offset : offset + length] for offset, length in ranges]


@pytest.mark.parametrize("name", [b"\xff.tar", b"a\nb.tar"])
def test_file_with_an_odd_name_is_read_by_threads_as_well(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(CONTENT)
    reader = RangeReader(path_to_uri(os.fsdecode(path)), retries=0)
    with ThreadPoolExecutor(8) as threads:
        contents = list(threads.map(lambda number: reader.read_at(number * 100, 100), range(500)))
    assert b"".join(contents) == CONTENT[:50_000]


def test_file_that_shrank_gives_what_is_left(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    reader = RangeReader(str(tmp_path / "a.tar"), retries=0)
    os.truncate(tmp_path / "a.tar", 100)
    assert reader.read_at(90, 50) == CONTENT[90:100]


def test_read_that_fails_for_a_passing_reason_is_repeated_and_counted(uri, flaky_reads):
    flaky_reads(errno.EIO, errno.ESTALE)
    reader = RangeReader(uri, retries=3)
    assert reader.read_counted(7, 5) == (CONTENT[7:12], 3)
    assert reader.read_counted(7, 5) == (CONTENT[7:12], 1)
    flaky_reads(errno.EIO)
    assert RangeReader(uri, retries=3).read_at(7, 5) == CONTENT[7:12]


def test_read_that_keeps_failing_says_so(uri, flaky_reads):
    flaky_reads(*[errno.EIO] * 3)
    with pytest.raises(OSError, match="Input/output") as caught:
        RangeReader(uri, retries=2).read_at(0, 5)
    assert caught.value.attempts == 3


def test_missing_file_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError):
        RangeReader(str(tmp_path / "a.tar"), retries=3)


# ---------------------------------------------------------------------------------------------------------------
# As a Python file

steps = st.lists(
    st.tuples(st.just("read"), st.integers(-1, 100))
    | st.tuples(st.just("seek"), st.integers(0, 2 * len(CONTENT)))
    | st.tuples(st.just("seek"), st.integers(-100, 0), st.just(os.SEEK_END))
    | st.tuples(st.just("seek"), st.integers(0, 100), st.just(os.SEEK_CUR))
    | st.tuples(st.just("tell"))
)


@given(steps)
def test_range_file_does_what_any_file_does(uri, steps):
    file, expected = RangeFile(RangeReader(uri, retries=0)), io.BytesIO(CONTENT)
    for name, *arguments in steps:
        assert getattr(file, name)(*arguments) == getattr(expected, name)(*arguments)


def test_range_files_of_one_reader_have_positions_of_their_own(uri):
    reader = RangeReader(uri, retries=0)
    one, other = RangeFile(reader), RangeFile(reader)
    one.seek(1_000)
    assert other.read(10) == CONTENT[:10]
    assert one.read(10) == CONTENT[1_000:1_010]


def test_standard_library_reads_archives_through_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", CONTENT)
    with zipfile.ZipFile(io.BufferedReader(RangeFile(RangeReader(str(tmp_path / "a.zip"), retries=0)))) as archive:
        assert archive.read("a") == CONTENT


def test_parquet_is_read_through_it_although_reads_fail(tmp_path, flaky_reads):
    table = pa.table({"uri": [str(number) for number in range(1_000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    flaky_reads(errno.EIO, errno.EIO, errno.ESTALE)
    with pa.PythonFile(RangeFile(RangeReader(str(tmp_path / "a.parquet"), retries=3)), mode="r") as file:
        assert pq.ParquetFile(file).read_row_group(7) == table.slice(700, 100)
