"""`nightshift doctor` as its users run it: on this machine, with a cluster, with buckets, and without half of it.

pytest tests/jobs/test_doctor.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
LINES = (
    "python libraries decoders cores load processor threads memory shared_memory open_files temporary_files compiler "
    "torch cuda ray cluster s3 output"
).split()


@pytest.fixture
def doctor(tmp_path):
    """A function that runs the command from another folder and returns what came of it."""

    def run(*arguments, python=sys.executable, **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.run(
            [python, "-m", "jobs", "doctor", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            env={**environment, "PYTHONPATH": str(ROOT), **variables},
        )

    return run


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> str:
    """The interpreter of an environment that has all libraries of this one, without torch and Ray."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    (target,) = folder.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(("torch", "ray", "_virtualenv", "__editable__")):
            (target / entry.name).symlink_to(entry)
    return str(folder / "bin/python")


def read(done) -> dict[str, list[dict]]:
    """The findings of `--json`, by name."""
    findings = {}
    for finding in json.loads(done.stdout)["findings"]:
        findings.setdefault(finding["name"], []).append(finding)
    return findings


@pytest.mark.slow
def test_machine_that_is_fit_is_told_so_and_left_as_it_was(doctor, tmp_path):
    """Ray's start included, and its end."""
    before = {process.pid for process in psutil.process_iter()}
    done = doctor("out")
    assert done.returncode == 0, done.stdout + done.stderr
    *table, verdict = done.stdout.splitlines()
    assert verdict.startswith("fit for a run")
    marked = [line[2:] for line in table if line[:1] in tuple("✓!-")]
    for name in ("shared memory", "open files", "temporary files"):
        marked = [line.replace(name, name.replace(" ", "_")) for line in marked]
    names = [line.split()[0] for line in marked]
    assert names[: len(LINES)] == LINES
    assert "started on this machine" in done.stdout
    assert "\x1b" not in done.stdout
    assert list(tmp_path.iterdir()) == []
    new = [process for process in psutil.process_iter(["name"]) if process.pid not in before]
    assert not [process for process in new if process.info["name"] == "raylet"]


def test_cluster_that_is_running_is_reached_and_its_nodes_are_asked(doctor, ray_cluster, tmp_path):
    import ray

    address = ray.get_runtime_context().gcs_address
    done = doctor("--json", "-v", str(tmp_path), "--address", address)
    document = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert document["is_fit"]
    findings = read(done)
    assert findings["cluster"][0]["state"] == "ok"
    assert findings["cluster"][0]["found"].startswith(f"answers at {address} in ")
    assert findings["cluster"][0]["found"].endswith("1 node, 2 CPUs, 0 GPUs; tasks run")
    assert findings["ray"][0]["found"].startswith(ray.__version__)
    assert findings["torch"][0]["state"] in ("ok", "warning")
    assert ray.is_initialized()
    assert [name for name in os.listdir(tmp_path) if "doctor" in name] == []


def test_dead_addresses_are_one_clear_line_each(doctor):
    done = doctor(RAY_ADDRESS="127.0.0.1:1", RAY_API_SERVER_ADDRESS="http://127.0.0.1:2")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "✗ cluster          no Ray cluster answers at 127.0.0.1:1 (RAY_ADDRESS)" in lines
    assert "✗ jobs             no Ray cluster answers at http://127.0.0.1:2 (RAY_API_SERVER_ADDRESS)" in lines
    assert lines[-1].startswith("not fit for a run: 2 faults")


def test_machine_without_torch_and_ray_is_told_how_to_get_them(doctor, bare_python, bucket, tmp_path):
    """And everything else is looked at all the same: places, and an address at which nobody is."""
    done = doctor(
        *("--json", "out", f"s3://{bucket}/labels", f"s3://{bucket}-other", "--input", "nowhere"),
        python=bare_python,
        RAY_ADDRESS="127.0.0.1:1",
    )
    assert done.returncode == 1, done.stderr
    findings = read(done)
    assert findings["torch"][0]["found"] == "torch is not installed"
    assert findings["torch"][0]["remedy"].startswith("pip install torch torchvision")
    assert findings["ray"][0]["remedy"] == "pip install 'ray[data,train]'"
    assert findings["cuda"][0]["state"] == "skipped"
    if findings["libraries"][0]["state"] != "skipped":  # by how nightshift itself is installed
        assert "not installed: ray, torch, torchvision" in findings["libraries"][0]["found"]
    assert [finding["state"] for finding in findings["output"]][1:] == ["ok", "fault"]
    assert findings["input"][0]["found"] == "nowhere: nothing is there"
    assert findings["s3"][0]["found"].startswith("keys in the environment; endpoint http://127.0.0.1")
    assert findings["decoders"][0]["state"] == "ok"
    assert "the check itself failed" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_bucket_that_answers_403_is_a_fault_with_its_remedy(doctor, bare_python, faulty_s3, bucket):
    from faults import DENIED

    faulty_s3.answer(403, DENIED)
    done = doctor(f"s3://{bucket}/labels", python=bare_python)
    assert done.returncode == 1
    remedy = next(line for line in done.stdout.splitlines() if "output: the credentials" in line)
    number = remedy.partition(".")[0]
    assert number.isdecimal()
    assert f"✗ output           s3://{bucket}/labels: refused while listing it" in done.stdout


@pytest.fixture
def findings():
    from pipeline.diagnosis.finding import Finding

    return [
        Finding(name="python", state="ok", found="3.11"),
        Finding(
            name="shared memory", state="warning", found="little", remedy="start it with\nmore", details="why\nit is"
        ),
        Finding(name="ray", state="fault", found="word " * 40, remedy="pip install 'ray[data,train]'"),
        Finding(name="s3", state="skipped", found="none"),
    ]


class Stream:
    def __init__(self, *, encoding="utf-8", is_terminal=False):
        self.encoding = encoding
        self.isatty = lambda: is_terminal


def test_table_is_aligned_and_remedies_are_numbered_under_it(findings):
    from jobs.doctor import describe

    lines = describe(findings, Stream(), is_verbose=False).splitlines()
    assert lines[0] == "✓ python         3.11"
    assert lines[1] == "! shared memory  little"
    assert lines[3].startswith(" " * 17 + "word")
    assert max(map(len, lines)) <= 120
    start = lines.index("what to do")
    assert lines[start + 1 :] == [
        r"1. shared memory: start it with\nmore",
        "2. ray: pip install 'ray[data,train]'",
        "",
        "not fit for a run: 1 fault, 1 warning",
    ]


def test_causes_and_times_are_shown_on_request(findings):
    from jobs.doctor import describe

    text = describe(findings, Stream(), is_verbose=True)
    assert f"little (0.0 s)\n{' ' * 17}why\n{' ' * 17}it is\n" in text


def test_marks_are_coloured_on_a_terminal_only_and_not_against_the_users_wish(findings, monkeypatch):
    from jobs.doctor import describe

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b[31m✗\x1b[0m ray " in describe(findings, Stream(is_terminal=True), is_verbose=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in describe(findings, Stream(is_terminal=True), is_verbose=False)
    assert describe(findings, Stream(encoding="ascii"), is_verbose=False).isascii()


def test_warnings_alone_leave_a_machine_fit(findings):
    from jobs.doctor import describe_verdict, is_fit

    fine = [finding for finding in findings if finding.state != "fault"]
    assert is_fit(fine)
    assert describe_verdict(fine) == "fit for a run: 1 warning"
    assert describe_verdict(fine[:1]) == "fit for a run"
