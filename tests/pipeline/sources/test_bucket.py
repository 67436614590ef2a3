"""A bucket lists like the same tree on a file system: all of it, in the same order, whatever the store does."""

from __future__ import annotations

import io
import random
import tarfile
from urllib.parse import unquote

import pytest
from faults import DENIED

from pipeline.errors import NoImagesError, StorageError
from pipeline.listing import Inputs
from pipeline.sources import ListedImage, ListingOptions, Selection, open_source
from pipeline.sources.tar import TarSource
from pipeline.storage import join_key

pytestmark = pytest.mark.usefixtures("waits")

# What sorts differently by characters, bytes and whole paths, and what means something in an address.
TREE = (
    "b.jpg", "a/b.jpg", "a.jpg", "a!/c.jpg", "a-b/c.jpg", "a0.jpg", "A.JPG", "é.jpg", "\uff5a.jpg", "🦊.jpg",
    "a/é/x y.jpg", "50%/a#1.jpg", "c::d/e.jpg", "+.jpg", "?/a.jpg", "z/y/x/w/v.jpg", "a/.hidden.jpg", ".git/a.jpg",
    "__MACOSX/a.jpg", "notes.md", "a/x.csv", "d/e.png", "d.d/e.webp",
)  # fmt: skip


@pytest.fixture
def put_tree(put_object):
    def put(*keys: str) -> None:
        for key in keys:
            put_object(key, b"")

    return put


def list_items(given: str, **options) -> list:
    return list(open_source(given, options=ListingOptions(**{"retries": 1, **options})).list_images())


def names(items: list, root: str) -> list[str]:
    assert all(item.uri.startswith(f"{root}/") for item in items)
    return [item.uri.removeprefix(f"{root}/") for item in items]


def list_requests(proxy) -> list[str]:
    """The prefixes that were listed."""
    queries = [path.partition("?")[2] for path in proxy.paths("GET") if "list-type=2" in path]
    return [unquote(dict(pair.partition("=")[::2] for pair in query.split("&")).get("prefix", "")) for query in queries]


# ---------------------------------------------------------------------------------------------------------------
# What is listed, and in which order


def test_bucket_lists_like_the_same_folder(bucket, put_tree, tmp_path):
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    put_tree(*random.Random(1).sample(TREE, len(TREE)))
    local, remote = (open_source(given, options=ListingOptions()) for given in (str(tmp_path), f"s3://{bucket}"))
    local_names = names(list(local.list_images()), str(tmp_path))
    assert names(list(remote.list_images()), f"s3://{bucket}") == local_names
    assert remote.skipped == local.skipped


def test_input_below_the_root_lists_what_is_below(bucket, put_tree):
    put_tree("in/a.jpg", "in/b/c.jpg", "in2/d.jpg", "in.jpg")
    assert names(list_items(f"s3://{bucket}/in/"), f"s3://{bucket}/in") == ["a.jpg", "b/c.jpg"]


def test_size_of_an_object_is_listed(bucket, put_object):
    put_object("in/a.jpg", bytes(123))
    assert list_items(f"s3://{bucket}/in") == [ListedImage(f"s3://{bucket}/in/a.jpg", size=123)]


def test_folder_is_the_target(bucket, put_tree):
    put_tree("in/cat #1/a.jpg", "in/b.jpg")
    images = list_items(f"s3://{bucket}/in", target="folder")
    assert [image.target for image in images] == ["in", "cat #1"]


def test_folder_of_more_than_a_page_is_listed_whole(faulty_s3, bucket, put_tree):
    put_tree(*(f"in/{number:04d}.jpg" for number in range(1003)))
    assert len(list_items(f"s3://{bucket}/in")) == 1003
    assert len([path for path in faulty_s3.paths("GET") if "continuation-token" in path]) == 1


def test_containers_are_sources_of_their_own(bucket, put_tree):
    put_tree("in/a.jpg", "in/b.tar", "in/c.jpg")
    first, tar, last = list_items(f"s3://{bucket}/in")
    assert isinstance(tar, TarSource) and tar.uri == f"s3://{bucket}/in/b.tar"
    assert (first.uri[-5:], last.uri[-5:]) == ("a.jpg", "c.jpg")


def test_object_that_stands_for_a_folder_is_no_image(bucket, put_tree):
    put_tree("in/", "in/a.jpg/", "in/b/", "in/b/c.jpg")
    assert names(list_items(f"s3://{bucket}/in"), f"s3://{bucket}/in") == ["b/c.jpg"]


def test_name_that_is_a_file_and_a_folder_is_both(bucket, put_tree):
    put_tree("in/a.jpg", "in/a.jpg/b.jpg")
    assert sorted(names(list_items(f"s3://{bucket}/in"), f"s3://{bucket}/in")) == ["a.jpg", "a.jpg/b.jpg"]


