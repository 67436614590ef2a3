"""How far a job has come, by what its run leaves and by what it prints."""

import json
import time

import pytest

from pipeline.standing import find_standing, read_standing

COUNTS = {"listed": 400, "labelled": 95, "failed": 5}


def write_account(folder, *, state="running", began=0.0, **changes):
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began))
    account = {
        "job": "label",
        "state": state,
        "counts": COUNTS,
        "throughput": {"images_per_s": 10.0},
        "invocations": [{"started": started}],
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(account))


def test_running_job_is_read_from_its_output(tmp_path):
    write_account(tmp_path, began=1_000)
    standing = read_standing(str(tmp_path), since=990)
    assert (standing.done, standing.total, standing.unit, standing.failed) == (100, 400, "images", 5)
    assert (standing.images_per_s, standing.left_s) == (10.0, 30.0)


@pytest.mark.parametrize(("state", "began"), [("running", 900), ("stopped", 1_000), ("done", 1_000)])
def test_run_that_is_not_at_work_has_a_past_and_no_end_in_sight(state, began, tmp_path):
    write_account(tmp_path, state=state, began=began)
    standing = read_standing(str(tmp_path), since=990)
    assert (standing.done, standing.left_s) == (100, None)


def test_run_that_was_taken_up_later_says_nothing_of_the_job_before(tmp_path):
    write_account(tmp_path, began=1_000)
    assert read_standing(str(tmp_path), since=500, until=900) is None
    assert read_standing(str(tmp_path), since=500, until=1_100) is not None


def test_training_counts_epochs(tmp_path):
    config = {"resolved": {"recipe": {"epochs": 10}}}
    counts = {"train": 100, "val": 10, "unusable": 1}
    write_account(tmp_path, began=1_000, job="finetune", epochs=4, counts=counts, config=config)
    standing = read_standing(str(tmp_path), since=990)
    assert (standing.done, standing.total, standing.unit, standing.left_s) == (4, 10, "epochs", 60.0)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"job": "label"}'])
def test_output_that_says_nothing_yet_has_no_standing(content, tmp_path):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert read_standing(str(tmp_path)) is None
    assert read_standing("ftp://me:***@host/out") is None


def test_last_line_of_progress_in_a_log_tells():
    lines = [
        "loading resnet50",
        "10/400 images · workers are starting",
        "1,000/4,000 images · 50.0 images/s · 1 min 00 s left · 7 failed",
        "x",
    ]
    standing = find_standing("\n".join(lines))
    assert (standing.done, standing.total, standing.failed) == (1000, 4000, 7)
    assert (standing.images_per_s, standing.left_s) == (50.0, 60.0)
    assert find_standing("10/400 images · workers are starting\n").images_per_s is None
    training = find_standing("epoch 3/10 · step 5/20 · loss 0.5 · 80.5 images/s · 10 s left\n")
    assert (training.done, training.total, training.unit, training.images_per_s) == (2, 10, "epochs", 80.5)
    assert find_standing("nothing of that\n") is None
