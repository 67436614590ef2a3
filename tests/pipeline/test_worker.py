"""A worker's rows are those of its shard, in order, and it publishes only while its run may."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pipeline import plan as plans
from pipeline import worker as workers
from pipeline.answers import BestClasses, Embeddings
from pipeline.attempts import Care, Journal, Step, read_records
from pipeline.commit import PREDICTIONS_DIR
from pipeline.lease import Fence, hold_lease
from pipeline.meters import Meters
from pipeline.models import find_features, open_model
from pipeline.plan import Shard, write_listing
from pipeline.run import SCRATCH_DIR
from pipeline.sources import ListedImage, ListingOptions
from pipeline.sources.tar import TarSource
from pipeline.storage import LocalFolder, LocalStore
from pipeline.worker import Decoder, DroppedShard, Labeller, LostDevice, Task

RUN_HASH = "0123456789ab"
UPDATE_HASH = "ba9876543210"
SHARD = Shard(0, 0, 20)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return open_model(tiny_model_dir)


@pytest.fixture
def job(tmp_path, make_images, model):
    """A held lease, and a task over 20 images in one shard, three of which cannot be labelled."""
    folder = LocalFolder(tmp_path / "out", scratch=SCRATCH_DIR)
    paths = make_images(tmp_path / "images", 18)
    Path(paths[3]).write_bytes(b"broken")
    forbidden = ListedImage("/forbidden", error="PermissionError: Permission denied")
    images = [*map(ListedImage, paths), forbidden, ListedImage("/gone.jpg")]
    assert write_listing(folder, images, shard_size=20).num_shards == 1
    threads = torch.get_num_threads()
    with hold_lease(folder) as lease:
        yield (
            lease,
            Task(
                folder=folder,
                fence=lease.fence,
                run_id="run",
                run_hashes=(RUN_HASH, UPDATE_HASH),
                preset=model.preset,
                precision="fp32",
                exif="ignore",
                max_pixels=10**6,
                preprocess="exact",
                answer=BestClasses(3),
                batch_size=4,
                retries=0,
            ),
        )
    torch.set_num_threads(threads)


def decode(task):
    return Decoder(task, num_threads=2).decode(SHARD)


def label(task, model, shard: Shard):
    batches = Decoder(task, num_threads=1).decode(shard)
    return Labeller(task, model, device="cpu", num_threads=1).label(shard, batches)


@pytest.fixture
def looks(monkeypatch):
    """When the fence was looked at, on a clock that stands still unless it is moved."""
    seen = []
    is_open = Fence.is_open.fget
    monkeypatch.setattr(Fence, "is_open", property(lambda fence: seen.append(clock.now) or is_open(fence)))
    clock = Clock()
    monkeypatch.setattr(workers.time, "monotonic", lambda: clock.now)
    return seen, clock


class Clock:
    now = 1_000.0


def list_parts(task):
    return task.folder.list_names(PREDICTIONS_DIR)


def test_decoded_batches_hold_all_images_in_the_order_of_the_plan(job):
    _, task = job
    batches = list(decode(task))
    rows = [row for batch in batches for row in batch.rows]
    assert [row.uri for row in rows] == [image.uri for image in plans.read_images(task.folder, SHARD)]
    assert [len(batch.rows) for batch in batches] == [4, 4, 4, 4, 4]
    assert [len(batch.pixels) for batch in batches] == [3, 4, 4, 4, 2]
    assert [(row.error_stage, row.error) for row in rows if row.error] == [
        ("decode", "UnidentifiedImageError: cannot identify image file"),
        ("list", "PermissionError: Permission denied"),
        ("read", "FileNotFoundError: No such file or directory"),
    ]


def test_decoding_runs_ahead_of_the_model_and_no_further_than_its_window(job, monkeypatch):
    _, task = job
    opened = []
    decoder = Decoder(task, num_threads=1)
    opener = decoder._opener
    open_image = opener._open
    monkeypatch.setattr(opener, "_open", lambda *fetch: opened.append(fetch) or open_image(*fetch))
    batches = decoder.decode(SHARD)
    next(batches)
    opener._threads.submit(lambda: None).result()  # everything submitted before is done
    assert len(opened) == 4 * 3
    batches.close()


def test_labelled_shard_is_one_part_with_its_counts(job, model):
    _, task = job
    done = Labeller(task, model, device="cpu", num_threads=1).label(SHARD, decode(task))
    assert done.counts.labelled == 17
    assert dict(done.counts.failed) == {"UnidentifiedImageError": 1, "PermissionError": 1, "FileNotFoundError": 1}
    assert list_parts(task) == [f"part-000000-{RUN_HASH}.parquet"]


def test_shard_of_an_update_is_named_by_the_hash_of_its_segment(job, model):
    _, task = job
    images = plans.read_images(task.folder, Shard(0, 0, 2))
    write_listing(task.folder, images, segment=1)
    label(task, model, Shard(1, 0, 2, segment=1))
    assert list_parts(task) == [f"part-000001-{UPDATE_HASH}.parquet"]


def test_images_of_a_unit_are_rows_in_its_order_with_the_entries_that_failed(job, model, tmp_path):
    _, task = job
    photos = [Path(image.uri).read_bytes() for image in plans.read_images(task.folder, Shard(0, 0, 3))]
    path = tmp_path / "a.tgz"
    with gzip.open(path, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
        for number, photo in enumerate(photos):
            header = tarfile.TarInfo(f"{number}.jpg")
            header.size = len(photo)
            archive.addfile(header, io.BytesIO(photo))
    images = list(TarSource(str(path), path="a.tgz", options=ListingOptions()).list_images())
    images[1] = images[1]._replace(error="FileTooLarge: it says so")
    images.append(ListedImage(str(path), error="DamagedArchive: it ends at byte 7"))
    assert write_listing(task.folder, images, shard_size=1).max_shard_images == 3
    rows = [row for batch in Decoder(task, num_threads=2).decode(Shard(0, 0, 3)) for row in batch.rows]
    assert [(row.uri, row.error_stage) for row in rows] == [
        (f"tar://0.jpg::{path}", None),
        (f"tar://1.jpg::{path}", "list"),
        (f"tar://2.jpg::{path}", None),
    ]
    assert [row.size_bytes for row in rows] == [len(photos[0]), None, len(photos[2])]


def test_row_says_how_many_attempts_its_image_took(job, monkeypatch):
    _, task = job
    left = {2: 2, 3: 9}  # how often an image cannot be read
    read = LocalStore.read

    def fail(self, uri):
        number = int(Path(uri).stem) if "images" in uri else None
        if left.get(number, 0):
            left[number] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, uri)

    monkeypatch.setattr(LocalStore, "read", fail)
    monkeypatch.setattr(workers.time, "sleep", lambda seconds: None)
    rows = [row for batch in decode(replace(task, retries=3)) for row in batch.rows]
    assert [row.attempts for row in rows[:5]] == [1, 1, 3, 4, 1]
    assert rows[2].error is None
    assert (rows[3].error_stage, rows[3].error) == ("read", "OSError: Input/output error")


# A NUL byte in a manifest, say, must not fail the whole shard.
@pytest.mark.parametrize("uri", ["/a%00b.jpg", f"/{'x' * 10_000}.jpg", "/", "/dev/null", "/a.tar", "tar://a::/b.tar"])
def test_uri_that_leads_nowhere_is_a_failed_row(job, uri):
    _, task = job
    write_listing(task.folder, [ListedImage(uri)])
    (batch,) = Decoder(task, num_threads=1).decode(Shard(0, 0, 1))
    assert batch.rows[0].error_stage == "read"
    assert len(batch.pixels) == 0


def test_fence_is_looked_at_once_a_second_and_before_the_publish(job, model, looks):
    _, task = job
    seen, clock = looks

    def tick():
        for batch in decode(task):
            yield batch
            clock.now += 0.4  # five batches, at 0, 0.4, 0.8, 1.2 and 1.6

    Labeller(task, model, device="cpu", num_threads=1).label(SHARD, tick())
    assert [round(moment - 1_000, 1) for moment in seen] == [0, 1.2, 2.0]


def test_fence_is_looked_at_before_every_publish(job, model, looks):
    _, task = job
    seen, clock = looks
    labeller = Labeller(task, model, device="cpu", num_threads=1)
    for _ in range(3):
        labeller.label(SHARD, decode(task))
    assert len(seen) == 1 + 3
    assert set(seen) == {clock.now}


def test_run_that_is_stopped_within_a_shard_ends_at_the_next_look(job, model, looks):
    lease, task = job
    _, clock = looks
    drawn = []

    def stop_after_two():
        for batch in decode(task):
            drawn.append(batch)
            if len(drawn) == 2:
                lease.stop()
                clock.now += 2
            yield batch

    with pytest.raises(DroppedShard):
        Labeller(task, model, device="cpu", num_threads=1).label(SHARD, stop_after_two())
    assert len(drawn) == 2
    assert list_parts(task) == []


def test_worker_finds_the_stores_of_the_driver_unless_its_own_environment_knows_better(job, monkeypatch):
    _, task = job
    monkeypatch.setenv("AWS_REGION", "here")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    replace(task, environment={"AWS_REGION": "there", "AWS_ENDPOINT_URL": "http://there"}).prepare_process()
    assert (os.environ["AWS_REGION"], os.environ["AWS_ENDPOINT_URL"]) == ("here", "http://there")


def test_task_travels_to_workers(job):
    _, task = job
    assert pickle.loads(pickle.dumps(task)).run_hashes == task.run_hashes


def test_stopped_run_publishes_nothing(job, model):
    lease, task = job
    labeller = Labeller(task, model, device="cpu", num_threads=1)
    lease.stop()
    with pytest.raises(DroppedShard):
        labeller.label(SHARD, decode(task))
    assert list_parts(task) == []


def test_worker_of_a_replaced_run_drops_its_work_before_publishing(job, model):
    """Held after its last batch; another run takes the folder; then let go."""
    lease, task = job
    labeller = Labeller(task, model, device="cpu", num_threads=1)
    is_held, may_go = threading.Event(), threading.Event()
    outcome: list[object] = []

    def hold_after_the_last_batch():
        yield from decode(task)
        is_held.set()
        may_go.wait()

    def work():
        try:
            outcome.append(labeller.label(SHARD, hold_after_the_last_batch()))
        except DroppedShard as dropped:
            outcome.append(dropped)

    thread = threading.Thread(target=work)
    thread.start()
    is_held.wait()
    lease.release()
    with hold_lease(task.folder):
        may_go.set()
        thread.join()
    assert isinstance(outcome[0], DroppedShard)
    assert list_parts(task) == []


def test_output_that_is_no_number_is_a_failed_row(job, model, monkeypatch):
    _, task = job
    labeller = Labeller(task, model, device="cpu", num_threads=1)
    network = labeller.predictor._network

    def poison_first_image(pixels):
        logits = network(pixels)
        logits[0, 4] = float("nan")
        return logits

    monkeypatch.setattr(labeller.predictor, "_network", poison_first_image)
    task = replace(task, batch_size=20)
    done = labeller.label(SHARD, decode(task))
    assert (done.counts.labelled, done.counts.failed["NonFiniteScore"]) == (16, 1)


def test_batch_without_any_decoded_image_is_committed_too(job, model):
    _, task = job
    write_listing(task.folder, [ListedImage("/gone.jpg"), ListedImage("/gone2.jpg")])
    done = label(task, model, Shard(0, 0, 2))
    assert (done.counts.labelled, done.counts.num_failed) == (0, 2)


def test_model_uses_the_threads_of_its_share_of_the_cores(job, model):
    _, task = job
    Labeller(task, model, device="cpu", num_threads=1)
    assert torch.get_num_threads() == 1


# ---------------------------------------------------------------------------------------------------------------
# Memory, and devices that are lost


class Cramped:
    """A model that has memory for so many images at once."""

    def __init__(self, predictor, room: int, error: Exception) -> None:
        self.predictor, self.room, self.error, self.sizes = predictor, room, error, []

    def __call__(self, pixels):
        self.sizes.append(len(pixels))
        if len(pixels) > self.room:
            raise self.error
        return self.predictor(pixels)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError("std::bad_alloc"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:40],
)
def test_batch_that_does_not_fit_into_memory_is_halved_from_then_on(job, model, error):
    _, task = job
    task = replace(task, batch_size=10)
    expected = read_rows(task, label(task, model, SHARD))
    labeller = Labeller(task, model, device="cpu", num_threads=1)
    labeller.predictor = Cramped(labeller.predictor, room=3, error=error)
    rows = read_rows(task, labeller.label(SHARD, decode(task)))
    assert labeller.predictor.sizes == [9, 4, 2, 2, 2, 2, 1, 2, 2, 2, 2]
    assert [row["label_id"] for row in rows] == [row["label_id"] for row in expected]
    assert [row["error"] for row in rows] == [row["error"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["score"] == (other["score"] and pytest.approx(other["score"], abs=1e-4))


def test_image_for_which_there_is_no_memory_even_alone_is_a_failed_row(job, model):
    _, task = job
    labeller = Labeller(task, model, device="cpu", num_threads=1)
    labeller.predictor = Cramped(labeller.predictor, room=0, error=MemoryError("no room"))
    rows = read_rows(task, labeller.label(SHARD, decode(task)))
    assert {(row["error_stage"], row["error"]) for row in rows if row["error_stage"] == "predict"} == {
        ("predict", "OutOfMemory: no room")
    }
    assert sum(row["error_stage"] == "predict" for row in rows) == 17


def test_other_errors_of_a_model_are_nobody_s_lack_of_memory(job, model):
    _, task = job
    labeller = Labeller(task, model, device="cpu", num_threads=1)
    labeller.predictor = Cramped(labeller.predictor, room=0, error=ValueError("a bug, out of memory or not"))
    with pytest.raises(ValueError, match="a bug"):
        labeller.label(SHARD, decode(task))


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
    ids=str,
)
def test_lost_device_ends_the_attempt_and_leaves_the_batch_in_the_record(job, model, error):
    _, task = job
    labeller = Labeller(task, model, device="cpu", num_threads=1)
    labeller.predictor = Cramped(labeller.predictor, room=0, error=error)
    with Journal(task.folder, run_id="run", worker="w").attempt(0) as attempt:
        with pytest.raises(LostDevice, match=str(error)):
            labeller.label(SHARD, decode(task), attempt)
        (record,) = read_records(task.folder, run_id="run")
    assert record.entries[0].step == Step("predict", 0, 4)
    assert record.entries[0].cause == f"DeviceError: {error}"
    assert list_parts(task) == []


# ---------------------------------------------------------------------------------------------------------------
# With care


def read_rows(task, done):
    table = pq.read_table(task.folder.path(f"{PREDICTIONS_DIR}/part-{done.shard:06d}-{RUN_HASH}.parquet"))
    return table.to_pylist()


def attempt_with(task, care: Care):
    return Journal(task.folder, run_id="run", worker="w").attempt(0, care)


def do_with_care(task, model, care: Care):
    labeller = Labeller(task, model, device="cpu", num_threads=1)
    with attempt_with(task, care) as attempt:
        return labeller.label(SHARD, Decoder(task, num_threads=2).decode(SHARD, attempt), attempt)


def test_shard_done_with_care_is_the_same_part(job, model):
    _, task = job
    plain = read_rows(task, label(task, model, SHARD))
    done = do_with_care(task, model, Care(deaths=1, unexplained=1, singly=frozenset({0, 5, 6, 19})))
    assert done.deaths == 1
    for row, other in zip(read_rows(task, done), plain, strict=True):
        assert row["score"] == (other["score"] and pytest.approx(other["score"], abs=1e-4))
        for name in row.keys() - {"score", "predictions"}:
            assert row[name] == other[name], name


def test_images_that_are_given_up_are_not_touched_again(job, model, monkeypatch):
    _, task = job
    errors = {2: ("read", "Timeout: not read"), 7: ("predict", "WorkerCrashed: two workers died at this image")}
    read = LocalStore.read
    touched = []
    monkeypatch.setattr(LocalStore, "read", lambda self, uri: touched.append(Path(uri).stem) or read(self, uri))
    rows = read_rows(task, do_with_care(task, model, Care(deaths=4, failed=errors)))
    assert {n: (rows[n]["error_stage"], rows[n]["error"]) for n in errors} == errors
    assert "00002" not in touched and "00001" in touched
    assert (rows[7]["width"], rows[2]["width"]) == (60, None)
    assert [row["label"] is None for row in rows] == [row["error"] is not None for row in rows]


def test_images_read_in_one_pass_are_given_up_together(tmp_path):
    images = [ListedImage(f"tar://{n}.jpg::/{name}.tgz", unit=0) for name in "ab" for n in range(3)]
    images.append(ListedImage("/plain.jpg"))
    found = workers._find_unreadable(images, Care(deaths=3, failed={1: ("read", "E: x"), 6: ("predict", "E: y")}))
    assert found == dict.fromkeys((0, 1, 2), "E: x")


def test_record_is_at_each_batch_while_it_is_read_and_while_the_model_has_it(job, model, monkeypatch):
    _, task = job
    steps = []
    enter = Journal.enter
    monkeypatch.setattr(
        Journal, "enter", lambda self, shard, step, *rest: steps.append(step) or enter(self, shard, step, *rest)
    )
    do_with_care(replace(task, batch_size=10), model, Care(deaths=1, singly=frozenset({4})))
    chunks = [(0, 4), (4, 1), (5, 10), (15, 5)]
    pairs = [(Step("read", *chunk), Step("predict", *chunk)) for chunk in chunks]
    assert [step for step in steps if step] == [step for pair in pairs for step in pair]
    assert steps[-1] is None, "whoever dies at the commit blames no image"


# ---------------------------------------------------------------------------------------------------------------
# Other answers than labels


@pytest.fixture
def embed_task(job, model):
    return replace(job[1], answer=Embeddings(tap=find_features(model), dtype="float16", is_normalised=True))


def read_vectors(task) -> list[dict]:
    (part,) = task.folder.list_names("embeddings")
    return pq.read_table(task.folder.path(f"embeddings/{part}")).to_pylist()


def test_vectors_are_committed_as_labels_are(embed_task, model):
    done = label(embed_task, model, SHARD)
    assert (done.counts.labelled, done.counts.num_failed) == (17, 3)
    assert list_parts(embed_task) == []
    rows = read_vectors(embed_task)
    assert [row["uri"] for row in rows] == [image.uri for image in plans.read_images(embed_task.folder, SHARD)]
    assert [row["embedding"] is None for row in rows] == [row["error"] is not None for row in rows]
    assert all(sum(x * x for x in row["embedding"]) == pytest.approx(1, abs=0.01) for row in rows if not row["error"])


def test_vector_that_is_no_number_or_has_no_room_is_a_failed_row(embed_task, model, monkeypatch):
    labeller = Labeller(embed_task, model, device="cpu", num_threads=1)
    network = labeller.predictor._network

    def poison_first_image(pixels):
        features = network(pixels)
        features[0, 4] = float("nan")
        return features

    monkeypatch.setattr(labeller.predictor, "_network", poison_first_image)
    assert labeller.label(SHARD, decode(embed_task)).counts.failed["NonFiniteEmbedding"] == 5  # one a batch
    labeller.predictor = Cramped(labeller.predictor, room=0, error=MemoryError("no room"))
    assert labeller.label(SHARD, decode(embed_task)).counts.failed["OutOfMemory"] == 17


def test_work_is_metered(job, model):
    _, task = job
    meters = Meters()
    decoder = Decoder(task, num_threads=1, meters=meters)
    Labeller(task, model, device="cpu", num_threads=1, meters=meters).label(SHARD, decoder.decode(SHARD))
    assert all(seconds > 0 for seconds in meters.read().values())
    assert meters.count_queued() == 0
