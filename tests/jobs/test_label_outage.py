"""`label` through the nights on which everything goes wrong around it: dead drivers, full disks, refusing buckets.

Each ends in every image in exactly one row, with the labels of an undisturbed run.

pytest tests/jobs/test_label_outage.py
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from faults import DENIED

from jobs.label import LabelConfig, run
from pipeline import plan as plans
from pipeline.answers import BestClasses
from pipeline.errors import PipelineError, StorageError, WorkerError
from pipeline.lease import LEASE, hold_lease
from pipeline.storage import open_folder
from pipeline.worker import Decoder, DroppedShard, Labeller, Task

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model_dir, make_images, ray_cluster):
    """The settings of a run over 150 images, and what it gives."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_images(folder / "images", 150)
    config = LabelConfig(
        inputs=(str(folder / "images"),),
        output=str(folder / "out"),
        model=tiny_model_dir,
        precision="fp32",
        shard_size=10,
        num_workers="1",
        quiet=True,
    )
    run(config)
    return config, read(config)


@pytest.fixture
def config(undisturbed, tmp_path) -> LabelConfig:
    """The same, with an output that does not exist yet."""
    return replace(undisturbed[0], output=str(tmp_path / "out"))


def read(config: LabelConfig) -> pa.Table:
    return ds.dataset(f"{config.output}/predictions", format="parquet").to_table().sort_by("uri")


def assert_undisturbed(table: pa.Table, expected: pa.Table) -> None:
    """Each image once, with the same label."""
    assert table["uri"].to_pylist() == expected["uri"].to_pylist()
    assert table["label"].to_pylist() == expected["label"].to_pylist()
    assert table["score"].to_pylist() == pytest.approx(expected["score"].to_pylist(), abs=TOLERANCE)


def assert_no_litter(output: str | Path) -> None:
    """Only parts stand among the data, and nothing unfinished beside them."""
    names = os.listdir(Path(output, "predictions"))
    assert all(name.startswith("part-") and name.endswith(".parquet") for name in names)
    assert not any(Path(output, "_nightshift/tmp").glob("*"))


