"""What can be known of a job before it is sent: places, workers, versions, and the size of what travels."""

import os
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline import submission
from pipeline.jobserver import Site
from pipeline.submission import (
    Place,
    Upload,
    check_name,
    check_resources,
    check_versions,
    compose_entrypoint,
    find_unreachable,
    read_env,
)


def make_site(*nodes, ray_version="2.60.0", python_version="3.11.7", is_here=False, can_grow=False) -> Site:
    return Site(
        ray_version=ray_version,
        python_version=python_version,
        nodes=nodes or ({"CPU": 4.0},),
        is_here=is_here,
        can_grow=can_grow,
    )


GPU_NODE = {"CPU": 16.0, "GPU": 2.0}


def check_workers(site, num_workers="auto", cpus=None, gpus=None):
    return list(check_resources(site, num_workers=num_workers, cpus_per_worker=cpus, gpus_per_worker=gpus))


def test_more_workers_than_the_cluster_has_gpus_for_are_told_before_they_wait():
    (fault,) = check_workers(make_site(GPU_NODE, GPU_NODE), num_workers="5", gpus=1)
    assert fault == (
        "--num-workers 5: 5 workers with 1 GPU each need 5, and the cluster has 4 and no autoscaler to add some"
    )
    assert check_workers(make_site(GPU_NODE, GPU_NODE), num_workers="5") != []  # auto is a GPU for each


@pytest.mark.parametrize(
    ("num_workers", "gpus"), [("auto", None), ("4", 1), ("8", 0.5), ("2..99", 1), ("5", 0), ("1", 2)]
)
def test_workers_that_fit_are_no_fault(num_workers, gpus):
    assert check_workers(make_site(GPU_NODE, GPU_NODE), num_workers=num_workers, gpus=gpus) == []


def test_worker_that_no_node_can_hold_is_a_fault():
    (fault,) = check_workers(make_site(GPU_NODE, GPU_NODE), gpus=4)
    assert "no node has more than 2" in fault
    (fault,) = check_workers(make_site(), gpus=1)
    assert "the cluster cannot give a worker 1 GPUs, it has none" in fault
    (fault,) = check_workers(make_site(), cpus=8)
    assert "no node has more than 4" in fault


def test_cluster_that_grows_is_waited_for():
    assert check_workers(make_site(can_grow=True), num_workers="64", gpus=1) == []


@pytest.mark.parametrize(
    ("versions", "fault"),
    [
        ({}, None),
        ({"python_version": "3.13.1"}, None),
        ({"python_version": None}, None),
        ({"ray_version": "2.63.1"}, None),
        ({"python_version": "3.10.2"}, "Python 3.10.2, and nightshift needs 3.11 to 3.13"),
        ({"ray_version": "2.64.0"}, "Ray 2.64.0, and nightshift needs 2.59 to 2.63"),
        ({"ray_version": "3.0.0.dev0"}, "Ray 3.0.0.dev0"),
    ],
)
def test_versions_that_cannot_run_our_source_are_faults(versions, fault):
    faults = list(check_versions(make_site(**versions)))
    assert len(faults) == (fault is not None)
    assert all(fault in text for text in faults)


def test_versions_are_those_of_the_package():
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    (ray,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "ray"]
    for (first, end), specifier in (
        (submission.RAY_VERSIONS, ray.specifier),
        (submission.PYTHON_VERSIONS, SpecifierSet(project["requires-python"])),
    ):
        assert SpecifierSet(f">={first[0]}.{first[1]},<{end[0]}.{end[1]}") == specifier


# ---------------------------------------------------------------------------------------------------------------
# Places


def find_fault(value, site, *, shared=(), shipped=(), is_read_by_all=True, must_exist=True):
    place = Place(name="x", flag="INPUT", value=value, is_read_by_all=is_read_by_all, must_exist=must_exist)
    return find_unreachable(place, site, shared=shared, has_shipped=lambda path: path in shipped)


def test_local_path_is_refused_where_the_nodes_are_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for value in ("photos", str(tmp_path / "photos"), f"file://{tmp_path}/photos"):
        assert "the nodes of the cluster cannot see it" in find_fault(value, make_site())
    assert find_fault("photos", make_site(), shared=[str(tmp_path)]) is None
    assert find_fault("s3://bucket/photos", make_site()) is None
    assert find_fault("/nowhere/on/this/machine", make_site()) is None  # the cluster's own


def test_path_on_a_network_file_system_is_seen_by_all(tmp_path, monkeypatch):
    from collections import namedtuple

    mount = namedtuple("mount", "mountpoint fstype")
    mounts = [mount("/", "ext4"), mount(str(tmp_path), "nfs4")]
    monkeypatch.setattr(submission.psutil, "disk_partitions", lambda all: mounts)
    assert find_fault(str(tmp_path / "photos"), make_site()) is None
    assert find_fault("/etc", make_site()) is not None


