"""Objects come back byte for byte, or with the reason why not; what passes is tried again, and counted."""

from __future__ import annotations

import importlib
import io
import itertools
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import DENIED
from reading import fetch

from pipeline.errors import ReadError, StorageError
from pipeline.fetch import Fetcher
from pipeline.listing import Inputs
from pipeline.sources import ListedImage, ListingOptions, open_source
from pipeline.storage import describe, is_transient, join_key, open_folder, open_store, retry
from pipeline.storage.bucket import BucketFolder, open_bucket, read_environment
from pipeline.storage.ranges import RangeReader

bucket_module = importlib.import_module("pipeline.storage.bucket")
fsspec_registry = importlib.import_module("fsspec.registry")

pytestmark = pytest.mark.usefixtures("waits")


def list_all(*inputs: str) -> list[ListedImage]:
    return list(Inputs(inputs, options=ListingOptions(retries=1)).list_images())


# ---------------------------------------------------------------------------------------------------------------
# Reading

ODD_KEYS = [
    "a b.jpg",
    " a.jpg",
    "a.jpg ",
    "a%41.jpg",
    "%2F.jpg",
    "a#1.jpg",
    "a#row=3",
    "a::b.jpg",
    "é.jpg",
    "🦊.jpg",
    "a+b.jpg",
    "a?b=c.jpg",
    "a&b<c>.jpg",
    "a*[b].jpg",
    "a\\b.jpg",
    "a\x01.jpg",
    " a / b .jpg",
    "...",
]


@pytest.mark.parametrize("key", ODD_KEYS)
def test_object_with_an_odd_key_is_read(bucket, put_object, key):
    put_object(key, key.encode())
    assert fetch(join_key("s3", bucket, key)) == (key.encode(), 1)


@pytest.mark.parametrize("key", ["a//b.jpg", "/a.jpg", "//a.jpg", "a/./b.jpg", "a/../b.jpg", "./a.jpg", "a/.."])
def test_key_that_cannot_be_asked_for_is_a_failed_image(bucket, put_object, key):
    put_object("a/b.jpg", b"another")
    put_object("b.jpg", b"another")
    put_object("a.jpg", b"another")
    put_object(key, b"content")
    with pytest.raises(ReadError, match="UnsupportedKey"):
        fetch(join_key("s3", bucket, key))


def test_empty_object_is_empty(bucket, put_object):
    put_object("a.jpg", b"")
    assert fetch(f"s3://{bucket}/a.jpg") == (b"", 1)


def test_too_large_an_object_is_not_read(faulty_s3, bucket, put_object, monkeypatch):
    monkeypatch.setattr(bucket_module, "MAX_IMAGE_BYTES", 10)
    put_object("a.jpg", bytes(11))
    with pytest.raises(ReadError, match="FileTooLarge"):
        fetch(f"s3://{bucket}/a.jpg")
    assert faulty_s3.paths("GET") == []


def test_missing_object_is_not_asked_for_again(faulty_s3, bucket):
    with pytest.raises(ReadError, match="FileNotFoundError") as raised:
        fetch(f"s3://{bucket}/nothing.jpg")
    assert raised.value.attempts == 1 and len(faulty_s3.requests) == 1


def test_object_in_a_missing_bucket_is_a_failed_image(bucket):
    with pytest.raises(ReadError, match="FileNotFoundError"):
        fetch("s3://there-is-no-such-bucket/a.jpg")


def test_folder_is_no_image(bucket, put_object):
    put_object("a/b.jpg", b"")
    with pytest.raises(ReadError):
        fetch(f"s3://{bucket}/a")


def test_forbidden_object_is_not_asked_for_again(faulty_s3, bucket, put_object):
    put_object("a.jpg", b"")
    faulty_s3.answer(403, DENIED)
    with pytest.raises(ReadError, match=r"^AccessDenied: ") as raised:
        fetch(f"s3://{bucket}/a.jpg")
    assert raised.value.attempts == 1 and len(faulty_s3.requests) == 1


