"""What is trained on is the same whether it was kept, decoded once more, or made ready by somebody else."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from training import tabulate, write_images

from pipeline import examples as examples_module
from pipeline.errors import WorkerError
from pipeline.examples import BATCH_SIZE, Examples, keep_pixels
from pipeline.fetch import Fetcher
from pipeline.images import ImageOpener
from pipeline.presets import Preset
from pipeline.rows import Room
from pipeline.storage.uri import path_to_uri
from pipeline.team import Team

PRESET = Preset(resize=12, crop=10)
NUM_BYTES = 3 * 10 * 10
LABEL_IDS = [0, 1, 2, 1, 0, 2, 0]
AMPLE = Room(10**6, 10**6)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), LABEL_IDS)


@pytest.fixture(scope="module")
def row_groups(paths, tmp_path_factory):
    """The same images, in a Parquet file with row groups of three."""
    path = str(tmp_path_factory.mktemp("parquet") / "images.parquet")
    images = [{"bytes": Path(image).read_bytes(), "path": None} for image in paths]
    pq.write_table(pa.table({"image": images}), path, row_group_size=3)
    uris = [f"{path_to_uri(path)}#row={row}" for row in range(len(paths))]
    return tabulate(uris, LABEL_IDS, units=[row // 3 for row in range(len(paths))])


def open_examples(table, *, room: Room = AMPLE, transform=keep_pixels, team=None) -> Examples:
    opener = ImageOpener(Fetcher(retries=0), PRESET, exif="ignore", max_pixels=10**6, num_threads=1)
    kept = transform(torch.zeros((1, 3, 10, 10), dtype=torch.uint8))[0]
    return Examples(table, opener, transform, kept.shape, kept.dtype, team=team or Team(), room=room)


def prepare(table, **options) -> Examples:
    examples = open_examples(table, **options)
    examples.unusable = examples.prepare(lambda count: None)
    return examples


def average(pixels: torch.Tensor) -> torch.Tensor:
    """A transform to features."""
    return pixels.float().mean((2, 3))


def open_plainly(paths) -> torch.Tensor:
    return torch.stack([PRESET.exact(Image.open(path).convert("RGB")) for path in paths])


@pytest.mark.parametrize("num_kept", [0, 3, 7], ids=["none kept", "some kept", "all kept"])
@pytest.mark.parametrize("transform", [keep_pixels, average], ids=["pixels", "features"])
def test_images_are_the_same_whether_or_not_there_is_room_for_them(paths, num_kept, transform):
    expected = transform(open_plainly(paths))
    row_bytes = expected[0].numel() * expected.itemsize
    examples = prepare(tabulate(paths, LABEL_IDS), room=Room(num_kept * row_bytes, 0), transform=transform)
    assert examples.num_kept == num_kept
    for rows in (np.arange(7), np.array([6, 0, 3, 3, 1, 6]), np.array([5]), np.array([], dtype=np.int64)):
        assert torch.equal(examples.take(rows), expected[rows])


@pytest.mark.parametrize("num_kept", [0, 2, 7], ids=["none kept", "some kept", "all kept"])
def test_rows_of_a_row_group_can_be_taken_in_any_order_and_more_than_once(paths, row_groups, num_kept):
    expected = open_plainly(paths)
    examples = prepare(row_groups, room=Room(0, num_kept * NUM_BYTES))
    shuffled = random.Random(0)
    for count in (7, 7, 20):
        rows = np.array(shuffled.choices(range(7), k=count) if count > 7 else shuffled.sample(range(7), 7))
        assert torch.equal(examples.take(rows), expected[rows])


def test_row_group_is_read_once_however_its_rows_are_asked_for(row_groups, monkeypatch):
    examples = prepare(row_groups, room=Room(0, 0))
    read = []
    read_row_group = pq.ParquetFile.read_row_group
    iter_batches = pq.ParquetFile.iter_batches

    def watch_read(file, group, *args, **kwargs):
        read.append(group)
        return read_row_group(file, group, *args, **kwargs)

    def watch_iter(file, *args, **kwargs):
        read.extend(kwargs.get("row_groups") or ["all"])
        return iter_batches(file, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watch_read)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watch_iter)
    examples.take(np.array([5, 0, 4, 1, 3, 2, 0]))
    assert sorted(read) == [0, 1]


def test_unusable_images_are_told_apart_with_their_reasons(tmp_path):
    paths = write_images(tmp_path, LABEL_IDS)
    Path(paths[1]).write_bytes(b"broken")
    Path(paths[4]).unlink()
    examples = prepare(tabulate(paths, LABEL_IDS))
    assert examples.usable.tolist() == [0, 2, 3, 5, 6]
    assert [(Path(image.uri).name, image.error_stage) for image in examples.unusable] == [
        ("00001.png", "decode"),
        ("00004.png", "read"),
    ]
    assert examples.unusable[0].error == "UnidentifiedImageError: cannot identify image file"
    kept = [paths[row] for row in examples.usable]
    assert torch.equal(examples.take(examples.usable), open_plainly(kept))


def test_image_that_was_readable_and_is_not_any_more_is_named(tmp_path):
    paths = write_images(tmp_path, LABEL_IDS)
    examples = prepare(tabulate(paths, LABEL_IDS), room=Room(2 * NUM_BYTES, 0))
    Path(paths[5]).write_bytes(b"broken")
    with pytest.raises(WorkerError, match=r"00005\.png could be read before, and cannot now: Unidentified"):
        examples.take(np.array([5, 0]))
    assert len(examples.take(np.array([0, 6]))) == 2


def test_each_image_is_counted_once(paths):
    counts = []
    table = tabulate(paths * 50, LABEL_IDS * 50)
    open_examples(table).prepare(counts.append)
    assert sum(counts) == 350 and max(counts) <= BATCH_SIZE
    assert counts[0] == BATCH_SIZE, "the driver hears of it early"


def test_set_without_images_is_ready_at_once(paths):
    examples = prepare(tabulate(paths, LABEL_IDS).slice(0, 0))
    assert len(examples.usable) == 0 and examples.unusable == []


class Worker(Team):
    """One of two on this host that take turns: `Team` without the waiting."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.local_ranks = [0, 1]
        self._rank_here = rank

    @property
    def local_rank(self) -> int:
        return self._rank_here


def test_workers_make_every_image_ready_between_them_in_the_same_batches(paths, monkeypatch):
    monkeypatch.setattr(examples_module, "BATCH_SIZE", 2)
    monkeypatch.setattr(examples_module, "_CHUNK_SIZE", 4)
    table = tabulate(paths * 3, LABEL_IDS * 3)

    def watch(sizes):
        return lambda pixels: sizes.append(pixels[:, 0, 0, 0].tolist()) or keep_pixels(pixels)

    alone: list = []
    prepare(table, transform=watch(alone))
    shared: list = []
    counts: list = []
    for rank in (0, 1):
        seen: list = []
        examples = open_examples(table, transform=watch(seen))
        examples._team = Worker(rank)
        examples.prepare(counts.append)
        shared += seen[1:]  # the first one asked for the shape
    assert sum(counts) == 21
    assert sorted(shared) == sorted(alone[1:])


@pytest.mark.parametrize("chunk", [3, 64])
def test_row_group_is_made_ready_by_one_worker(row_groups, monkeypatch, chunk):
    monkeypatch.setattr(examples_module, "_CHUNK_SIZE", chunk)
    for first, end in open_examples(row_groups)._cut():
        assert first % 3 == 0 and (end % 3 == 0 or end == 7)
