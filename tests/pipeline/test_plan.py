"""A plan holds every listed image once, is the same for the same listing, and stays small on disk and in memory."""

from __future__ import annotations

import dataclasses
import tempfile
import tracemalloc
import uuid
from itertools import pairwise
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import plan as plans
from pipeline import schema
from pipeline.plan import (
    Listing,
    Plan,
    Shard,
    find_shard_size,
    load_plan,
    read_images,
    read_shards,
    seal_plan,
    stride_order,
    write_listing,
)
from pipeline.sources import ListedImage
from pipeline.storage import LocalFolder

LISTING = Listing(num_images=5, num_shards=1, shard_size=64, hash="ab" * 32)


def make_images(count: int) -> list[ListedImage]:
    return [ListedImage(f"/photos/{number:07d}.jpg") for number in range(count)]


def read_all(folder: LocalFolder) -> list[ListedImage]:
    return [image for shard in read_shards(folder) for image in read_images(folder, shard)]


def list_plan_files(folder: LocalFolder) -> list[str]:
    return folder.list_names(plans.PLAN_DIR)


@pytest.fixture
def small_files(monkeypatch):
    """Four rows a group and twelve a file, so that a few dozen images fill several of both."""
    monkeypatch.setattr(plans, "_ROWS_PER_GROUP", 4)
    monkeypatch.setattr(plans, "ROWS_PER_FILE", 12)


def write_anew(images: list[ListedImage], shard_size: int | None = None) -> Listing:
    with tempfile.TemporaryDirectory() as root:
        return write_listing(LocalFolder(root, scratch="tmp"), images, shard_size=shard_size)


# ---------------------------------------------------------------------------------------------------------------
# Shards


@pytest.mark.parametrize(
    ("num_images", "shard_size"),
    [
        (0, 64),
        (1, 64),
        (64, 64),
        (65, 64),
        (64 * 512, 64),
        (96 * 512 - 1, 64),
        (96 * 512 + 1, 128),
        (128 * 512, 128),
        (98_303, 128),
        (98_304, 256),  # 192 is as near to 128 as to 256
        (98_305, 256),
        (256 * 512, 256),
        (1_000_000, 2048),  # 1,953
        (1_281_167, 2048),  # ImageNet: 2,502
        (3072 * 512 - 1, 2048),
        (3072 * 512 + 1, 4096),
        (4096 * 512, 4096),
        (10_000_000, 4096),
        (1_000_000_000, 4096),
    ],
)
def test_shard_size_is_the_power_of_two_nearest_a_512th(num_images, shard_size):
    assert find_shard_size(num_images) == shard_size


def test_shard_size_is_capped_where_shards_are_sent_as_pixels():
    assert find_shard_size(10_000_000, max_shard_size=plans.MAX_SPLIT_SHARD_SIZE) == 512
    assert find_shard_size(1, max_shard_size=plans.MAX_SPLIT_SHARD_SIZE) == 64


def test_listing_is_cut_by_the_number_of_its_images(folder):
    listing = write_listing(folder, make_images(150))
    assert (listing.num_images, listing.num_shards, listing.shard_size) == (150, 3, 64)
    assert read_shards(folder) == [Shard(0, 0, 64), Shard(1, 64, 64), Shard(2, 128, 22)]


@given(num_images=st.integers(0, 60), shard_size=st.integers(1, 70))
@settings(max_examples=60)
def test_every_image_is_in_exactly_one_shard(num_images, shard_size):
    images = make_images(num_images)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        patch.setattr(plans, "_ROWS_PER_GROUP", 4)
        patch.setattr(plans, "ROWS_PER_FILE", 12)
        folder = LocalFolder(root, scratch="tmp")
        listing = write_listing(folder, images, shard_size=shard_size)
        shards = read_shards(folder)
        assert [image for shard in shards for image in read_images(folder, shard)] == images
        assert listing.num_shards == len(shards)
        assert all(shard.num_images == shard_size for shard in shards[:-1])
        assert all(0 < shard.num_images <= shard_size for shard in shards)
        assert [shard.index for shard in shards] == list(range(len(shards)))


@pytest.mark.parametrize("shard_size", [100, 4096, 5000, 10_000])
def test_shards_of_any_size_are_read_from_files_of_the_real_size(folder, shard_size):
    images = make_images(9001)
    write_listing(folder, images, shard_size=shard_size)
    assert read_all(folder) == images


