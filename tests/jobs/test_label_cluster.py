"""`label` on clusters of several nodes that come, go and differ: GPUs are filled, and every image is exactly one row.

pytest tests/jobs/test_label_cluster.py

One cluster is simulated on this machine for all tests, and nodes are added and killed. Its GPUs exist for Ray alone:
workers that are given one are told to compute on the CPU. The command runs in a process of its own, as it always does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from clusters import NUM_IMAGES, Job, Nodes, assert_complete, find_raylet, read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    # Short, since the paths of Ray's sockets have at most 107 bytes; and apart, since Ray notes there which cluster a
    # process without an address belongs to.
    with tempfile.TemporaryDirectory(prefix="ns-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        # Read by the nodes, which pass them on to their workers.
        patch.setenv("NIGHTSHIFT_FAKE_GPUS", "1")
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_health_check_period_ms", "2000")
        patch.setenv("RAY_health_check_failure_threshold", "5")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Nodes()
        yield cluster
        cluster.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_images) -> Path:
    folder = tmp_path_factory.mktemp("images")
    make_images(folder, NUM_IMAGES)
    return folder


@pytest.fixture
def start(nodes, tmp_path, images) -> Iterator[Callable[..., Job]]:
    """A function that starts a job."""
    started = []

    def start(*flags: str) -> Job:
        folder = tmp_path / f"job{len(started)}"
        folder.mkdir()
        started.append(Job(folder, images, nodes.address, *flags))
        return started[-1]

    yield start
    for job in started:
        job.end()


def find_decoders(raylet: int | None = None) -> list[psutil.Process]:
    """The processes that decode for others, on any node or on that of a raylet."""
    parents = [psutil.Process(raylet)] if raylet else [psutil.Process()]
    found = []
    for process in (child for parent in parents for child in parent.children(recursive=True)):
        try:
            if "_DecodeWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # ended meanwhile
            continue
    return found


# ---------------------------------------------------------------------------------------------------------------
# What a cluster can hold


def test_more_workers_than_the_cluster_can_ever_hold_are_refused_at_once(nodes, start):
    nodes.shape((1, 2), (1, 2))
    job = start("--num-workers", "5", "--gpus-per-worker", "1")
    assert job.wait() == 2
    assert "--num-workers 5: the cluster has room for 4 with 1 GPU and 0.5 CPU each" in job.log
    assert not job.workers


def test_what_an_autoscaler_can_add_is_counted_on(nodes):
    nodes.shape((1, 2), (1, 2))
    nodes.announce([({"CPU": 1, "GPU": 2}, 3), ({"CPU": 16, "GPU": 0}, 4)])
    try:
        code = f"""
import json
from pipeline.cluster import open_cluster
with open_cluster({nodes.address!r}) as cluster:
    print(json.dumps([[kind.cpus, kind.gpus, kind.count, kind.max_count] for kind in cluster.kinds]))
    print(json.dumps([cluster.is_open, cluster.has_launcher, cluster.is_here]))
"""
        printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout
        kinds, flags = map(json.loads, printed.splitlines()[-2:])
        assert kinds == [[16, 0, 0, 4], [1, 2, 2, 3]]
        assert flags == [True, False, True]
    finally:
        nodes.announce([])


# ---------------------------------------------------------------------------------------------------------------
# GPUs


def test_each_gpu_has_a_worker_that_sees_no_other_and_half_a_gpu_packs_two(nodes, start, images):
    nodes.shape((2, 2))
    whole = start()
    whole.hold()
    whole.until(lambda: len(whole.workers) == 2)
    whole.go_on()
    assert sorted(worker["gpu"] for worker in whole.workers.values()) == ["0", "1"]
    assert_complete(whole, images)

    half = start("--gpus-per-worker", "0.5")
    half.hold()
    half.until(lambda: len(half.workers) == 4)
    half.go_on()
    assert sorted(worker["gpu"] for worker in half.workers.values()) == ["0", "0", "1", "1"]
    assert_complete(half, images)
    assert read(half) == read(whole)


# ---------------------------------------------------------------------------------------------------------------
# Growing and shrinking


def test_node_that_joins_takes_part_and_idle_gpus_are_released_at_the_tail(nodes, start, images):
    (first,) = nodes.shape((1, 1))
    job = start()
    job.hold()
    job.until(lambda: job.workers)
    assert nodes.free_gpus() == 0
    began = time.monotonic()
    second = nodes.add(1, 1)
    raylets = {find_raylet(first), find_raylet(second)}
    job.until(lambda: {worker["raylet"] for worker in job.workers.values()} == raylets)
    took_s = time.monotonic() - began
    print(f"a node's worker took part {took_s:.0f} s after the node was there")
    assert took_s < 90  # Ray Data looks every 20 s, and PyTorch takes long to import here

    # One worker is kept at its shard; when nothing is left for the other, its GPU is free for others.
    kept = next(pid for pid, worker in job.workers.items() if worker["raylet"] == find_raylet(second))
    job.hold(kept)
    (job.folder / "hold").unlink()
    job.until(lambda: nodes.free_gpus() == 1)
    job.go_on()
    assert_complete(job, images)


# ---------------------------------------------------------------------------------------------------------------
# Nodes that differ


def test_decoding_on_nodes_without_gpus_survives_the_loss_of_a_node_and_of_a_decoder(nodes, start, images):
    plain, first, second = nodes.shape((2, 0), (1, 1), (1, 1))
    fused = start()
    assert_complete(fused, images)

    split = start("--decode-on", "cpu-nodes")
    split.hold()
    raylets = {find_raylet(first), find_raylet(second)}
    split.until(lambda: {worker["raylet"] for worker in split.workers.values()} == raylets)
    decoders = find_decoders()
    assert len(decoders) == 2
    assert {decoder.pid for decoder in decoders} == {d.pid for d in find_decoders(find_raylet(plain))}

    nodes.kill(second)
    decoders[0].kill()
    split.go_on()
    assert_complete(split, images)
    assert split.parts == fused.parts
    assert read(split) == read(fused)


def test_decoders_and_predictors_never_wait_for_each_others_cores(nodes, start, images):
    """A decoder that dies comes back although more workers are wanted than there are cores for them."""
    nodes.shape((2, 0))
    job = start("--decode-on", "cpu-nodes", "--num-workers", "1..4")
    job.hold()
    job.until(lambda: job.workers)
    (decoder,) = find_decoders()
    decoder.kill()
    job.go_on()
    assert_complete(job, images)
    assert re.search(r"240 of 240 images labelled", job.log)
