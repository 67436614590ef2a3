"""A run uses only a folder that is its own, goes on only as it began, and run.json says how far it is."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import platform
import signal
import socket
import threading
from collections import Counter

import pytest

from pipeline import run as runs
from pipeline.commit import Counts
from pipeline.errors import (
    InterruptedRunError,
    LeaseLostError,
    OutputError,
    StorageError,
    TooManyFailuresError,
    WorkerError,
)
from pipeline.lease import LEASE, hold_lease, read_lease
from pipeline.plan import Listing, Plan, load_plan, seal_plan, write_listing
from pipeline.run import (
    RUN,
    SUCCESS,
    LabelAccount,
    clear_run,
    explain_folder,
    find_finished,
    keep_account,
    open_log,
    open_run_folder,
    refuse_changes,
)
from pipeline.sources import ListedImage

GIVEN = {"model": "resnet50", "precision": "auto", "crop": None, "limit": None}
RESOLVED = {
    **GIVEN,
    "precision": "bf16",
    "weights": "IMAGENET1K_V2",
    "resize": 232,
    "crop": 224,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bilinear",
    "fixed": {"sha256": "ab" * 32, "num_classes": 10},
}


@pytest.fixture
def plan() -> Plan:
    first = Listing(num_images=150, num_shards=3, shard_size=64, max_shard_images=64, hash="cd" * 32)
    update = Listing(num_images=50, num_shards=1, shard_size=64, max_shard_images=50, hash="ef" * 32)
    return Plan(run_id="20250101-000000-abcdef", epoch=2, segments=(first, update), given=GIVEN, resolved=RESOLVED)


@pytest.fixture
def account(folder, plan) -> LabelAccount:
    return LabelAccount(folder, plan, {}, started=1_000_000.0)


def read_account(folder) -> dict:
    return json.loads(folder.read(RUN))


# ---------------------------------------------------------------------------------------------------------------
# The folder


def test_folder_that_is_new_or_empty_can_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "new/and/deep", "empty"):
        assert open_run_folder(str(tmp_path / name)).root == tmp_path / name
    assert not (tmp_path / "new").exists()  # looking makes nothing


def test_folder_of_a_run_can_be_used_again(tmp_path):
    (tmp_path / "out/_nightshift").mkdir(parents=True)
    (tmp_path / "out/my notes.txt").touch()
    assert open_run_folder(str(tmp_path / "out")).root == tmp_path / "out"


def test_folder_is_absolute_whatever_becomes_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_run_folder("out").root == tmp_path / "out"


def test_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(OutputError, match=r"is not empty and no nightshift run; name a new folder"):
        open_run_folder(str(tmp_path))


def test_folder_with_hidden_files_in_it_is_not_empty(tmp_path):
    (tmp_path / ".git").mkdir()
    with pytest.raises(OutputError, match=r"is not empty"):
        open_run_folder(str(tmp_path))


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match=r"out' is a file$"):
        open_run_folder(str(tmp_path / "out"))


@pytest.mark.parametrize("output", ["file/out", "file/deep/out", "dangling", "dangling/out"])
def test_output_that_can_be_no_folder_is_refused(tmp_path, output):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere/to/go")
    with pytest.raises(OutputError):
        open_run_folder(str(tmp_path / output))


@pytest.mark.parametrize("output", ["https://host/out", "nosuch://bucket/out", "tar://a::/b"])
def test_output_where_nothing_can_be_written_is_refused_with_what_would_work(output):
    with pytest.raises(OutputError, match=r"an output is a folder on a file system, or one of s3://, gs://, "):
        open_run_folder(output)


def test_output_can_be_a_file_uri(tmp_path):
    assert open_run_folder(f"file://{tmp_path}/my%20run").root == tmp_path / "my run"


def test_name_of_an_output_is_taken_as_it_is(tmp_path):
    assert open_run_folder(f"{tmp_path}/50%20#1::a").root == tmp_path / "50%20#1::a"


def test_log_of_a_local_run_lies_in_its_folder(folder):
    with open_log(folder) as log:
        assert log == folder.path("_nightshift/logs/driver.log")


def test_unfinished_files_lie_on_the_same_file_system_outside_the_data(tmp_path):
    folder = open_run_folder(str(tmp_path / "out"))
    assert folder.scratch == "_nightshift/tmp"


# ---------------------------------------------------------------------------------------------------------------
# Finished, and cleared


def test_run_is_finished_when_it_says_so(folder):
    assert find_finished(folder, job="label") is None
    folder.put(RUN, b'{"state": "done"}')
    assert find_finished(folder, job="label") is None  # _SUCCESS comes last
    folder.put(SUCCESS, b"")
    assert find_finished(folder, job="label") == {"state": "done"}


@pytest.mark.parametrize("content", [None, b"", b'{"state": '])
def test_finished_run_without_a_readable_account_is_finished_once_more(folder, content):
    folder.put(SUCCESS, b"")
    if content is not None:
        folder.put(RUN, content)
    assert find_finished(folder, job="label") is None


def test_cleared_run_leaves_only_what_is_not_its_own(folder):
    own = [
        RUN,
        SUCCESS,
        "predictions/part-000000-0123456789ab.parquet",
        "predictions/part-000001-ba9876543210.parquet",
        "_nightshift/plan/plan.json",
        "_nightshift/plan/segment-000/shards.parquet",
        "_nightshift/plan/segment-001/images-00000.parquet",
        "_nightshift/tmp/part-000002-0123456789ab.parquet.99-abcd",
    ]
    others = ["notes.txt", "predictions/notes.txt", "predictions/sub/_SUCCESS", "report/run.json", "_nightshift/lease"]
    for name in own + others:
        folder.put(name, b"content")
    clear_run(folder)
    assert [name for name in own if folder.exists(name)] == []
    assert [name for name in others if not folder.exists(name)] == []


def test_clearing_an_empty_folder_does_nothing(folder):
    clear_run(folder)


def test_clearing_that_breaks_off_leaves_the_plan_which_tells_of_it(folder, monkeypatch):
    listing = write_listing(folder, [ListedImage("/a.jpg")])
    seal_plan(folder, listing, given={}, resolved={}, epoch=0)
    folder.put(SUCCESS, b"")
    folder.put(RUN, b"{}")

    def break_off(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "sweep_foreign", break_off)
    with pytest.raises(KeyboardInterrupt):
        clear_run(folder)
    assert load_plan(folder) is not None
    assert find_finished(folder, job="label") is None


# ---------------------------------------------------------------------------------------------------------------
# Going on as it began


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"precision": "bf16"},  # what auto had come to
        {"crop": 224},
        {"precision": "bf16", "crop": 224},
    ],
)
def test_same_settings_and_what_they_came_to_are_no_change(given):
    refuse_changes(GIVEN | given, stored_given=GIVEN, stored_resolved=RESOLVED, output="out")


def test_tuples_are_as_good_as_the_lists_that_come_back():
    given = {"inputs": ("/a", "/b"), "mean": (0.5, 0.5, 0.5)}
    stored = json.loads(json.dumps(given))
    refuse_changes(given, stored_given=stored, stored_resolved=stored, output="out")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"model": "resnet18"}, "--model: resnet50 then, resnet18 now"),
        ({"precision": "fp32"}, "--precision: auto then, fp32 now"),
        ({"crop": 200}, "--crop: (none) then, 200 now"),
        ({"limit": 10}, "--limit: (none) then, 10 now"),
    ],
)
def test_changed_setting_is_refused_with_the_difference(given, line):
    with pytest.raises(OutputError) as caught:
        refuse_changes(GIVEN | given, stored_given=GIVEN, stored_resolved=RESOLVED, output="out")
    first, difference, last = str(caught.value).split("\n")
    assert first == "output 'out' holds a run with other settings:"
    assert difference.strip() == line
    assert "--overwrite" in last


def test_default_in_place_of_a_given_value_is_a_change():
    stored = GIVEN | {"crop": 200, "precision": "fp32", "limit": 10}
    with pytest.raises(OutputError) as caught:
        refuse_changes(GIVEN, stored_given=stored, stored_resolved=RESOLVED | stored, output="out")
    assert [line.split(":")[0].strip() for line in str(caught.value).split("\n")[1:-1]] == [
        "--precision",
        "--crop",
        "--limit",
    ]


def test_every_change_is_named_and_lists_are_readable():
    stored = {"include": ["*.jpg", "*.png"], "exclude": [], "top_k": 5}
    with pytest.raises(OutputError) as caught:
        refuse_changes(
            {"include": (), "exclude": ("*.gif",), "top_k": 4},
            stored_given=stored,
            stored_resolved=stored,
            output="out",
        )
    assert [line.strip() for line in str(caught.value).split("\n")[1:-1]] == [
        "--include: *.jpg *.png then, (none) now",
        "--exclude: (none) then, *.gif now",
        "--top-k: 5 then, 4 now",
    ]


# ---------------------------------------------------------------------------------------------------------------
# The account


def test_account_says_what_was_asked_and_what_came_of_it(folder, account, plan):
    account.add(0, Counts(60, Counter({"OSError": 1, "EmptyFile": 3})), ready_at=1_000_010.0, finished_at=1_000_015.0)
    account.add(0, Counts(64), ready_at=1_000_012.0, finished_at=1_000_026.0)
    account.timings = {"plan_s": 1.23456}
    account.cluster = {"num_nodes": 1}
    written = account.write("stopped")
    assert written == read_account(folder)
    assert written["run_id"] == plan.run_id
    assert written["state"] == "stopped"
    assert written["counts"] == {"listed": 200, "labelled": 124, "failed": 4}
    assert list(written["failures"].items()) == [("EmptyFile", 3), ("OSError", 1)]
    assert written["throughput"]["images_per_s"] == 128 / 16
    assert written["timings"] == {"plan_s": 1.235}
    assert written["cluster"] == {"num_nodes": 1}
    assert written["config"] == {"given": GIVEN, "resolved": RESOLVED}
    assert written["plan"] == {
        "epoch": 2,
        "shards": 4,
        "segments": [
            {
                "num_images": 150,
                "num_shards": 3,
                "shard_size": 64,
                "max_shard_images": 64,
                "hash": "cd" * 32,
                "run_hash": plan.run_hashes[0],
            },
            {
                "num_images": 50,
                "num_shards": 1,
                "shard_size": 64,
                "max_shard_images": 50,
                "hash": "ef" * 32,
                "run_hash": plan.run_hashes[1],
            },
        ],
    }
    assert written["versions"]["python"] == platform.python_version()
    assert {"ray", "torch", "torchvision", "pyarrow"} <= written["versions"].keys()


def test_account_describes_the_model(account):
    assert account.write()["model"] == {
        "name": "resnet50",
        "weights": "IMAGENET1K_V2",
        "sha256": "ab" * 32,
        "num_classes": 10,
        "preset": {"resize": 232, "crop": 224, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"},
    }


def test_account_names_its_invocation(account):
    (invocation,) = account.write("done")["invocations"]
    assert invocation["started"] == "1970-01-12T13:46:40Z"
    assert (invocation["host"], invocation["pid"]) == (socket.gethostname(), os.getpid())
    assert invocation["state"] == "done"
    assert invocation["images"] == 0 and invocation["active_seconds"] == 0


def test_account_without_work_has_no_throughput(account):
    assert account.write("done")["throughput"]["images_per_s"] is None


def test_failure_rate_is_of_all_listed_images(folder, plan, account):
    assert account.failure_rate == 0
    account.add(0, Counts(54, Counter({"OSError": 10})), ready_at=1.0, finished_at=2.0)
    assert account.failure_rate == 10 / 200
    continued = LabelAccount(
        folder, plan, {0: Counts(54, Counter({"OSError": 10})), 1: Counts(34, Counter({"EmptyFile": 30}))}, started=0.0
    )
    assert continued.failure_rate == 40 / 200


def test_continued_run_counts_earlier_parts_and_only_its_own_images_as_new(folder, plan):
    first = LabelAccount(folder, plan, {}, started=1_000_000.0)
    first.add(0, Counts(64), ready_at=1_000_010.0, finished_at=1_000_026.0)
    first.write("stopped")
    second = LabelAccount(folder, plan, {0: Counts(64)}, started=2_000_000.0)
    second.add(0, Counts(60, Counter({"OSError": 4})), ready_at=2_000_010.0, finished_at=2_000_042.0)
    assert second.num_new == 64
    written = second.write("done")
    assert written["counts"] == {"listed": 200, "labelled": 124, "failed": 4}
    assert [(i["state"], i["images"], i["active_seconds"]) for i in written["invocations"]] == [
        ("stopped", 64, 16),
        ("done", 64, 32),
    ]
    assert written["throughput"]["images_per_s"] == round(128 / 48, 2)


def test_invocations_of_another_run_are_forgotten(folder, plan, account):
    account.write("done")
    other = LabelAccount(folder, dataclasses.replace(plan, run_id="another"), {}, started=0.0)
    assert len(other.write()["invocations"]) == 1


def test_account_that_is_damaged_does_not_stop_the_next_run(folder, plan):
    folder.put(RUN, b'{"run_id": ')
    assert len(LabelAccount(folder, plan, {}, started=0.0).write()["invocations"]) == 1


def test_account_written_again_keeps_its_state_and_one_invocation(account):
    account.write("stopped")
    written = account.write()
    assert written["state"] == "stopped"
    assert len(written["invocations"]) == 1


# ---------------------------------------------------------------------------------------------------------------
# While it runs


def test_account_says_running_while_the_block_lasts(folder, account):
    with hold_lease(folder) as lease, keep_account(account, lease):
        assert read_account(folder)["state"] == "running"
        assert lease.fence.is_open
    assert read_account(folder)["state"] == "running"  # whoever ends the run says how


def test_failed_run_says_so_and_stops_its_workers(folder, account):
    with hold_lease(folder) as lease:
        with pytest.raises(ValueError, match="broken"), keep_account(account, lease):
            raise ValueError("broken")
        assert read_account(folder)["state"] == "failed"
        assert read_lease(folder).state == "stop"
        assert not lease.fence.is_open


@pytest.mark.parametrize(
    ("interrupt", "exit_code"),
    [(KeyboardInterrupt(), 130), (KeyboardInterrupt(signal.SIGTERM), 143)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_interrupted_run_says_what_is_done_and_what_will_be_redone(folder, account, interrupt, exit_code):
    account.max_in_work = 128
    account.add(0, Counts(60, Counter({"OSError": 4})), ready_at=1.0, finished_at=2.0)
    with hold_lease(folder) as lease:
        with pytest.raises(InterruptedRunError) as caught, keep_account(account, lease):
            raise interrupt
        assert not lease.fence.is_open
    assert caught.value.exit_code == exit_code
    assert "64 of 200 images are done and kept, up to 128 that were in work will be redone" in str(caught.value)
    assert read_account(folder)["state"] == "stopped"


def test_interrupted_run_redoes_no_more_than_is_missing(folder, account):
    account.max_in_work = 128
    account.add(0, Counts(190), ready_at=1.0, finished_at=2.0)
    with hold_lease(folder) as lease:
        with pytest.raises(InterruptedRunError, match="up to 10 that"), keep_account(account, lease):
            raise KeyboardInterrupt


def test_account_is_refreshed_while_the_block_lasts(folder, account, monkeypatch):
    monkeypatch.setattr(runs, "REFRESH_S", 0.001)
    refreshed = threading.Event()
    writes = []
    write = account.write

    def count(state=None):
        writes.append(state)
        if writes.count(None) >= 2:
            refreshed.set()
        return write(state)

    monkeypatch.setattr(account, "write", count)
    with hold_lease(folder) as lease, keep_account(account, lease):
        assert refreshed.wait(10)
    assert writes[0] == "running"
    assert account.write()["state"] == "running"


def test_disk_that_is_full_does_not_hide_why_the_run_has_ended(folder, account, monkeypatch):
    write = account.write

    def fail(state=None):
        if state != "running":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(state)

    monkeypatch.setattr(account, "write", fail)
    account.add(0, Counts(64), ready_at=1.0, finished_at=2.0)
    with hold_lease(folder) as lease, pytest.raises(WorkerError) as caught, keep_account(account, lease):
        raise WorkerError("3 shards failed")
    assert str(caught.value) == (
        "3 shards failed; 64 of 200 images are done and kept; once the cause is removed, the same command goes on"
    )


def test_run_that_lost_its_lease_leaves_the_others_account_alone(folder, account):
    with hold_lease(folder) as lease:
        with pytest.raises(LeaseLostError, match="taken over by another run, process 1 on host"):
            with keep_account(account, lease):
                taken = json.loads(folder.read(LEASE)) | {"token": "of another", "pid": 1}
                folder.put(LEASE, json.dumps(taken).encode())
                folder.put(RUN, b"of another")
                raise WorkerError("the run was stopped, or replaced by another in the same folder")
        assert folder.read(RUN) == b"of another"


# ---------------------------------------------------------------------------------------------------------------
# Too many failures


def fail_all(account: LabelAccount, *, shards: int, images: int, failed: int) -> None:
    for shard in range(shards):
        counts = Counts(images - failed, Counter({"HTTP503": failed}))
        account.add(shard, counts, ready_at=1.0, finished_at=2.0)


@pytest.fixture
def large(folder, plan) -> LabelAccount:
    """The account of a run over a million images."""
    segment = dataclasses.replace(plan.segments[0], num_images=1_000_000, num_shards=15_625)
    return LabelAccount(folder, dataclasses.replace(plan, segments=(segment,)), {}, started=0.0)


def test_run_ends_early_when_the_limit_is_certain_to_be_passed(account):
    fail_all(account, shards=1, images=64, failed=10)
    account.check_failures(0.05)  # 10 of 200 are just allowed
    with pytest.raises(TooManyFailuresError) as caught:
        account.check_failures(0.049)
    assert str(caught.value).split("\n")[:2] == [
        "ended early: 10 of 64 images failed, and --max-failure-rate 0.049 allows no more than 9 of all 200",
        "       10  HTTP503",
    ]
    assert caught.value.exit_code == 1


def test_complete_run_does_not_end_early(account):
    fail_all(account, shards=4, images=50, failed=40)
    account.check_failures(0.05)


@pytest.mark.parametrize(
    ("shards", "images", "failed", "is_hopeless"),
    [(16, 64, 33, True), (16, 64, 32, False), (15, 70, 60, False), (20, 49, 49, False), (20, 50, 49, True)],
)
def test_run_ends_early_when_most_of_many_images_from_many_shards_fail(large, shards, images, failed, is_hopeless):
    fail_all(large, shards=shards, images=images, failed=failed)
    if is_hopeless:
        with pytest.raises(TooManyFailuresError, match="more than images are to blame for"):
            large.check_failures(0.05)
    else:
        large.check_failures(0.05)


def test_user_who_expects_failures_gets_them(large):
    fail_all(large, shards=16, images=64, failed=50)
    large.check_failures(0.8)
    with pytest.raises(TooManyFailuresError):
        large.check_failures(0.7)


def test_failures_of_an_earlier_invocation_do_not_end_this_one(folder, large):
    earlier = {shard: Counts(0, Counter({"HTTP503": 64})) for shard in range(40)}
    account = LabelAccount(folder, large.plan, earlier, started=0.0)
    account.add(40, Counts(64), ready_at=1.0, finished_at=2.0)
    account.check_failures(0.05)


def test_rows_that_are_done_again_replace_what_they_were_counted_as(folder, plan):
    before = {0: Counts(54, Counter({"HTTP503": 8, "EmptyFile": 2})), 1: Counts(64)}
    account = LabelAccount(folder, plan, before, started=0.0, redo={0: 8})
    assert account.num_todo == 200 - 128 + 8
    account.check_failures(0)  # nothing is known before all of them are done
    new = account.add(0, Counts(61, Counter({"HTTP503": 1, "EmptyFile": 2})), ready_at=1.0, finished_at=2.0)
    assert (new, account.num_new, account.num_redone) == (8, 8, 8)
    assert account.counts == Counts(125, Counter({"EmptyFile": 2, "HTTP503": 1}))
    assert account.write()["invocations"][0]["images_redone"] == 8


# ---------------------------------------------------------------------------------------------------------------
# What the file system says


def test_error_of_the_outputs_file_system_says_where_and_what_to_do(folder):
    with pytest.raises(StorageError) as caught, explain_folder(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder.locate())
    assert str(caught.value) == (
        f"cannot use output {folder.locate()!r}: No space left on device; what is committed is kept, and once the "
        f"cause is removed, the same command goes on"
    )
    with pytest.raises(FileNotFoundError), explain_folder(folder):
        open("/no/such/file")