def test_rows_come_back_with_targets_and_errors(folder, small_files):
    images = [
        ListedImage("/a/ä\n.jpg", "cat"),
        ListedImage("/a/b", None, "PermissionError: Permission denied"),
        ListedImage("/a/c.jpg", None, None),
    ] * 9
    write_listing(folder, images)
    assert read_all(folder) == images


def test_reading_a_shard_reads_only_its_own_rows(folder, small_files, monkeypatch):
    write_listing(folder, make_images(60), shard_size=4)
    groups = []

    class SpiedFile(pq.ParquetFile):
        def read_row_group(self, group):
            groups.append(group)
            return super().read_row_group(group)

    monkeypatch.setattr(pq, "ParquetFile", SpiedFile)
    shard = read_shards(folder)[7]  # images 28 to 31: group 1 of file 2
    assert read_images(folder, shard) == make_images(60)[28:32]
    assert groups == [1]


def test_plan_files_are_of_plain_types(folder):
    write_listing(folder, make_images(3))
    assert pq.read_schema(folder.path("_nightshift/plan/images-00000.parquet")).equals(schema.PLAN)
    assert pq.read_schema(folder.path("_nightshift/plan/shards.parquet")).equals(schema.SHARDS)


# ---------------------------------------------------------------------------------------------------------------
# The hash of a listing

# Few and short values, so that two drawn listings often differ in one place only.
cells = st.sampled_from(["a", "b", "ab"])
listings = st.lists(st.builds(ListedImage, cells, st.none() | cells, st.none() | cells), max_size=3)


@given(listings, listings)
@settings(max_examples=100)
def test_listings_have_the_same_hash_if_and_only_if_they_are_the_same(one, other):
    assert (write_anew(one).hash == write_anew(other).hash) is (one == other)


BASE = [ListedImage("/a.jpg", "cat"), ListedImage("/b.jpg", "dog"), ListedImage("/c", None, "OSError: no")]


@pytest.mark.parametrize(
    "changed",
    [
        [ListedImage("/A.jpg", "cat"), *BASE[1:]],
        [ListedImage("/a.jpg", "dog"), *BASE[1:]],
        [ListedImage("/a.jpg"), *BASE[1:]],
        [ListedImage("/a.jpg", None, "cat"), *BASE[1:]],
        [*BASE[:2], ListedImage("/c", None, "OSError: yes")],
        [*BASE[:2], ListedImage("/c")],
        [BASE[1], BASE[0], BASE[2]],
        BASE[:2],
        [*BASE, BASE[0]],
        [],
    ],
)
def test_any_change_of_a_listing_changes_its_hash(changed):
    assert write_anew(BASE).hash == write_anew(list(BASE)).hash
    assert write_anew(changed).hash != write_anew(BASE).hash


def test_change_beyond_the_first_file_changes_the_hash(folder, small_files):
    images = make_images(40)
    before = write_listing(folder, images).hash
    for place in (11, 12, 24, 39):
        changed = [*images[:place], ListedImage("/photos/other.jpg"), *images[place + 1 :]]
        assert write_listing(folder, changed).hash != before
    assert write_listing(folder, images).hash == before


def test_shard_size_is_part_of_the_hash():
    assert write_anew(BASE, 64).hash == write_anew(BASE).hash
    assert write_anew(BASE, 65).hash != write_anew(BASE).hash


# ---------------------------------------------------------------------------------------------------------------
# The hash of a run


def make_plan(**changes) -> Plan:
    fields = {
        "run_id": "1",
        "epoch": 0,
        "listing": LISTING,
        "given": {"model": "auto"},
        "resolved": {"model": "a", "k": 5},
    }
    return Plan(**fields | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 1},
        {"resolved": {"model": "b", "k": 5}},
        {"resolved": {"model": "a", "k": 6}},
        {"resolved": {"model": "a"}},
        {"resolved": {"model": "a", "k": 5, "mean": [0.5]}},
        {"listing": dataclasses.replace(LISTING, hash="cd" * 32)},
        {"format": 2},
    ],
)
def test_run_hash_depends_on_what_the_rows_depend_on(changes):
    assert make_plan(**changes).run_hash != make_plan().run_hash


@pytest.mark.parametrize("changes", [{"given": {"model": "a"}}, {"run_id": "2"}, {"resolved": {"k": 5, "model": "a"}}])
def test_run_hash_depends_on_nothing_else(changes):
    assert make_plan(**changes).run_hash == make_plan().run_hash


def test_run_hash_is_what_part_names_hold():
    assert len(make_plan().run_hash) == 12
    int(make_plan().run_hash, 16)


