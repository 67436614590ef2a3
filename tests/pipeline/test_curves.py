"""Whoever watches a training sees each epoch once, in text and in TensorBoard."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pipeline.curves import EVENTS_DIR, METRICS, open_curves
from pipeline.storage import open_folder


def make_history(count: int) -> list[dict]:
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "val_loss": 2 / epoch,
            "val_top1": 0.5,
            "val_top5": 1.0,
            "lr": 1e-3,
            "images_per_s": 100.0 + epoch,
            "data_wait": 0.01,
            "seconds": 3.0,
        }
        for epoch in range(1, count + 1)
    ]


def read_events(content: bytes) -> list[Event]:
    """The records of an events file: a length, its checksum, the event, its checksum."""
    events, start = [], 0
    while start < len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        events.append(Event.FromString(content[start + 12 : start + 12 + length]))
        start += length + 16
    return events


def read_scalars(events: list[Event]) -> dict[str, list[tuple[int, float]]]:
    scalars: dict[str, list[tuple[int, float]]] = {}
    for event in events:
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def read_files(folder) -> list[list[Event]]:
    """The events of each file, in the order in which TensorBoard reads them."""
    names = folder.list_names(EVENTS_DIR)
    assert all(name.startswith("events.out.tfevents.") for name in names)
    return [read_events(folder.read(f"{EVENTS_DIR}/{name}")) for name in names]


def test_each_epoch_is_a_line_and_a_point_of_each_curve(folder):
    history = make_history(3)
    with open_curves(folder) as curves:
        for count in (1, 2, 3):
            curves.write(history[:count])
            assert [json.loads(line) for line in folder.read(METRICS).splitlines()] == history[:count]
    (events,) = read_files(folder)
    scalars = read_scalars(events)
    assert scalars.keys() == {
        "train/loss",
        "train/lr",
        "validation/loss",
        "validation/accuracy_top1",
        "validation/accuracy_top5",
        "throughput/images_per_s",
        "throughput/data_wait",
    }
    assert scalars["train/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert scalars["throughput/images_per_s"] == [(1, 101.0), (2, 102.0), (3, 103.0)]


def test_points_can_be_seen_before_the_training_is_over(folder):
    with open_curves(folder) as curves:
        curves.write(make_history(1))
        ((*_, last),) = read_files(folder)
        assert last.step == 1


def test_without_validation_there_is_no_curve_of_it(folder):
    rows = [{k: v for k, v in row.items() if not k.startswith("val_")} for row in make_history(2)]
    with open_curves(folder) as curves:
        curves.write(rows)
    scalars = read_scalars(read_files(folder)[0])
    assert scalars["train/loss"] and not [tag for tag in scalars if tag.startswith("validation/")]


def test_resumed_training_takes_the_place_of_what_was_shown_before(folder):
    with open_curves(folder) as curves:
        curves.write(make_history(2))
    with open_curves(folder) as curves:
        curves.write(make_history(2))
        curves.write(make_history(3))
    resumed = max(read_files(folder), key=lambda events: sum(len(event.summary.value) for event in events))
    starts = [event.step for event in resumed if event.session_log.status == SessionLog.START]
    assert starts == [1], "TensorBoard forgets what earlier files say of this step and all after it"
    assert [step for step, _ in read_scalars(resumed)["train/loss"]] == [1, 2, 3]


def test_training_without_an_epoch_leaves_no_curves(folder):
    with open_curves(folder):
        pass
    assert not folder.exists(EVENTS_DIR)


def test_curves_in_a_bucket_are_those_on_a_disk(bucket, folder):
    remote = open_folder(f"s3://{bucket}/out", scratch="_nightshift/tmp")
    history = make_history(2)
    for place in (folder, remote):
        with open_curves(place) as curves:
            curves.write(history[:1])
            curves.write(history)
    assert remote.read(METRICS) == folder.read(METRICS)
    (here,), (there,) = read_files(folder), read_files(remote)
    assert read_scalars(there) == read_scalars(here)
    assert not list(Path(".").glob("events.out.tfevents.*"))