def test_file_for_the_driver_may_travel_but_inputs_may_not(tmp_path):
    model = str(tmp_path / "model")
    assert find_fault(model, make_site(), shipped={model}, is_read_by_all=False) is None
    fault = find_fault(model, make_site(), is_read_by_all=False)
    assert fault is not None and "--working-dir" in fault
    assert find_fault(model, make_site(), shipped={model}) is not None


def test_on_the_same_host_a_path_only_has_to_be_there(tmp_path):
    here = make_site(is_here=True)
    assert find_fault(str(tmp_path), here) is None
    assert find_fault(str(tmp_path / "none"), here) == f"INPUT {tmp_path}/none: does not exist"
    assert find_fault(str(tmp_path / "none"), here, must_exist=False) is None
    assert find_fault(f"{tmp_path}/*.jpg", here) is None


# ---------------------------------------------------------------------------------------------------------------
# What travels


def write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)


def test_size_is_that_of_what_ray_would_upload(tmp_path):
    write(tmp_path / "net.py", 10)
    write(tmp_path / "data/keep.bin", 100)
    write(tmp_path / "data/skip.log", 1_000)
    write(tmp_path / "runs/1/big.bin", 10_000)
    write(tmp_path / ".git/objects/x", 100_000)
    write(tmp_path / "a/__pycache__/x.pyc", 100_000)
    (tmp_path / "data/.gitignore").write_text("*.log\n")
    (tmp_path / ".rayignore").write_text("/runs/\n")
    upload = Upload(str(tmp_path))
    listed = sum(os.path.getsize(tmp_path / name) for name in ("data/.gitignore", ".rayignore"))
    assert upload._sizes["."] == 110 + listed
    assert upload.has(str(tmp_path / "data/keep.bin")) and upload.has(str(tmp_path / "data"))
    assert not any(upload.has(str(tmp_path / name)) for name in ("runs", "data/skip.log", "..", "data/no"))

    from ray._private.runtime_env.packaging import create_package  # what Ray itself makes of the folder

    package = tmp_path.parent / f"{tmp_path.name}.zip"
    create_package(str(tmp_path), package, include_gitignore=True, excludes=list(submission._LEFT_OUT), logger=None)
    import zipfile

    with zipfile.ZipFile(package) as archive:
        names = {info.filename for info in archive.infolist() if not info.is_dir()}
    assert abs(upload.num_bytes - package.stat().st_size) < 100
    assert names == {name for name in upload._sizes if (tmp_path / name).is_file()}


def test_folder_that_is_too_large_names_what_weighs_most(tmp_path):
    write(tmp_path / "runs/old/weights/big.bin", 90 << 20)
    write(tmp_path / "photos/1.jpg", 12 << 20)
    write(tmp_path / "photos/2.jpg", 13 << 20)
    write(tmp_path / "net.py", 10)
    (fault,) = Upload(str(tmp_path)).check()
    assert "has 120.6 MB to upload, and the Jobs API takes 104.9 MB" in fault
    assert "the largest are runs/old/weights/big.bin 94.4 MB, photos/ 26.2 MB, net.py 10 bytes" in fault


def test_folder_with_a_package_of_our_name_is_refused(tmp_path):
    write(tmp_path / "pipeline/stage.py", 1)
    (fault,) = Upload(str(tmp_path)).check()
    assert "its folder 'pipeline' would hide nightshift's own" in fault
    assert list(Upload(str(Path(submission.__file__).parents[1])).check()) == []


# ---------------------------------------------------------------------------------------------------------------
# The command


def test_entrypoint_brings_every_argument_through_the_shell_and_shows_no_secret(tmp_path):
    arguments = ["/a b/*.jpg", "ftp://u:pa$word@h/x", "-o", "out", "$HOME", 'quo"te']
    entrypoint, env = compose_entrypoint("label", arguments)
    assert entrypoint.startswith("python -m jobs.label ")
    assert "pa$word" not in entrypoint
    print_them = shlex.join(["python3", "-c", "import sys; print(sys.argv[1:])"])
    shell = entrypoint.replace("python -m jobs.label", print_them, 1)
    done = subprocess.run(["sh", "-c", shell], env={**os.environ, **env}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{arguments}\n"


def test_variables_are_taken_from_the_flag_or_from_here(monkeypatch):
    monkeypatch.setenv("HERE", "1")
    monkeypatch.delenv("AWAY", raising=False)
    env, faults = read_env(["A=b=c", "HERE", "AWAY", "1x=2", "HF TOKEN=abc"])
    assert env == {"A": "b=c", "HERE": "1"}
    assert [fault.split(":")[0] for fault in faults] == ["--env AWAY", "--env 1x=2", "--env HF TOKEN=abc"]


@pytest.mark.parametrize(("name", "is_valid"), [("photos-1.2_x", True), ("a/b", False), ("-x", False), ("", False)])
def test_names_are_such_that_they_can_stand_in_addresses(name, is_valid):
    assert (list(check_name(name)) == []) is is_valid
