import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import plan as plans
from pipeline.commit import PREDICTIONS_DIR
from pipeline.lease import hold_lease
from pipeline.models import open_model
from pipeline.plan import write_listing
from pipeline.run import SCRATCH_DIR
from pipeline.sources import ListedImage
from pipeline.storage import LocalFolder
from pipeline.worker import Decoder, DroppedShard, Labeller, Task

RUN_HASH = "0123456789ab"


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
    write_listing(folder, [*map(ListedImage, paths), forbidden, ListedImage("/gone.jpg")], shard_size=20)
    threads = torch.get_num_threads()
    with hold_lease(folder) as lease:
        yield (
            lease,
            Task(
                folder=folder,
                fence=lease.fence,
                run_id="run",
                run_hash=RUN_HASH,
                preset=model.preset,
                precision="fp32",
                exif="ignore",
                max_pixels=10**6,
                top_k=3,
                batch_size=4,
                retries=0,
            ),
        )
    torch.set_num_threads(threads)


def only_shard(task):
    return plans.read_shards(task.folder)[0]


def decode(task):
    return Decoder(task, num_threads=2).decode(only_shard(task))


def list_parts(task):
    return task.folder.list_names(PREDICTIONS_DIR)


def test_decoded_batches_hold_all_images_in_the_order_of_the_plan(job):
    _, task = job
    batches = list(decode(task))
    rows = [row for batch in batches for row in batch.rows]
    assert [row.uri for row in rows] == [image.uri for image in plans.read_images(task.folder, only_shard(task))]
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
    open_image = decoder._open
    monkeypatch.setattr(decoder, "_open", lambda image: opened.append(image) or open_image(image))
    batches = decoder.decode(only_shard(task))
    next(batches)
    decoder._threads.submit(lambda: None).result()  # everything submitted before is done
    assert len(opened) == 4 * 3
    batches.close()


def test_labelled_shard_is_one_part_with_its_counts(job, model):
    _, task = job
    done = Labeller(task, model, device="cpu", num_threads=1).label(only_shard(task), decode(task))
    assert done.counts.labelled == 17
    assert dict(done.counts.failed) == {"UnidentifiedImageError": 1, "PermissionError": 1, "FileNotFoundError": 1}
    assert list_parts(task) == [f"part-000000-{RUN_HASH}.parquet"]


def test_stopped_run_publishes_nothing(job, model):
    lease, task = job
    labeller = Labeller(task, model, device="cpu", num_threads=1)
    lease.stop()
    with pytest.raises(DroppedShard):
        labeller.label(only_shard(task), decode(task))
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
            outcome.append(labeller.label(only_shard(task), hold_after_the_last_batch()))
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
    done = labeller.label(only_shard(task), decode(task))
    assert (done.counts.labelled, done.counts.failed["NonFiniteScore"]) == (16, 1)


def test_batch_without_any_decoded_image_is_committed_too(job, model):
    _, task = job
    write_listing(task.folder, [ListedImage("/gone.jpg"), ListedImage("/gone2.jpg")], shard_size=20)
    done = Labeller(task, model, device="cpu", num_threads=1).label(only_shard(task), decode(task))
    assert (done.counts.labelled, done.counts.num_failed) == (0, 2)


def test_model_uses_the_threads_of_its_share_of_the_cores(job, model):
    _, task = job
    Labeller(task, model, device="cpu", num_threads=1)
    assert torch.get_num_threads() == 1
