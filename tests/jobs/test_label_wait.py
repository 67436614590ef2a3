"""Where no worker is at work, whoever waits is told what for."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipeline.attempts import Journal
from pipeline.dispatch import _explain_wait
from pipeline.scaling import Scaling
from pipeline.storage import LocalFolder

SCALING = Scaling(min_workers=1, num_workers=1, max_workers=1, cpus_per_worker=1, gpus_per_worker=0)


@pytest.fixture
def task(tmp_path) -> SimpleNamespace:
    return SimpleNamespace(folder=LocalFolder(tmp_path, scratch="tmp"), attempts_id="run")


def test_what_is_waited_for_is_told_where_no_worker_is_at_work(ray_cluster, task, monkeypatch):
    monkeypatch.setattr("pipeline.dispatch.WAIT_S", 0.0)
    told, is_told = [], threading.Event()
    with _explain_wait(task, replace(SCALING, gpus_per_worker=1), lambda text: (told.append(text), is_told.set())):
        assert is_told.wait(30)
    assert re.search(r"each needs 1 GPU and 1 CPU, and 0 of 0 GPUs and [\d.]+ of 2 CPUs are free", told[0])


def test_nothing_is_told_of_waiting_where_a_worker_is_at_work_or_the_work_is_done(ray_cluster, task, monkeypatch):
    told = []
    with _explain_wait(task, SCALING, told.append):
        waiting = [thread for thread in threading.enumerate() if thread.name == "waiting for workers"]
    monkeypatch.setattr("pipeline.dispatch.WAIT_S", 0.0)
    with Journal(task.folder, run_id="run", worker="w").attempt(0), _explain_wait(task, SCALING, told.append):
        waiting += [thread for thread in threading.enumerate() if thread.name == "waiting for workers"]
        for thread in waiting:
            thread.join(30)
    assert not told
