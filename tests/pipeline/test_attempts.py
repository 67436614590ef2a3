"""A worker's record tells what it died of, and leads its successors to the image in a bounded number of steps."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading

import pytest

from pipeline.attempts import (
    ATTEMPTS_DIR,
    MAX_UNEXPLAINED,
    NO_CARE,
    Care,
    Journal,
    Step,
    forget_all,
    forget_unfinished,
    gather,
    read_records,
)
from pipeline.storage import LocalFolder

RUN = "20261127-1"


def open_journal(folder, worker="w", run_id=RUN) -> Journal:
    return Journal(folder, run_id=run_id, worker=worker, node="n")


def die_at(folder, shard: int, step: Step | None = None, cause: str | None = None, *, worker="w", care=NO_CARE) -> Care:
    """Be a process that is killed while it is at a shard; returns the care it took."""
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)

    def live() -> None:
        with open_journal(folder, worker).attempt(shard, care) as attempt:
            writing.send(attempt.care)
            if cause is not None and step is not None:
                attempt.blame(step, cause)
            else:
                attempt.enter(step)
            os.kill(os.getpid(), signal.SIGKILL)

    process = context.Process(target=live)
    process.start()
    taken = reading.recv()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return taken


def read_care(folder, shard: int, *, worker="w") -> Care:
    """What the successor of a worker knows of a shard."""
    with open_journal(folder, worker).attempt(shard) as attempt:
        return attempt.care


# ---------------------------------------------------------------------------------------------------------------
# What deaths tell


def test_shard_over_which_nobody_died_is_done_without_care():
    assert not NO_CARE.is_needed
    assert list(NO_CARE.divide(0, 70, size=32)) == [(0, 32), (32, 32), (64, 6)]


def test_deaths_lead_from_the_shard_to_the_batch_to_the_image():
    care = NO_CARE.after_death(None, None)
    assert care.is_needed
    care = care.after_death(Step("predict", 32, 32), None)
    assert list(care.divide(0, 96, size=32)) == [(0, 32), *((i, 1) for i in range(32, 64)), (64, 32)]
    care = care.after_death(Step("predict", 40, 1), None)
    assert care.failed == {}, "one death may be chance: somebody killed the worker just then"
    care = care.after_death(Step("predict", 40, 1), None)
    assert care.failed == {40: ("predict", "WorkerCrashed: two workers died at this image")}


def test_image_whose_worker_could_tell_the_cause_has_it_for_its_error():
    care = NO_CARE
    for _ in range(2):
        care = care.after_death(Step("predict", 3, 1), "Timeout: not labelled within 5 s")
    assert care.failed == {3: ("predict", "Timeout: not labelled within 5 s")}


def test_deaths_at_different_images_blame_none_of_them():
    care = NO_CARE
    for position in range(50):
        care = care.after_death(Step("predict", position, 1), None)
    assert care.failed == {}
    assert not care.is_hopeless


def test_shard_that_kills_without_a_trace_is_given_up_after_a_number_of_deaths():
    care = NO_CARE
    for number in range(MAX_UNEXPLAINED):
        assert not care.is_hopeless, number
        care = care.after_death(None, None)
    assert care.is_hopeless
    assert not care.after_death(Step("read", 0, 8), None).is_hopeless, "something was found out"


def test_care_survives_json():
    care = Care(
        deaths=4, unexplained=1, singly=frozenset({2, 1}), struck=frozenset({7}), failed={7: ("read", "Timeout: x")}
    )
    assert Care.from_json(json.loads(json.dumps(care.to_json()))) == care


def test_division_goes_on_from_any_image_and_ends_where_it_should():
    care = Care(deaths=1, singly=frozenset({5, 6, 20}))
    assert list(care.divide(4, 22, size=8)) == [(4, 1), (5, 1), (6, 1), (7, 8), (15, 5), (20, 1), (21, 1)]


# ---------------------------------------------------------------------------------------------------------------
# Records


def test_successor_knows_at_what_its_predecessor_was_killed(folder):
    assert not die_at(folder, 5).is_needed
    assert die_at(folder, 5, Step("predict", 32, 32)).unexplained == 1
    assert min(die_at(folder, 5, Step("predict", 33, 1)).singly) == 32
    assert die_at(folder, 5, Step("predict", 33, 1)).struck == {33}
    assert set(read_care(folder, 5).failed) == {33}
    assert open_journal(folder).deaths == 5


def test_successor_that_dies_before_it_comes_to_a_shard_hands_on_what_it_knows(folder):
    die_at(folder, 5)
    die_at(folder, 8, Step("predict", 0, 4), "Timeout: x")
    assert read_care(folder, 8).singly == {0, 1, 2, 3}
    assert read_care(folder, 5).deaths == 1


def test_shard_that_was_finished_or_failed_leaves_nothing_behind_at_the_next_one(folder):
    journal = open_journal(folder)
    with journal.attempt(1):
        pass
    with pytest.raises(ValueError), journal.attempt(2):
        raise ValueError
    with journal.attempt(3):
        (record,) = read_records(folder, run_id=RUN)
        assert list(record.entries) == [3]
        assert (record.worker, record.pid, record.node) == ("w", os.getpid(), "n")


def test_undisturbed_shard_costs_one_write(folder, monkeypatch):
    writes = []
    put = LocalFolder.put
    monkeypatch.setattr(LocalFolder, "put", lambda self, *args: writes.append(args[0]) or put(self, *args))
    journal = open_journal(folder)
    for shard in range(3):
        with journal.attempt(shard) as attempt:
            for first in range(0, 96, 32):
                attempt.enter(Step("predict", first, 32))
            attempt.enter(None)
    assert writes == [f"{ATTEMPTS_DIR}/w.json"] * 3


def test_careful_shards_are_done_one_at_a_time(folder):
    journal = open_journal(folder)
    care = Care(deaths=1)
    has_second, at_once = threading.Event(), []

    def second() -> None:
        with journal.attempt(2, care):
            at_once.append(2)
        has_second.set()

    thread = threading.Thread(target=second)
    with journal.attempt(1, care):
        thread.start()
        with journal.attempt(3):  # one without care is not held up
            assert not has_second.wait(0.3)
    thread.join()
    assert at_once == [2]


def test_driver_gathers_what_dead_workers_knew_into_one_record(folder):
    die_at(folder, 1, worker="a")
    die_at(folder, 2, Step("predict", 0, 8), "Timeout: x", worker="b")
    die_at(folder, 3, worker="c")
    die_at(folder, 4, worker="d")
    # 3 was lost but is done by now, 4 failed without a death: its worker lived on and died over another one.
    cares = gather(folder, {1, 2, 3}, missing={1, 2, 4}, run_id=RUN)
    assert cares.keys() == {1, 2}
    assert cares[2].singly == set(range(8))
    assert folder.list_names(ATTEMPTS_DIR) == ["known.json"]
    die_at(folder, 2, Step("predict", 3, 1), worker="e", care=cares[2])
    again = gather(folder, {2}, missing={1, 2}, run_id=RUN)
    assert (again[1], again[2].struck, again[2].deaths) == (cares[1], {3}, 2)


def test_two_workers_of_one_shard_are_both_heard(folder):
    """Split: one has opened the images, and another one has predicted."""
    die_at(folder, 1, Step("read", 4, 1), "Timeout: x", worker="decoder", care=Care(deaths=1, struck=frozenset({4})))
    die_at(folder, 1, Step("predict", 0, 4), worker="predictor", care=Care(deaths=1))
    care = gather(folder, {1}, missing={1}, run_id=RUN)[1]
    assert (set(care.failed), care.singly) == ({4}, {0, 1, 2, 3})


def test_records_of_another_run_in_the_folder_tell_nothing(folder):
    die_at(folder, 1)
    assert open_journal(folder, run_id="another").deaths == 0
    assert gather(folder, {1}, missing={1}, run_id="another") == {}


def test_workers_that_are_sent_away_are_not_taken_for_dead(folder):
    die_at(folder, 1, worker="a")
    known = gather(folder, {1}, missing={1}, run_id=RUN)
    die_at(folder, 2, worker="b")
    forget_unfinished(folder, run_id=RUN)
    assert gather(folder, {1, 2}, missing={1, 2}, run_id=RUN) == known
    forget_all(folder)
    assert folder.list_names(ATTEMPTS_DIR) == []