def test_listing_is_the_same_twice(bucket, put_tree):
    put_tree(*(f"in/{number % 7}/{number}.jpg" for number in range(50)))
    assert list_items(f"s3://{bucket}/in") == list_items(f"s3://{bucket}/in")


@pytest.mark.parametrize("key", ["in/a//b.jpg", "in//b.jpg", "in/./b.jpg", "in/../b.jpg", "in/a///b.jpg"])
def test_keys_that_cannot_be_asked_for_are_one_entry(bucket, put_tree, key):
    put_tree("in/0.jpg", "in/z.jpg", "in/a/a.jpg", key)
    images = list_items(f"s3://{bucket}/in")
    assert [image.error.partition(":")[0] for image in images if image.error] == ["UnsupportedKey"]
    assert [image.uri.rpartition("/")[2] for image in images if not image.error] == ["0.jpg", "a.jpg", "z.jpg"]


def test_key_that_begins_with_a_slash_is_one_entry(bucket, put_tree):
    put_tree("/a.jpg", "b.jpg")
    failed, image = list_items(f"s3://{bucket}")
    assert failed.error.startswith("UnsupportedKey") and failed.uri == f"s3://{bucket}//"
    assert image.uri == f"s3://{bucket}/b.jpg"


def test_empty_bucket_lists_nothing(bucket):
    assert list_items(f"s3://{bucket}") == []


def test_output_inside_the_input_is_not_listed(faulty_s3, bucket, put_tree):
    put_tree("in/a.jpg", "in/out/b.jpg", "in/out2/c.jpg")
    images = list_items(f"s3://{bucket}/in", output=f"s3://{bucket}/in/out")
    assert names(images, f"s3://{bucket}/in") == ["a.jpg", "out2/c.jpg"]
    assert "in/out/" not in list_requests(faulty_s3)


def test_output_that_is_the_input_lists_nothing(bucket, put_tree):
    put_tree("in/a.jpg")
    assert list_items(f"s3://{bucket}/in", output=f"s3://{bucket}/in") == []


def test_globs_include_and_exclude(bucket, put_tree):
    put_tree("in/a.jpg", "in/b.png", "in/c/d.jpg", "in/c/e.jpg")
    images = list_items(f"s3://{bucket}/in", selection=Selection(("*.jpg",), ("c/e*",)))
    assert names(images, f"s3://{bucket}/in") == ["a.jpg", "c/d.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected", "listed"),
    [
        ("*.jpg", ["a.jpg"], {"in/"}),
        ("2024-*/*.jpg", ["2024-01/b.jpg", "2024-02/c.jpg"], {"in/", "in/2024-01/", "in/2024-02/"}),
        ("2024-01", ["2024-01/b.jpg", "2024-01/x/d.jpg"], {"in/2024-01/", "in/2024-01/x/"}),
        ("2024-?1", ["2024-01/b.jpg", "2024-01/x/d.jpg"], {"in/", "in/2024-01/", "in/2024-01/x/"}),
        ("*/x/*", ["2024-01/x/d.jpg"], {"in/", "in/2023/", "in/2024-01/", "in/2024-02/", "in/2024-01/x/"}),
    ],
)
def test_pattern_lists_only_where_it_leads(faulty_s3, bucket, put_tree, pattern, expected, listed):
    put_tree("in/a.jpg", "in/2023/a.png", "in/2024-01/b.jpg", "in/2024-02/c.jpg", "in/2024-01/x/d.jpg", "z/z.jpg")
    images = list_items(f"s3://{bucket}/in/{pattern}")
    assert [image.uri.removeprefix(f"s3://{bucket}/in/") for image in images] == expected
    assert set(list_requests(faulty_s3)) - {"in", "in/2024-01"} == listed - {"in/2024-01"}


# ---------------------------------------------------------------------------------------------------------------
# Many requests at a time, and those that fail


def test_folders_are_listed_at_the_same_time(faulty_s3, bucket, put_tree):
    put_tree(*(f"in/{number:02d}/a.jpg" for number in range(40)))
    barrier = faulty_s3.gather(32, path=r"prefix=in%2F\d+%2F")
    images = list_items(f"s3://{bucket}/in")
    assert not barrier.broken
    assert names(images, f"s3://{bucket}/in") == [f"{number:02d}/a.jpg" for number in range(40)]


def test_tars_are_indexed_at_the_same_time_and_listed_in_their_order(faulty_s3, bucket, put_object):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    for number in range(70):
        put_object(f"in/{number:02d}.tar", content.getvalue())
    barrier = faulty_s3.gather(64, method="GET", path=r"/in/\d+\.tar")
    images = list(Inputs((f"s3://{bucket}/in",), options=ListingOptions()).list_images())
    assert not barrier.broken
    assert [image.uri for image in images] == [
        f"tar://a.jpg::s3://{bucket}/in/{number:02d}.tar" for number in range(70)
    ]


