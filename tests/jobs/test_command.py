"""The command as its users run it: in a process of its own, with its own Ray, from another directory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture
def nightshift(tmp_path):
    """A function that runs `nightshift …` in an empty folder and returns what came of it."""

    def run(*arguments, **options):
        command = [sys.executable, "-m", "jobs", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, **options)

    return run


def test_pictures_are_labelled_on_the_terminal_without_ray(nightshift, tiny_model_dir, make_images, tmp_path):
    cat, dog = make_images(tmp_path, 2)
    done = nightshift("label", os.path.basename(cat), dog, "--model", tiny_model_dir, "-k", "3")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [os.path.basename(cat), dog]
    assert len(lines) == 8
    assert all("%" in line for line in lines if line.startswith(" "))
    assert done.stderr == ""
    traced = nightshift("label", cat, "--model", tiny_model_dir, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert "torchvision" in traced.stderr
    assert not any(line.rstrip().endswith("| ray") for line in traced.stderr.splitlines())


def test_picture_that_cannot_be_decoded_does_not_hide_the_others(nightshift, tiny_model_dir, make_images, tmp_path):
    (cat,) = make_images(tmp_path, 1)
    (tmp_path / "broken.jpg").write_bytes(b"")
    done = nightshift("label", "broken.jpg", cat, "--model", tiny_model_dir, "--json")
    assert done.returncode == 3
    broken, labelled = json.loads(done.stdout)
    assert broken["error"] == "EmptyFile: the file has no bytes"
    assert len(labelled["predictions"]) == 5


def test_folder_without_an_output_is_refused(nightshift, tmp_path):
    done = nightshift("label", str(tmp_path))
    assert done.returncode == 2
    assert "is no single image: name an output for its labels with -o" in done.stderr


def test_dry_run_says_what_a_run_would_take_and_writes_nothing(nightshift, make_images, tmp_path):
    make_images(tmp_path / "images", 130)
    (tmp_path / "images" / "readme.txt").touch()
    done = nightshift("label", "images", "-o", "out", "--dry-run")
    assert done.stdout.startswith("images  130\nshards  3 of up to 64 images\n")
    assert "skipped 1 .txt" in done.stdout
    assert not (tmp_path / "out").exists()


def test_unknown_command_is_a_usage_error(nightshift):
    done = nightshift("lable")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown command 'lable'" in done.stderr


FACTORY = """
import torch
def make():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 7))
"""


def test_run_prints_one_document_and_none_of_rays_chatter(nightshift, make_images, tmp_path):
    """A model of the user's own beside the command, a run, and the same command again."""
    make_images(tmp_path / "images", 70)
    (tmp_path / "images" / "phone.heic").touch()
    (tmp_path / "my_net.py").write_text(FACTORY)
    command = ("label", "images", "-o", "out", "--model", "my_net:make", "--json")
    done = nightshift(*command)
    assert done.returncode == 0, done.stderr
    account = json.loads(done.stdout)
    assert account == json.loads((tmp_path / "out/run.json").read_text())
    assert account["counts"] == {"listed": 70, "labelled": 70, "failed": 0}
    assert account["throughput"]["images_per_s"] > 0
    assert account["throughput"]["seconds"] > account["invocations"][0]["active_seconds"]
    assert (tmp_path / "out/_SUCCESS").read_bytes() == b""
    assert "passed over: 1 .heic" in done.stderr.splitlines()
    chatter = ("loading", "starting", "passed over")
    assert all(line.startswith(chatter) or " images" in line for line in done.stderr.splitlines())
    assert {row["label"] for row in pq.read_table(tmp_path / "out/predictions").to_pylist()} <= set("0123456")

    began = time.monotonic()
    again = nightshift(*command, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert time.monotonic() - began < 3
    assert (again.returncode, again.stdout) == (0, done.stdout)
    loaded = {line.rpartition("|")[2].strip() for line in again.stderr.splitlines()}
    assert "pyarrow" in loaded
    assert not loaded & {"torch", "ray"}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_stops_cleanly_and_is_continued(number, exit_code, nightshift, tiny_model_dir, tmp_path):
    """Images that take a while each, so that the signal comes in the middle of the work; and for one of them, twice."""
    images = tmp_path / "images"
    images.mkdir()
    noise = Image.effect_noise((3000, 2500), 50).convert("RGB")
    noise.save(images / "00.png", compress_level=0)
    for index in range(1, 36):
        os.link(images / "00.png", images / f"{index:02}.png")
    command = ("label", "images", "-o", "out", "--model", tiny_model_dir, "--shard-size", "2", "--num-workers", "1")
    predictions = tmp_path / "out/predictions"

    def start_until(num_parts: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *command],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while not predictions.exists() or len(list(predictions.iterdir())) < num_parts:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)  # a file of another process: there is no event to wait for
        return process

    process = start_until(4)
    # A terminal sends Ctrl-C to all that it has started, `kill` sends a signal to one process.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    began = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == exit_code
    assert output == ""
    assert "images are done and kept" in errors
    assert "that were in work will be redone" in errors
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    stopped = json.loads((tmp_path / "out/run.json").read_text())
    assert stopped["state"] == "stopped"
    assert 0 < stopped["counts"]["labelled"] < 36
    assert not Path(tmp_path, "out/_SUCCESS").exists()

    if number == signal.SIGINT:
        process = start_until(len(list(predictions.iterdir())) + 2)
        started = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in one.name() for one in started)
        os.killpg(process.pid, signal.SIGINT)
        while json.loads((tmp_path / "out/_nightshift/lease").read_text())["state"] == "running":
            time.sleep(0.02)  # the first one has been heard
        os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
        process.communicate(timeout=60)
        assert process.returncode == 130
        _, alive = psutil.wait_procs(started, timeout=2)
        assert alive == []
        assert time.monotonic() - began < 3

    done = nightshift(*command)
    assert done.returncode == 0, done.stderr
    uris = pq.read_table(predictions)["uri"].to_pylist()
    assert len(uris) == len(set(uris)) == 36