# ---------------------------------------------------------------------------------------------------------------
# File systems


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """A function that mounts a new file system of so many bytes, or changes how it is mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounts a file system, which only root may do")
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / "mounted"
        place.mkdir(exist_ok=True)
        how = f"remount,{options}" if mounted else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode and not mounted:
            pytest.skip(f"this machine lets nobody mount a file system: {done.stderr}")
        assert done.returncode == 0, done.stderr
        mounted.append(place)
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(mounted[0])], check=True)


def test_disk_that_is_full_is_one_clear_error_and_the_run_goes_on_when_there_is_room(undisturbed, config, mount):
    """It has room for the plan and for some of 75 parts; then for nothing at all; then for everything."""
    place = mount("size=400k")
    config = replace(config, output=str(place / "out"), shard_size=2)
    with pytest.raises(WorkerError) as caught:
        run(config)
    assert caught.value.exit_code == 1
    assert "No space left on device" in str(caught.value)
    assert "of 150 images are done and kept" in str(caught.value)
    num_kept = len(read(config))
    assert 0 < num_kept < 150
    assert_no_litter(config.output)

    filler = place / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    with pytest.raises(PipelineError) as caught:
        run(config)
    assert caught.value.exit_code == 1
    assert "No space left on device" in str(caught.value)
    # Not even a plan can be written.
    with pytest.raises(StorageError, match=r"cannot use output .*No space left on device"):
        run(replace(config, output=str(place / "other")))

    filler.unlink()
    mount("size=64m")
    done = run(config)
    assert done.account["counts"] == {"listed": 150, "labelled": 150, "failed": 0}
    assert done.account["invocations"][-1]["images"] == 150 - num_kept
    assert_undisturbed(read(config), undisturbed[1])
    assert_no_litter(config.output)


def test_output_that_is_mounted_read_only_is_one_clear_error_until_it_is_not(undisturbed, config, mount):
    place = mount("size=64m")
    config = replace(config, output=str(place / "out"))
    shutil.copytree(undisturbed[0].output, config.output)
    mount("ro")
    assert run(config).account["state"] == "done"  # nothing is to be written
    assert run(replace(config, verify=True)).account["verified"]["rows"] == 150
    mount("rw")
    Path(config.output, "_SUCCESS").unlink()
    for part in sorted(Path(config.output, "predictions").iterdir())[:7]:
        part.unlink()
    mount("ro")
    for output in (config.output, str(place / "new")):
        with pytest.raises(StorageError, match=r"cannot use output .*Read-only file system") as caught:
            run(replace(config, output=output))
        assert caught.value.exit_code == 1
    mount("rw")
    assert run(config).account["invocations"][-1]["images"] == 70
    assert_undisturbed(read(config), undisturbed[1])


# ---------------------------------------------------------------------------------------------------------------
# Buckets


def test_bucket_that_refuses_for_a_while_is_waited_for_or_one_clear_error(undisturbed, config, bucket, faulty_s3):
    config = replace(config, output=f"s3://{bucket}/out")
    faulty_s3.answer(403, DENIED, method="PUT", path="/predictions/")
    with pytest.raises(WorkerError) as caught:
        run(config)
    assert caught.value.exit_code == 1
    assert "ACCESS_DENIED" in str(caught.value)
    assert "0 of 150 images are done and kept" in str(caught.value)
    folder = open_folder(config.output, scratch="")
    assert json.loads(folder.read("run.json"))["state"] == "failed"

    faulty_s3.heal()
    faulty_s3.answer(403, DENIED, method="PUT")
    with pytest.raises(StorageError, match=r"cannot use output 's3://.*AccessDenied"):
        run(config)

    faulty_s3.heal()
    faulty_s3.slow_down(skip=20, times=7)  # in a row, so that one request is repeated for 10 s
    done = run(config)
    assert done.account["counts"] == {"listed": 150, "labelled": 150, "failed": 0}
    rows = done.dataset().to_table().sort_by("uri")
    assert_undisturbed(rows, undisturbed[1])
    asked = faulty_s3.requests
    assert sum("/predictions/" in request.path and request.method == "PUT" for request in asked) > 15


# ---------------------------------------------------------------------------------------------------------------
# Processes that are left over


def test_worker_of_a_run_that_was_overwritten_publishes_nothing(undisturbed, config, tiny_model_dir):
    """Held after its last batch, just before it publishes; the run is done anew with other settings; then let go."""
    shutil.copytree(undisturbed[0].output, config.output)
    folder = open_folder(config.output, scratch="_nightshift/tmp")
    plan = plans.load_plan(folder)
    shard = plans.read_shards(folder, plan)[3]
    model = config.open_model()
    with hold_lease(folder) as lease:
        held = json.loads(folder.read(LEASE))
        task = Task(
            folder=folder,
            fence=lease.fence,
            run_id=plan.run_id,
            run_hashes=plan.run_hashes,
            preset=model.preset,
            precision="fp32",
            exif="ignore",
            max_pixels=config.max_pixels,
            preprocess="exact",
            answer=BestClasses(5),
            batch_size=8,
            retries=0,
        )
    # Its driver was killed, so nobody has told the worker anything.
    dead = subprocess.Popen(["true"])
    dead.wait()
    folder.put(LEASE, json.dumps({**held, "pid": dead.pid}).encode())
    assert task.fence.is_open
    is_held, may_go = threading.Event(), threading.Event()
    outcome: list[object] = []

    def hold_before_the_publish():
        yield from Decoder(task, num_threads=1).decode(shard)
        is_held.set()
        assert may_go.wait(300)

    def work() -> None:
        try:
            outcome.append(labeller.label(shard, hold_before_the_publish()))
        except DroppedShard as dropped:
            outcome.append(dropped)

    labeller = Labeller(task, model, device="cpu", num_threads=1)
    thread = threading.Thread(target=work)
    thread.start()
    assert is_held.wait(100)
    done = run(replace(config, overwrite=True, top_k=3))
    may_go.set()
    thread.join()
    assert isinstance(outcome[0], DroppedShard)
    rows = read(config)
    assert rows["uri"].to_pylist() == undisturbed[1]["uri"].to_pylist()
    assert set(rows["run_id"].to_pylist()) == {done.account["run_id"]}
    assert {len(best) for best in rows["predictions"].to_pylist()} == {3}
    assert_no_litter(config.output)


# A model that takes its time, so that there is a middle of the work.
SLOW_MODEL = """
import time, torch

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 7))

    def forward(self, images):
        time.sleep(0.2)
        return self.layers(images)

def make():
    torch.manual_seed(0)
    return Slow()
"""

# The command, which kills itself at the n-th thing that it does in its output folder; with 0, never.
MORTAL = """
import os, signal, sys

left, output = int(sys.argv[1]), os.path.abspath("out")

def count(event, arguments):
    global left
    if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(output):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
