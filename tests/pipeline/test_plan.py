"""A plan holds every listed image once, is the same for the same listing, and stays small on disk and in memory."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import tracemalloc
import uuid
from itertools import islice, pairwise
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import plan as plans
from pipeline import schema
from pipeline.errors import OutputError
from pipeline.plan import (
    Listing,
    Plan,
    Shard,
    Units,
    extend_plan,
    find_shard_size,
    load_plan,
    read_images,
    read_shard_uris,
    read_shards,
    read_uris,
    sample_uris,
    seal_plan,
    stride_order,
    write_listing,
)
from pipeline.sources import ListedImage
from pipeline.storage import LocalFolder

LISTING = Listing(num_images=5, num_shards=1, shard_size=64, max_shard_images=5, hash="ab" * 32)
FIRST = f"{plans.PLAN_DIR}/segment-000"


def make_images(count: int) -> list[ListedImage]:
    return [ListedImage(f"/photos/{number:07d}.jpg") for number in range(count)]


def make_unit(container: str, unit: int, count: int) -> list[ListedImage]:
    """What is read in one pass: the rows of a row group, or the members of a compressed tar."""
    return [ListedImage(f"{container}#row={unit * 1000 + row}", unit=unit) for row in range(count)]


def seal(folder: LocalFolder, *listings: Listing) -> Plan:
    """A plan of these segments, whose settings do not matter."""
    plan = seal_plan(folder, listings[0], given={}, resolved={}, epoch=0)
    for listing in listings[1:]:
        plan = extend_plan(folder, plan, listing)
    return plan


def read_segment(folder: LocalFolder, listing: Listing) -> list[Shard]:
    """The shards of a first segment that is not sealed yet."""
    return read_shards(folder, make_plan(segments=(listing,)))


def read_all(folder: LocalFolder, listing: Listing) -> list[ListedImage]:
    return [image for shard in read_segment(folder, listing) for image in read_images(folder, shard)]


def list_plan_files(folder: LocalFolder) -> list[str]:
    return folder.list_names(FIRST)


@pytest.fixture
def small_files(monkeypatch):
    """Four rows a group and twelve a file, so that a few dozen images fill several of both."""
    monkeypatch.setattr(plans, "_ROWS_PER_GROUP", 4)
    monkeypatch.setattr(plans, "ROWS_PER_FILE", 12)


def write_anew(images: list[ListedImage], shard_size: int | None = None) -> Listing:
    with tempfile.TemporaryDirectory() as root:
        return write_listing(LocalFolder(root, scratch="tmp"), images, shard_size=shard_size)


def make_plan(**changes) -> Plan:
    fields = {
        "run_id": "1",
        "epoch": 0,
        "segments": (LISTING,),
        "given": {"model": "auto"},
        "resolved": {"model": "a", "k": 5},
    }
    return Plan(**fields | changes)


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
    assert listing.max_shard_images == 64
    assert read_segment(folder, listing) == [Shard(0, 0, 64), Shard(1, 64, 64), Shard(2, 128, 22)]


@given(num_images=st.integers(0, 60), shard_size=st.integers(1, 70))
@settings(max_examples=60)
def test_every_image_is_in_exactly_one_shard(num_images, shard_size):
    images = make_images(num_images)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        patch.setattr(plans, "_ROWS_PER_GROUP", 4)
        patch.setattr(plans, "ROWS_PER_FILE", 12)
        folder = LocalFolder(root, scratch="tmp")
        listing = write_listing(folder, images, shard_size=shard_size)
        shards = read_segment(folder, listing)
        assert [image for shard in shards for image in read_images(folder, shard)] == images
        assert listing.num_shards == len(shards)
        assert all(shard.num_images == shard_size for shard in shards[:-1])
        assert all(0 < shard.num_images <= shard_size for shard in shards)
        assert [shard.index for shard in shards] == list(range(len(shards)))


@pytest.mark.parametrize("shard_size", [100, 4096, 5000, 10_000])
def test_shards_of_any_size_are_read_from_files_of_the_real_size(folder, shard_size):
    images = make_images(9001)
    listing = write_listing(folder, images, shard_size=shard_size)
    assert read_all(folder, listing) == images


def test_rows_come_back_with_targets_and_errors(folder, small_files):
    images = [
        ListedImage("/a/ä\n.jpg", "cat"),
        ListedImage("/a/b", None, "PermissionError: Permission denied"),
        ListedImage("/a/c.jpg", None, None),
        ListedImage("/a/d.jpg", "", ""),
    ] * 9
    listing = write_listing(folder, images)
    assert read_all(folder, listing) == images


def test_rows_come_back_with_what_it_takes_to_read_them(folder, small_files):
    images = [
        ListedImage("tar://a.jpg::/b.tar", None, None, 512, 2**40, None),
        ListedImage("tar://c.jpg::/b.tgz", "cat", None, 2**62, 0, 0),
        ListedImage("/d.parquet#row=7", None, "DamagedImage: no", None, None, 2**31 - 1),
    ] * 9
    listing = write_listing(folder, images)
    assert read_all(folder, listing) == images


def test_uris_of_a_shard_are_those_of_its_images(folder, small_files):
    listing = write_listing(folder, make_images(60), shard_size=7)
    for shard in read_segment(folder, listing):
        uris = [image.uri for image in read_images(folder, shard)]
        assert read_shard_uris(folder, shard).to_pylist() == uris
        assert uris[0] in sample_uris(folder, read_segment(folder, listing))


def test_reading_a_shard_reads_only_its_own_rows(folder, small_files, monkeypatch):
    listing = write_listing(folder, make_images(60), shard_size=4)
    groups = []

    class SpiedFile(pq.ParquetFile):
        def read_row_group(self, group, columns=None):
            groups.append(group)
            return super().read_row_group(group, columns)

    monkeypatch.setattr(pq, "ParquetFile", SpiedFile)
    shard = read_segment(folder, listing)[7]  # images 28 to 31: group 1 of file 2
    assert read_images(folder, shard) == make_images(60)[28:32]
    assert groups == [1]


def test_plan_files_are_of_plain_types(folder):
    write_listing(folder, make_images(3))
    assert pq.read_schema(folder.path(f"{FIRST}/images-00000.parquet")).equals(schema.PLAN)
    assert pq.read_schema(folder.path(f"{FIRST}/shards.parquet")).equals(schema.SHARDS)


# A worker of a run that was overwritten may still be reading while the next one has written a shorter plan.
@pytest.mark.parametrize("first", [5, 10, 5_000])
def test_images_that_are_not_in_the_plan_any_more_are_an_error(folder, first):
    write_listing(folder, make_images(10))
    with pytest.raises((OutputError, OSError, pa.ArrowException, IndexError)):
        read_images(folder, Shard(0, first, 64))


# ---------------------------------------------------------------------------------------------------------------
# Units

# Images by themselves (None) and units, in some order; neighbours of one container have different numbers.
layouts = st.lists(st.none() | st.integers(1, 12), max_size=12)


def lay_out(layout: list[int | None]) -> tuple[list[ListedImage], list[range]]:
    """The images of a layout, and where its units lie."""
    images: list[ListedImage] = []
    units = []
    for number, count in enumerate(layout):
        unit = [ListedImage(f"/{number}.jpg")] if count is None else make_unit(f"/{number // 3}.parquet", number, count)
        if count is not None:
            units.append(range(len(images), len(images) + count))
        images += unit
    return images, units


@given(layout=layouts, shard_size=st.integers(1, 30), chunk=st.integers(1, 9))
@example([None, 3, None], 2, 1)
@example([12], 5, 5)
@settings(max_examples=300)
def test_shards_are_cut_everywhere_but_within_units(layout, shard_size, chunk):
    images, ranges = lay_out(layout)
    units = Units()
    for first in range(0, len(images), chunk):
        units.add(images[first : first + chunk], first=first)
    borders = list(units.cut(len(images), shard_size))
    assert (borders[0], borders[-1]) == (0, len(images))
    assert borders == sorted(set(borders))
    assert not [border for border in borders for unit in ranges if unit.start < border < unit.stop]
    for first, end in pairwise(borders):
        is_one_unit = range(first, end) in ranges
        assert end - first <= shard_size or is_one_unit
        following = next((unit for unit in ranges if unit.start == end), range(end, end + 1))
        assert end == len(images) or end - first + len(following) > shard_size  # no smaller than it has to be


@given(layout=layouts, shard_size=st.integers(1, 30))
@settings(max_examples=30)
def test_every_image_of_a_unit_is_in_the_same_shard_on_disk(layout, shard_size):
    images, ranges = lay_out(layout)
    with tempfile.TemporaryDirectory() as root:
        folder = LocalFolder(root, scratch="tmp")
        listing = write_listing(folder, images, shard_size=shard_size)
        shards = read_segment(folder, listing)
        assert read_all(folder, listing) == images
        assert listing.max_shard_images == max((shard.num_images for shard in shards), default=0)
    for unit in ranges:
        assert any(shard.first <= unit.start and unit.stop <= shard.first + shard.num_images for shard in shards)


def test_large_unit_is_one_shard_over_several_row_groups(folder, small_files):
    images = [*make_images(3), *make_unit("/a.tgz", 0, 50), *make_images(3)]
    listing = write_listing(folder, images, shard_size=8)
    assert [(shard.first, shard.num_images) for shard in read_segment(folder, listing)] == [(0, 3), (3, 50), (53, 3)]
    assert listing.max_shard_images == 50
    assert read_all(folder, listing) == images


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (make_unit("/a.parquet", 0, 4), make_unit("/a.parquet", 1, 4)),  # row groups of one file
        (make_unit("/a.parquet", 0, 4), make_unit("/b.parquet", 0, 4)),  # of two files
        (make_unit("/a#b.parquet", 0, 4), make_unit("/a.parquet", 0, 4)),
    ],
)
def test_neighbouring_units_are_told_apart(one, other):
    units = Units()
    units.add([*one, *other], first=0)
    assert list(units.cut(8, 4)) == [0, 4, 8]


def test_unit_that_was_interrupted_is_two():
    units = Units()
    units.add([*make_unit("/a.parquet", 0, 4), ListedImage("/b.jpg"), *make_unit("/a.parquet", 0, 4)], first=0)
    assert list(units.cut(9, 5)) == [0, 5, 9]


def test_units_take_a_few_bytes_each():
    units = Units()
    rows = [ListedImage(f"/{number}.parquet#row=0", unit=0) for number in range(20_000)]
    tracemalloc.start()
    try:
        units.add(rows, first=0)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / len(rows) < 24


# ---------------------------------------------------------------------------------------------------------------
# The hash of a listing

# Few and short values, so that two drawn listings often differ in one place only.
cells = st.sampled_from(["a", "b", "ab"])
texts = st.none() | cells | st.just("")
numbers = st.none() | st.integers(0, 1)
listings = st.lists(st.builds(ListedImage, cells, texts, texts, numbers, numbers, numbers), max_size=2)


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
        [ListedImage("/a.jpg", ""), *BASE[1:]],
        [ListedImage("/a.jpg", "cat", ""), *BASE[1:]],
        [ListedImage("/a.jpg", "cat", offset=0), *BASE[1:]],
        [ListedImage("/a.jpg", "cat", size=0), *BASE[1:]],
        [ListedImage("/a.jpg", "cat", unit=0), *BASE[1:]],
        [ListedImage("/a.jpg', '/b.jpg", "cat"), *BASE[1:]],
    ],
)
def test_any_change_of_a_listing_changes_its_hash(changed):
    # None and "" as well: an image without a label is not one whose label is empty.
    assert write_anew(BASE).hash == write_anew(list(BASE)).hash
    assert write_anew(changed).hash != write_anew(BASE).hash


def test_change_beyond_the_first_file_changes_the_hash(folder, small_files):
    images = make_images(40)
    before = write_listing(folder, images).hash
    for place in (11, 12, 24, 39):
        changed = [*images[:place], ListedImage("/photos/other.jpg"), *images[place + 1 :]]
        assert write_listing(folder, changed).hash != before
    assert write_listing(folder, images).hash == before


def test_shard_borders_are_part_of_the_hash():
    assert write_anew(BASE, 3).hash == write_anew(BASE).hash
    assert write_anew(BASE, 2).hash != write_anew(BASE).hash != write_anew(BASE, 1).hash


# ---------------------------------------------------------------------------------------------------------------
# The hash of a run


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 1},
        {"resolved": {"model": "b", "k": 5}},
        {"resolved": {"model": "a", "k": 6}},
        {"resolved": {"model": "a"}},
        {"resolved": {"model": "a", "k": 5, "mean": [0.5]}},
        {"segments": (dataclasses.replace(LISTING, hash="cd" * 32),)},
        {"format": 1},
    ],
)
def test_run_hash_depends_on_what_the_rows_depend_on(changes):
    assert make_plan(**changes).run_hashes != make_plan().run_hashes


@pytest.mark.parametrize("changes", [{"given": {"model": "a"}}, {"run_id": "2"}, {"resolved": {"k": 5, "model": "a"}}])
def test_run_hash_depends_on_nothing_else(changes):
    assert make_plan(**changes).run_hashes == make_plan().run_hashes


def test_run_hash_is_what_part_names_hold():
    (run_hash,) = make_plan().run_hashes
    assert len(run_hash) == 12
    int(run_hash, 16)


def test_run_hash_survives_being_stored(folder):
    resolved = {"mean": (0.485, 0.1 + 0.2), "inputs": ["/caf\udce9"], "limit": None, "fixed": {"b": 1, "a": "ä"}}
    plan = seal_plan(folder, write_listing(folder, BASE), given={"mean": None}, resolved=resolved, epoch=3)
    assert load_plan(folder) == plan
    assert load_plan(folder).run_hashes == plan.run_hashes
    assert plan.epoch == 3
    assert plan.resolved["mean"] == [0.485, 0.1 + 0.2]  # as it comes back from disk, on the first run too


# ---------------------------------------------------------------------------------------------------------------
# The seal


def test_listing_without_its_seal_is_no_plan(folder):
    assert load_plan(folder) is None
    write_listing(folder, BASE)
    assert load_plan(folder) is None
    seal_plan(folder, write_listing(folder, BASE), given={}, resolved={}, epoch=0)
    assert load_plan(folder).num_images == 3


def break_off(images: list[ListedImage]):
    yield from images
    raise OSError("the store refuses")


def test_listing_that_breaks_off_leaves_no_plan(folder):
    with pytest.raises(OSError, match="the store refuses"):
        write_listing(folder, break_off(BASE))
    assert load_plan(folder) is None


@pytest.mark.parametrize("found", [1, 3, None])
def test_plan_of_another_format_is_refused(folder, found):
    seal(folder, write_listing(folder, BASE))
    fields = json.loads(folder.read(plans.SEAL))
    del fields["format"]
    folder.put(plans.SEAL, json.dumps(fields | ({"format": found} if found else {})).encode())
    with pytest.raises(OutputError, match=f"holds a plan of format {found}, and this nightshift knows 2"):
        load_plan(folder)


# The first one had one listing, and its files lay elsewhere.
def test_plan_of_the_first_format_is_refused(folder):
    folder.put(plans.SEAL, b'{"run_id": "1", "epoch": 0, "listing": {"num_images": 3}, "format": 1}')
    with pytest.raises(OutputError, match=r"/out' holds a plan of format 1"):
        load_plan(folder)


def test_shorter_listing_leaves_nothing_of_the_longer_one(folder, small_files):
    write_listing(folder, make_images(40))
    assert len(list_plan_files(folder)) == 5
    listing = write_listing(folder, make_images(12))
    assert list_plan_files(folder) == ["images-00000.parquet", "shards.parquet"]
    assert read_all(folder, listing) == make_images(12)


def test_two_runs_have_two_ids(folder):
    listing = write_listing(folder, BASE)
    ids = {seal_plan(folder, listing, given={}, resolved={}, epoch=0).run_id for _ in range(20)}
    assert len(ids) == 20


# ---------------------------------------------------------------------------------------------------------------
# Segments


def test_segment_more_leaves_run_hashes_and_shards_as_they_were(folder):
    plan = seal(folder, write_listing(folder, make_images(150)))
    shards = read_shards(folder, plan)
    longer = extend_plan(folder, plan, write_listing(folder, make_images(70)[64:], segment=1))
    assert longer.run_hashes[:1] == plan.run_hashes
    assert len(set(longer.run_hashes)) == 2
    assert read_shards(folder, longer)[:3] == shards
    assert read_shards(folder, longer)[3:] == [Shard(3, 0, 6, segment=1)]
    assert (longer.num_images, longer.num_shards, longer.max_shard_images) == (156, 4, 64)
    assert (longer.run_id, longer.epoch) == (plan.run_id, plan.epoch)
    assert load_plan(folder) == longer


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 8))
@settings(max_examples=25)
def test_every_image_of_all_segments_is_in_exactly_one_shard(sizes, shard_size):
    images = make_images(sum(sizes))
    with tempfile.TemporaryDirectory() as root:
        folder, remaining = LocalFolder(root, scratch="tmp"), iter(images)
        plan = seal(
            folder,
            *(
                write_listing(folder, islice(remaining, size), segment=segment, shard_size=shard_size)
                for segment, size in enumerate(sizes)
            ),
        )
        shards = read_shards(folder, plan)
        assert [shard.index for shard in shards] == list(range(plan.num_shards))
        assert [image for shard in shards for image in read_images(folder, shard)] == images
        assert list(read_uris(folder, plan)) == [image.uri for image in images]
        assert len(plan.run_hashes) == len(sizes)


def test_uris_are_read_from_all_files_in_their_order(folder, small_files):
    plan = seal(folder, write_listing(folder, make_images(40)), write_listing(folder, make_images(13), segment=1))
    assert list(read_uris(folder, plan)) == [image.uri for image in make_images(40) + make_images(13)]


def test_segment_that_breaks_off_leaves_the_plan_as_it_was(folder):
    plan = seal(folder, write_listing(folder, BASE))
    with pytest.raises(OSError, match="the store refuses"):
        write_listing(folder, break_off(make_images(9000)), segment=1)
    assert load_plan(folder) == plan
    assert read_all(folder, plan.segments[0]) == BASE
    longer = extend_plan(folder, plan, write_listing(folder, make_images(2), segment=1))
    assert list(read_uris(folder, longer)) == [image.uri for image in BASE + make_images(2)]
    assert folder.list_names(f"{plans.PLAN_DIR}/segment-001") == ["images-00000.parquet", "shards.parquet"]


def test_empty_segment_is_a_plan_too(folder):
    plan = seal(folder, write_listing(folder, []))
    assert (plan.num_images, plan.num_shards, plan.max_shard_images) == (0, 0, 0)
    assert read_shards(folder, plan) == list(read_uris(folder, plan)) == []


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
        lambda n: f"tar://{n:09d}.jpg::s3://my-bucket/laion/shard-{n // 10_000:06d}.tar",
        lambda n: f"/data/train-{n // 5000:05d}-of-00128.parquet#row={n % 5000}",
    )
    images, offset = [], 0
    for n in range(100_000):
        size = random.randrange(5_000, 200_000)
        offset += 1024 + size
        images.append(
            ListedImage(
                kinds[n * len(kinds) // 100_000](n),
                f"n{n // 1300:08d}",
                offset=offset if 60_000 <= n < 80_000 else None,
                size=size if 60_000 <= n < 80_000 else None,
                unit=n // 500 if n >= 80_000 else None,
            )
        )
    write_listing(folder, images)
    sizes = [folder.path(f"{FIRST}/{name}").stat().st_size for name in list_plan_files(folder)]
    assert sum(sizes) / len(images) < 100


def test_image_of_a_tar_takes_less_than_40_bytes_on_disk(folder):
    images = [
        ListedImage(f"tar://{n:09d}.jpg::s3://b/shard-{n // 10_000:06d}.tar", str(n % 1000), None, n * 9_999, 9_000)
        for n in range(20_000)
    ]
    write_listing(folder, images)
    sizes = [folder.path(f"{FIRST}/{name}").stat().st_size for name in list_plan_files(folder)]
    assert sum(sizes) / len(images) < 40


def test_memory_does_not_grow_with_the_listing(folder):
    arrow_bytes = []

    def stream():
        for number in range(120_000):
            if number % 20_000 == 0:
                arrow_bytes.append(pa.total_allocated_bytes())
            yield ListedImage(f"/mnt/archive/photos/{number // 700:04d}/IMG_{number:06d}.JPG", f"class {number // 700}")

    tracemalloc.start()
    try:
        listing = write_listing(folder, stream())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert listing.num_images == 120_000
    assert peak < 15e6
    assert max(arrow_bytes) - arrow_bytes[0] < 30e6


@pytest.mark.parametrize("content", [b"", b'{"run_id": "2025', b"\0" * 500])
def test_damaged_seal_is_refused_with_what_to_do(folder, content):
    folder.put(plans.SEAL, content)
    with pytest.raises(OutputError, match=r"the plan in .* is damaged .*; delete the folder, or name another output"):
        load_plan(folder)