def test_only_the_range_is_asked_for(faulty_s3, bucket, put_object):
    put_object("a.tar", bytes(range(256)) * 100)
    reader = RangeReader(f"s3://{bucket}/a.tar", retries=0)
    assert reader.read_at(256, 3) == b"\x00\x01\x02"
    assert [request.headers["range"] for request in faulty_s3.requests if request.method == "GET"] == ["bytes=256-258"]


def test_many_ranges_are_on_their_way_at_once(faulty_s3, bucket, put_object):
    put_object("a.tar", bytes(1000))
    reader = RangeReader(f"s3://{bucket}/a.tar", retries=0)
    barrier = faulty_s3.gather(64, method="GET")
    with ThreadPoolExecutor(64) as threads:
        parts = list(threads.map(lambda number: reader.read_at(number, 2), range(64)))
    assert parts == [b"\0\0"] * 64 and not barrier.broken


# ---------------------------------------------------------------------------------------------------------------
# What passes is tried again

PASSING = {
    "500": lambda proxy, **rule: proxy.answer(500, **rule),
    "502": lambda proxy, **rule: proxy.answer(502, **rule),
    "429": lambda proxy, **rule: proxy.answer(429, **rule),
    "SlowDown": lambda proxy, **rule: proxy.slow_down(**rule),
    "cut before the answer": lambda proxy, **rule: proxy.cut(**rule),
}


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("fail", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again_and_counted(faulty_s3, bucket, put_object, fail, method):
    put_object("a.jpg", bytes(1000))
    open_bucket("s3", bucket).read(f"s3://{bucket}/a.jpg")
    fail(faulty_s3, method=method, times=4)
    content, attempts = fetch(f"s3://{bucket}/a.jpg", retries=4)
    # curl itself tries once more where a connection that it had used before is gone.
    assert content == bytes(1000) and attempts in ((3, 4, 5) if fail is PASSING["cut before the answer"] else (5,))


def test_body_that_was_cut_is_read_again(faulty_s3, bucket, put_object):
    put_object("a.jpg", bytes(1000))
    faulty_s3.cut_body(method="GET", times=1)
    assert fetch(f"s3://{bucket}/a.jpg") == (bytes(1000), 2)


def test_stalled_connection_is_given_up_and_tried_again(faulty_s3, bucket, put_object, monkeypatch):
    monkeypatch.setattr(bucket_module, "STALL_TIMEOUT_S", 1)
    put_object("a.jpg", b"content")
    faulty_s3.stall(method="GET", times=1)
    assert fetch(f"s3://{bucket}/a.jpg") == (b"content", 2)


def test_no_more_attempts_than_asked_for(faulty_s3, bucket, put_object):
    put_object("a.jpg", bytes(1000))
    faulty_s3.slow_down(method="GET")
    with pytest.raises(ReadError, match=r"^(SlowDown|ServiceUnavailable): ") as raised:
        fetch(f"s3://{bucket}/a.jpg", retries=2)
    assert raised.value.attempts == 3
    assert len(faulty_s3.paths("GET")) == 3


def test_waits_grow(faulty_s3, bucket, put_object, waits):
    put_object("a.jpg", b"content")
    faulty_s3.slow_down(times=6)
    fetch(f"s3://{bucket}/a.jpg", retries=6)
    assert len(waits) == 6 and all(later > earlier / 2 for earlier, later in itertools.pairwise(waits))
    assert waits[-1] > 8 * waits[0]


def test_range_is_tried_again_and_counted(faulty_s3, bucket, put_object):
    put_object("a.tar", bytes(range(100)))
    reader = RangeReader(f"s3://{bucket}/a.tar", retries=2)
    faulty_s3.slow_down(times=2)
    assert reader.read_counted(10, 2) == (b"\x0a\x0b", 3)


# ---------------------------------------------------------------------------------------------------------------
# Containers


def make_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read_all(images: list[ListedImage]) -> dict[str, bytes]:
    fetched = Fetcher(retries=1).fetch(images)
    return {image.uri.partition("::")[0]: get()[0] for image, get in fetched}


def test_tar_in_a_bucket_is_indexed_with_few_requests(faulty_s3, bucket, put_object):
    put_object("a.tar", make_tar({f"{number}.jpg": bytes(1000) for number in range(300)}))
    assert len(list_all(f"s3://{bucket}/a.tar")) == 300
    assert len(faulty_s3.requests) < 12


def test_tar_of_large_members_is_indexed_without_reading_them(faulty_s3, bucket, put_object):
    put_object("a.tar", make_tar({f"{number}.jpg": bytes(2 << 20) for number in range(8)}))
    assert len(list_all(f"s3://{bucket}/a.tar")) == 8
    ranges = [request.headers["range"].removeprefix("bytes=").split("-") for request in faulty_s3.requests
              if request.method == "GET" and "range" in request.headers]  # fmt: skip
    assert sum(int(last) - int(first) + 1 for first, last in ranges) < 1 << 20


def test_member_of_a_tar_is_read_by_its_range(faulty_s3, bucket, put_object):
    members = {f"{number}.jpg": bytes([number]) * 1000 for number in range(10)}
    put_object("a.tar", make_tar(members))
    images = list_all(f"s3://{bucket}/a.tar")
    faulty_s3.requests.clear()
    assert read_all(images[3:5]) == {"tar://3.jpg": members["3.jpg"], "tar://4.jpg": members["4.jpg"]}
    assert [request.method for request in faulty_s3.requests].count("GET") == 2


def test_zip_in_a_bucket_is_read(bucket, put_object):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", b"content of a" * 100)
        archive.writestr("b.jpg", b"content of b")
    put_object("x.zip", buffer.getvalue())
    found = read_all(list_all(f"s3://{bucket}/x.zip"))
    assert found == {"zip://a.jpg": b"content of a" * 100, "zip://b.jpg": b"content of b"}


def test_parquet_in_a_bucket_is_read(bucket, put_object):
    sink = pa.BufferOutputStream()
    images = [{"bytes": bytes([row]) * 10, "path": None} for row in range(6)]
    pq.write_table(pa.table({"image": images, "label": list("abcabc")}), sink, row_group_size=4)
    put_object("x.parquet", sink.getvalue().to_pybytes())
    listed = list_all(f"s3://{bucket}/x.parquet")
    assert [image.target for image in listed] == list("abcabc")
    assert list(read_all(listed).values()) == [image["bytes"] for image in images]


def test_container_that_stays_unavailable_ends_the_listing(faulty_s3, bucket, put_object):
    put_object("a.tar", make_tar({"a.jpg": b"content"}))
    faulty_s3.slow_down(method="GET", path="a.tar")
    with pytest.raises(StorageError, match=r"a\.tar: (SlowDown|ServiceUnavailable)"):
        list_all(f"s3://{bucket}/a.tar")


# ---------------------------------------------------------------------------------------------------------------
# Writing


@pytest.fixture
def folder(faulty_s3, bucket) -> BucketFolder:
    return open_folder(f"s3://{bucket}/out", scratch="_nightshift/tmp")


def test_small_file_is_one_request(faulty_s3, folder):
    with folder.open_write("predictions/part-0.parquet") as file:
        file.write(b"content")
    assert [request.method for request in faulty_s3.requests] == ["PUT"]


@pytest.mark.parametrize("fail", PASSING.values(), ids=PASSING)
def test_put_is_tried_again(faulty_s3, folder, fail):
    fail(faulty_s3, method="PUT", times=2)
    folder.put("a", b"content")
    assert folder.read("a") == b"content"


@pytest.mark.parametrize("step", ["POST .*uploads", "PUT partNumber=1", "PUT partNumber=2", "POST uploadId="])
def test_large_write_that_fails_leaves_nothing(faulty_s3, folder, monkeypatch, step):
    monkeypatch.setattr(bucket_module, "FOLDER_RETRIES", 0)
    method, _, path = step.partition(" ")
    faulty_s3.cut(method=method, path=path)
    with pytest.raises(OSError, match="AWS Error"):
        folder.put("a", bytes(21 << 20))
    assert not folder.exists("a") and folder.is_empty()


def test_small_write_that_fails_leaves_nothing_and_is_not_sent_later(faulty_s3, folder, monkeypatch):
    monkeypatch.setattr(bucket_module, "FOLDER_RETRIES", 0)
    faulty_s3.slow_down(method="PUT", times=1)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        folder.put("a", b"content")
    assert not folder.exists("a") and len(faulty_s3.paths("PUT")) == 1


@pytest.mark.parametrize(("size", "requests"), [((10 << 20) - 1, ["PUT"]), (10 << 20, ["POST", "PUT", "POST"])])
def test_parts_begin_where_the_library_begins_them(faulty_s3, folder, size, requests):
    folder.put("a", bytes(size))
    assert [request.method for request in faulty_s3.requests] == requests


def test_large_write_that_was_interrupted_is_sent_again(faulty_s3, folder):
    faulty_s3.cut(method="PUT", path="partNumber=2", times=1)
    content = bytes(range(256)) * (21 << 12)
    folder.put("a", content)
    assert folder.read("a") == content


def test_write_is_not_given_up_within_a_minute(faulty_s3, folder, waits):
    faulty_s3.slow_down()
    with pytest.raises(OSError, match="SLOW_DOWN"):
        folder.put("a", b"")
    assert 30 < sum(waits) < 300


@pytest.mark.parametrize("act", ["read", "open_read", "list_names", "delete", "delete_tree", "exists"])
def test_every_request_of_a_folder_is_tried_again(faulty_s3, folder, act):
    folder.put("a", b"")
    faulty_s3.cut(times=1)
    with pytest.raises(FileNotFoundError) if act in ("read", "open_read") else pytest.MonkeyPatch.context():
        getattr(folder, act)("nothing")


def test_output_in_a_missing_bucket_is_a_clear_error(bucket, monkeypatch):
    folder = open_folder("s3://there-is-no-such-bucket/out", scratch="tmp")
    with pytest.raises(OSError, match="NO_SUCH_BUCKET") as raised:
        folder.is_empty()
    assert describe(raised.value)[0] == "NoSuchBucket"


# ---------------------------------------------------------------------------------------------------------------
# Where the store is, and who asks


def test_endpoint_for_s3_alone_goes_first(faulty_s3, bucket, put_object, monkeypatch):
    put_object("a", b"content")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", faulty_s3.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert fetch(f"s3://{bucket}/a") == (b"content", 1)


@pytest.mark.parametrize(("profile", "section"), [(None, "default"), ("work", "profile work")])
def test_endpoint_and_region_come_from_the_profile(
    faulty_s3, bucket, put_object, monkeypatch, tmp_path, profile, section
):
    put_object("a", b"content")
    (tmp_path / "config").write_text(f"[{section}]\nregion = eu-north-1\nendpoint_url = {faulty_s3.url}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_REGION")
    assert fetch(f"s3://{bucket}/a") == (b"content", 1)
    assert "/eu-north-1/" in faulty_s3.requests[0].headers["authorization"]


def test_region_of_the_environment_goes_first(faulty_s3, bucket, put_object, monkeypatch):
    put_object("a", b"content")
    monkeypatch.setenv("AWS_REGION", "ap-south-1")
    fetch(f"s3://{bucket}/a")
    assert "/ap-south-1/" in faulty_s3.requests[0].headers["authorization"]


def test_configuration_that_is_no_configuration_is_passed_over(bucket, put_object, monkeypatch, tmp_path):
    put_object("a", b"content")
    (tmp_path / "config").write_bytes(b"\xff\xfe = [nothing\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert fetch(f"s3://{bucket}/a") == (b"content", 1)


@pytest.mark.parametrize("url", ["127.0.0.1", "http://", "nosuch://127.0.0.1:1"])
def test_endpoint_that_is_no_address_is_one_clear_error(bucket, monkeypatch, url):
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setattr(bucket_module, "CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(StorageError, match=r"^[^\n]+$"):
        open_source(f"s3://{bucket}", options=ListingOptions(retries=0))


def test_requests_are_signed(faulty_s3, bucket):
    open_bucket("s3", bucket).find_kind(f"s3://{bucket}/a")
    assert all("authorization" in request.headers for request in faulty_s3.requests)


def test_anonymous_bucket_is_read_without_credentials(faulty_s3, bucket, put_object):
    put_object("a/b.jpg", b"content")
    (image,) = list_all(f"s3://anonymous@{bucket}/a")
    assert image.uri == f"s3://anonymous@{bucket}/a/b.jpg"
    assert fetch(image.uri) == (b"content", 1)
    assert not any("authorization" in request.headers for request in faulty_s3.requests)


@pytest.mark.parametrize("value", ["YES", "true", "1"])
def test_environment_asks_for_no_credentials(faulty_s3, bucket, put_object, monkeypatch, value):
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", value)
    put_object("a", b"content")
    assert fetch(f"s3://{bucket}/a") == (b"content", 1)
    assert not any("authorization" in request.headers for request in faulty_s3.requests)


def test_workers_are_told_of_no_secret(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "secret")
    told = read_environment()
    assert told["AWS_ENDPOINT_URL"] and told["AWS_REGION"] == "us-east-1"
    assert not any("KEY" in name or "TOKEN" in name for name in told)


def test_store_is_opened_once(bucket):
    assert open_bucket("s3", bucket) is open_store(f"s3://{bucket}/a")


# ---------------------------------------------------------------------------------------------------------------
# Schemes of fsspec


def test_scheme_of_fsspec_is_a_source(tmp_path):
    files = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    for name, content in {
        "b.jpg": b"b",
        "a/%41 é#.jpg": b"odd",
        ".hidden.jpg": b"",
        "c.tar": make_tar({"d.jpg": b"d"}),
    }.items():
        files.pipe(f"{root}/{name}", content)
    images = list_all(f"memory:/{root}")
    assert [image.uri.removeprefix(f"memory:/{root}/") for image in images] == [
        "a/%2541 é%23.jpg", "b.jpg", f"tar://d.jpg::memory:/{root}/c.tar",
    ]  # fmt: skip
    assert list(read_all(images).values()) == [b"odd", b"b", b"d"]


class FailingFileSystem(fsspec.AbstractFileSystem):
    """A library with exceptions of its own."""

    protocol = "failing"
    errors: list[Exception]

    def info(self, path, **options):
        if self.errors:
            raise self.errors.pop(0)
        return {"name": path, "size": 7, "type": "file"}

    def open(self, path, mode="rb", **options):
        return io.BytesIO(b"content")


@pytest.fixture
def failing_store(monkeypatch):
    """A function that makes `failing://` raise these errors first."""
    monkeypatch.setitem(fsspec_registry._registry, "failing", FailingFileSystem)
    open_bucket.cache_clear()

    def fail(*errors: Exception) -> None:
        monkeypatch.setattr(FailingFileSystem, "errors", list(errors), raising=False)

    return fail


class ServiceError(Exception):
    """What a library raises that knows nothing of OSErrors."""


def test_error_of_a_library_is_tried_again(failing_store):
    failing_store(ServiceError("busy"), ServiceError("busy"))
    assert retry(lambda: open_store("failing://b/a").find_kind("failing://b/a"), retries=2) == ("file", 3)


@pytest.mark.parametrize("error", [ServiceError("no"), ValueError("no"), KeyError("no"), NotImplementedError("no")])
def test_error_of_a_library_is_a_failed_image_or_a_clear_error(failing_store, error):
    failing_store(*[error] * 4)
    with pytest.raises(ReadError, match="no"):
        fetch("failing://b/a.jpg", retries=0)
    with pytest.raises(StorageError, match=r"^cannot read input 'failing://b/a.jpg': \w+: .*no.*$"):
        open_source("failing://b/a.jpg", options=ListingOptions(retries=0))


def test_mistake_is_not_tried_again(failing_store):
    failing_store(ValueError("no such bucket name"))
    with pytest.raises(OSError, match="no such bucket name") as raised:
        open_store("failing://b/a").find_kind("failing://b/a")
    assert not is_transient(raised.value)


def test_scheme_without_its_library_says_what_to_install(monkeypatch):
    entry = {"class": "there_is_no_such_library.FileSystem", "err": "Install there-is-no-such-library"}
    monkeypatch.setitem(fsspec_registry.known_implementations, "uninstalled", entry)
    with pytest.raises(StorageError, match="cannot open uninstalled://b: Install there-is-no-such-library"):
        open_source("uninstalled://b/a", options=ListingOptions())
    with pytest.raises(ReadError, match="Install there-is-no-such-library"):
        fetch("uninstalled://b/a.jpg")