from jobs.cli import leave, run_command
from jobs.label import main
leave(run_command(main, sys.argv[2:]))
"""


@pytest.fixture
def start(tmp_path, make_images, ray_cluster) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts the command in a process of its own, on the Ray of the tests, from the same folder."""
    import ray

    make_images(tmp_path / "images", 150)
    (tmp_path / "slow.py").write_text(SLOW_MODEL)
    (tmp_path / "mortal.py").write_text(MORTAL)
    address = ray.get_runtime_context().gcs_address
    flags = "images -o out --model slow:make --precision fp32 --shard-size 5 --num-workers 1 --json".split()
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": os.fspath(Path(__file__).parents[2])}
    started = []

    def start(*more: str, dies_at: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "mortal.py", str(dies_at), *flags, "--address", address, *more]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def count_parts(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return len(os.listdir(folder / "out/predictions"))
    return 0


def test_driver_killed_at_ten_moments_of_one_run_loses_and_repeats_nothing(start, tmp_path):
    """Five while it takes the lease, lists, plans and seals, five while workers commit: by progress, not by time."""
    drawn = random.Random(6)
    for dies_at in sorted(drawn.sample(range(2, 23), 5)):  # the plan is sealed with the 20th
        process = start(dies_at=dies_at)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, (dies_at, errors)
    for num_parts in sorted(drawn.sample(range(1, 29), 5)):
        process = start()
        while count_parts(tmp_path) < num_parts:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)  # files of another process: there is no event to wait for
        process.kill()
        process.communicate()
    process = start()
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    account = json.loads(output)
    assert account["counts"] == {"listed": 150, "labelled": 150, "failed": 0}
    *killed, last = [invocation["state"] for invocation in account["invocations"]]
    assert last == "done" and set(killed) == {"killed"}
    assert 5 <= len(killed) <= 10  # those that had come as far as to have an account
    rows = ds.dataset(tmp_path / "out/predictions").to_table().sort_by("uri")
    assert_no_litter(tmp_path / "out")

    process = start("-o", "undisturbed")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_undisturbed(rows, ds.dataset(tmp_path / "undisturbed/predictions").to_table().sort_by("uri"))


def test_of_two_runs_that_start_at_once_one_does_the_work_and_the_other_says_who(start, tmp_path):
    processes = [start(), start()]
    finished = []
    while len(finished) < 2:
        finished += [one for one in processes if one not in finished and one.poll() is not None]
        time.sleep(0.05)
    refused, done = finished
    assert (refused.returncode, done.returncode) == (2, 0), [one.communicate() for one in processes]
    host = os.uname().nodename
    message = refused.communicate()[1].strip()
    assert message.startswith(f"error: '{tmp_path}/out' is in use by another run: process {done.pid} on host {host}, ")
    assert json.loads(done.communicate()[0])["counts"]["labelled"] == 150
    assert len(ds.dataset(tmp_path / "out/predictions").to_table()) == 150


# ---------------------------------------------------------------------------------------------------------------
# Nodes that see something else


def test_node_that_does_not_see_the_input_is_named_before_any_work(config, tmp_path, ray_cluster):
    """A node on which an empty file system is mounted over the images."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "--uts", "true"], check=False).returncode:
        pytest.skip("makes a node that sees other mounts, which only root may do")
    import ray

    images = config.inputs[0]
    script = (
        f"mount -t tmpfs none '{images}' && hostname blind && "
        f"exec '{sys.executable}' -m ray.scripts.scripts start --address={ray.get_runtime_context().gcs_address} "
        f"--num-cpus=1 --object-store-memory=100000000 --disable-usage-stats --block"
    )
    node = subprocess.Popen(
        ["unshare", "--mount", "--uts", "sh", "-c", script],
        env={**os.environ, "RAY_AUTH_MODE": "token"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while "blind" not in {one["NodeManagerHostname"] for one in ray.nodes() if one["Alive"]}:
            assert node.poll() is None, node.communicate()
            time.sleep(0.1)
        with pytest.raises(WorkerError) as caught:
            run(config)
        first, second = str(caught.value).split("\n")
        assert "on a file system that every node mounts at the same path" in first
        assert second.startswith("  node blind (") and second.endswith(f") does not see '{images}'")
        assert not Path(config.output, "predictions").exists()
    finally:
        processes = psutil.Process(node.pid).children(recursive=True)
        for process in (psutil.Process(node.pid), *processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.communicate()
        while "blind" in {one["NodeManagerHostname"] for one in ray.nodes() if one["Alive"]}:
            time.sleep(0.1)
    assert run(config).account["counts"]["labelled"] == 150