def test_listing_that_is_given_up_stops_asking(faulty_s3, bucket, put_tree):
    put_tree(*(f"in/{number:03d}/a.jpg" for number in range(200)))
    images = open_source(f"s3://{bucket}/in", options=ListingOptions()).list_images()
    next(images)
    images.close()
    assert len(list_requests(faulty_s3)) < 100


@pytest.mark.parametrize("fail", ["slow_down", "cut", "cut_body"])
def test_listing_that_fails_for_a_moment_is_tried_again(faulty_s3, bucket, put_tree, fail):
    put_tree("in/a.jpg", "in/b/c.jpg", "in/d/e.jpg")
    getattr(faulty_s3, fail)(path="prefix=in%2Fb%2F", times=2)
    assert names(list_items(f"s3://{bucket}/in", retries=2), f"s3://{bucket}/in") == ["a.jpg", "b/c.jpg", "d/e.jpg"]


@pytest.mark.parametrize("prefix", ["in%2F", "in%2Fb%2F"])
def test_listing_that_keeps_failing_ends_the_listing(faulty_s3, bucket, put_tree, prefix):
    put_tree("in/a.jpg", "in/b/c.jpg")
    faulty_s3.slow_down(path=f"prefix={prefix}(&|$)")
    with pytest.raises(StorageError, match=rf"^cannot (list|read input) '?s3://{bucket}/in(/b)?'?: SlowDown: [^\n]+$"):
        list_items(f"s3://{bucket}/in", retries=2)
    assert len(list_requests(faulty_s3)) >= 3


def test_page_that_keeps_failing_ends_the_listing(faulty_s3, bucket, put_tree):
    put_tree(*(f"in/{number:04d}.jpg" for number in range(1001)))
    faulty_s3.slow_down(path="continuation-token")
    with pytest.raises(StorageError, match="SlowDown"):
        list_items(f"s3://{bucket}/in")


def test_forbidden_folder_is_one_entry(faulty_s3, bucket, put_tree):
    put_tree("in/a.jpg", "in/b/c.jpg", "in/b/d/e.jpg", "in/f/g.jpg")
    faulty_s3.answer(403, DENIED, path="prefix=in%2Fb%2F")
    first, forbidden, last = list_items(f"s3://{bucket}/in")
    assert forbidden.uri == f"s3://{bucket}/in/b" and forbidden.error.startswith("AccessDenied: ")
    assert (first.error, last.error) == (None, None)


# ---------------------------------------------------------------------------------------------------------------
# Inputs that are none


def test_missing_bucket_is_an_input_that_does_not_exist(bucket):
    with pytest.raises(NoImagesError, match="input 's3://there-is-no-such-bucket/in' does not exist"):
        open_source("s3://there-is-no-such-bucket/in", options=ListingOptions())
    with pytest.raises(NoImagesError, match="input 's3://there-is-no-such-bucket' does not exist"):
        open_source("s3://there-is-no-such-bucket", options=ListingOptions())


def test_missing_key_is_an_input_that_does_not_exist(bucket, put_tree):
    put_tree("in/a.jpg")
    with pytest.raises(NoImagesError, match=rf"input 's3://{bucket}/in/b' does not exist$"):
        open_source(f"s3://{bucket}/in/b", options=ListingOptions())
    with pytest.raises(NoImagesError, match=rf"and neither does the folder 's3://{bucket}/no'"):
        open_source(f"s3://{bucket}/no/b", options=ListingOptions())


def test_all_missing_inputs_are_named_at_once(bucket, put_tree):
    with pytest.raises(NoImagesError) as raised:
        Inputs((f"s3://{bucket}/a.jpg", f"s3://{bucket}/b.jpg"), options=ListingOptions())
    assert len(raised.value.faults) == 2


def test_forbidden_input_is_one_clear_line(faulty_s3, bucket):
    faulty_s3.answer(403, DENIED)
    with pytest.raises(StorageError, match=rf"^cannot read input 's3://{bucket}/in': AccessDenied: [^\n]+$"):
        open_source(f"s3://{bucket}/in", options=ListingOptions())


def test_input_is_looked_for_again_where_the_store_is_busy(faulty_s3, bucket, put_tree):
    put_tree("in/a.jpg")
    faulty_s3.slow_down(times=2)
    assert open_source(f"s3://{bucket}/in", options=ListingOptions(retries=2)).is_folder


@pytest.mark.parametrize("key", ["a//b", "./a", "a/../b"])
def test_input_that_cannot_be_asked_for_is_one_clear_line(bucket, key):
    with pytest.raises(StorageError, match=r"UnsupportedKey: [^\n]+$"):
        open_source(join_key("s3", bucket, key), options=ListingOptions())