def test_run_hash_survives_being_stored(folder):
    resolved = {"mean": (0.485, 0.1 + 0.2), "inputs": ["/caf\udce9"], "limit": None, "fixed": {"b": 1, "a": "ä"}}
    plan = seal_plan(folder, write_listing(folder, BASE), given={"mean": None}, resolved=resolved, epoch=3)
    assert load_plan(folder) == plan
    assert load_plan(folder).run_hash == plan.run_hash
    assert plan.epoch == 3
    assert plan.resolved["mean"] == [0.485, 0.1 + 0.2]  # as it comes back from disk, on the first run too


# ---------------------------------------------------------------------------------------------------------------
# The seal


def test_listing_without_its_seal_is_no_plan(folder):
    assert load_plan(folder) is None
    write_listing(folder, BASE)
    assert load_plan(folder) is None
    seal_plan(folder, write_listing(folder, BASE), given={}, resolved={}, epoch=0)
    assert load_plan(folder).listing.num_images == 3


def test_listing_that_breaks_off_leaves_no_plan(folder):
    seal_plan(folder, write_listing(folder, BASE), given={}, resolved={}, epoch=0)

    def break_off():
        yield from BASE
        raise OSError("the store refuses")

    with pytest.raises(OSError, match="the store refuses"):
        write_listing(folder, break_off())
    assert load_plan(folder) is None  # not the one before either: its images are gone


def test_shorter_listing_leaves_nothing_of_the_longer_one(folder, small_files):
    write_listing(folder, make_images(40))
    assert len(list_plan_files(folder)) == 5
    write_listing(folder, make_images(12))
    assert list_plan_files(folder) == ["images-00000.parquet", "shards.parquet"]
    assert read_all(folder) == make_images(12)


def test_two_runs_have_two_ids(folder):
    listing = write_listing(folder, BASE)
    ids = {seal_plan(folder, listing, given={}, resolved={}, epoch=0).run_id for _ in range(20)}
    assert len(ids) == 20


# ---------------------------------------------------------------------------------------------------------------
# The order of work


@pytest.mark.parametrize("count", [*range(30), 97, 128, 1000, 2584])
def test_stride_order_has_every_shard_once(count):
    shards = [Shard(index, index * 64, 64) for index in range(count)]
    order = list(stride_order(shards))
    assert sorted(order, key=lambda shard: shard.index) == shards
    assert list(stride_order(shards)) == order


@pytest.mark.parametrize("count", [300, 512, 1000, 10_000])
def test_first_tenth_of_the_work_is_from_all_over_the_archive(count):
    order = [shard.index for shard in stride_order([Shard(index, index * 64, 64) for index in range(count)])]
    assert {index * 10 // count for index in order[: count // 10]} == set(range(10))


def test_neighbours_are_not_worked_on_one_after_the_other():
    order = [shard.index for shard in stride_order([Shard(index, index * 64, 64) for index in range(1000)])]
    assert min(abs(a - b) for a, b in pairwise(order)) > 100


# ---------------------------------------------------------------------------------------------------------------
# Size


def test_image_takes_less_than_100_bytes_on_disk(folder):
    random = Random(1)
    kinds = (
        lambda n: f"/mnt/archive/photos/{2005 + n // 9000}/{n // 700:04d}-trip to the sea/IMG_{n:06d}.JPG",
        lambda n: f"/data/imagenet/train/n{n // 1300:08d}/n{n // 1300:08d}_{random.randrange(100_000)}.JPEG",
        lambda n: f"/srv/uploads/{uuid.UUID(int=random.getrandbits(128))}.webp",
    )
    images = [ListedImage(kinds[n * 3 // 100_000](n), f"n{n // 1300:08d}") for n in range(100_000)]
    write_listing(folder, images)
    size = sum(folder.path(f"{plans.PLAN_DIR}/{name}").stat().st_size for name in list_plan_files(folder))
    assert size / len(images) < 100


def test_memory_does_not_grow_with_the_listing(folder):
    arrow_bytes = []

    def stream():
        for number in range(200_000):
            if number % 20_000 == 0:
                arrow_bytes.append(pa.total_allocated_bytes())
            yield ListedImage(f"/mnt/archive/photos/{number // 700:04d}/IMG_{number:06d}.JPG", f"class {number // 700}")

    tracemalloc.start()
    try:
        listing = write_listing(folder, stream())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert listing.num_images == 200_000
    assert peak < 15e6
    assert max(arrow_bytes) - arrow_bytes[0] < 30e6
